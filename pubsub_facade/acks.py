"""The low-water mark: which deliveries can be settled in one go, and which must be settled singly.

Brokers number what they deliver on a link (AMQP delivery tags, Kafka offsets, STOMP messages in order)
and settle "everything up to here" at the price of one. Handlers finish in any order. This class turns
the second into the first, and must never let the mark pass a delivery that is not settled. Pure: no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Tag = TypeVar("Tag", bound=Hashable)


class LowWaterMark(Generic[Tag]):
    """One link's (or partition's) deliveries in the order the broker numbered them.

    Any hashable is a tag; order is the order of `delivered`. Settling an unknown tag, or one twice, does
    nothing: it belongs to an old link.
    """

    __slots__ = ("_done", "_fresh", "_line", "_mark", "_open", "_told")

    def __init__(self) -> None:
        self._line: deque[Tag] = deque()  # delivered and above the mark, in order
        self._open: set[Tag] = set()  # of these: not settled
        self._done: dict[Tag, None] = {}  # settled above the mark, broker not told
        self._told: set[Tag] = set()  # settled above the mark, broker told singly
        self._mark: Tag | None = None
        self._fresh = False

    def delivered(self, tag: Tag) -> None:
        """The broker handed out ``tag``, which comes after all before it."""
        self._line.append(tag)
        self._open.add(tag)

    def settle(self, tag: Tag) -> bool:
        """``tag`` needs no redelivery any more; False where it was not open."""
        if tag not in self._open:
            return False
        self._open.remove(tag)
        line = self._line
        if line[0] != tag:
            self._done[tag] = None
            return True
        line.popleft()
        mark = self._rise()
        self._mark = tag if mark is None else mark
        self._fresh = True
        return True

    def settle_singly(self, tag: Tag) -> bool:
        """As `settle`, where the broker has been told of this one alone (given back, dropped)."""
        if tag not in self._open:
            return False
        self._open.remove(tag)
        if self._line[0] != tag:
            self._told.add(tag)
            return True
        self._line.popleft()
        mark = self._rise()
        if mark is not None:
            self._mark = mark
            self._fresh = True
        return True

    def _rise(self) -> Tag | None:
        """Pass the settled at the head; the last of them that the broker was not told of singly."""
        line, done, told = self._line, self._done, self._told
        mark: Tag | None = None
        while line:
            head = line[0]
            if head in done:
                del done[head]
                mark = head
            elif head in told:
                told.remove(head)
            else:
                break
            line.popleft()
        return mark

    def take_mark(self) -> Tag | None:
        """The mark, if it rose since the last call; else None.

        It is the highest tag up to which all are settled that was not told singly: a broker refuses to
        settle "up to here" where "here" is settled already.
        """
        if not self._fresh:
            return None
        self._fresh = False
        return self._mark

    def take_singles(self, threshold: int) -> list[Tag]:
        """The settled tags above the mark, if they are at least ``threshold``; each is returned once.

        Only for brokers that settle one alone: a stuck head then costs a few single acks, not the window.
        """
        if not self._done or len(self._done) < threshold:
            return []
        singles = list(self._done)
        self._told.update(singles)
        self._done.clear()
        return singles

    @property
    def mark(self) -> Tag | None:
        """The highest tag up to which all are settled; None before the first."""
        return self._mark

    def is_open(self, tag: Tag) -> bool:
        """Whether ``tag`` is delivered and not settled."""
        return tag in self._open

    @property
    def unsettled(self) -> int:
        """How many are delivered and not settled."""
        return len(self._open)

    def open_tags(self) -> list[Tag]:
        """The tags not settled, in order."""
        return [tag for tag in self._line if tag in self._open]
