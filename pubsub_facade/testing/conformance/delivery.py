"""Contract 3 to 7: who gets a message, how often, and what settling does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

import pytest

from pubsub_facade.errors import SendFailed, UnsupportedFeature
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import (
    QUIET,
    Bench,
    Inbox,
    Suite,
    eventually,
    nothing_more,
    receive,
)


class Delivering(Suite):
    """Each subscription its copy, members share, nothing lost, nothing settled unasked."""

    async def test_each_subscription_gets_each_message(self, bench: Bench) -> None:
        pubsub = bench.client()
        notifications, analytics = Inbox(), Inbox()
        pubsub.subscriber("social.post.*", subscription="notifications", concurrency=8)(notifications)
        pubsub.subscriber("social.#", subscription="analytics", concurrency=8)(analytics)
        await pubsub.start()
        sent = await pubsub.publish_many(
            Message(f"social.post.{'created' if n % 2 else 'liked'}", {"number": n}) for n in range(100)
        )
        for inbox in (notifications, analytics):
            await inbox.until_ids(message.id for message in sent)
            assert sorted(inbox.ids) == sorted(message.id for message in sent)
            assert sorted(payload["number"] for payload in inbox.payloads) == list(range(100))

    async def test_members_of_one_subscription_share_its_messages(self, bench: Bench) -> None:
        inboxes = [Inbox() for _ in range(3)]
        publisher = bench.client()
        for inbox in inboxes:
            member = bench.client()
            member.subscriber("social.#", subscription="analytics", concurrency=4)(inbox)
            await member.start()

        sent: list[Message] = []
        for start in range(0, 1000, 250):
            sent += await publisher.publish_many(
                Message("social.post", n, key=str(n)) for n in range(start, start + 250)
            )
            await eventually(_has(inboxes, len(sent)), f"{len(sent)} messages seen")
        seen = Counter(id for inbox in inboxes for id in inbox.ids)
        assert seen == Counter(message.id for message in sent)
        busy = [inbox for inbox in inboxes if inbox.seen]
        if bench.capabilities.competing:
            assert len(busy) > 1, "one member had all the work"
        else:
            assert len(busy) == 1, "standing by means that one member is active"

    async def test_when_a_member_leaves_another_one_goes_on(self, bench: Bench) -> None:
        first, second, publisher = bench.client(), bench.client(), bench.client()
        inboxes = Inbox(), Inbox()
        first.subscriber("social.#", subscription="analytics")(inboxes[0])
        second.subscriber("social.#", subscription="analytics")(inboxes[1])
        await first.start()
        await second.start()
        before = await publisher.publish_many(Message("social.post", n, key=str(n)) for n in range(20))
        await eventually(_has(inboxes, 20), "the first 20 messages seen")
        await first.close()
        mine = len(inboxes[1].seen)
        after = await publisher.publish_many(Message("social.post", n, key=str(n)) for n in range(20))
        await inboxes[1].until(mine + 20)
        assert {*inboxes[0].ids, *inboxes[1].ids} == {message.id for message in (*before, *after)}

    async def test_messages_published_while_no_member_is_connected_are_kept(self, bench: Bench) -> None:
        declarer = bench.client()
        await declarer.declare("social.#", subscription="analytics")
        await declarer.close()
        publisher = bench.client()
        sent = await publisher.publish_many(Message("social.post", n) for n in range(10))
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            assert {d.id for d in await receive(stream, 10)} == {m.id for m in sent}
        late = await publisher.publish("social.post", "while the member was away")
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            assert [d.id for d in await receive(stream, 1)] == [late.id]
            await nothing_more(stream)

    async def test_nothing_published_before_the_declaration_is_delivered(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.publish("social.post", "before")
        await pubsub.declare("social.#", subscription="analytics")
        after = await pubsub.publish("social.post", "after")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            assert [d.id for d in await receive(stream, 1)] == [after.id]
            await nothing_more(stream)

    async def test_an_ephemeral_subscription_gets_each_message_in_each_process(self, bench: Bench) -> None:
        one, two = bench.client(), bench.client()
        await one.publish("social.post", "before")
        async with one.subscribe("social.#") as first, two.subscribe("social.#") as second:
            sent = await one.publish_many(Message("social.post", n) for n in range(10))
            for stream in (first, second):
                received = await receive(stream, 10)
                assert {d.id for d in received} == {m.id for m in sent}
                assert {d.subscription for d in received} == {""}
        await two.publish("social.post", "while nobody listens")
        async with one.subscribe("social.#") as again:
            now = await two.publish("social.post", "now")
            assert [d.id for d in await receive(again, 1)] == [now.id]
            await nothing_more(again)

    async def test_two_ephemeral_subscriptions_of_one_client_both_get_each_message(
        self, bench: Bench
    ) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#") as first, pubsub.subscribe("social.*") as second:
            sent = await pubsub.publish("social.post", "hello")
            assert [d.id for d in await receive(first, 1)] == [sent.id]
            assert [d.id for d in await receive(second, 1)] == [sent.id]

    async def test_a_delivery_reads_like_the_message_that_was_published(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            before = datetime.now(UTC)
            sent = await pubsub.publish(
                "social.post.created", {"author": 42}, key="42", headers={"lang": "en"}, id="my-own-id"
            )
            (delivery,) = await receive(stream, 1)
        assert sent.id == "my-own-id"
        assert (delivery.id, delivery.topic, delivery.key) == ("my-own-id", "social.post.created", "42")
        assert (delivery.payload, delivery.body) == ({"author": 42}, b'{"author":42}')
        assert dict(delivery.headers) == {"lang": "en"}
        assert delivery.content_type == "application/json"
        assert delivery.subscription == "analytics"
        assert (delivery.attempt, delivery.redelivered) == (1, False)
        assert delivery.published_at is not None
        assert before.timestamp() - 0.01 <= delivery.published_at.timestamp() <= datetime.now(UTC).timestamp()
        assert delivery.published_at == sent.published_at

    async def test_a_message_is_settled_once_its_handler_returned(self, bench: Bench) -> None:
        inbox = Inbox()
        gate = asyncio.Event()

        async def handle(payload: int) -> None:
            if payload == 0:
                entered.set()
                await gate.wait()

        entered = asyncio.Event()
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", concurrency=4)(handle)
        await pubsub.start()
        sent = await pubsub.publish_many(Message("social.post", n) for n in range(3))
        await asyncio.wait_for(entered.wait(), 30)
        await pubsub.close(grace=0.2)  # the first handler does not end in time: its message was not settled
        again = bench.client()
        again.subscriber("social.#", subscription="analytics")(inbox)
        await again.start()
        await inbox.until_ids([sent[0].id])
        gate.set()

    async def test_a_settled_message_does_not_come_again(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish_many(Message("social.post", n) for n in range(20))
            received = await receive(stream, 20, ack=False)
            for delivery in reversed(received):
                await delivery.ack()
                await delivery.ack()  # the second settlement does nothing
                await delivery.release()
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            await nothing_more(stream)

    async def test_a_released_message_comes_again(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            sent = await pubsub.publish("social.post", "hello", headers={"lang": "en"}, key="k")
            (delivery,) = await receive(stream, 1, ack=False)
            await delivery.release()
            (again,) = await receive(stream, 1)
            assert (again.id, again.payload, again.key) == (sent.id, "hello", "k")
            assert dict(again.headers) == {"lang": "en"}
            await nothing_more(stream)

    async def test_leaving_a_stream_gives_back_what_was_not_settled(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            sent = await pubsub.publish_many(Message("social.post", n) for n in range(10))
            received = await receive(stream, 10, ack=False)
            for delivery in received[:4]:
                await delivery.ack()
        kept = {delivery.id for delivery in received[4:]}
        assert len(kept) == 6
        assert kept < {message.id for message in sent}
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            assert {d.id for d in await receive(stream, 6)} == kept
            await nothing_more(stream)

    async def test_settling_after_the_stream_has_ended_does_nothing(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            sent = await pubsub.publish("social.post", "hello")
            (old,) = await receive(stream, 1, ack=False)
        await old.ack()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            assert [d.id for d in await receive(stream, 1)] == [sent.id]

    async def test_at_most_a_window_of_deliveries_is_out_unsettled(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics", window=5) as stream:
            await pubsub.publish_many(Message("social.post", n) for n in range(12))
            out = await receive(stream, 5, ack=False)
            await nothing_more(stream)
            await out[2].ack()
            for delivery in (*out[:2], *out[3:]):
                await delivery.ack()
            rest = await receive(stream, 7)
            assert len({delivery.id for delivery in (*out, *rest)}) == 12

    async def test_publishing_with_no_subscription_is_fine(self, bench: Bench) -> None:
        sent = await bench.client().publish("social.post", "to nobody")
        assert sent.id

    async def test_publishing_to_nobody_is_refused_where_subscribers_are_required(self, bench: Bench) -> None:
        if not bench.capabilities.require_subscribers:
            with pytest.raises(UnsupportedFeature, match="require_subscribers"):
                bench.client(require_subscribers=True)
            return
        pubsub = bench.client(require_subscribers=True)
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            with pytest.raises(SendFailed) as caught:
                await pubsub.publish("other.topic", "to nobody", id="alone")
            assert caught.value.fates == {"alone": "not stored"}
            assert "'other.topic'" in str(caught.value)
            assert "pubsub declare" in str(caught.value)
            with pytest.raises(SendFailed) as caught:
                await pubsub.publish_many(
                    Message("social.post" if n % 2 else "other.topic", n, id=f"id-{n}") for n in range(10)
                )
            assert caught.value.fates == {f"id-{n}": "not stored" for n in range(0, 10, 2)}
            assert {d.id for d in await receive(stream, 5)} == {f"id-{n}" for n in range(1, 10, 2)}
            assert await pubsub.publish("social.post", "to somebody")
            await receive(stream, 1)
            async with pubsub.subscribe("other.#") as ephemeral:
                await pubsub.publish("other.topic", "to an ephemeral one")
                await receive(ephemeral, 1)

            async def refused() -> bool:
                try:
                    await pubsub.publish("other.topic", "to nobody again")
                except SendFailed:
                    return True
                return False

            await eventually(refused, "the ephemeral subscription gone with its member")

    async def test_the_backlog_tells_how_much_waits(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish_many(Message("social.post", n) for n in range(7))
        if not bench.capabilities.backlog:
            assert (await pubsub.backlog("analytics")).waiting is None
            return

        async def unsettled(count: int) -> bool:
            backlog = await pubsub.backlog("analytics")
            assert backlog.waiting is not None
            assert backlog.oldest is None or 0 <= backlog.oldest < 120
            return backlog.waiting + (backlog.in_flight or 0) == count

        await eventually(lambda: unsettled(7), "7 messages wait")
        async with pubsub.subscribe("social.#", subscription="analytics", window=3) as stream:
            out = await receive(stream, 3, ack=False)
            await eventually(lambda: unsettled(7), "7 messages wait or are in flight")
            in_flight = (await pubsub.backlog("analytics")).in_flight
            assert in_flight in (3, None)
            for delivery in out:
                await delivery.ack()
            await receive(stream, 4)
            await eventually(lambda: unsettled(0), "nothing waits")

    async def test_an_idle_member_gets_a_message_at_once(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish("social.post", "first")
            await receive(stream, 1)
            await nothing_more(stream)  # idle for QUIET seconds
            await pubsub.publish("social.post", "second")
            delivery = await stream.receive(10 * QUIET)
            assert delivery.payload == "second"


def _has(inboxes: Sequence[Inbox], count: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return len({id for inbox in inboxes for id in inbox.ids}) >= count

    return holds
