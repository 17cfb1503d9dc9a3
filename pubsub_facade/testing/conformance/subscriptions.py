"""Contract 3: a subscription declared again, deleted, and beside others of its name in other namespaces."""

from __future__ import annotations

import asyncio

import pytest

from pubsub_facade.errors import ConfigError, FilterError, TopologyConflict
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import (
    Bench,
    NamesOnBroker,
    Suite,
    eventually,
    nothing_more,
    receive,
)


class Subscriptions(Suite):
    """What declaring again changes, and what deleting frees."""

    async def test_declaring_again_changes_nothing(self, bench: Bench) -> None:
        one, two = bench.client(), bench.client()
        await one.declare("social.#", subscription="analytics")
        sent = await one.publish("social.post", "hello")
        await asyncio.gather(*(client.declare("social.#", subscription="analytics") for client in (one, two)))
        async with two.subscribe("social.#", subscription="analytics") as stream:
            await one.declare("social.#", subscription="analytics")
            assert [d.id for d in await receive(stream, 1)] == [sent.id]
            await nothing_more(stream)

    async def test_other_patterns_count_from_now_on_and_what_waits_stays(self, bench: Bench) -> None:
        """Where the broker cannot do it, TopologyConflict is raised and nothing is lost."""
        pubsub = bench.client()
        await pubsub.declare("old.*", "both.*", subscription="analytics")
        await pubsub.publish_many([Message("old.1", 1), Message("both.1", 2), Message("new.1", "too early")])
        try:
            await pubsub.declare("new.*", "both.*", subscription="analytics")
        except TopologyConflict as conflict:
            _names_the_subscription(conflict)
            await pubsub.publish_many(
                [Message("old.2", 3), Message("both.2", 4), Message("new.2", "not taken")]
            )
            patterns = ("old.*", "both.*")
            expected = {"old.1", "both.1", "old.2", "both.2"}
        else:
            await pubsub.publish_many(
                [Message("old.2", "removed"), Message("both.2", 4), Message("new.2", 3)]
            )
            patterns = ("new.*", "both.*")
            expected = {"old.1", "both.1", "both.2", "new.2"}
        async with pubsub.subscribe(*patterns, subscription="analytics") as stream:
            received = await receive(stream, 4)
            assert {delivery.topic for delivery in received} == expected
            await nothing_more(stream)

    async def test_another_filter_counts_from_now_on_and_what_waits_stays(self, bench: Bench) -> None:
        pubsub = bench.client()

        async def publish(number: int) -> None:
            await pubsub.publish_many(
                Message("social.post", number, headers={"level": level}, id=f"{number}-{level}")
                for level in (1, 5)
            )

        await pubsub.declare("social.#", subscription="analytics", filter="level > 3")
        await publish(1)
        try:
            await pubsub.declare("social.#", subscription="analytics", filter="level < 3")
        except TopologyConflict as conflict:
            _names_the_subscription(conflict)
            current, expected = "level > 3", {"1-5", "2-5"}
        else:
            current, expected = "level < 3", {"1-5", "2-1"}
        await publish(2)
        async with pubsub.subscribe("social.#", subscription="analytics", filter=current) as stream:
            assert {delivery.id for delivery in await receive(stream, 2)} == expected
            await nothing_more(stream)

    async def test_a_member_with_more_patterns_joins_while_others_work(self, bench: Bench) -> None:
        """A rolling deploy: the old member goes on, the new one brings its pattern."""
        pubsub, other = bench.client(), bench.client()
        async with pubsub.subscribe("old.*", subscription="analytics") as old:
            await pubsub.publish("new.1", "too early")
            await pubsub.publish("old.1", 1)
            await receive(old, 1)
            try:
                async with other.subscribe("old.*", "new.*", subscription="analytics") as new:
                    sent = await pubsub.publish_many([Message("old.2", 2), Message("new.2", 3)])
                    got: set[str] = set()

                    async def both() -> bool:
                        for stream in (old, new):
                            try:
                                delivery = await stream.receive(0.05)
                            except TimeoutError:
                                continue
                            await delivery.ack()
                            got.add(delivery.id)
                        return got == {message.id for message in sent}

                    await eventually(both, "both messages received by either member")
            except TopologyConflict as conflict:
                _names_the_subscription(conflict)
                await pubsub.publish("old.2", 2)
                await receive(old, 1)

    async def test_deleting_a_subscription_removes_all_it_holds(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish_many(Message("social.post", n) for n in range(5))
            received = await receive(stream, 3, ack=False)
            await received[0].reject("dead before the end")
            await received[1].retry(60)
            assert (await pubsub.backlog("analytics")).declared
        await pubsub.delete("analytics")
        backlog = await pubsub.backlog("analytics")
        assert not backlog.declared
        assert {backlog.waiting, backlog.in_flight, backlog.dead} <= {0, None}
        await pubsub.publish("social.post", "to nobody")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            assert await pubsub.dead_letters("analytics").count() == 0
            now = await pubsub.publish("social.post", "now")
            assert [d.id for d in await receive(stream, 1)] == [now.id]
            await nothing_more(stream)

    async def test_deleting_a_subscription_frees_everything_on_the_broker(
        self, bench: Bench, names_on_broker: NamesOnBroker | None
    ) -> None:
        if names_on_broker is None:
            pytest.skip("the fixture names_on_broker is not given")
        pubsub, member, settings = bench.client(), bench.client(), bench.settings()
        await pubsub.declare("social.#", subscription="another")
        await pubsub.publish("social.post", "so that the topic is there")
        await pubsub.delete("another")
        before = await names_on_broker(settings)
        names = {"analytics": False, "timeline": True}
        for name, ordered in names.items():
            async with member.subscribe("social.#", subscription=name, ordered=ordered) as stream:
                await pubsub.publish_many(Message("social.post", n, key=str(n)) for n in range(4))
                received = await receive(stream, 3, ack=False)
                await received[0].retry(60)
                await received[1].reject("dead")
                await received[2].ack()
        await member.close()
        assert await names_on_broker(settings) != before, "the hook sees nothing of a subscription"
        for name in names:
            await pubsub.delete(name)
        left: set[str] = set()

        async def gone() -> bool:
            left.clear()
            left.update(await names_on_broker(settings) - before)
            return not left

        try:
            await eventually(gone, "nothing of the subscriptions is left")
        except AssertionError:
            raise AssertionError(f"left on the broker: {sorted(left)}") from None

    async def test_deleting_what_is_not_there_is_no_error(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.delete("never-declared")
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.delete("analytics")
        await pubsub.delete("analytics")

    async def test_deleting_a_subscription_leaves_the_others_alone(self, bench: Bench) -> None:
        pubsub = bench.client()
        names = ["analytics", "analytics.eu", "analytics-eu", "analytics.dead.eu", "dead"]
        for name in names:
            await pubsub.declare("social.#", subscription=name)
        sent = await pubsub.publish("social.post", "hello")
        await pubsub.delete("analytics")
        for name in names[1:]:
            async with pubsub.subscribe("social.#", subscription=name) as stream:
                assert [d.id for d in await receive(stream, 1)] == [sent.id]

    async def test_two_namespaces_do_not_see_each_other(self, bench: Bench) -> None:
        """Also where one's name begins with the other's, and the topics make up for the difference."""
        namespaces = [bench.namespace, f"{bench.namespace}.b", f"{bench.namespace}-b"]
        clients = [bench.client(namespace=namespace) for namespace in namespaces]
        for client in clients:
            await client.declare("#", subscription="analytics")
        for client, namespace in zip(clients, namespaces, strict=True):
            await client.publish_many(Message(topic, namespace) for topic in ("b.c", "c", "social.post"))
        for client, namespace in zip(clients, namespaces, strict=True):
            async with client.subscribe("#", subscription="analytics") as stream:
                received = await receive(stream, 3, ack=False)
                assert [d.payload for d in received] == [namespace] * 3
                assert sorted(d.topic for d in received) == ["b.c", "c", "social.post"]
                for delivery in received:
                    await delivery.reject(namespace)
                await nothing_more(stream)
        await clients[0].delete("analytics")
        for client, namespace in zip(clients[1:], namespaces[1:], strict=True):
            letters = [letter async for letter in client.dead_letters("analytics")]
            assert [letter.payload for letter in letters] == [namespace] * 3
            assert {letter.failure.error for letter in letters if letter.failure} == {namespace}

    async def test_what_cannot_be_declared_is_refused_before_anything_is_sent(self, bench: Bench) -> None:
        pubsub = bench.client()
        for name in ("", "a b", "a..b", "ä", "a/b", "s" * 101, "analytics.dead"):
            with pytest.raises(ConfigError, match="subscription name"):
                await pubsub.declare("social.#", subscription=name)
        with pytest.raises(FilterError):
            await pubsub.declare("social.#", subscription="analytics", filter="level >")
        with pytest.raises(ConfigError, match="max_attempts"):
            pubsub.subscribe("social.#", subscription="analytics", max_attempts=0)
        assert pubsub.state == "idle"

    async def test_two_handlers_of_one_subscription_with_different_patterns_are_refused(
        self, bench: Bench
    ) -> None:
        pubsub = bench.client()

        async def handle(payload: str) -> None:
            raise AssertionError("nothing is published here")

        pubsub.subscriber("social.#", subscription="analytics")(handle)
        with pytest.raises(ConfigError, match="analytics"):
            pubsub.subscriber("chat.#", subscription="analytics")(handle)


def _names_the_subscription(conflict: TopologyConflict) -> None:
    assert "analytics" in str(conflict)
    assert len(str(conflict)) > 40, "it says how to go on"
