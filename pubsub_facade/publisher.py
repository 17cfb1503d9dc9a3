"""Confirmed publishing: a window of unconfirmed messages, resent after a lost link, bounded by a timeout.

What queued while the last batch was under way is the next batch: no timer, no task per message. Batches go to
the backend in order, at once where it can begin without waiting, else by a pump task. When the link is lost
everything unconfirmed goes back to the front of the line, with the same ids and in the old order. A message is
never called sent before the broker confirmed it, and never called unsent once it may have left.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Final

from pubsub_facade._tasks import cancel
from pubsub_facade.backends.base import Backend
from pubsub_facade.errors import (
    Closed,
    ConnectionFailed,
    ConnectionLost,
    Fate,
    PublishTimeout,
    PubSubError,
    SendFailed,
)
from pubsub_facade.message import Message
from pubsub_facade.supervisor import Supervisor

log = logging.getLogger("pubsub_facade")

MAX_BATCH: Final = 500  # messages in one send
MAX_BATCH_BYTES: Final = 1 << 20

Done = Callable[[BaseException | None], None]


class _Publication:
    """What one call published: done when each of its messages is confirmed or has failed."""

    __slots__ = ("deadline", "done", "failed", "finished", "messages", "open", "sent", "why")

    def __init__(self, messages: Sequence[Message], deadline: float, done: Done) -> None:
        self.messages = messages
        self.deadline = deadline
        self.done = done
        self.open = len(messages)  # not confirmed, not failed
        self.sent = 0  # so many, from the first on, were ever handed to a driver
        self.failed: dict[str, Fate] = {}
        self.why: BaseException | None = None
        self.finished = False


_Entry = tuple[Message, _Publication, int]  # the int: which of its publication's messages it is


class _Batch:
    """Some consecutive messages in line, and whose they are."""

    __slots__ = ("entries", "error", "messages", "sequence")

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.entries: list[_Entry] = []
        self.messages: list[Message] = []
        self.error: BaseException | None = None


class Publisher:
    """The way in, shared by all publishers of one client.

    Arguments:
        supervisor: keeps the backend connected.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._line: deque[_Entry] = deque()
        self._flying: dict[int, _Batch] = {}
        self._returned: list[_Batch] = []  # came back unconfirmed from a lost link
        self._sequence = 0
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._sends: set[asyncio.Task[None]] = set()
        self._pending: deque[_Publication] = deque()
        self._expiry: asyncio.TimerHandle | None = None
        self._expires = 0.0
        self._closing = False
        self._finished: asyncio.Future[None] | None = None  # done when nobody waits any more; made by `close`
        self._launching = False  # `launch` will be called in this turn of the loop
        self._loop = asyncio.get_running_loop()

    def submit(self, messages: Sequence[Message], timeout: float, done: Done) -> None:
        """Put messages in line; ``done(None)`` or ``done(error)`` is called once, on the loop.

        Arguments:
            messages: checked and encoded, at least one.
            timeout: seconds until PublishTimeout.
            done: must not raise.
        """
        self.enqueue(messages, timeout, done)
        if self._supervisor.backend.pipeline == 1:
            self.launch()
        elif not self._launching:  # once this turn of the loop is over, with all that it brings
            self._launching = True
            self._loop.call_soon(self.launch)

    def enqueue(self, messages: Sequence[Message], timeout: float, done: Done) -> None:
        """`submit` for who calls `launch` himself once several are in line."""
        if self._closing:
            done(Closed("this client is closed: nothing was sent; make a new one"))
            return
        deadline = self._loop.time() + timeout
        publication = _Publication(messages, deadline, done)
        line = self._line
        for index, message in enumerate(messages):
            line.append((message, publication, index))
        self._pending.append(publication)
        if self._expiry is None or deadline < self._expires:
            self._arm(deadline)

    def launch(self) -> None:
        """Begin what is in line: at once where nothing has to be waited for, else by the pump."""
        self._launching = False
        if self._closing and not self._pending:
            return
        backend = self._supervisor.backend
        if backend.pipeline > 1 and self._supervisor.state == "connected" and not self._returned:
            while self._line and len(self._flying) < backend.pipeline:
                self._begin(backend)
        elif self._line or self._returned:
            if self._pump is None or self._pump.done():
                self._pump = self._loop.create_task(self._run(), name="pubsub-publisher")
            self._wake.set()

    async def publish(self, messages: Sequence[Message], timeout: float) -> None:
        """`submit` and wait. Cancelling the wait does not take the messages back: their fate is unknown."""
        future: asyncio.Future[None] = self._loop.create_future()

        def done(error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.submit(messages, timeout, done)
        await future

    async def close(self, grace: float) -> None:
        """Wait up to ``grace`` seconds for what is in line, then fail what is left with Closed."""
        self._closing = True
        if self._pending:
            self._finished = self._loop.create_future()
            await asyncio.wait([self._finished], timeout=grace)
        for publication in list(self._pending):
            self._give_up(publication, Closed("the client was closed before the broker confirmed"))
        for task in (self._pump, *self._sends):
            if task is not None:
                await cancel(task)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # -- the pump ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        """For what has to be waited for: a link, the end of a lost one, a backend that takes one batch at a time."""
        while True:
            self._wake.clear()
            if self._line or self._returned:
                try:
                    backend = await self._supervisor.ready()
                except PubSubError as error:
                    self._fail_all(error)
                    continue
                except Exception as error:
                    self._fail_all(self._fault(error))
                    continue
                if self._returned:
                    if not self._flying and not self._sends:
                        self._requeue()
                        continue
                elif backend.pipeline > 1:
                    self.launch()
                else:
                    while self._line and not self._returned:
                        batch = self._next_batch()
                        if batch.messages:
                            self._flying[batch.sequence] = batch
                            await self._send(backend, batch)
                    if self._returned:
                        continue
            await self._wake.wait()

    def _begin(self, backend: Backend) -> None:
        """Hand the next batch over; by a task where the backend has to wait before it can."""
        batch = self._next_batch()
        if not batch.messages:
            return
        self._flying[batch.sequence] = batch
        epoch = self._supervisor.epoch
        try:
            # One that still waits in a task must not be overtaken.
            future = None if self._sends else backend.begin(batch.messages)
        except Exception as error:
            self._loop.call_soon(self._landed, batch, epoch, error)
            return
        if future is None:
            self._follow(self._send(backend, batch))
        else:
            future.add_done_callback(lambda future: self._landed(batch, epoch, future.exception()))

    def _follow(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work, name="pubsub-send")
        self._sends.add(task)
        task.add_done_callback(self._followed)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._sends.discard(task)
        self.launch()

    def _next_batch(self) -> _Batch:
        self._sequence += 1
        batch = _Batch(self._sequence)
        size = 0
        line = self._line
        while line and len(batch.messages) < MAX_BATCH and size < MAX_BATCH_BYTES:
            entry = line.popleft()
            message, owner, index = entry
            if owner.finished:
                continue
            if index >= owner.sent:
                owner.sent = index + 1
            size += len(message.body)
            batch.messages.append(message)
            batch.entries.append(entry)
        return batch

    async def _send(self, backend: Backend, batch: _Batch) -> None:
        epoch = self._supervisor.epoch
        try:
            await backend.send(batch.messages)
        except asyncio.CancelledError:
            self._flying.pop(batch.sequence, None)
            raise
        except Exception as error:
            self._take_outcome(batch, error)
            if isinstance(error, ConnectionLost):
                await self._supervisor.lost(epoch, error)
        else:
            self._take_outcome(batch, None)

    def _landed(self, batch: _Batch, epoch: int, error: BaseException | None) -> None:
        """What became of a batch that was begun without a task."""
        self._take_outcome(batch, error)
        if self._closing and not self._pending:
            return
        if isinstance(error, ConnectionLost):
            self._follow(self._supervisor.lost(epoch, error))
        else:
            self.launch()

    def _take_outcome(self, batch: _Batch, error: BaseException | None) -> None:
        del self._flying[batch.sequence]
        if error is None or isinstance(error, SendFailed):
            self._settle(batch, error)
        elif isinstance(error, ConnectionLost):
            batch.error = error
            self._returned.append(batch)
        else:
            # Refused as a whole, by the broker or by a fault in the driver: it may have left, so it is unknown.
            failed = SendFailed(
                f"{self._supervisor.backend.name}: {len(batch.messages)} messages not confirmed: {error}",
                {message.id: "unknown" for message in batch.messages},
            )
            failed.__cause__ = error
            self._settle(batch, failed)

    def _requeue(self) -> None:
        """Everything unconfirmed goes to the front of the line again, in the old order."""
        for batch in sorted(self._returned, key=lambda batch: batch.sequence, reverse=True):
            for entry in reversed(batch.entries):
                entry[1].why = batch.error
                self._line.appendleft(entry)
        self._returned.clear()

    # -- outcomes ---------------------------------------------------------------------------------

    def _settle(self, batch: _Batch, failure: SendFailed | None) -> None:
        fates = failure.fates if failure is not None else {}
        for message, owner, _ in batch.entries:
            owner.open -= 1
            if message.id in fates:
                owner.failed[message.id] = fates[message.id]
                owner.why = failure
            if owner.open == 0 and not owner.finished:
                self._finish(owner, self._failure_of(owner))

    def _failure_of(self, owner: _Publication) -> BaseException | None:
        if not owner.failed:
            return None
        cause = owner.why
        if isinstance(cause, SendFailed) and cause.fates == owner.failed:
            return cause
        error = SendFailed(str(cause), owner.failed)
        error.__cause__ = cause
        return error

    def _finish(self, publication: _Publication, error: BaseException | None) -> None:
        publication.finished = True
        pending = self._pending
        if pending and pending[0] is publication:
            pending.popleft()
            while pending and pending[0].finished:
                pending.popleft()
            if not pending and self._finished is not None and not self._finished.done():
                self._finished.set_result(None)
        publication.done(error)

    def _fail_all(self, error: PubSubError) -> None:
        """The backend cannot be reached and waiting will not mend it: everybody in line is told."""
        for publication in list(self._pending):
            self._give_up(publication, error)
        self._line.clear()
        self._returned.clear()

    def _fault(self, error: Exception) -> ConnectionFailed:
        failed = ConnectionFailed(
            f"{self._supervisor.backend.name}: fault in the driver while connecting: {error}"
        )
        failed.__cause__ = error
        return failed

    def _give_up(self, publication: _Publication, error: PubSubError) -> None:
        if not publication.finished:
            self._finish(
                publication, error if publication.sent == 0 else self._unconfirmed(publication, error)
            )

    def _unconfirmed(self, publication: _Publication, why: BaseException) -> SendFailed:
        failed = SendFailed(
            f"{publication.open} of {len(publication.messages)} messages were not confirmed: {why}",
            self._fates(publication),
        )
        failed.__cause__ = why
        return failed

    def _fates(self, publication: _Publication) -> dict[str, Fate]:
        """What is known of each message that is not confirmed: in line and never sent, or under way."""
        fates: dict[str, Fate] = dict(publication.failed)
        batches = [*self._flying.values(), *self._returned]
        entries = [*self._line, *(entry for batch in batches for entry in batch.entries)]
        for message, owner, index in entries:
            if owner is publication:
                fates[message.id] = "not stored" if index >= publication.sent else "unknown"
        return fates

    # -- timeouts ---------------------------------------------------------------------------------

    def _arm(self, deadline: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expires = deadline
        self._expiry = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        now = self._loop.time()
        soonest = 0.0
        for publication in list(self._pending):
            if publication.finished:
                continue
            if publication.deadline <= now + 0.001:
                self._finish(publication, self._timeout(publication))
            elif not soonest or publication.deadline < soonest:
                soonest = publication.deadline
        if soonest:
            self._arm(soonest)

    def _timeout(self, publication: _Publication) -> PublishTimeout:
        fates = self._fates(publication)
        cause: BaseException | None = self._supervisor.last_error or publication.why
        why = f": {cause}" if cause is not None else ": the broker did not confirm in time"
        topic = publication.messages[0].topic
        error = PublishTimeout(
            f"{len(fates)} of {len(publication.messages)} messages (first topic {topic!r}) not confirmed by "
            f"{self._supervisor.backend.name} within the timeout{why}; publish again with the same id, or wait longer",
            fates,
        )
        error.__cause__ = cause
        return error
