"""Who runs the handlers: tasks for async ones, a few threads for sync ones.

An async handler is awaited in place, so a message costs no task. Threads take from one queue and put
outcomes on another, and wake the loop only when it is not awake already, so a message costs no hop of its
own each way. Neither settles anything itself: each outcome goes to the `Consumer`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from pubsub_facade._tasks import cancel
from pubsub_facade.consumer import Consumer
from pubsub_facade.handler import Handler
from pubsub_facade.message import Delivery

log = logging.getLogger("pubsub_facade")

TURN: Final = 32  # deliveries handled by one task before the loop gets a turn
STOP_TIMEOUT: Final = 5.0  # s that a cancelled handler gets to end


class Workers(Protocol):
    """Runs one handler for one consumer until stopped."""

    def start(self) -> None: ...
    async def stop(self) -> None: ...


class BlockingDelivery(Delivery):
    """A `Delivery` in the hands of sync code: the same, and settling does not need ``await``.

    `ack` and `release` hand over and return; `retry` and `reject` return when the copy is stored.
    """

    __slots__ = ()

    def ack(self) -> None:  # type: ignore[override]
        if self.settler is not None:
            _consumer(self).report(self, done=True)

    def release(self) -> None:  # type: ignore[override]
        if self.settler is not None:
            _consumer(self).report(self, done=False)

    def retry(self, after: float | None = None) -> None:  # type: ignore[override]
        if self.settler is not None:
            _await(self, self.settler.retry(self, after))

    def reject(self, reason: str) -> None:  # type: ignore[override]
        if self.settler is not None:
            _await(self, self.settler.reject(self, reason))


def blocking(delivery: Delivery) -> BlockingDelivery:
    """The same object, now with settling for sync code: the two classes have one layout."""
    delivery.__class__ = BlockingDelivery
    assert isinstance(delivery, BlockingDelivery)
    return delivery


def _consumer(delivery: Delivery) -> Consumer:
    assert isinstance(delivery.settler, Consumer)
    return delivery.settler


def _loop_of(delivery: Delivery) -> asyncio.AbstractEventLoop:
    return _consumer(delivery).loop


def _await(delivery: Delivery, settling: Awaitable[None]) -> None:
    async def run() -> None:
        await settling

    asyncio.run_coroutine_threadsafe(run(), _loop_of(delivery)).result()


class TaskWorkers:
    """``concurrency`` tasks for an async handler."""

    def __init__(self, consumer: Consumer, handler: Handler, concurrency: int) -> None:
        self._consumer = consumer
        self._handler = handler
        self._concurrency = concurrency
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self) -> None:
        loop = self._consumer.loop
        self._tasks = [
            loop.create_task(self._run(), name=f"pubsub-handler-{self._handler.name}-{number}")
            for number in range(self._concurrency)
        ]

    async def stop(self) -> None:
        """End handlers still running; what they had in hand is given back."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, deaf = await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT)
            if deaf:
                log.error("%d handlers %s do not end when cancelled", len(deaf), self._handler.name)

    async def _run(self) -> None:
        while True:
            try:
                return await self._work()
            except asyncio.CancelledError:
                if self._ending():
                    raise

    def _ending(self) -> bool:
        """Whether a cancellation is meant for this task; else it was a handler's own, and is undone here."""
        task = asyncio.current_task()
        assert task is not None
        if task.cancelling() and (self._stopping or not self._consumer.receiving):
            return True
        while task.cancelling():
            task.uncancel()
        return False

    async def _work(self) -> None:
        consumer = self._consumer
        turn = 0
        while True:
            delivery = consumer.take()
            if delivery is None:
                if not await consumer.wait():
                    return
                continue
            await self._handle(delivery)
            turn += 1
            if turn >= TURN:
                turn = 0
                await asyncio.sleep(0)

    async def _handle(self, delivery: Delivery) -> None:
        handler = self._handler
        try:
            payload: Any = None
            if handler.decode is not None:
                payload = handler.decode(delivery.body, delivery.content_type)
            await handler.call(payload, delivery)
        except asyncio.CancelledError as error:
            if self._ending():
                self._consumer.given_back(delivery)
                raise
            self._consumer.failed(delivery, error)
        except BaseException as error:  # whatever it raises is its message's failure, not the member's end
            self._consumer.failed(delivery, error)
        else:
            self._consumer.succeeded(delivery)


class ThreadWorkers:
    """``concurrency`` threads for a sync handler.

    A handler's function may have an attribute ``thread_ends``, a function that each of its threads calls last: what
    a framework keeps by thread, as database connections, is given up there.
    """

    def __init__(self, consumer: Consumer, handler: Handler, concurrency: int) -> None:
        self._consumer = consumer
        self._handler = handler
        self._concurrency = concurrency
        self._queue: SimpleQueue[Delivery | None] = SimpleQueue()
        self._outcomes: deque[tuple[Delivery, BaseException | None]] = deque()
        self._awake = False  # the loop has been told and has not looked yet
        self._feed: asyncio.Task[None] | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._threads = [
            threading.Thread(target=self._run, name=f"pubsub-{self._handler.name}-{number}", daemon=True)
            for number in range(self._concurrency)
        ]
        for thread in self._threads:
            thread.start()
        self._feed = self._consumer.loop.create_task(self._hand_over(), name="pubsub-threads")

    async def stop(self) -> None:
        """Give back what no thread has begun, and let the threads end; a running handler cannot be ended."""
        if self._feed is not None:
            await cancel(self._feed)
        self._take_back()
        for _ in self._threads:
            self._queue.put(None)
        self._collect()

    async def _hand_over(self) -> None:
        consumer = self._consumer
        while True:
            delivery = consumer.take()
            if delivery is not None:
                self._queue.put(delivery)
            elif not await consumer.wait():
                self._take_back()
                return

    def _take_back(self) -> None:
        while True:
            try:
                delivery = self._queue.get_nowait()
            except Empty:
                return
            if delivery is not None:
                self._consumer.given_back(delivery)

    def _run(self) -> None:
        try:
            self._handle_all()
        finally:
            ends = getattr(self._handler.function, "thread_ends", None)
            if ends is not None:
                ends()

    def _handle_all(self) -> None:
        decode_hint = self._handler.decode
        call = self._handler.call
        outcomes = self._outcomes
        get = self._queue.get
        while (delivery := get()) is not None:
            error: BaseException | None = None
            try:
                payload: Any = None
                if decode_hint is not None:
                    payload = decode_hint(delivery.body, delivery.content_type)
                call(payload, blocking(delivery))
            except BaseException as raised:  # whatever a handler raises is its message's failure
                error = raised
            outcomes.append((delivery, error))
            if not self._awake:
                self._awake = True
                try:
                    self._consumer.loop.call_soon_threadsafe(self._collect)
                except RuntimeError:  # the loop is closed: the message was not settled and comes again
                    return

    def _collect(self) -> None:
        self._awake = False
        outcomes = self._outcomes
        consumer = self._consumer
        while outcomes:
            delivery, error = outcomes.popleft()
            if error is None:
                consumer.succeeded(delivery)
            else:
                consumer.failed(delivery, error)


def workers_for(consumer: Consumer, handler: Handler, concurrency: int) -> Workers:
    """Tasks for an async handler, threads for a sync one."""
    kind = TaskWorkers if handler.is_async else ThreadWorkers
    return kind(consumer, handler, concurrency)
