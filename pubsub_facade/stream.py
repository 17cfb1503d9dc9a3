"""A `Stream`: deliveries one by one, settled by whoever iterates.

The async context manager is the member's life: declared and receiving once entered; on leaving, what was
received and not settled goes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from pubsub_facade.consumer import Consumer
from pubsub_facade.errors import Closed
from pubsub_facade.message import Delivery


class Stream:
    """What `AsyncPubSub.subscribe` returns: ``async with`` it, then iterate it.

    Arguments:
        join: makes the consumer; called when entered.
        leave: told when the stream has ended.
    """

    def __init__(self, join: Callable[[], Awaitable[Consumer]], leave: Callable[[Stream], None]) -> None:
        self._join = join
        self._leave = leave
        self._consumer: Consumer | None = None

    async def __aenter__(self) -> Stream:
        if self._consumer is not None:
            raise Closed("a stream is entered once: subscribe again")
        consumer = await self._join()
        self._consumer = consumer
        try:
            await consumer.start()
        except BaseException:
            self._leave(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delivery:
        consumer = self._consumer
        if consumer is None:
            raise Closed("the stream is not entered: write 'async with pubsub.subscribe(...) as stream'")
        while (delivery := consumer.take()) is None:
            if not await consumer.wait():
                if consumer.error is not None:
                    raise consumer.error
                raise StopAsyncIteration
        return delivery

    async def receive(self, timeout: float | None = None) -> Delivery:
        """The next delivery.

        Arguments:
            timeout: seconds to wait; None: until there is one.

        Raises TimeoutError when nothing came in time, Closed when the stream has ended.
        """
        try:
            if timeout is None:
                return await self.__anext__()
            async with asyncio.timeout(timeout):
                return await self.__anext__()
        except StopAsyncIteration:
            raise Closed("the stream has ended") from None

    async def receive_many(self, limit: int, timeout: float | None = None) -> list[Delivery]:
        """At least one delivery and at most ``limit``, without waiting for more than the first."""
        batch = [await self.receive(timeout)]
        assert self._consumer is not None
        while len(batch) < limit and (delivery := self._consumer.take()) is not None:
            batch.append(delivery)
        return batch

    async def close(self) -> None:
        """Leave: what was received and not settled goes back to the subscription. Idempotent."""
        consumer = self._consumer
        if consumer is not None:
            await consumer.stop_receiving()
            await consumer.leave()
        self._leave(self)
