"""Many at once: topics, subscriptions, tasks, clients."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import Bench, Inbox, Suite, receive, until


class Scale(Suite):
    """One client with a lot to do."""

    async def test_two_hundred_topics_and_fifty_subscriptions_in_one_client(self, bench: Bench) -> None:
        pubsub = bench.client()
        inboxes = [Inbox() for _ in range(50)]
        for number, inbox in enumerate(inboxes):
            pubsub.subscriber(f"room-{number}.*", subscription=f"room-{number}")(inbox)
        await pubsub.start()
        sent = await pubsub.publish_many(
            Message(f"room-{room}.door-{door}", [room, door]) for room in range(50) for door in range(4)
        )
        assert len(sent) == 200
        for room, inbox in enumerate(inboxes):
            await inbox.until(4)
            assert sorted(inbox.payloads) == [[room, door] for door in range(4)]

    async def test_twenty_tasks_publish_and_subscribe_at_once(self, bench: Bench) -> None:
        pubsub = bench.client()
        joined = [asyncio.Event() for _ in range(10)]

        async def subscribe(number: int) -> set[str]:
            async with pubsub.subscribe(f"task-{number}.#", subscription=f"task-{number}") as stream:
                joined[number].set()
                return {d.id for d in await receive(stream, 20)}

        async def publish(number: int) -> set[str]:
            await joined[number].wait()
            messages = [await pubsub.publish(f"task-{number}.{n % 3}", n) for n in range(10)]
            messages += await pubsub.publish_many(Message(f"task-{number}", n) for n in range(10))
            return {message.id for message in messages}

        received, sent = await asyncio.gather(
            asyncio.gather(*(subscribe(n) for n in range(10))),
            asyncio.gather(*(publish(n) for n in range(10))),
        )
        assert received == sent

    async def test_concurrent_publishes_of_one_client_are_all_confirmed(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics", window=500) as stream:
            sent = await asyncio.gather(*(pubsub.publish(f"social.{n % 7}", n) for n in range(500)))
            received = await receive(stream, 500)
            assert {d.id for d in received} == {message.id for message in sent}
            assert len(received) == 500

    async def test_streams_come_and_go_while_messages_flow(self, bench: Bench) -> None:
        """Members leave with messages in hand and join again; nothing is lost."""
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="analytics")
        sent = await pubsub.publish_many(Message("social.post", n, key=str(n)) for n in range(60))
        wanted = {message.id for message in sent}
        acked: set[str] = set()
        for _ in range(3):
            async with pubsub.subscribe("social.#", subscription="analytics") as stream:
                received = await receive(stream, 20, ack=False)
                for delivery in received[::2]:
                    await delivery.ack()
                    acked.add(delivery.id)
        async with AsyncExitStack() as stack:
            stream = await stack.enter_async_context(pubsub.subscribe("social.#", subscription="analytics"))
            while acked != wanted:
                acked |= {d.id for d in await receive(stream, 1)}

    async def test_many_clients_in_one_process(self, bench: Bench) -> None:
        clients = [bench.client() for _ in range(8)]
        inboxes = [Inbox() for _ in clients]
        for client, inbox in zip(clients, inboxes, strict=True):
            client.subscriber("social.#")(inbox)
        await asyncio.gather(*(client.start() for client in clients))
        sent = await asyncio.gather(*(client.publish("social.post", "hello") for client in clients))
        ids = {message.id for message in sent}
        await until(lambda: all(ids == set(inbox.ids) for inbox in inboxes), "each client got each message")
