"""What is special to Kafka: raw clients, where a subscription begins, rebalances, commits, what is left behind."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.structs import TopicPartition

from pubsub_facade import AsyncPubSub, Backoff, ConnectionLost, Delivery, Message, SendFailed, Settings
from pubsub_facade.backends._kafka_member import commit
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_partition import Progress
from pubsub_facade.backends._kafka_receiver import KafkaReceiver
from pubsub_facade.stream import Stream
from pubsub_facade.testing.conformance import eventually, nothing_more, receive
from tests.conftest import broker_settings
from tests.integration import foreign

pytestmark = pytest.mark.broker("kafka")

DEADLINE: Final = 45.0


class Bench:
    """Clients of one namespace, and raw ones beside them."""

    def __init__(self) -> None:
        self.namespace = "k" + secrets.token_hex(4)
        self.names = Names(self.namespace)
        self.clients: list[AsyncPubSub] = []

    def settings(self, **kafka: Any) -> Settings:
        made = broker_settings("kafka")(namespace=self.namespace)
        section = made.kafka.model_copy(update={"session_timeout": 6.0, **kafka})
        return broker_settings("kafka")(namespace=self.namespace, kafka=section.model_dump())

    @property
    def servers(self) -> str:
        return ",".join(self.settings().kafka.bootstrap_servers)

    def client(self, **kafka: Any) -> AsyncPubSub:
        client = AsyncPubSub(self.settings(**kafka))
        self.clients.append(client)
        return client

    async def kcat(self, *arguments: str, text: bytes = b"") -> bytes:
        process = await asyncio.create_subprocess_exec(
            "kcat",
            *("-b", self.servers, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE):
            out, err = await process.communicate(text)
        assert process.returncode == 0, err
        return out

    async def admin(self) -> AIOKafkaAdminClient:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.servers)
        await admin.start()
        return admin

    async def topics(self) -> set[str]:
        """The Kafka topics of this namespace."""
        admin = await self.admin()
        try:
            return {name for name in await admin.list_topics() if name.startswith(self.namespace)}
        finally:
            await admin.close()

    async def groups(self) -> set[str]:
        """The consumer groups of this namespace."""
        admin = await self.admin()
        try:
            return {
                name for name, *_ in await admin.list_consumer_groups() if name.startswith(self.namespace)
            }
        finally:
            await admin.close()

    async def commits(self, subscription: str) -> dict[TopicPartition, int]:
        """What the subscription's group has committed, as any Kafka tool sees it."""
        admin = await self.admin()
        try:
            found = await admin.list_consumer_group_offsets(self.names.group(subscription))
            return {tp: commit.offset for tp, commit in found.items() if commit.offset >= 0}
        finally:
            await admin.close()


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


async def wait_for(stream: Stream, count: int) -> list[Any]:
    """The payloads of the next deliveries, acked."""
    return [delivery.payload for delivery in await receive(stream, count)]


# -- raw clients --------------------------------------------------------------------------------------


async def test_kcat_reads_what_we_publish_as_the_wire_mapping_says(bench: Bench) -> None:
    sent = await bench.client().publish(
        "social.post", {"text": "hé"}, key="42", headers={"lang": "en", "stars": 5, "größe": 1.5}
    )
    format = "%k|%s|%h|%T"
    out = await bench.kcat("-C", "-t", f"{bench.namespace}.social.post", "-e", "-q", "-f", format)
    key, body, headers, timestamp = out.decode().split("|")
    assert (key, body) == ("42", '{"text":"hé"}')
    facts = (
        f"pubsub-id={sent.id}",
        "pubsub-content-type=application/json",
        "lang=en",
        "stars=5",
        "größe=1.5",
    )
    assert [fact for fact in facts if f",{fact}," not in f",{headers},"] == []
    assert sent.published_at is not None
    assert int(timestamp) == int(sent.published_at.timestamp() * 1000)


async def test_what_kcat_writes_is_delivered_whatever_it_holds(bench: Bench) -> None:
    client = bench.client()
    name = f"{bench.namespace}.social.post"
    await client.publish("social.post", "ours")
    async with client.subscribe("social.*", subscription="s") as stream:
        await bench.kcat(
            "-P", "-t", name, "-k", "k", "-H", "lang=en", "-H", "content-type=text/plain", text=b"x\n"
        )
        await bench.kcat("-P", "-t", name, "-Z", "-K:", text=b"tombstone:\n")
        await bench.kcat("-P", "-t", name, text=b"\xff\xfe\n")
        found = {delivery.key: delivery for delivery in await receive(stream, 3)}
    assert (found["k"].payload, found["k"].headers["lang"]) == ("x", "en")
    assert found["tombstone"].body == b""
    assert found[None].payload == b"\xff\xfe"
    assert len({delivery.id for delivery in found.values()}) == 3
    assert all(delivery.attempt == 1 and delivery.published_at for delivery in found.values())


async def test_a_header_name_that_is_not_utf8_holds_up_nothing(bench: Bench) -> None:
    client = bench.client(partitions=1)
    await client.publish("social.post", "before")
    async with client.subscribe("social.*", subscription="s") as stream:
        process = await asyncio.create_subprocess_exec(
            *(
                b"kcat",
                b"-P",
                b"-b",
                bench.servers.encode(),
                b"-t",
                bench.namespace.encode() + b".social.post",
            ),
            *(b"-H", b"\xff\xfe=v"),
            stdin=asyncio.subprocess.PIPE,
        )
        await process.communicate(b"odd\n")
        assert process.returncode == 0
        await client.publish("social.post", "behind")
        odd, behind = await receive(stream, 2)
    assert (odd.body, odd.headers) == (b"odd", {"\ufffd\ufffd": "v"})
    assert behind.payload == "behind"


async def test_a_foreign_message_keeps_its_id_over_retries_and_in_the_dead_letters(bench: Bench) -> None:
    client = bench.client()
    async with client.subscribe(
        "social.*", subscription="s", max_attempts=2, backoff=Backoff(0.05)
    ) as stream:
        await bench.kcat("-P", "-t", f"{bench.namespace}.social.post", "-k", "k", text=b"x\n")
        (first,) = await receive(stream, 1, ack=False)
        await first.retry()
        (second,) = await receive(stream, 1, ack=False)
        assert (second.id, second.attempt, second.key, second.topic) == (first.id, 2, "k", "social.post")
        await second.retry()
        letters = [letter async for letter in client.dead_letters("s")]
    assert [(letter.id, letter.body, letter.key) for letter in letters] == [(first.id, b"x", "k")]


async def test_forged_fields_of_copies_are_not_believed(bench: Bench) -> None:
    client = bench.client()
    await client.publish("social.post", "ours")
    async with client.subscribe("social.*", subscription="s") as stream:
        forged = ["-H", "pubsub-attempt=99", "-H", "pubsub-topic=other", "-H", "pubsub-failure={}"]
        await bench.kcat("-P", "-t", f"{bench.namespace}.social.post", *forged, text=b"x\n")
        (delivery,) = await receive(stream, 1)
    assert (delivery.attempt, delivery.topic, delivery.failure) == (1, "social.post", None)


async def test_a_key_has_the_partition_that_kafkas_other_clients_give_it(bench: Bench) -> None:
    client = bench.client(partitions=7)
    keys = [f"key-{number}-ü" for number in range(40)]
    await client.publish_many(Message("social.post", key, key=key) for key in keys)
    lines = "".join(f"{key}:theirs\n" for key in keys).encode()
    topic = f"{bench.namespace}.social.post"
    await bench.kcat("-P", "-t", topic, "-K:", "-X", "topic.partitioner=murmur2_random", text=lines)
    out = await bench.kcat("-C", "-t", topic, "-e", "-q", "-f", "%k %p\n")
    places = defaultdict(set)
    for line in out.decode().splitlines():
        key, number = line.rsplit(" ", 1)
        places[key].add(number)
    assert sorted(places) == sorted(keys)
    assert all(len(numbers) == 1 for numbers in places.values()), places
    assert len(set.union(*places.values())) > 1


async def test_what_a_transaction_aborted_is_not_delivered(bench: Bench) -> None:
    client = bench.client(partitions=1)
    await client.publish("social.post", "before")
    async with client.subscribe("social.*", subscription="s") as stream:
        producer = AIOKafkaProducer(bootstrap_servers=bench.servers, transactional_id=bench.namespace)
        await producer.start()
        try:
            for text in (b"aborted", b"committed"):
                await producer.begin_transaction()
                await producer.send_and_wait(f"{bench.namespace}.social.post", text)
                await (producer.abort_transaction if text == b"aborted" else producer.commit_transaction)()
        finally:
            await producer.stop()
        (delivery,) = await receive(stream, 1)
        assert delivery.body == b"committed"
        await nothing_more(stream)


# -- names --------------------------------------------------------------------------------------------


async def test_topics_that_kafka_would_confuse_are_different_topics(bench: Bench) -> None:
    client = bench.client()
    async with (
        client.subscribe("a.b", subscription="dots") as dots,
        client.subscribe("#", subscription="all") as all_,
    ):
        await client.publish("a.b", "dots")
        await client.publish("a_b", "underscore")
        await bench.client().publish("a_b", "again")
        assert await wait_for(dots, 1) == ["dots"]
        await nothing_more(dots)
        found = {(delivery.topic, delivery.payload) for delivery in await receive(all_, 3)}
    assert found == {("a.b", "dots"), ("a_b", "underscore"), ("a_b", "again")}


async def test_subscriptions_that_kafka_would_confuse_are_different_subscriptions(bench: Bench) -> None:
    client = bench.client()
    for name in ("a.b", "a_b", "a-b"):
        await client.declare("t", subscription=name)
    await client.publish("t", 1)
    for name in ("a.b", "a_b", "a-b"):
        async with client.subscribe("t", subscription=name) as stream:
            (delivery,) = await receive(stream, 1, ack=False)
            await delivery.reject("no")
        assert await client.dead_letters(name).count() == 1


async def test_the_longest_names_work(bench: Bench) -> None:
    bench.namespace = bench.namespace.ljust(60, "n")
    bench.names = Names(bench.namespace)
    topic = "t" * 199
    client = bench.client()
    name = "s" * 100
    async with client.subscribe("#", subscription=name) as stream:
        await client.publish(topic + "1", 1)
        await client.publish(topic + "2", 2, key="k", headers={"h": 1})
        found = {(delivery.topic, delivery.payload) for delivery in await receive(stream, 2)}
    assert found == {(topic + "1", 1), (topic + "2", 2)}
    async with bench.client().subscribe(topic + "2", subscription="other") as stream:
        await client.publish(topic + "1", 3)
        await client.publish(topic + "2", 4)
        assert await wait_for(stream, 1) == [4]


def test_names_of_one_namespace_are_never_another_ones() -> None:
    a, ab = Names("a"), Names("a.b")
    assert a.topic("b.c") != ab.topic("c")
    assert a.parse(ab.topic("c")) is None
    assert ab.parse(a.topic("b.c")) is None
    assert a.parse(a.topic("b.c")) == "b.c"
    assert ab.parse(ab.topic("c")) == "c"
    own = [a.registry, a.retry("s"), a.dead("s"), a.alias("t")]
    assert [a.parse(name) for name in own] == [None] * 4
    assert a.group("b.c") != ab.group("c")


# -- where a subscription begins ----------------------------------------------------------------------


async def test_nothing_from_before_the_declaration_comes_and_all_from_after_it(bench: Bench) -> None:
    client = bench.client()
    await client.publish_many(Message("social.old", f"before {number}") for number in range(20))
    await client.declare("social.#", subscription="s")
    await client.publish_many(Message("social.old", f"after {number}") for number in range(20))
    await client.publish("social.new", "new topic")
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        found = await wait_for(stream, 21)
        await nothing_more(stream)
    assert sorted(found) == sorted([*(f"after {number}" for number in range(20)), "new topic"])


async def test_a_topic_that_another_client_makes_later_is_read_from_its_beginning(bench: Bench) -> None:
    async with bench.client(metadata_max_age=0.3).subscribe("social.#", subscription="s") as stream:
        for number in range(5):
            await bench.kcat("-P", "-t", f"{bench.namespace}.social.later", text=f"{number}\n".encode())
        found = [delivery.body for delivery in await receive(stream, 5)]
    assert sorted(found) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_pattern_added_while_members_run_counts_from_then_on(bench: Bench) -> None:
    client, other = bench.client(), bench.client(metadata_max_age=0.3)
    await client.publish("added.x", "before")
    async with other.subscribe("social.#", subscription="s") as stream:
        await client.publish("social.x", "first")
        assert await wait_for(stream, 1) == ["first"]
        await client.declare("social.#", "added.#", subscription="s")
        await client.publish("added.x", "after")
        await client.publish("added.y", "new topic")
        assert sorted(await wait_for(stream, 2)) == ["after", "new topic"]
        await nothing_more(stream)


async def test_a_pattern_removed_while_members_run_stops_and_what_waits_stays(bench: Bench) -> None:
    client = bench.client()
    await client.declare("keep.#", "drop.#", subscription="s")
    await client.publish("drop.x", "waits")
    await client.declare("keep.#", subscription="s")
    await client.publish("drop.x", "too late")
    await client.publish("keep.x", "kept")
    async with bench.client().subscribe("keep.#", subscription="s") as stream:
        assert sorted(await wait_for(stream, 2)) == ["kept", "waits"]
        await nothing_more(stream)


async def test_a_topic_made_anew_is_read_from_its_beginning(bench: Bench) -> None:
    client = bench.client(partitions=1)
    await client.publish_many(Message("social.x", number) for number in range(5))
    await client.declare("social.#", subscription="s")
    admin = await bench.admin()
    await admin.delete_topics([f"{bench.namespace}.social.x"])
    await admin.close()

    async def gone() -> bool:
        return f"{bench.namespace}.social.x" not in await bench.topics()

    await eventually(gone, "the topic is gone")
    await client.publish_many(Message("social.x", f"anew {number}") for number in range(9))
    async with bench.client().subscribe("social.#", subscription="s") as stream:
        assert sorted(await wait_for(stream, 9)) == [f"anew {number}" for number in range(9)]


async def test_a_topic_deleted_under_a_running_member_is_found_again(bench: Bench) -> None:
    client = bench.client(metadata_max_age=0.3)
    async with client.subscribe("social.#", subscription="s") as stream:
        await client.publish("social.x", "first")
        assert await wait_for(stream, 1) == ["first"]
        admin = await bench.admin()
        await admin.delete_topics([f"{bench.namespace}.social.x"])
        await admin.close()
        await client.publish("social.x", "second")
        await client.publish("social.y", "beside")
        assert sorted(await wait_for(stream, 2)) == ["beside", "second"]


async def test_a_subscription_deleted_and_declared_again_begins_anew(bench: Bench) -> None:
    client = bench.client()
    async with client.subscribe("social.x", subscription="s") as stream:
        await client.publish("social.x", "first")
        assert await wait_for(stream, 1) == ["first"]
    await client.publish("social.x", "missed")
    await client.delete("s")
    await client.declare("social.x", subscription="s")
    await client.publish("social.x", "second")
    async with client.subscribe("social.x", subscription="s") as stream:
        assert await wait_for(stream, 1) == ["second"]
        await nothing_more(stream)


async def test_what_an_earlier_subscription_of_the_name_committed_counts_for_nothing(bench: Bench) -> None:
    client = bench.client(partitions=1)
    await client.publish("social.x", "before")
    await client.declare("social.x", subscription="s")
    shared = client._supervisor.backend._shared  # type: ignore[attr-defined]
    stale = {(f"{bench.namespace}.social.x", 0): Progress(0, moves=1)}
    assert await commit(shared.cluster, bench.names.group("s"), stale) == 0
    await client.publish("social.x", "after")
    async with client.subscribe("social.x", subscription="s") as stream:
        assert await wait_for(stream, 1) == ["after"]
        await nothing_more(stream)


async def test_what_another_tool_commits_is_obeyed(bench: Bench) -> None:
    client = bench.client(partitions=1)
    await client.publish_many(Message("social.x", number) for number in range(4))
    await client.declare("social.x", subscription="s")
    admin = AIOKafkaConsumer(bootstrap_servers=bench.servers, group_id=bench.names.group("s"))
    tp = TopicPartition(f"{bench.namespace}.social.x", 0)
    admin.assign([tp])
    await admin.start()
    await admin.commit({tp: 2})
    await admin.stop()
    async with client.subscribe("social.x", subscription="s") as stream:
        assert await wait_for(stream, 2) == [2, 3]


async def test_a_seek_moves_members_that_run(bench: Bench) -> None:
    client, other = bench.client(), bench.client(metadata_max_age=0.3)
    await client.publish("social.x", "history")
    async with other.subscribe("social.x", subscription="s") as stream:
        await client.publish("social.x", "first")
        assert await wait_for(stream, 1) == ["first"]
        between = datetime.now(UTC)
        await client.publish("social.x", "second")
        assert await wait_for(stream, 1) == ["second"]
        await client.seek("s", "beginning")
        assert sorted(await wait_for(stream, 3)) == ["first", "history", "second"]
        await client.seek("s", between)
        assert await wait_for(stream, 1) == ["second"]
        await nothing_more(stream)


# -- members ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
async def test_rebalances_under_load_lose_nothing_repeat_nothing_and_keep_order(
    bench: Bench, ordered: bool
) -> None:
    total = 600
    publisher = bench.client()
    await publisher.declare("social.#", subscription="s", ordered=ordered)
    seen: dict[str, list[int]] = defaultdict(list)
    at_work: set[str] = set()

    async def handle(number: int, delivery: Delivery) -> None:
        key = delivery.key or ""
        assert not ordered or key not in at_work, "two messages of a key at a time"
        at_work.add(key)
        seen[key].append(number)
        await asyncio.sleep(0.02)
        at_work.discard(key)

    async def member() -> AsyncPubSub:
        client = bench.client()
        client.subscriber("social.#", subscription="s", ordered=ordered, concurrency=4)(handle)
        await client.start()
        return client

    async def handled(count: int) -> None:
        async def so_many() -> bool:
            return sum(len(numbers) for numbers in seen.values()) >= count

        await eventually(so_many, f"{count} messages handled")

    await publisher.publish_many(
        Message(f"social.{number % 2}", number, key=str(number % 20)) for number in range(total)
    )
    members = [await member()]
    for turn in range(4):
        await handled(total * (turn + 1) // 8)
        if turn % 2:
            await members.pop(0).close()
        else:
            members.append(await member())
    await handled(total)
    assert sorted(number for numbers in seen.values() for number in numbers) == list(range(total))
    if ordered:
        assert [key for key, numbers in seen.items() if numbers != sorted(numbers)] == []


async def test_what_waits_in_a_member_goes_to_another_and_is_not_handled_twice(bench: Bench) -> None:
    seen: list[int] = []

    async def handle(number: int) -> None:
        seen.append(number)
        await asyncio.sleep(0.3)

    async def member() -> None:
        client = bench.client()
        client.subscriber("social.x", subscription="s")(handle)
        await client.start()

    publisher = bench.client()
    await publisher.declare("social.x", subscription="s")
    await publisher.publish_many(Message("social.x", number, key=str(number)) for number in range(45))
    await member()  # its window takes all 45, which is more than it handles while a rebalance waits for it

    async def begun() -> bool:
        return bool(seen)

    await eventually(begun, "the first is handled")
    await member()

    async def all_seen() -> bool:
        return set(seen) == set(range(45)) and (await publisher.backlog("s")).in_flight == 0

    await eventually(all_seen, "all are handled")
    assert sorted(seen) == list(range(45))


async def test_the_commit_stays_below_what_is_not_settled_and_the_rest_does_not_come_again(
    bench: Bench,
) -> None:
    client = bench.client(partitions=1)
    await client.declare("social.x", subscription="s")
    await client.publish_many(Message("social.x", number) for number in range(10))
    tp = TopicPartition(f"{bench.namespace}.social.x", 0)
    async with bench.client().subscribe("social.x", subscription="s") as stream:
        received = await receive(stream, 10, ack=False)
        for delivery in received:
            if delivery.payload not in (3, 7):
                await delivery.ack()

        async def committed() -> bool:
            return (await bench.commits("s")).get(tp) == 3

        await eventually(committed, "the low-water mark is committed")
    assert (await bench.commits("s"))[tp] == 3
    async with bench.client().subscribe("social.x", subscription="s") as stream:
        again = await receive(stream, 2)
        await nothing_more(stream)
    assert [(delivery.payload, delivery.redelivered) for delivery in again] == [(3, True), (7, True)]


async def test_a_handler_slower_than_the_session_keeps_its_partitions(bench: Bench) -> None:
    client = bench.client(session_timeout=6.0)
    started: list[float] = []
    done = asyncio.Event()

    async def handle(payload: str) -> None:
        started.append(time.monotonic())
        await asyncio.sleep(8)
        done.set()

    client.subscriber("social.x", subscription="s")(handle)
    await client.start()
    await client.publish("social.x", "slow")
    async with asyncio.timeout(DEADLINE):
        await done.wait()

    async def settled() -> bool:
        backlog = await client.backlog("s")
        return not backlog.waiting and not backlog.in_flight

    await eventually(settled, "it is settled")
    assert len(started) == 1


async def test_a_member_that_leaves_hands_over_at_once(bench: Bench) -> None:
    client = bench.client()
    await client.declare("social.x", subscription="s")
    async with bench.client().subscribe("social.x", subscription="s") as first:
        await client.publish("social.x", 1)
        await receive(first, 1, ack=False)
    began = time.monotonic()
    async with bench.client().subscribe("social.x", subscription="s") as second:
        (delivery,) = await receive(second, 1)
    assert delivery.payload == 1
    assert time.monotonic() - began < 5.0, "it waited for a session to end"


# -- what waits and what is left ----------------------------------------------------------------------


async def test_a_long_delay_is_made_of_shorter_ones(bench: Bench) -> None:
    client = bench.client()
    async with client.subscribe("social.x", subscription="s") as stream:
        await client.publish("social.x", "late", key="k", headers={"n": 1})
        await client.publish("social.x", "later")
        by_payload = {delivery.payload: delivery for delivery in await receive(stream, 2, ack=False)}
        began = time.monotonic()
        await by_payload["later"].retry(4.5)
        await by_payload["late"].retry(2.4)
        (late,) = await receive(stream, 1)
        assert 2.4 <= time.monotonic() - began < 3.4
        (later,) = await receive(stream, 1)
        assert 4.5 <= time.monotonic() - began < 5.7
    assert (late.payload, late.key, late.headers, late.attempt) == ("late", "k", {"n": 1}, 2)
    assert (later.payload, later.attempt) == ("later", 2)


async def test_delete_leaves_no_group_and_no_topic_but_the_published_one(bench: Bench) -> None:
    client = bench.client()
    async with client.subscribe("social.x", subscription="s") as stream:
        await client.publish("social.x", 1)
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.reject("no")
    assert bench.names.dead("s") in await bench.topics()
    assert bench.names.group("s") in await bench.groups()
    await client.delete("s")

    async def freed() -> bool:
        return await bench.topics() == {f"{bench.namespace}.social.x", bench.names.registry}

    await eventually(freed, "only the published topic and the registry are left")
    assert await bench.groups() == set()


async def test_an_ephemeral_subscription_leaves_no_more_than_the_word_that_it_is_gone(bench: Bench) -> None:
    client = bench.client()
    async with client.subscribe("social.x") as stream:
        await client.publish("social.x", 1)
        assert await wait_for(stream, 1) == [1]
    assert await bench.groups() == set()
    assert await bench.topics() == {f"{bench.namespace}.social.x", bench.names.registry}
    out = await bench.kcat("-C", "-t", bench.names.registry, "-e", "-q", "-Z", "-f", "%k|%s\n")
    written, gone = (line.split("|", 1) for line in out.decode().splitlines())
    assert written[0].startswith("here:")
    assert gone == [written[0], "NULL"]


async def test_asking_for_what_is_not_there_creates_nothing(bench: Bench) -> None:
    client = bench.client()
    assert (await client.backlog("nobody")).waiting == 0
    assert await client.dead_letters("nobody").count() == 0
    await client.delete("nobody")
    assert await bench.topics() == set()
    async with client.subscribe("social.x"):
        assert await bench.topics() == {bench.names.registry}


async def test_a_message_the_topic_is_too_small_for_is_refused_alone(bench: Bench) -> None:
    admin = await bench.admin()
    configs = {"max.message.bytes": "5000"}
    await admin.create_topics([NewTopic(f"{bench.namespace}.social.x", 1, 1, topic_configs=configs)])
    await admin.close()
    client = bench.client()
    await client.declare("social.x", subscription="s")
    messages = [Message("social.x", b"x" * size) for size in (1000, 9000, 1000, 3000)]
    with pytest.raises(SendFailed) as caught:
        await client.publish_many(messages)
    assert list(caught.value.fates.values()) == ["not stored"]
    async with client.subscribe("social.x", subscription="s") as stream:
        assert sorted(len(delivery.body) for delivery in await receive(stream, 3)) == [1000, 1000, 3000]
        await client.publish("social.x", b"on")
        assert await wait_for(stream, 1) == [b"on"]


async def test_a_member_is_told_even_where_closing_its_link_takes_too_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_facade.backends.kafka.CLOSE_TIMEOUT", 0.1)
    client = bench.client()
    async with client.subscribe("#", subscription="audit") as stream:
        assert stream._consumer is not None
        receiver = stream._consumer._receiver
        assert isinstance(receiver, KafkaReceiver)
        monkeypatch.setattr(receiver._fetcher, "close", asyncio.Event().wait)
        supervisor = client._supervisor
        await supervisor.lost(supervisor.epoch, ConnectionLost("cut"))
        sent = await client.publish("a.b", "after")
        assert (await stream.receive(20)).id == sent.id
