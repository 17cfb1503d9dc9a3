"""What a chaos run does to its processes from within, by a file that all of them map: a few numbers.

Their clocks jump, their handlers dawdle, and the first that comes to a named point ends there at once, as by
``kill -9``. The library is not touched: a process changes its own `time.time` and what it calls of the driver.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import mmap
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from pubsub_facade import Message
from pubsub_facade.backends.base import Backend, Receiver

POINTS: Final = ("handling", "handled", "parking", "burying", "copied", "sending")
"""In a handler; between its return and the ack; while a copy is stored; between its confirm and the ack of
the original; while a batch is on its way."""

CRASHED: Final = 99  # exit status of a process that ended at a point
SOON: Final = 0.004  # s within which it ends at those that take a while

true_time: Final = time.time

_SLOTS: Final = 4
_copying: contextvars.ContextVar[bool] = contextvars.ContextVar("copying", default=False)


class Levers:
    """The numbers in ``path``, shared by all who map it; it is made where it is not there.

    Each is one aligned word, so that nobody sees half of one.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * _SLOTS))
        with path.open("r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), 8 * _SLOTS)).cast("d")

    @property
    def clock(self) -> float:
        """Seconds that the processes' clocks are ahead of the true one."""
        return self._numbers[0]

    @clock.setter
    def clock(self, seconds: float) -> None:
        self._numbers[0] = seconds

    @property
    def slow(self) -> float:
        """Seconds that a handler takes which begins now."""
        return self._numbers[1]

    @slow.setter
    def slow(self, seconds: float) -> None:
        self._numbers[1] = seconds

    @property
    def point(self) -> str | None:
        """Where the next process ends; None once one has ended there."""
        chosen = int(self._numbers[2])
        return POINTS[chosen - 1] if chosen else None

    @point.setter
    def point(self, name: str | None) -> None:
        self._numbers[2] = 0 if name is None else 1 + POINTS.index(name)

    @property
    def enough(self) -> bool:
        """Publishers end once they have published their share; until then they go on."""
        return self._numbers[3] > 0

    @enough.setter
    def enough(self, yes: bool) -> None:
        self._numbers[3] = float(yes)

    # -- in the processes -------------------------------------------------------------------------

    def take_over_the_clock(self) -> None:
        """From now on `time.time` of this process is ``clock`` seconds off."""
        time.time = lambda: true_time() + self._numbers[0]

    def here(self, name: str) -> None:
        """This process is at that point: it ends if it is the one."""
        if self.point == name:
            self.point = None
            os._exit(CRASHED)

    def around_here(self, name: str) -> None:
        """As `here`, at any moment of what begins now."""
        if self.point == name:
            self.point = None
            timer = threading.Timer(random.uniform(0, SOON), os._exit, (CRASHED,))
            timer.daemon = True
            timer.start()

    def watch(self, backend: Backend) -> None:
        """Let this process come to the points within the driver."""
        begin, consume = backend.begin, backend.consume

        @functools.wraps(begin)
        def begun(messages: Sequence[Message]) -> asyncio.Future[Any] | None:
            self.around_here("sending")
            return begin(messages)

        setattr(backend, "begin", begun)  # noqa: B010  mypy minds a method's name
        setattr(backend, "send", self._during("sending", backend.send))  # noqa: B010
        watched: set[type[Receiver]] = set()

        async def joined(*arguments: Any) -> Receiver:
            receiver = await consume(*arguments)
            kind = type(receiver)
            if kind not in watched:
                watched.add(kind)
                self._watch_receiver(kind)
            return receiver

        setattr(backend, "consume", joined)  # noqa: B010

    def _watch_receiver(self, kind: type[Receiver]) -> None:
        for name, copy in (("parking", "park"), ("burying", "bury")):
            setattr(kind, copy, self._during(name, getattr(kind, copy), copies=True))
        settles = next(name for name in ("_settle", "_settled", "ack") if name in vars(kind))
        settle = getattr(kind, settles)

        @functools.wraps(settle)
        def settled(*arguments: Any) -> Any:
            if _copying.get():
                self.here("copied")
            return settle(*arguments)

        setattr(kind, settles, settled)

    def _during(
        self, name: str, call: Callable[..., Awaitable[None]], *, copies: bool = False
    ) -> Callable[..., Awaitable[None]]:
        @functools.wraps(call)
        async def called(*arguments: Any) -> None:
            self.around_here(name)
            token = _copying.set(copies)
            try:
                await call(*arguments)
            finally:
                _copying.reset(token)

        return called
