"""Required subscribers on ActiveMQ: other processes, killed ones, links that are lost (contract 5)."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, cast

import pytest
import pytest_asyncio

from pubsub_facade import AsyncPubSub, Message, PublishTimeout, SendFailed, Settings
from pubsub_facade.backends._activemq_demand import LEASE, MAX_AGE
from pubsub_facade.backends._activemq_forms import everything, nothing
from pubsub_facade.backends._activemq_record import Record
from pubsub_facade.backends._activemq_session import store
from pubsub_facade.backends._activemq_wire import ENTRY, OWNER, Letter
from pubsub_facade.backends._stomp import Frame
from pubsub_facade.backends.activemq import ActivemqBackend
from pubsub_facade.subscription import Definition, Subscription
from pubsub_facade.testing.conformance import eventually, receive
from pubsub_facade.testing.faults import Proxy, Victim
from tests.conftest import broker_settings

DEADLINE: Final = 45.0
SHORT_LEASE: Final = 3.0  # seconds, in the process that is killed
ROOT: Final = Path(__file__).parent.parent.parent
FORMS: Final = [
    pytest.param(form, marks=pytest.mark.broker(form)) for form in ("activemq", "activemq-virtual", "artemis")
]

_MEMBER: Final = """
import asyncio, sys
from pubsub_facade import AsyncPubSub
from pubsub_facade.backends import _activemq_demand, _activemq_receiver
from tests.conftest import broker_settings

async def main(form, namespace, lease, pattern):
    _activemq_demand.LEASE, _activemq_receiver.RENEWAL = float(lease), float(lease) / 3
    async with AsyncPubSub(broker_settings(form)(namespace=namespace)) as pubsub:
        async with pubsub.subscribe(pattern):
            print("ready", flush=True)
            await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


class Bench:
    """Clients of one namespace, in this process and in others."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.namespace = f"t{secrets.token_hex(4)}.req"
        self.declared: set[str] = set()
        self._stack = contextlib.AsyncExitStack()

    def settings(self, *, strict: bool = False, **overrides: Any) -> Settings:
        return broker_settings(self.form)(namespace=self.namespace, require_subscribers=strict, **overrides)

    async def client(self, *, strict: bool = False, **overrides: Any) -> AsyncPubSub:
        """Arguments: strict: it requires subscribers."""
        return await self._stack.enter_async_context(AsyncPubSub(self.settings(strict=strict, **overrides)))

    async def declare(self, client: AsyncPubSub, *patterns: str, subscription: str, **more: Any) -> None:
        self.declared.add(subscription)
        await client.declare(*patterns, subscription=subscription, **more)

    async def ephemeral_member(self, pattern: str) -> Victim:
        """A process with an ephemeral subscription, whose lease is a short one."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _MEMBER, self.form, self.namespace, str(SHORT_LEASE), pattern),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        self._stack.push_async_callback(process.wait)
        victim = Victim(process.pid)
        self._stack.callback(victim.kill)
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            assert await process.stdout.readline() == b"ready\n"
        return victim

    async def backend(self) -> ActivemqBackend:
        """The bare driver, to look at the entries."""
        backend = ActivemqBackend(self.settings())
        await backend.open()
        self._stack.push_async_callback(backend.close)
        return backend

    async def finish(self) -> None:
        await self._stack.aclose()
        async with AsyncPubSub(self.settings()) as client:
            for name in self.declared:
                await client.delete(name)


@pytest_asyncio.fixture(params=FORMS)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    bench = Bench(request.param)
    yield bench
    await bench.finish()


async def entries(backend: ActivemqBackend) -> list[Frame]:
    return await backend.form.sweep(backend.session, backend.form.demand, nothing)


async def refused(client: AsyncPubSub, topic: str, **headers: Any) -> bool:
    """Whether nobody is said to want it; any other failure is raised."""
    try:
        await client.publish(topic, 1, id="alone", headers=headers)
    except SendFailed as error:
        if "have no subscription (require_subscribers is set)" not in str(error):
            raise
        return error.fates == {"alone": "not stored"}
    return False


async def test_what_was_declared_a_moment_ago_elsewhere_is_never_overlooked(bench: Bench) -> None:
    strict, other = await bench.client(strict=True), await bench.client()
    for n in range(8):
        assert await refused(strict, f"t{n}.x")
        await bench.declare(other, f"t{n}.*", subscription=f"s{n}")
        assert not await refused(strict, f"t{n}.x")
        async with other.subscribe(f"e{n}.*"):
            assert not await refused(strict, f"e{n}.x")


async def test_the_filter_in_force_counts(bench: Bench) -> None:
    strict, other = await bench.client(strict=True), await bench.client()
    await bench.declare(other, "a", subscription="analytics", filter="n > 1")
    assert not await refused(strict, "a", n=2)
    assert await refused(strict, "a", n=1)
    await bench.declare(other, "a", subscription="analytics", filter="n < 2")
    assert not await refused(strict, "a", n=1)

    async def no_longer() -> bool:
        return await refused(strict, "a", n=2)

    await eventually(no_longer, "the filter of before counts no more")


async def test_a_deleted_subscription_leaves_no_entry_and_counts_no_more(bench: Bench) -> None:
    strict, other, backend = await bench.client(strict=True), await bench.client(), await bench.backend()
    for name, pattern in (("analytics", "a"), ("audit", "b"), ("audit", "b.#")):
        await bench.declare(other, pattern, subscription=name)
    assert [headers[OWNER] for headers, _ in await entries(backend)] == ["analytics", "audit"]
    assert not await refused(strict, "a")
    await other.delete("analytics")
    assert [headers[OWNER] for headers, _ in await entries(backend)] == ["audit"]
    deleted = time.monotonic()

    async def no_longer() -> bool:
        return await refused(strict, "a")

    await eventually(no_longer, "the deleted subscription counts no more")
    assert time.monotonic() - deleted < MAX_AGE + 5
    assert not await refused(strict, "b.c")


async def test_a_killed_ephemeral_member_counts_until_its_lease_is_over(bench: Bench) -> None:
    strict = await bench.client(strict=True)
    victim = await bench.ephemeral_member("a.*")
    end = time.monotonic() + 2 * SHORT_LEASE
    while time.monotonic() < end:  # it is renewed
        assert not await refused(strict, "a.b")
        await asyncio.sleep(0.1)
    assert await refused(strict, "b")
    victim.kill()

    async def no_longer() -> bool:
        return await refused(strict, "a.b")

    await eventually(no_longer, "the killed member's lease is over")


async def test_an_ephemeral_member_that_leaves_says_so(bench: Bench) -> None:
    strict, other = await bench.client(strict=True), await bench.client()
    async with other.subscribe("a.*"):
        assert not await refused(strict, "a.b")
    left = time.monotonic()

    async def no_longer() -> bool:
        return await refused(strict, "a.b")

    await eventually(no_longer, "the member has left")
    assert time.monotonic() - left < LEASE / 2, "it did not wait for its lease to end"


async def test_more_subscriptions_than_a_browser_shows_all_count(bench: Bench) -> None:
    strict, other, backend = await bench.client(strict=True), await bench.client(), await bench.backend()
    await backend.demand.prepare()
    crowd = Record(Definition.first(Subscription(None, ("z",)), 0.0), ("z",))
    await store(backend.session.main, [backend.demand.lease(f"~{n}", crowd) for n in range(450)])
    await bench.declare(other, "a.#", subscription="analytics")
    for _ in range(3):
        assert not await refused(strict, "a.b")
        assert await refused(strict, "b")
    await bench.declare(other, "a.#", subscription="analytics")
    owners = [headers[OWNER] for headers, _ in await entries(backend)]
    assert owners.count("analytics") == 1
    await backend.form.sweep(backend.session, backend.form.demand, everything)


async def test_all_of_many_entries_that_were_stored_a_moment_ago_are_read(bench: Bench) -> None:
    """On Classic what is persistent (a fence, too) may overtake what is not, and a long queue may come to a halt."""
    backend = await bench.backend()
    some = Record(Definition.first(Subscription(None, ("z",)), 0.0), ("z",))
    for turn in range(6):
        backend.demand.reset()
        backend.form.demand += f".{turn}"  # it happens to new queues
        await backend.demand.prepare()
        leases = [backend.demand.lease(f"~{n}", some) for n in range(595)]
        await store(backend.session.main, [*leases, backend.demand.entry("s", some)])
        began = time.monotonic()
        assert len(await entries(backend)) == 596
        assert time.monotonic() - began < 15
        await backend.form.sweep(backend.session, backend.form.demand, everything)


async def test_a_subscription_of_before_there_were_entries_gets_one_when_it_is_declared(bench: Bench) -> None:
    strict, other, backend = await bench.client(strict=True), await bench.client(), await bench.backend()
    await bench.declare(other, "a", subscription="analytics")
    await backend.form.sweep(backend.session, backend.form.demand, everything)
    assert await refused(strict, "a")
    await bench.declare(other, "a", subscription="analytics")
    assert not await refused(strict, "a")


async def test_an_entry_that_cannot_be_read_is_told_and_nothing_is_called_unwanted(bench: Bench) -> None:
    strict, backend = await bench.client(strict=True), await bench.backend()
    await backend.demand.prepare()
    bad = Letter(backend.form.queue_lines(backend.form.demand), {OWNER: "analytics", ENTRY: "1"}, b"no entry")
    await store(backend.session.main, [bad])
    with pytest.raises(SendFailed, match=r"cannot be known.*none was sent.*'analytics'") as caught:
        await strict.publish_many([Message("a", 1, id="one"), Message("b", 1, id="two")])
    assert caught.value.fates == {"one": "not stored", "two": "not stored"}
    await backend.demand.remove(await backend.demand.all_entries("analytics"))
    assert await refused(strict, "a")


async def test_a_lost_link_refuses_nothing(bench: Bench) -> None:
    """What waits is published when the link is back; what does not wait long enough fails as any publish does."""
    other = await bench.client()
    await bench.declare(other, "a", subscription="analytics")
    address = bench.settings().activemq.address
    with Proxy(*address.hosts[0]) as proxy:
        known = bench.settings().activemq
        section = {name: getattr(known, name) for name in known.model_fields_set}
        section["url"] = f"stomp://{address.username}:{address.secret}@{proxy.host}:{proxy.port}"
        section["heartbeat"] = 1.0
        strict = await bench.client(strict=True, activemq=section, connect_timeout=1.0)
        assert not await refused(strict, "a")
        proxy.swallow()
        with pytest.raises(PublishTimeout):
            await strict.publish("b", "to nobody", timeout=1)
        waiting = asyncio.create_task(strict.publish("a", "waited", timeout=DEADLINE))
        proxy.restore()
        proxy.cut()
        await waiting
        assert await refused(strict, "b")
    async with other.subscribe("a", subscription="analytics") as stream:
        assert [delivery.payload for delivery in await receive(stream, 2)] == [1, "waited"]


async def test_messages_keep_their_order_while_who_wants_them_is_asked(bench: Bench) -> None:
    strict, other = await bench.client(strict=True), await bench.client()
    async with other.subscribe("a", subscription="analytics", ordered=True) as stream:
        bench.declared.add("analytics")
        publishing = []
        for n in range(200):
            one = strict.publish("b" if n % 7 == 3 else "a", n, key="k")
            publishing.append(asyncio.create_task(one))
            await asyncio.sleep(0.001)  # several batches are under way
        outcomes = await asyncio.gather(*publishing, return_exceptions=True)
        expected = [n for n in range(200) if n % 7 != 3]
        assert [d.payload for d in await receive(stream, len(expected))] == expected
    failed = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, SendFailed)]
    assert failed == [n for n in range(200) if n % 7 == 3]


async def test_a_client_that_requires_nobody_reads_no_entries(bench: Bench) -> None:
    client = await bench.client()
    backend = cast(ActivemqBackend, client._supervisor.backend)
    await bench.declare(client, "a", subscription="analytics")
    await client.publish_many([Message("a", 1), Message("b", 1)])
    assert backend.demand._view is None
