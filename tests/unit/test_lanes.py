"""The line of one member: in order, and of an ordered subscription one of a key at a time."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pubsub_facade.lanes import Lanes
from pubsub_facade.message import Delivery

RECEIVER: Any = None


def delivery(tag: int, key: str | None) -> Delivery:
    return Delivery(RECEIVER, tag, "s", "t", b"", key=key)


def pushed(lanes: Lanes, *keys: str | None) -> list[Delivery]:
    deliveries = [delivery(tag, key) for tag, key in enumerate(keys)]
    for each in deliveries:
        lanes.push(each)
    return deliveries


def test_without_order_the_line_is_a_queue() -> None:
    lanes = Lanes(ordered=False)
    first, second, third = pushed(lanes, "k", "k", None)
    assert len(lanes) == 3
    assert [lanes.pop(), lanes.pop(), lanes.pop(), lanes.pop()] == [first, second, third, None]
    assert not lanes.done(first)
    assert not lanes.holds(first)


def test_the_next_of_a_key_waits_until_the_one_before_is_done() -> None:
    lanes = Lanes(ordered=True)
    first, other, second, keyless = pushed(lanes, "k", "j", "k", None)
    assert [lanes.pop(), lanes.pop(), lanes.pop(), lanes.pop()] == [first, other, keyless, None]
    assert not lanes.done(other)
    assert not lanes.done(keyless)
    assert lanes.done(first)
    assert lanes.pop() is second
    assert not lanes.done(second)


def test_a_delivery_that_comes_again_is_first_and_keeps_its_lane() -> None:
    lanes = Lanes(ordered=True)
    first, other, second = pushed(lanes, "k", "j", "k")
    assert lanes.pop() is first
    lanes.again(first)
    assert [lanes.pop(), lanes.pop(), lanes.pop()] == [first, other, None]
    assert lanes.done(first)
    assert lanes.pop() is second


def test_after_a_lost_link_the_lane_of_what_is_still_in_hand_stays_busy() -> None:
    lanes = Lanes(ordered=True)
    in_hand, ready, waiting = pushed(lanes, "k", "j", "k")
    assert lanes.pop() is in_hand
    assert sorted(each.tag for each in lanes.clear()) == [ready.tag, waiting.tag]
    assert lanes.pop() is None
    again_k, again_j = pushed(lanes, "k", "j")
    assert lanes.pop() is again_j, "nobody has j in hand"
    assert lanes.pop() is None, "k's old handler is still at work"
    assert lanes.done(in_hand)
    assert lanes.pop() is again_k


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=80), st.randoms())
def test_every_key_is_handed_out_one_at_a_time_in_order(steps: list[tuple[str, bool]], random: Any) -> None:
    lanes = Lanes(ordered=True)
    out: list[Delivery] = []
    handed: dict[str, list[int]] = {key: [] for key in "abcd"}
    sent: dict[str, list[int]] = {key: [] for key in "abcd"}
    for tag, (key, finish) in enumerate(steps):
        lanes.push(delivery(tag, key))
        sent[key].append(tag)
        taken = lanes.pop()
        if taken is not None:
            assert taken.key not in {each.key for each in out}
            out.append(taken)
            handed[str(taken.key)].append(taken.tag)
        if finish and out:
            lanes.done(out.pop(random.randrange(len(out))))
    while out or len(lanes):
        while (taken := lanes.pop()) is not None:
            assert taken.key not in {each.key for each in out}
            out.append(taken)
            handed[str(taken.key)].append(taken.tag)
        lanes.done(out.pop(random.randrange(len(out))))
    assert handed == sent
    assert not lanes._busy
    assert not lanes._waiting
