"""A Kafka topic that is deleted and made again: all that is published on the new one is delivered (contract 3, 6).

What makes it hard is that the new one has the old one's name, and may be longer than what was read of the old
one. Members that could look while there is none would notice: so here they are held up meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer
from aiokafka.protocol.fetch import FetchRequest

from pubsub_facade import AsyncPubSub, Message
from pubsub_facade.backends import _kafka_fetch as fetching
from pubsub_facade.backends._kafka_cluster import READ
from pubsub_facade.backends._kafka_member import commit
from pubsub_facade.backends._kafka_partition import Progress
from pubsub_facade.stream import Stream
from pubsub_facade.testing.conformance import eventually, nothing_more, receive
from tests.integration import foreign
from tests.integration.test_kafka import Bench, wait_for

pytestmark = pytest.mark.broker("kafka")

OLD: Final = 12  # messages on the topic that is deleted
NEW: Final = 30  # on the one of its name
TOPIC: Final = "social.x"


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    for client in bench.clients:
        await client.close(grace=1)
    async with AsyncPubSub(bench.settings()) as client:
        for group in await bench.groups():
            await client.delete(group.removeprefix(f"{bench.names.root}."))
    await foreign.drop_kafka_topics(bench.settings())


def messages(word: str, count: int) -> list[Message]:
    """On all partitions."""
    return [Message(TOPIC, f"{word} {number}", key=str(number)) for number in range(count)]


OLDS: Final = sorted(message.payload for message in messages("old", OLD))
NEWS: Final = sorted(message.payload for message in messages("new", NEW))


async def delete_topic(bench: Bench) -> None:
    name = bench.names.topic(TOPIC)
    admin = await bench.admin()
    await admin.delete_topics([name])
    await admin.close()

    async def gone() -> bool:
        return name not in await bench.topics()

    await eventually(gone, "the topic is gone")


async def make_anew(bench: Bench, partitions: int = 3) -> None:
    """By clients of its own, as other processes would."""
    await delete_topic(bench)
    async with AsyncPubSub(bench.settings(partitions=partitions)) as client:
        await client.publish_many(messages("new", NEW))


def make_anew_meanwhile(bench: Bench) -> None:
    """The same, while nothing else in this process does a thing."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, make_anew(bench)).result()


async def all_new(*streams: Stream) -> list[Any]:
    """What was received, without what came twice, once all of the new topic has."""
    found: set[Any] = set()

    async def take(stream: Stream) -> None:
        async for delivery in stream:
            found.add(delivery.payload)
            await delivery.ack()

    async def all_came() -> bool:
        return found >= set(NEWS)

    tasks = [asyncio.create_task(take(stream)) for stream in streams]
    try:
        await eventually(all_came, "all of the new topic came")
    except AssertionError as error:
        raise AssertionError(f"{len(set(NEWS) - found)} of {NEW} did not come") from error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return sorted(found)


def shared_of(client: AsyncPubSub) -> Any:
    return client._supervisor.backend._shared  # type: ignore[attr-defined]


def by_id(_: pytest.MonkeyPatch) -> None:
    """As this broker does it."""


def by_name(patch: pytest.MonkeyPatch) -> None:
    """As brokers before Kafka 3.1 do it: they tell ids and take fetches by name only."""
    patch.setattr(fetching._Incremental, "prepare", FetchRequest.prepare)


@pytest.mark.parametrize("form", [by_id, by_name])
@pytest.mark.parametrize("members", [1, 2])
async def test_all_of_a_topic_made_anew_under_members_is_delivered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, form: Callable[[pytest.MonkeyPatch], None], members: int
) -> None:
    form(monkeypatch)
    client = bench.client()
    await client.publish(TOPIC, "before")
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        await client.publish_many(messages("old", OLD))
        assert sorted(await wait_for(stream, OLD)) == OLDS
        if members == 1:
            make_anew_meanwhile(bench)
            assert await all_new(stream) == NEWS
        else:
            async with bench.client().subscribe("social.#", subscription="s") as other:
                make_anew_meanwhile(bench)
                assert set(await all_new(stream, other)) == set(NEWS)
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        await nothing_more(stream)


@pytest.mark.parametrize("form", [by_id, by_name])
async def test_an_ephemeral_subscription_gets_all_of_a_topic_made_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, form: Callable[[pytest.MonkeyPatch], None]
) -> None:
    form(monkeypatch)
    client = bench.client()
    await client.publish(TOPIC, "before")
    async with bench.client().subscribe("social.#") as stream:
        await client.publish_many(messages("old", OLD))
        assert sorted(await wait_for(stream, OLD)) == OLDS
        make_anew_meanwhile(bench)
        assert await all_new(stream) == NEWS
        await nothing_more(stream)


async def test_settling_what_was_in_hand_of_the_old_topic_settles_nothing_of_the_new(bench: Bench) -> None:
    client = bench.client()
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        await client.publish_many(messages("old", OLD))
        held = await receive(stream, OLD, ack=False)
        make_anew_meanwhile(bench)
        for delivery in held:
            await delivery.ack()
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        assert await all_new(stream) == NEWS
        await nothing_more(stream)


async def test_a_commit_of_the_old_topic_says_nothing_of_the_new(bench: Bench) -> None:
    client = bench.client(partitions=1)
    await client.publish_many(messages("old", OLD))
    await client.declare("social.#", subscription="s")
    tp = (bench.names.topic(TOPIC), 0)
    cluster = shared_of(client).cluster
    await cluster.refresh(None)
    late = Progress(OLD, moves=1 << 60, topic_id=cluster.ids[tp[0]])
    await make_anew(bench, partitions=1)
    assert await commit(cluster, bench.names.group("s"), {tp: late}) == 0
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        assert await all_new(stream) == NEWS


async def test_a_commit_that_names_no_topic_id_is_obeyed(bench: Bench) -> None:
    """As an earlier version of this package wrote it."""
    client = bench.client(partitions=1)
    await client.declare("social.#", subscription="s")
    await client.publish_many(messages("old", OLD))
    said = {(bench.names.topic(TOPIC), 0): Progress(OLD - 2, moves=1 << 60)}
    assert await commit(shared_of(client).cluster, bench.names.group("s"), said) == 0
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        assert await wait_for(stream, 2) == [f"old {number}" for number in (OLD - 2, OLD - 1)]
        await nothing_more(stream)


async def test_where_a_subscription_began_on_the_old_topic_says_nothing_of_the_new(bench: Bench) -> None:
    """Whatever the clocks of those say who publish on the new one."""
    client = bench.client(partitions=1)
    await client.publish_many(messages("old", OLD))
    await client.declare("social.#", subscription="s")
    await delete_topic(bench)
    await client.publish(TOPIC, "made anew")
    yesterday = int((time.time() - 86400) * 1000)
    async with AIOKafkaProducer(bootstrap_servers=bench.servers) as producer:
        for number in range(NEW):
            await producer.send_and_wait(
                bench.names.topic(TOPIC), f"new {number}".encode(), timestamp_ms=yesterday
            )
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        found = [delivery.body for delivery in await receive(stream, NEW + 1)]
        assert found[1:] == [f"new {number}".encode() for number in range(NEW)]


async def test_a_fetch_by_the_id_of_the_old_topic_brings_nothing_of_the_new(bench: Bench) -> None:
    """So that nothing of it is read from the place that was reached in the old one."""
    client = bench.client(partitions=1)
    await client.publish_many(messages("old", OLD))
    tp = (bench.names.topic(TOPIC), 0)
    cluster = shared_of(client).cluster
    await cluster.refresh(None)
    old = cluster.ids[tp[0]]
    await make_anew(bench, partitions=1)
    await cluster.refresh(None)

    async def ask(id: str) -> fetching.Fetched:
        wanted = fetching.Session().request({tp: OLD}, 0, {tp[0]: id})
        response = await cluster.call(cluster.leader(tp), wanted, READ)
        return next(fetching.answers(response, {tp: OLD}, {tp[0]: id}))

    found = await ask(cluster.ids[tp[0]])
    assert (found.code, found.following) == (0, NEW)
    refused = await ask(old)
    assert refused.code != 0
    assert refused.size == 0
