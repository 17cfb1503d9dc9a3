"""Required subscribers on a real Kafka: other processes, killed ones, links that are lost (contract 5)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer

from pubsub_facade import AsyncPubSub, ConnectionLost, Message, PublishTimeout, SendFailed
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_registry import Registry
from pubsub_facade.testing.conformance import eventually, receive
from pubsub_facade.testing.faults import Victim, free_port
from tests.conftest import broker_settings
from tests.integration import foreign

pytestmark = pytest.mark.broker("kafka")

DEADLINE: Final = 45.0
LEASE: Final = 5.0  # seconds, in the process that is killed; renewed every second
ROOT: Final = Path(__file__).parent.parent.parent

_PROCESS: Final = """
import asyncio, sys
from pubsub_facade import AsyncPubSub
from pubsub_facade.backends import _kafka_presence
from tests.conftest import broker_settings

async def main(verb, namespace, lease):
    _kafka_presence.LEASE, _kafka_presence.RENEW = float(lease), float(lease) / 5
    async with AsyncPubSub(broker_settings("kafka")(namespace=namespace)) as pubsub:
        for line in sys.stdin:
            pattern = line.strip()
            if verb == "declare":
                await pubsub.declare(pattern, subscription="s." + pattern)
                print("ready", flush=True)
            else:
                async with pubsub.subscribe(pattern) as stream:
                    print("ready", flush=True)
                    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


class Other:
    """A process that declares what it is told, or subscribes to it without a name."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.victim = Victim(process.pid)

    async def tell(self, pattern: str) -> None:
        """Return when it has done it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{pattern}\n".encode())
        await self.process.stdin.drain()
        async with asyncio.timeout(DEADLINE):
            assert await self.process.stdout.readline() == b"ready\n"


class Bench:
    """Clients of one namespace, in this process and in others."""

    def __init__(self) -> None:
        self.namespace = "r" + secrets.token_hex(4)
        self.registry = Names(self.namespace).registry
        self.clients: list[AsyncPubSub] = []
        self.others: list[Other] = []

    def client(self, *, strict: bool = False, **kafka: Any) -> AsyncPubSub:
        """Arguments: strict: it requires subscribers."""
        section = broker_settings("kafka")(namespace=self.namespace).kafka.model_copy(update=kafka)
        made = broker_settings("kafka")(
            namespace=self.namespace, require_subscribers=strict, kafka=section.model_dump()
        )
        client = AsyncPubSub(made)
        self.clients.append(client)
        return client

    async def other(self, verb: str) -> Other:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PROCESS, verb, self.namespace, str(LEASE)),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.others.append(Other(process))
        return self.others[-1]

    async def leases(self) -> dict[str, Any]:
        """The last record of each client in the registry, as any Kafka tool sees it; None: taken away."""
        servers = ",".join(broker_settings("kafka")(namespace=self.namespace).kafka.bootstrap_servers)
        process = await asyncio.create_subprocess_exec(
            *("kcat", "-C", "-b", servers, "-t", self.registry, "-e", "-q", "-Z", "-f", "%k\\t%s\\n"),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE):
            out, _ = await process.communicate()
        found = dict(line.split("\t", 1) for line in out.decode().splitlines())
        return {
            key: None if value == "NULL" else json.loads(value)
            for key, value in found.items()
            if key.startswith("here:")
        }


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    for other in bench.others:
        with contextlib.suppress(ProcessLookupError):
            other.process.kill()
        await other.process.wait()
        other.process._transport.close()  # type: ignore[attr-defined]
    for client in bench.clients:
        await client.close(grace=1)
    await foreign.drop_kafka_topics(broker_settings("kafka")(namespace=bench.namespace))


def backend_of(client: AsyncPubSub) -> Any:
    """The driver within."""
    return client._supervisor.backend


async def refused(client: AsyncPubSub, topic: str) -> bool:
    """Whether a publish is refused because nobody would get it."""
    try:
        await client.publish(topic, "x", id="x")
    except SendFailed as error:
        failure = error
    else:
        return False
    assert "1 of 1 messages have no subscription (require_subscribers is set)" in str(failure), failure
    assert failure.fates == {"x": "not stored"}
    return True


# -- two processes ------------------------------------------------------------------------------------


async def test_what_another_process_declared_a_moment_ago_is_never_refused(bench: Bench) -> None:
    strict = bench.client(strict=True, metadata_max_age=300.0)
    other = await bench.other("declare")
    for number in range(8):
        topic = f"social.{number}"
        assert await refused(strict, topic)
        await other.tell(topic)
        assert not await refused(strict, topic)


async def test_an_ephemeral_subscription_of_another_process_counts_until_its_process_is_killed(
    bench: Bench,
) -> None:
    strict = bench.client(strict=True)
    assert await refused(strict, "social.post")
    other = await bench.other("subscribe")
    await other.tell("social.*")
    began = time.monotonic()
    while time.monotonic() - began < 1.5 * LEASE:  # its lease is renewed
        assert not await refused(strict, "social.post")
        await asyncio.sleep(0.1)
    assert await refused(strict, "other.topic")
    other.victim.kill()
    killed = time.monotonic()

    async def gone() -> bool:
        return await refused(strict, "social.post")

    await eventually(gone, "the killed one's lease is over")
    assert time.monotonic() - killed < LEASE + 5


async def test_what_a_killed_process_left_is_taken_away_by_the_next_that_subscribes(bench: Bench) -> None:
    client = bench.client()
    async with client.subscribe("social.*"):
        ((own, mine),) = (await bench.leases()).items()
        assert mine["for"] == [[["social.*"], None]]
        servers = broker_settings("kafka")(namespace=bench.namespace).kafka.bootstrap_servers
        async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
            old = int(time.time() * 1000) - 3_600_000
            value = json.dumps(mine).encode()
            await producer.send_and_wait(bench.registry, value, b"here:killed", timestamp_ms=old)
    assert (await bench.leases())[own] is None
    strict = bench.client(strict=True)
    assert await refused(strict, "social.post"), "an hour old, and it counts"
    async with bench.client().subscribe("social.*"):
        assert (await bench.leases())["here:killed"] is None
        assert not await refused(strict, "social.post")
    assert set((await bench.leases()).values()) == {None}


# -- what counts --------------------------------------------------------------------------------------


async def test_filters_count_by_the_rules_in_force(bench: Bench) -> None:
    strict, other = bench.client(strict=True), bench.client()
    await other.declare("social.#", subscription="s", filter="n > 3")
    async with other.subscribe("social.#", filter="lang = 'en'") as stream:
        with pytest.raises(SendFailed) as caught:
            await strict.publish_many(
                Message("social.post", n, id=f"{n}", headers={"n": n, "lang": lang})
                for n, lang in ((1, "de"), (2, "en"), (5, "de"), (6, "en"))
            )
        assert caught.value.fates == {"1": "not stored"}
        assert {delivery.id for delivery in await receive(stream, 2)} == {"2", "6"}
    await other.declare("social.#", subscription="s", filter="n < 3")
    assert await strict.publish("social.post", 1, headers={"n": 1})

    async def gone() -> bool:
        try:
            await strict.publish("social.post", 5, headers={"n": 5})
        except SendFailed:
            return True
        return False

    await eventually(gone, "the old filter counts no more")


async def test_what_was_deleted_counts_no_more_once_the_registry_was_read_again(bench: Bench) -> None:
    strict, other = bench.client(strict=True, metadata_max_age=0.5), bench.client()
    await other.declare("social.#", subscription="s")
    assert not await refused(strict, "social.post")
    await other.delete("s")
    deleted = time.monotonic()

    async def gone() -> bool:
        return await refused(strict, "social.post")

    await eventually(gone, "the deleted one counts no more")
    assert time.monotonic() - deleted < 5


async def test_what_is_refused_makes_no_topic(bench: Bench) -> None:
    strict = bench.client(strict=True)
    assert await refused(strict, "social.post")
    names = await foreign.names_on_kafka(broker_settings("kafka")(namespace=bench.namespace))
    assert not [name for name in names if name.endswith("social.post")]


# -- when it cannot be known --------------------------------------------------------------------------


async def test_a_registry_that_cannot_be_read_refuses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = bench.client(strict=True)
    await strict.declare("social.#", subscription="s")

    async def lost(registry: Registry) -> None:
        raise ConnectionLost("kafka: no leader tells the offsets")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "refresh", lost)
        with pytest.raises(PublishTimeout, match="no leader tells the offsets"):
            await strict.publish("other.topic", 1, timeout=3)
        waiting = asyncio.ensure_future(strict.publish("social.post", "x", timeout=DEADLINE))
        await asyncio.sleep(0.5)
        assert not waiting.done()
    await waiting


async def test_a_publisher_that_lost_its_link_refuses_nothing_and_goes_on(bench: Bench) -> None:
    strict = bench.client(strict=True)
    async with bench.client().subscribe("social.#") as stream:
        await strict.publish("social.post", 0)
        cluster = backend_of(strict)._shared.cluster
        cluster._brokers = dict.fromkeys(cluster._brokers, ("127.0.0.1", free_port()))
        for conn in list(cluster._links.values()):
            conn.close()
        await strict.publish("social.post", 1, timeout=DEADLINE)
        assert {delivery.payload for delivery in await receive(stream, 2)} == {0, 1}
    assert await refused(strict, "other.topic")


async def test_a_subscriber_that_lost_its_link_is_there_again_under_the_lease_it_had(bench: Bench) -> None:
    strict, client = bench.client(strict=True), bench.client()
    async with client.subscribe("social.#") as stream:
        (lease,) = await bench.leases()
        (receiver,) = lost = set(backend_of(client)._receivers)
        receiver.fail(ConnectionLost("kafka: cut by a test"))

        async def back() -> bool:
            there, shared = backend_of(client)._receivers, backend_of(client)._shared
            return shared is not None and bool(there - lost) and there <= shared.presence._here.keys()

        await eventually(back, "it has subscribed again")
        assert await strict.publish("social.post", "on")
        assert [delivery.payload for delivery in await receive(stream, 1)] == ["on"]
        assert list(await bench.leases()) == [lease]
    assert await bench.leases() == {lease: None}


async def test_a_publisher_that_is_cancelled_while_the_registry_is_read_stops_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = bench.client(strict=True)
    assert await refused(strict, "social.post")
    reading, go_on = asyncio.Event(), asyncio.Event()
    refresh = Registry.refresh

    async def slow(registry: Registry) -> None:
        reading.set()
        await go_on.wait()
        await refresh(registry)

    monkeypatch.setattr(Registry, "refresh", slow)
    first = asyncio.ensure_future(strict.publish("social.post", 1))
    await reading.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go_on.set()
    assert await refused(strict, "social.post")
    await bench.client().declare("social.#", subscription="s")
    assert not await refused(strict, "social.post")


async def test_who_does_not_require_subscribers_never_reads_the_registry(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = bench.client()
    await client.declare("social.#", subscription="s")

    async def refresh(registry: Registry) -> None:
        raise AssertionError("the registry was read")

    monkeypatch.setattr(Registry, "refresh", refresh)
    await client.publish("social.post", 1)
    await client.publish_many(Message("other.topic", n) for n in range(10))
