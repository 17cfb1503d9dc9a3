"""The parts of the RabbitMQ driver that need no broker: confirms, levels, records, retries, trials, properties."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import pytest

from pubsub_facade import Message
from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends import _rabbitmq_wire as mapping
from pubsub_facade.backends._rabbitmq_confirms import Outgoing, _Group
from pubsub_facade.backends._rabbitmq_names import LEVELS, Record, level_for
from pubsub_facade.backends._rabbitmq_retries import Hand
from pubsub_facade.backends._rabbitmq_trials import Trials
from pubsub_facade.errors import ConnectionLost
from pubsub_facade.subscription import Definition, Subscription


def came_back(number: int, returns: int, queue: int = 0) -> frames.Content:
    headers = {"x-delivery-count": returns} if returns else {}
    encoded = frames.properties(headers, content_type=None, message_id=str(number), timestamp=None)
    return frames.Content(frames.DELIVER, str(queue), number, returns > 0, "a.b", encoded, b"")


def group(count: int) -> _Group:
    messages = [Outgoing(str(n), "", "q", b"", b"", False) for n in range(count)]
    return _Group(11, messages, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(50))
def test_confirms_in_any_order_settle_each_message_once(seed: int) -> None:
    choose = random.Random(seed)
    tags = list(range(11, 31))
    whole, refused, open_ = group(20), set(), set(tags)
    while open_:
        tag = choose.choice(sorted(open_))
        multiple, stored = choose.random() < 0.3, choose.random() < 0.8
        covered = {each for each in open_ if each <= tag} if multiple else {tag}
        open_ -= covered
        if not stored:
            refused |= covered
        assert whole.upto < whole.last
        whole.settle(tag, multiple, stored)
    assert whole.upto == whole.last
    assert sorted(int(message.id) + 11 for message in whole.refused) == sorted(refused)


def test_a_range_may_begin_before_a_group_and_end_behind_it() -> None:
    whole = group(3)
    whole.settle(99, True, True)
    assert (whole.upto, whole.refused) == (13, [])


@pytest.mark.parametrize(
    ("delay", "level", "ms"),
    [(0.0001, 125, 1), (0.125, 125, 125), (0.1251, 250, 126), (1.0, 1000, 1000), (1.5, 2000, 1500)],
)
def test_a_delay_waits_in_the_next_level_for_its_own_time(delay: float, level: int, ms: int) -> None:
    assert level_for(delay) == (level, ms)


def test_a_delay_beyond_the_longest_level_waits_there() -> None:
    assert level_for(1e9) == (LEVELS[-1], LEVELS[-1])
    assert LEVELS[-1] < 1 << 32, "RabbitMQ refuses a longer time to live"


def waits(number: int, due: float) -> frames.Content:
    encoded = frames.properties(
        {"pubsub-due": repr(due)}, content_type=None, message_id=str(number), timestamp=None
    )
    return frames.Content(frames.DELIVER, "q", number, False, "a.b", encoded, b"")


async def test_retries_in_hand_are_due_the_soonest_first_and_not_before_their_time() -> None:
    hand, now = Hand(level=100.0), time.time()
    for number, at in ((1, 50.0), (2, -2.0), (3, 20.0), (4, -1.0)):
        hand.content(waits(number, now + at))
    assert [content.tag for content in hand.due()] == [2, 4]
    assert hand.away() == pytest.approx(20, abs=5)
    assert hand.due() == []
    assert len(hand) == 2


async def test_no_clock_makes_a_retry_wait_for_longer_than_its_queue_is_for() -> None:
    hand = Hand(level=2.0)
    hand.content(waits(1, time.time() + 1e6))
    away = hand.away()
    assert away is not None
    assert away <= 2.0


async def test_a_retry_that_could_not_be_moved_is_tried_again_in_a_while() -> None:
    hand = Hand(level=2.0)
    hand.content(waits(1, 0.0))
    hand.again(hand.due())
    assert hand.due() == []
    assert len(hand) == 1


async def test_what_was_in_hand_when_the_channel_closed_is_not_in_hand_any_more() -> None:
    hand = Hand(level=2.0)
    hand.content(waits(1, 0.0))
    hand.fail(ConnectionLost("gone"))
    assert (len(hand), hand.due(), hand.away()) == (0, [], None)


def test_a_record_is_read_as_it_was_written() -> None:
    definition = Definition.first(Subscription("s", ("a.#",), filter="n > 1"), 1.5)
    record = Record("ns", "s", definition, 4, (125, 1000))
    assert Record.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="record"):
        Record.from_json(b'{"namespace": 1}')


def test_members_filter_by_filters_and_not_by_patterns_that_the_broker_has_matched() -> None:
    plain = Definition.first(Subscription("s", ("a.#",)), 1.0)
    assert Record("ns", "s", plain).filtering is None
    filtered = plain.redeclared(Subscription("s", ("b.#",), filter="n > 1"), 2.0)
    filtering = Record("ns", "s", filtered).filtering
    assert filtering is not None
    assert filtering.accepts("a.x", {}, 1.5)
    assert filtering.accepts("b.x", {"n": 2}, 2.5)
    assert not filtering.accepts("b.x", {"n": 0}, 2.5)


def handed_out(trials: Trials, busy: int = 0) -> list[tuple[int, int, bool]]:
    """All that may be handed out while ``busy`` are in hand and nobody settles."""
    found = []
    while (next_ := trials.pop(busy + len(found))) is not None:
        found.append((next_[0].tag, next_[1], next_[2]))
    return found


def filled(contents: Iterable[frames.Content]) -> Trials:
    trials = Trials()
    for content in contents:
        trials.push(content)
    return trials


def test_what_never_came_back_or_once_is_handed_out_at_once() -> None:
    trials = filled([came_back(1, 1), came_back(2, 0), came_back(3, 0, queue=1)])
    assert handed_out(trials) == [(1, 1, False), (2, 0, False), (3, 0, False)]


def test_what_came_back_twice_is_tried_alone_and_in_place() -> None:
    trials = filled([came_back(1, 2), came_back(2, 2), came_back(3, 0)])
    assert handed_out(trials, busy=1) == [], "others are in hand"
    assert handed_out(trials) == [(1, 2, False)]
    trials.end()
    assert handed_out(trials) == [(2, 2, False)]
    trials.end()
    assert handed_out(trials) == [(3, 0, False)]


def test_only_the_first_one_tried_is_condemned_by_its_count_and_only_from_a_trial_on() -> None:
    trials = filled([came_back(1, 2, queue=0), came_back(2, 4, queue=1), came_back(3, 4, queue=2)])
    assert handed_out(trials) == [(2, 4, True)], "the one that came back most often, of equals the first"
    trials.end()
    assert handed_out(trials) == [(3, 4, False)]


def test_a_message_is_read_as_it_was_encoded() -> None:
    message = Message("a.b", None, key="k", headers={"é" * 150: 1.5, "CC": "x", "n": 1 << 70}, id="i" * 200)
    message.body, message.content_type, message.timestamp = b"x", "text/plain", 1234.5678
    content = frames.Content(frames.DELIVER, "0", 1, False, "a.b", mapping.encode(message), b"x")
    read = mapping.read_message(content)
    assert (read.topic, read.key, read.id, read.content_type) == ("a.b", "k", message.id, "text/plain")
    assert (dict(read.headers), read.timestamp) == (message.headers, 1234.5678)
