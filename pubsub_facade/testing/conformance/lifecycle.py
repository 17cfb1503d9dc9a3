"""Contract 5, 16 and 18: publishing, closing and health over a client's life."""

from __future__ import annotations

import asyncio
import time

import pytest

from pubsub_facade.errors import Closed
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import (
    DEADLINE,
    Bench,
    Inbox,
    Suite,
    nothing_more,
    receive,
    until,
)


class Lifecycle(Suite):
    """Start, drain, close; and what a closed client says."""

    async def test_close_lets_handlers_finish_and_settles_what_they_did(self, bench: Bench) -> None:
        entered, finished = asyncio.Semaphore(0), []

        async def handle(payload: int) -> None:
            entered.release()
            await asyncio.sleep(0.3)  # the work: still under way when close() begins
            finished.append(payload)

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", concurrency=4)(handle)
        await pubsub.start()
        await pubsub.publish_many(Message("social.post", n) for n in range(10))
        async with asyncio.timeout(DEADLINE):
            for _ in range(4):
                await entered.acquire()
        await pubsub.close()
        assert len(finished) >= 4
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            rest = await receive(stream, 10 - len(finished))
            assert sorted([*finished, *(d.payload for d in rest)]) == list(range(10))
            await nothing_more(stream)

    async def test_close_gives_back_what_did_not_finish_in_the_grace_time(self, bench: Bench) -> None:
        entered, ended = asyncio.Event(), []

        async def handle(payload: str) -> None:
            entered.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                ended.append(payload)
                raise

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics")(handle)
        await pubsub.start()
        sent = await pubsub.publish("social.post", "hello")
        await asyncio.wait_for(entered.wait(), DEADLINE)
        began = time.monotonic()
        await pubsub.close(grace=0.1)
        assert time.monotonic() - began < 20
        assert ended == ["hello"]
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            assert [d.id for d in await receive(stream, 1)] == [sent.id]
            await nothing_more(stream)

    async def test_close_twice_or_at_once_is_no_error(self, bench: Bench) -> None:
        unused, used = bench.client(), bench.client()
        await unused.close()
        await unused.close()
        await used.publish("social.post", "hello")
        await asyncio.gather(used.close(), used.close())
        await used.close()
        assert used.state == "closed"

    async def test_a_closed_client_refuses_everything(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="analytics")
        stream = pubsub.subscribe("social.#", subscription="analytics")
        await pubsub.close()
        for call in (
            lambda: pubsub.publish("social.post", "late"),
            lambda: pubsub.publish_many([Message("social.post", "late")]),
            lambda: pubsub.declare("social.#", subscription="analytics"),
            lambda: pubsub.delete("analytics"),
            lambda: pubsub.backlog("analytics"),
            lambda: pubsub.dead_letters("analytics").count(),
            lambda: pubsub.start(),
            lambda: pubsub.ping(),
            lambda: stream.__aenter__(),
        ):
            with pytest.raises(Closed):
                await call()
        async with bench.client().subscribe("social.#", subscription="analytics") as fresh:
            await nothing_more(fresh)

    async def test_closing_the_client_ends_its_streams(self, bench: Bench) -> None:
        pubsub = bench.client()
        received: list[str] = []

        async def iterate() -> None:
            async with pubsub.subscribe("social.#", subscription="analytics") as stream:
                joined.set()
                async for delivery in stream:
                    received.append(delivery.payload)
                    await delivery.ack()

        joined = asyncio.Event()
        task = asyncio.create_task(iterate())
        await asyncio.wait_for(joined.wait(), DEADLINE)
        await pubsub.publish("social.post", "hello")
        await until(lambda: bool(received), "the message received")
        await pubsub.close()
        await asyncio.wait_for(task, DEADLINE)
        assert received == ["hello"]

    async def test_a_stream_is_entered_once(self, bench: Bench) -> None:
        pubsub = bench.client()
        stream = pubsub.subscribe("social.#", subscription="analytics")
        with pytest.raises(Closed):
            await stream.receive(1)
        async with stream:
            with pytest.raises(Closed):
                await stream.__aenter__()
        with pytest.raises(Closed):
            await stream.receive(1)

    async def test_a_publish_whose_waiter_is_cancelled_breaks_nothing(self, bench: Bench) -> None:
        """The message arrives or does not; all others do, each once."""
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics", window=1000) as stream:
            waiters = [
                asyncio.create_task(pubsub.publish("social.post", n, id=f"id-{n}", key=str(n)))
                for n in range(60)
            ]
            for turn in range(3):
                await asyncio.sleep(0)
                for waiter in waiters[turn::6]:
                    waiter.cancel()
            results = await asyncio.gather(*waiters, return_exceptions=True)
            cancelled = [r for r in results if isinstance(r, asyncio.CancelledError)]
            confirmed = {r.id for r in results if isinstance(r, Message)}
            assert len(cancelled) + len(confirmed) == 60
            assert cancelled
            last = await pubsub.publish("social.post", "last", id="last")
            wanted = {*confirmed, last.id}
            ids: list[str] = []
            while not wanted.issubset(ids):
                ids += [d.id for d in await receive(stream, 1)]
            await pubsub.publish("social.post", "really last")
            assert len(ids) == len(set(ids))
            assert set(ids) <= {*(f"id-{n}" for n in range(60)), "last"}

    async def test_ids_are_given_in_order_and_differ(self, bench: Bench) -> None:
        pubsub = bench.client()
        sent = await pubsub.publish_many(Message("social.post", n) for n in range(200))
        ids = [message.id for message in sent]
        assert len(set(ids)) == 200
        assert sorted(ids) == ids
        assert all(id[14] == "7" for id in ids)  # UUID version 7

    async def test_ping_answers_and_the_state_is_told(self, bench: Bench) -> None:
        pubsub = bench.client()
        states: list[str] = []
        pubsub.on_state(states.append)
        seen: list[str] = [pubsub.state]
        await pubsub.ping()
        seen.append(pubsub.state)
        await pubsub.ping()
        await pubsub.close()
        seen.append(pubsub.state)
        assert seen == ["idle", "connected", "closed"]
        assert states == ["connecting", "connected", "closed"]

    async def test_handlers_registered_after_start_begin_with_the_next_start(self, bench: Bench) -> None:
        first, second = Inbox(), Inbox()
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="first")(first)
        await pubsub.start()
        pubsub.subscriber("social.#", subscription="second")(second)
        await pubsub.start()
        sent = await pubsub.publish("social.post", "hello")
        for inbox in (first, second):
            await inbox.until(1)
            assert inbox.ids == [sent.id]

    async def test_settings_provision_and_tune_subscriptions(self, bench: Bench) -> None:
        pubsub = bench.client(
            subscriptions={
                "ahead": {"topics": ["social.post.*"], "filter": "level > 3"},
                "analytics": {"max_attempts": 1},
            }
        )
        await pubsub.start()
        await pubsub.publish_many(
            Message("social.post.created", level, headers={"level": level}) for level in (1, 5)
        )
        async with pubsub.subscribe("social.post.*", subscription="ahead") as stream:
            assert [d.payload for d in await receive(stream, 1)] == [5]
            await nothing_more(stream)
        async with pubsub.subscribe("social.#", subscription="analytics", max_attempts=5) as stream:
            await pubsub.publish("social.post", "poison")
            (delivery,) = await receive(stream, 1, ack=False)
            await delivery.retry()
        assert await pubsub.dead_letters("analytics").count() == 1
