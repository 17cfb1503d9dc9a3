"""The one place that connects, backs off and connects again, for all backends.

Owns the backend's life: opened on first use, opened again when somebody reports the link lost, closed at
the end. One attempt is under way at a time, whoever asks; each change of state is one log line.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Literal, TypeVar

from pubsub_facade._tasks import cancel
from pubsub_facade.backends.base import Backend
from pubsub_facade.errors import AuthenticationFailed, Closed, ConnectionFailed, ConnectionLost

log = logging.getLogger("pubsub_facade")

STABLE = 1.0
"""Seconds that a link must have lived for its loss to be mended at once; a shorter life is a failed attempt."""

State = Literal["idle", "connecting", "connected", "reconnecting", "closed"]
T = TypeVar("T")


class Supervisor:
    """Keeps one backend connected.

    Arguments:
        backend: not yet opened.
        minimum: seconds before the second attempt to connect; doubles each time, with jitter.
        maximum: seconds between attempts at most.
    """

    def __init__(self, backend: Backend, minimum: float, maximum: float) -> None:
        self.backend = backend
        self.state: State = "idle"
        self.attempts = 0  # to connect, over the whole life: tests count them
        self._minimum = minimum
        self._maximum = maximum
        self._epoch = 0
        self._attempt: asyncio.Task[None] | None = None
        self._not_before = 0.0  # time.monotonic() of the next attempt at the earliest
        self._delay = minimum
        self._connected_at = 0.0
        self._listeners: list[Callable[[State], None]] = []
        self._last_error: ConnectionFailed | None = None

    @property
    def _closed(self) -> bool:
        return self.state == "closed"

    @property
    def epoch(self) -> int:
        """Counts links: an error seen under an older epoch says nothing about the present link."""
        return self._epoch

    @property
    def last_error(self) -> ConnectionFailed | None:
        """Why the last attempt to connect failed; None while connected."""
        return self._last_error

    def on_state(self, listener: Callable[[State], None]) -> None:
        """Call ``listener(state)`` on the event loop at each change of state."""
        self._listeners.append(listener)

    async def open(self) -> Backend:
        """The backend, connected. One attempt: raises ConnectionFailed if it fails."""
        return await self._opened(patient=False)

    async def ready(self) -> Backend:
        """The backend, connected: waits and tries again until it is.

        Raises only what waiting cannot mend: AuthenticationFailed, ConfigError, Closed.
        """
        return await self._opened(patient=True)

    async def _opened(self, *, patient: bool) -> Backend:
        while self.state != "connected":
            if self._closed:
                raise Closed("this client is closed: make a new one")
            pause = self._not_before - time.monotonic()
            attempt = self._under_way()
            if attempt is None and pause > 0:
                if not patient and self._last_error is not None:
                    raise self._last_error
                await asyncio.sleep(pause)
                continue
            try:
                await asyncio.shield(attempt or self._begin(self._connect()))
            except ConnectionFailed as error:
                if not patient or isinstance(error, AuthenticationFailed):
                    raise
            except asyncio.CancelledError:
                if not self._closed or _cancelled():
                    raise
        return self.backend

    def _under_way(self) -> asyncio.Task[None] | None:
        """The present attempt; one that has just ended is none, though its callback has not run yet."""
        attempt = self._attempt
        return None if attempt is None or attempt.done() else attempt

    def _begin(self, attempt: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(attempt, name="pubsub-connect")
        task.add_done_callback(self._ended)
        self._attempt = task
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._attempt is task:
            self._attempt = None
        if not task.cancelled():
            task.exception()  # retrieved here: those who waited may all have been cancelled

    async def _connect(self) -> None:
        self._change("reconnecting" if self._epoch else "connecting")
        self.attempts += 1
        try:
            await self.backend.open()
        except (ConnectionFailed, ConnectionLost) as raised:
            error = raised if isinstance(raised, ConnectionFailed) else ConnectionFailed(str(raised))
            if self._last_error is None or str(self._last_error) != str(error):
                log.warning("%s: %s", self.backend.name, error)
            self._last_error = error
            self._put_off()
            raise error from raised
        self._epoch += 1
        self._last_error = None
        self._connected_at = time.monotonic()
        self._change("connected")

    def _put_off(self) -> None:
        """The next attempt comes later than the one before."""
        self._not_before = time.monotonic() + self._delay * random.uniform(0.5, 1)
        self._delay = min(self._delay * 2, self._maximum)

    async def lost(self, epoch: int, error: BaseException) -> None:
        """Report that the link of ``epoch`` is gone: it is closed, and the next who needs it connects again."""
        if epoch != self._epoch or self.state != "connected":
            return
        log.warning("%s: connection lost: %s", self.backend.name, error)
        if time.monotonic() - self._connected_at < STABLE:
            self._put_off()
        else:
            self._delay = self._minimum
        self._change("reconnecting")
        await asyncio.shield(self._begin(self.backend.close()))

    async def run(self, operation: Callable[[Backend], Awaitable[T]], *, patient: bool = False) -> T:
        """Run ``operation`` on the connected backend, again on a new link if the link is lost under it.

        Arguments:
            operation: must be safe to repeat.
            patient: wait through failed attempts to connect; False: the first one is raised.
        """
        delay = self._minimum
        told = False
        while True:
            backend = await self._opened(patient=patient)
            epoch = self._epoch
            try:
                return await operation(backend)
            except ConnectionLost as error:
                await self.lost(epoch, error)
                if not patient and delay > self._maximum:
                    raise
            except ConnectionFailed as error:  # of a further link that the operation needs
                if not patient or isinstance(error, AuthenticationFailed):
                    raise
                if not told:
                    log.warning("%s: trying again: %s", backend.name, error)
                told = True
            await asyncio.sleep(min(delay, self._maximum) * random.uniform(0.5, 1))
            delay *= 2

    async def close(self) -> None:
        """Close the backend for good. Idempotent."""
        if self.state == "closed":
            return
        self._change("closed")
        if self._attempt is not None:
            await cancel(self._attempt)
        await self.backend.close()

    def _change(self, state: State) -> None:
        if state == self.state or self.state == "closed":
            return
        previous, self.state = self.state, state
        if state == "connected":
            again = " again" if previous == "reconnecting" else ""
            place = f" to {self.backend.place}" if self.backend.place else ""
            log.info("%s: connected%s%s", self.backend.name, again, place)
        for listener in self._listeners:
            try:
                listener(state)
            except Exception:
                log.exception("a connection state listener raised")


def _cancelled() -> bool:
    """Whether the running task itself is being cancelled, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
