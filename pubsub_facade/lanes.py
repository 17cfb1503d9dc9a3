"""Which delivery a free worker gets next: in line, and for an ordered subscription one of a key at a time.

Pure: no I/O, no clock. A key's lane is busy from `pop` until `done`, also over a lost link, so that the
message that comes again does not meet its own handler still at work.
"""

from __future__ import annotations

from collections import deque

from pubsub_facade.message import Delivery


class Lanes:
    """The line of one consumer.

    Arguments:
        ordered: keep one delivery of a key out at a time, in order of `push`.
    """

    __slots__ = ("_busy", "_ordered", "_ready", "_waiting")

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._ready: deque[Delivery] = deque()
        self._waiting: dict[str, deque[Delivery]] = {}  # key -> behind the one that is out
        self._busy: set[str] = set()

    def __len__(self) -> int:
        return len(self._ready)

    def push(self, delivery: Delivery) -> None:
        """Put a delivery in line."""
        if self._ordered and delivery.key is not None:
            if delivery.key in self._busy:
                self._waiting.setdefault(delivery.key, deque()).append(delivery)
                return
            self._busy.add(delivery.key)
        self._ready.append(delivery)

    def pop(self) -> Delivery | None:
        """The next delivery that may be handed out, or None."""
        return self._ready.popleft() if self._ready else None

    def holds(self, delivery: Delivery) -> bool:
        """Whether a delivery that is out has a lane: others of its key wait for it."""
        return self._ordered and delivery.key is not None

    def again(self, delivery: Delivery) -> None:
        """A delivery that was out goes to the front of the line; its lane stays busy."""
        self._ready.appendleft(delivery)

    def done(self, delivery: Delivery) -> bool:
        """A delivery that was out is out no more; True if another became ready by that."""
        key = delivery.key
        if not self._ordered or key is None:
            return False
        waiting = self._waiting.get(key)
        if waiting:
            self._ready.append(waiting.popleft())
            if not waiting:
                del self._waiting[key]
            return True
        self._busy.discard(key)
        return False

    def clear(self) -> list[Delivery]:
        """Take out all that is not handed out, in no certain order; lanes of what is out stay busy."""
        cleared = list(self._ready)
        for delivery in cleared:
            if self._ordered and delivery.key is not None:
                self._busy.discard(delivery.key)
        for waiting in self._waiting.values():
            cleared.extend(waiting)
        self._ready.clear()
        self._waiting.clear()
        return cleared
