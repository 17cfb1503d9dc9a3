"""What one member knows of one partition: where it reads, what is handed out, what the commit says.

The commit is more than the low-water mark: its metadata names what is settled above the mark, how often
each open delivery was handed out, and whether its writer may have handed out more. So one slow handler
does not make others' work come again, and a message that kills its process is found and counted.
Invariant: no commit covers a delivery that is not settled. Pure: no I/O.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from pubsub_facade.backends._kafka_log import Records
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.message import Delivery

MAX_METADATA: Final = 4000  # characters; Kafka's default limit is 4,096 bytes
READ_AHEAD: Final = 1 << 20  # bytes read and not handed out, until no more is fetched


@dataclass
class Progress:
    """What a commit says.

    Arguments:
        offset: all below is settled.
        moves: the last seek that its writer had obeyed; None where a foreign tool wrote the commit.
        window: deliveries that its writer may have handed out beyond ``reached``; 0: it left in order.
        reached: all from ``offset`` up to here is settled, but for what is in ``open``.
        open: offset -> how often it was handed to a handler.
        topic_id: whose offsets these are; None: of whatever topic has the name.
    """

    offset: int
    moves: int | None = 0
    window: int = 0
    reached: int = 0
    open: dict[int, int] = field(default_factory=dict)
    topic_id: str | None = None

    @classmethod
    def read(cls, offset: int, metadata: str) -> Progress:
        """From what is committed; metadata that is not ours says nothing."""
        try:
            data = json.loads(metadata)
            pairs = {offset + int(above): int(count) for above, count in data["open"]}
            moves, window, reached = int(data["moves"]), int(data["window"]), offset + int(data["reached"])
            id = data.get("topic")
            return cls(offset, moves, window, reached, pairs, None if id is None else str(id))
        except (ValueError, TypeError, KeyError):
            return cls(offset, None, 0, offset)

    def metadata(self) -> str:
        """As it is committed, shortened where Kafka would refuse it: what is left out comes again."""
        pairs = [[offset - self.offset, count] for offset, count in sorted(self.open.items())]
        reached = self.reached
        while True:
            data: dict[str, Any] = {
                "moves": self.moves or 0,
                "window": self.window,
                "reached": reached - self.offset,
            }
            data["open"] = pairs
            if self.topic_id is not None:
                data["topic"] = self.topic_id
            text = json.dumps(data, separators=(",", ":"))
            if len(text) <= MAX_METADATA:
                return text
            keep = len(pairs) * 3 // 4
            reached = self.offset + pairs[keep][0]
            pairs = pairs[:keep]


class Partition:
    """One partition, from its assignment until it is given up.

    Arguments:
        topic: the user's topic; None on a topic of our own, where each record names its own.
        guess: how often a message counts as handed out where the commit only says that it may have been.
    """

    __slots__ = (
        "_buffers",
        "_unread",
        "counts",
        "dirty",
        "doubtful",
        "fetch_from",
        "guess",
        "handed",
        "held",
        "marked",
        "moves",
        "open",
        "ordered",
        "position",
        "purged",
        "reached",
        "topic",
        "topic_id",
        "tp",
        "trial",
        "waiting",
    )

    def __init__(self, tp: TP, topic: str | None, start: Progress, guess: int, *, ordered: bool) -> None:
        self.tp = tp
        self.topic = topic
        self.topic_id = start.topic_id
        self.ordered = ordered
        self.position = start.offset  # the next offset to hand out
        self.fetch_from = start.offset
        self.purged = start.offset  # records below are deleted, on a topic of our own
        self.reached = max(start.reached, start.offset)
        self.counts = start.open  # of what was open before us
        self.doubtful = self.reached + start.window if start.window else 0
        self.guess = guess
        self.moves = start.moves or 0
        self.open: dict[int, Delivery | None] = {}  # handed out and not settled, in order of offset
        self.handed: set[int] = set()  # of these: in a handler's hands
        self.waiting = 0  # read, and waiting in the member for its time
        self.trial: int | None = None  # the offset that is being tried alone
        self.marked = False  # a commit says that we may hand out; nothing is handed out before
        self.dirty = False
        self.held = False  # nothing is handed out: it is being given up
        self._buffers: deque[tuple[Records, int]] = deque()
        self._unread = 0

    # -- reading ----------------------------------------------------------------------------------

    @property
    def hungry(self) -> bool:
        """Whether more should be fetched."""
        return self._unread < READ_AHEAD

    @property
    def unread(self) -> bool:
        """Whether something fetched is not handed out yet."""
        return bool(self._buffers)

    def feed(self, records: Records, size: int, fetch_from: int) -> None:
        """Take what was fetched, its size in bytes, and where the next fetch begins."""
        self._buffers.append((records, size))
        self._unread += size
        self.fetch_from = fetch_from

    def drop(self, position: int) -> None:
        """Forget what was fetched; the next fetch begins at ``position``."""
        self._buffers.clear()
        self._unread = 0
        self.position = self.fetch_from = position

    def next(self) -> Any | None:
        """The next record that is not settled yet, or None. `position` is behind it."""
        while self._buffers:
            records, size = self._buffers[0]
            for record in records:
                if record.offset < self.position:
                    continue
                self.position = record.offset + 1
                if record.offset < self.reached and record.offset not in self.counts:
                    self.dirty = True
                    continue
                return record
            self.position = max(self.position, records.next_fetch_offset)
            self._buffers.popleft()
            self._unread -= size
        return None

    # -- handing out ------------------------------------------------------------------------------

    @property
    def cautious(self) -> bool:
        """Whether what comes next may have killed its process, so that it is tried alone."""
        return self.position < self.doubtful

    def count(self, offset: int) -> int:
        """How often this message was handed out before, as far as is known."""
        if offset in self.counts:
            return self.counts[offset] or (self.guess if self.doubtful else 0)
        return self.guess if self.reached <= offset < self.doubtful else 0

    def seen(self, offset: int) -> bool:
        """Whether it may have been handed out before."""
        return offset in self.counts or self.reached <= offset < self.doubtful

    def settle(self, offset: int) -> bool:
        """It needs no redelivery; False where it was not open."""
        if self.open.pop(offset, self) is self:
            return False
        self.handed.discard(offset)
        self.counts.pop(offset, None)
        self.dirty = True
        return True

    @property
    def in_hand(self) -> bool:
        """Whether a handler is at work on one of its messages; one that is held for a later attempt is not."""
        return any(
            (delivery := self.open.get(offset)) is not None and not delivery.delay for offset in self.handed
        )

    def forget(self) -> int:
        """Nothing here is ours any more: settling does nothing from now on. Returns how many were handed out."""
        count = sum(delivery is not None for delivery in self.open.values())
        self.open.clear()
        self.handed.clear()
        self.held = True
        self.waiting = 0
        return count

    # -- committing -------------------------------------------------------------------------------

    def progress(self, window: int) -> Progress:
        """What to commit now.

        Arguments:
            window: deliveries that may be handed out before the next commit; 0: none, we leave.
        """
        mark = next(iter(self.open), self.position)
        count = self._handings if window else self._failures
        seen = {offset: count(offset, delivery) for offset, delivery in self.open.items()}
        old = {offset: count for offset, count in self.counts.items() if offset >= self.position}
        reached = self.position
        if self.reached > self.position:  # not yet back to where our predecessor was
            seen.update(old)
            reached = self.reached
        if self.doubtful > reached and not window:
            window = self.doubtful - reached
        return Progress(mark, self.moves, window, reached, seen, self.topic_id)

    def _handings(self, offset: int, delivery: Delivery | None) -> int:
        """How often it was handed to a handler, should we die now."""
        before = self.counts.get(offset, 0)
        if offset not in self.handed:
            return before
        return max(before + 1, delivery.attempt if self.ordered and delivery is not None else 0)

    def _failures(self, offset: int, delivery: Delivery | None) -> int:
        """The same where we leave in order: a handler that is still at work has killed nobody."""
        before = self.counts.get(offset, 0)
        if not self.ordered or delivery is None or offset not in self.handed:
            return before
        return max(before, delivery.attempt if delivery.delay else delivery.attempt - 1)
