"""The same work through the facade: ``publish_many``, and an async handler that returns."""

from __future__ import annotations

import asyncio
import time

from benchmarks.raw import BODY
from pubsub_facade import AsyncPubSub, Message, Settings

BATCH = 500
TOPIC = "bench.message"


async def publish(settings: Settings, subscription: str, count: int) -> float:
    """Confirmed batches of 500, two under way; a subscription stores each message."""
    async with AsyncPubSub(settings) as pubsub:
        await pubsub.declare("bench.#", subscription=subscription)
        await pubsub.publish(TOPIC, BODY)
        begin = time.perf_counter()
        under_way: set[asyncio.Task[list[Message]]] = set()
        for start in range(0, count - 1, BATCH):
            batch = [Message(TOPIC, BODY) for _ in range(min(BATCH, count - 1 - start))]
            under_way.add(asyncio.create_task(pubsub.publish_many(batch, timeout=120)))
            if len(under_way) >= 2:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        for task in under_way:
            await task
        return (count - 1) / (time.perf_counter() - begin)


async def consume(settings: Settings, subscription: str, count: int) -> float:
    """One member, one handler task; from the first delivery until the last is handled and settled."""
    async with AsyncPubSub(settings) as pubsub:
        done = asyncio.Event()
        got = 0
        begin = 0.0

        @pubsub.subscriber("bench.#", subscription=subscription)
        async def handle(body: bytes) -> None:
            nonlocal got, begin
            begin = begin or time.perf_counter()
            got += 1
            if got == count:
                done.set()

        await pubsub.start()
        async with asyncio.timeout(180):
            await done.wait()
        rate = count / (time.perf_counter() - begin)
        await pubsub.close()
        return rate


async def delete(settings: Settings, subscription: str) -> None:
    """Leave nothing behind."""
    async with AsyncPubSub(settings) as pubsub:
        await pubsub.delete(subscription)
