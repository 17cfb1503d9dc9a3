"""The low-water mark never passes what is not settled, and everything settled is told once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pubsub_facade.acks import LowWaterMark


def test_what_is_settled_in_order_is_one_mark() -> None:
    mark: LowWaterMark[int] = LowWaterMark()
    for tag in range(1, 6):
        mark.delivered(tag)
    assert mark.take_mark() is None
    for tag in range(1, 4):
        assert mark.settle(tag)
    assert mark.take_mark() == 3
    assert mark.take_mark() is None, "told already"
    assert mark.open_tags() == [4, 5]
    assert mark.unsettled == 2


def test_a_stuck_head_holds_the_mark_and_the_others_are_told_singly() -> None:
    mark: LowWaterMark[int] = LowWaterMark()
    for tag in range(1, 6):
        mark.delivered(tag)
    for tag in (5, 3, 2):
        mark.settle(tag)
    assert mark.take_mark() is None
    assert mark.take_singles(4) == []
    assert sorted(mark.take_singles(3)) == [2, 3, 5]
    assert mark.take_singles(1) == [], "each is told once"
    mark.settle(1)
    assert mark.take_mark() == 1, "it passes what was told singly, and never ends there"
    mark.settle(4)
    assert mark.take_mark() == 4
    assert mark.open_tags() == []


def test_what_the_broker_was_told_of_alone_is_passed_and_never_told_again() -> None:
    mark: LowWaterMark[int] = LowWaterMark()
    for tag in range(1, 5):
        mark.delivered(tag)
    assert mark.settle_singly(2)
    assert not mark.settle_singly(2)
    assert not mark.settle_singly(9)
    assert mark.settle_singly(1)
    assert mark.take_mark() is None, "nothing to tell"
    assert mark.settle(3)
    assert mark.take_mark() == 3
    assert mark.settle_singly(4)
    assert mark.take_mark() is None
    assert mark.unsettled == 0


def test_settling_twice_or_the_unknown_does_nothing() -> None:
    mark: LowWaterMark[int] = LowWaterMark()
    mark.delivered(1)
    mark.delivered(2)
    assert not mark.settle(7)
    assert mark.settle(2)
    assert not mark.settle(2)
    assert mark.settle(1)
    assert not mark.settle(1)
    assert mark.take_mark() == 2
    assert mark.unsettled == 0


def test_tags_are_not_numbers() -> None:
    mark: LowWaterMark[str] = LowWaterMark()
    for tag in ("ID:z-1", "ID:a-9", "ID:m-5"):
        mark.delivered(tag)
    mark.settle("ID:a-9")
    mark.settle("ID:z-1")
    assert mark.take_mark() == "ID:a-9"


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 8))
def test_in_any_order_the_mark_is_below_all_that_is_open_and_all_is_told(
    settled: list[int], threshold: int
) -> None:
    mark: LowWaterMark[int] = LowWaterMark()
    count = 31
    for tag in range(count):
        mark.delivered(tag)
    told: set[int] = set()
    open_tags = set(range(count))
    order = [*settled, *range(count)]
    for tag in order:
        assert mark.settle(tag) is (tag in open_tags)
        open_tags.discard(tag)
        marked = mark.take_mark()
        if marked is not None:
            assert marked not in told, "the broker knows no delivery that was settled singly"
            assert all(marked < each for each in open_tags)
            told.update(range(marked + 1))
        singles = mark.take_singles(threshold)
        assert not told.intersection(singles)
        assert not open_tags.intersection(singles)
        told.update(singles)
        assert mark.unsettled == len(open_tags)
        assert mark.open_tags() == sorted(open_tags)
    assert told == set(range(count))
    assert (mark._line, mark._open, mark._done, mark._told) == (type(mark._line)(), set(), {}, set())
