"""Which delivery of an ordered subscription is next, after some came back because a process or link was lost.

What came back once is next in its place. What came back more often may have killed its process, and would
again, with others in its company. It cannot be set aside without losing its place, so it is tried in place:
one in hand at a time and nothing beside it, the one that came back most often first, and of equals the
first by queue and place. What was tried and done is gone when the next process dies, so that the guilty
one is at the front: only the first one that a member tries may be condemned by how often it came back,
and only if it came back from a trial; any other gets one more. Pure: no I/O.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from pubsub_facade.backends._rabbitmq_frames import Content
from pubsub_facade.backends._rabbitmq_wire import returns_of

SUSPECT: Final = 2  # returns from which on it is tried alone


class Trials:
    """The line of one member, by the queues it consumes."""

    __slots__ = ("_first", "_free", "_lines", "_suspects", "_trial")

    def __init__(self) -> None:
        self._free: deque[tuple[Content, int]] = deque()
        self._lines: dict[str, deque[tuple[Content, int]]] = {}  # while there are suspects: by consumer tag
        self._suspects = 0  # how many are in the lines
        self._trial = False  # one is in hand
        self._first = True  # nothing was handed out yet

    def push(self, content: Content) -> None:
        """A delivery has arrived."""
        returns = returns_of(content)
        if returns < SUSPECT and not self._lines:
            self._free.append((content, returns))
            return
        self._suspects += returns >= SUSPECT
        self._lines.setdefault(content.consumer, deque()).append((content, returns))

    def pop(self, busy: int) -> tuple[Content, int, bool] | None:
        """The next that may be handed out, how often it came back, and whether that may condemn it.

        Arguments:
            busy: deliveries in hand now.
        """
        if self._trial:
            return None
        if self._free:
            self._first = False
            return *self._free.popleft(), False
        if not self._suspects:
            for line in self._lines.values():
                self._free.extend(line)
            self._lines.clear()
            return (*self._free.popleft(), False) if self._free else None
        if busy:
            return None
        name = max(sorted(self._lines), key=lambda name: self._lines[name][0][1])
        content, returns = self._lines[name].popleft()
        if not self._lines[name]:
            del self._lines[name]
        self._suspects -= returns >= SUSPECT
        self._trial = True
        first, self._first = self._first, False
        return content, returns, first and returns > SUSPECT

    @property
    def suspects(self) -> int:
        """How many are to be tried."""
        return self._suspects

    @property
    def on_trial(self) -> bool:
        """Whether one is in hand that nothing may be beside."""
        return self._trial

    def end(self) -> None:
        """The broker knows what became of it."""
        self._trial = False
