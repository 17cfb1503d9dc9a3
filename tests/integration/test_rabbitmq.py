"""What is RabbitMQ's own: the wire as raw clients see it, what is left on the broker, what it refuses."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import subprocess
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pika
import pytest

from brokers import ports
from pubsub_facade import AsyncPubSub, Delivery, Message, Settings
from pubsub_facade.errors import AuthenticationFailed, ConnectionFailed, SendFailed, TopologyConflict
from pubsub_facade.testing.conformance import Inbox, eventually, nothing_more, receive
from pubsub_facade.testing.faults import Proxy
from tests.conftest import FOLDER, broker_settings
from tests.integration.foreign import names_on_rabbitmq

pytestmark = pytest.mark.broker("rabbitmq")


class Desk:
    """Clients in a namespace of their own, and a raw channel beside them; leaves nothing on the broker."""

    def __init__(self) -> None:
        self._make = broker_settings("rabbitmq")
        self.namespace = f"t{uuid.uuid4().hex[:8]}"
        self.url = self._make().rabbitmq.url.get_secret_value()
        self._stack = AsyncExitStack()

    def settings(self, url: str | None = None, **overrides: Any) -> Settings:
        if url is not None:
            overrides["rabbitmq"] = {"url": url, **overrides.get("rabbitmq", {})}
        return self._make(**{"namespace": self.namespace, **overrides})

    async def client(self, url: str | None = None, **overrides: Any) -> AsyncPubSub:
        return await self._stack.enter_async_context(AsyncPubSub(self.settings(url, **overrides)))

    def raw(self) -> Any:
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        self._stack.callback(connection.close)
        channel = connection.channel()
        channel.confirm_delivery()
        return channel

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call the management plugin."""
        port = (ports.recorded(FOLDER / "rabbitmq") or ports.DEFAULTS["rabbitmq"])["management"]
        address = self.settings().rabbitmq.address
        token = base64.b64encode(f"{address.username}:{address.secret}".encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def bindings(self, queue: str) -> set[str]:
        found = self.api("GET", f"queues/%2F/{quote(queue, safe='')}/bindings")
        return {each["routing_key"] for each in found if each["source"]}

    async def finish(self) -> None:
        await self._stack.aclose()
        for kind in ("queues", "exchanges"):
            for each in self.api("GET", f"{kind}?columns=name"):
                if each["name"].startswith(self.namespace):
                    try:
                        self.api("DELETE", f"{kind}/%2F/{quote(each['name'], safe='')}")
                    except HTTPError as error:
                        if error.code != 404:  # what goes with its connection is gone meanwhile
                            raise


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    await desk.finish()


async def run_tool(*command: str) -> bytes:
    """What a program of amqp-tools prints; fails if it fails or is not installed."""
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=20, check=True)
    return done.stdout


# -- the wire --------------------------------------------------------------------------------------


async def test_a_raw_client_reads_what_we_publish(desk: Desk) -> None:
    pubsub, raw = await desk.client(), desk.raw()
    await pubsub.ping()
    queue = raw.queue_declare(f"{desk.namespace}-raw", exclusive=True).method.queue
    raw.queue_bind(queue, desk.namespace, "social.#")
    sent = await pubsub.publish(
        "social.post",
        {"text": "hello"},
        key="42",
        headers={"lang": "en", "n": 3, "ok": True, "x-forged": "x"},
    )
    method, properties, body = raw.basic_get(queue, auto_ack=True)
    assert (method.routing_key, json.loads(body)) == ("social.post", {"text": "hello"})
    assert (properties.message_id, properties.content_type) == (sent.id, "application/json")
    assert (properties.delivery_mode, properties.timestamp) == (2, int(sent.timestamp or 0))
    assert properties.headers == {
        "lang": "en",
        "n": 3,
        "ok": True,
        "pubsub-h-x-forged": "x",
        "pubsub-key": "42",
        "pubsub-published": repr(sent.timestamp),
    }


async def test_amqp_tools_and_we_understand_each_other(desk: Desk) -> None:
    pubsub, raw = await desk.client(), desk.raw()
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        await run_tool(
            "amqp-publish",
            f"--url={desk.url}",
            f"--exchange={desk.namespace}",
            "--routing-key=social.post",
            "--body=from outside",
        )
        (delivery,) = await receive(stream, 1)
        assert (delivery.topic, delivery.body, delivery.id) == ("social.post", b"from outside", "")
    queue = f"{desk.namespace}-tools"
    raw.queue_declare(queue)
    raw.queue_bind(queue, desk.namespace, "social.#")
    await pubsub.publish("social.post", b"\x00from inside\xff")
    got = await run_tool("amqp-get", f"--url={desk.url}", f"--queue={queue}")
    assert got == b"\x00from inside\xff"


async def test_headers_that_steer_the_broker_are_only_headers(desk: Desk) -> None:
    """``CC`` would send copies elsewhere, ``x-death`` and ``x-delivery-count`` would change what is counted."""
    pubsub, raw = await desk.client(), desk.raw()
    elsewhere = raw.queue_declare(f"{desk.namespace}-elsewhere", exclusive=True).method.queue
    forged = {"CC": elsewhere, "BCC": elsewhere, "x-death": "1", "x-delivery-count": 99, "X-Match": "any"}
    async with pubsub.subscribe("social.#", subscription="analytics", max_attempts=2) as stream:
        await pubsub.publish("social.post", "hello", headers=forged)
        (delivery,) = await receive(stream, 1, ack=False)
        assert (dict(delivery.headers), delivery.attempt) == (forged, 1)
        await delivery.retry(0)
        (again,) = await receive(stream, 1)
        assert (dict(again.headers), again.attempt) == (forged, 2)
    assert raw.basic_get(elsewhere)[0] is None


async def test_foreign_headers_of_any_type_are_read(desk: Desk) -> None:
    pubsub, raw = await desk.client(), desk.raw()
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        properties = pika.BasicProperties(
            headers={
                "when": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
                "nothing": None,
                "table": {"a": [1, "b"]},
                "bytes": b"\xff",
                "x-delivery-count": 7,
            },
            priority=3,
            correlation_id="c",
            reply_to="r",
            expiration="60000",
            timestamp=1_700_000_000,
            type="t",
            app_id="a",
        )
        raw.basic_publish(desk.namespace, "social.post", b"raw", properties)
        (delivery,) = await receive(stream, 1)
        assert delivery.headers["when"] == "2020-01-02T00:00:00+00:00"
        assert delivery.headers["bytes"] == "\ufffd"
        assert "x-delivery-count" not in delivery.headers
        assert (delivery.attempt, delivery.timestamp) == (1, 1_700_000_000.0)
        await nothing_more(stream)


async def test_a_message_that_comes_before_its_time_waits_for_it(desk: Desk) -> None:
    """How delays work that are longer than a message can live in a queue: it is parked until the rest is over."""
    pubsub, raw = await desk.client(), desk.raw()
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        due = time.time() + 2.5
        properties = pika.BasicProperties(headers={"pubsub-due": repr(due)})
        raw.basic_publish(desk.namespace, "social.post", b"later", properties)
        sent = await pubsub.publish("social.post", "now")
        (first,) = await receive(stream, 1)
        assert first.id == sent.id
        (late,) = await receive(stream, 1)
        assert (late.body, late.topic, late.attempt) == (b"later", "social.post", 1)
        assert time.time() > due - 1, "clocks may differ by a second"


# -- what is on the broker -------------------------------------------------------------------------


async def test_deleting_frees_every_queue_and_exchange_of_a_subscription(desk: Desk) -> None:
    pubsub = await desk.client()
    await pubsub.ping()
    before = await names_on_rabbitmq(desk.settings())
    for name, ordered in (("plain", False), ("timeline", True)):
        async with pubsub.subscribe("social.#", subscription=name, ordered=ordered) as stream:
            await pubsub.publish_many(Message("social.post", n, key=str(n)) for n in range(3))
            first, second, _ = await receive(stream, 3, ack=False)
            await first.reject("no")
            if not ordered:
                await second.retry(30)
    during = {
        name.removeprefix(f"queues {desk.namespace}.") for name in await names_on_rabbitmq(desk.settings())
    }
    expected = {"plain", "plain:apart", "plain:dead", "plain:definition", "plain:retry.32000"}
    assert expected <= during
    assert {"timeline:0", "timeline:dead", "timeline:definition"} <= during
    await pubsub.delete("plain")
    await pubsub.delete("timeline")
    left = await names_on_rabbitmq(desk.settings()) - before
    assert {name for name in left if ":notices." not in name} == set()


async def test_a_pattern_that_is_no_longer_declared_is_no_longer_bound(desk: Desk) -> None:
    pubsub = await desk.client()
    await pubsub.declare("a.*", "b.#", subscription="analytics")
    assert desk.bindings(f"{desk.namespace}.analytics") == {"a.*", "b.#"}
    other = await desk.client()
    await other.declare("b.#", "c", subscription="analytics")
    assert desk.bindings(f"{desk.namespace}.analytics") == {"b.#", "c"}


async def test_two_versions_that_declare_at_once_leave_one_definition(desk: Desk) -> None:
    clients = [await desk.client() for _ in range(4)]
    wanted = [("a.#",), ("b.#",)]
    await asyncio.gather(
        *(c.declare(*wanted[n % 2], subscription="analytics") for n, c in enumerate(clients * 3))
    )
    assert desk.bindings(f"{desk.namespace}.analytics") in ({"a.#"}, {"b.#"})


async def test_a_running_member_goes_by_a_filter_that_another_process_declares(desk: Desk) -> None:
    old, new = await desk.client(), await desk.client()
    async with old.subscribe("social.#", subscription="analytics", filter="n > 5") as stream:
        await new.declare("social.#", subscription="analytics", filter="n < 5")
        await new.publish_many(Message("social.post", n, headers={"n": n}) for n in (1, 9, 2))
        assert [d.payload for d in await receive(stream, 2)] == [1, 2]
        await nothing_more(stream)


# -- what is refused -------------------------------------------------------------------------------


async def test_a_queue_with_other_arguments_is_a_conflict_and_harms_nobody(desk: Desk) -> None:
    pubsub, raw = await desk.client(), desk.raw()
    raw.queue_declare(f"{desk.namespace}.taken", durable=True)
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        with pytest.raises(TopologyConflict, match=f"{desk.namespace}.taken"):
            await pubsub.declare("social.#", subscription="taken")
        sent = await pubsub.publish("social.post", "still here")
        (delivery,) = await receive(stream, 1)
        assert (delivery.id, delivery.attempt, delivery.redelivered) == (sent.id, 1, False)
    left = {name for name in await names_on_rabbitmq(desk.settings()) if ".taken" in name}
    assert left == {f"queues {desk.namespace}.taken"}


@pytest.mark.parametrize("ordered", [False, True])
async def test_order_cannot_be_changed_in_place(desk: Desk, ordered: bool) -> None:
    pubsub = await desk.client()
    await pubsub.declare("social.#", subscription="analytics", ordered=ordered)
    await pubsub.publish("social.post", "waits")
    with pytest.raises(TopologyConflict, match="declare a new name"):
        await pubsub.declare("social.#", subscription="analytics", ordered=not ordered)
    assert (await pubsub.backlog("analytics")).waiting == 1


async def test_names_that_would_meet_are_a_conflict(desk: Desk) -> None:
    first = await desk.client()
    await first.declare("social.#", subscription="eu.analytics")
    second = await desk.client(namespace=f"{desk.namespace}.eu")
    with pytest.raises(TopologyConflict, match=r"eu\.analytics"):
        await second.declare("social.#", subscription="analytics")


@pytest.fixture
def guest(desk: Desk) -> Iterator[str]:
    """The URL of a user who may publish and consume, but declare nothing."""
    name = f"guest-{desk.namespace}"
    desk.api("PUT", f"users/{name}", {"password": "sesame", "tags": ""})
    desk.api("PUT", f"permissions/%2F/{name}", {"configure": "^$", "write": ".*", "read": ".*"})
    host = desk.url.rpartition("@")[2]
    yield f"amqp://{name}:sesame@{host}"
    desk.api("DELETE", f"users/{name}")


async def test_a_user_who_may_not_declare_can_publish_and_is_told_what_is_missing(
    desk: Desk, guest: str
) -> None:
    owner, limited = await desk.client(), await desk.client(guest)
    async with owner.subscribe("social.#", subscription="analytics") as stream:
        sent = await limited.publish("social.post", "hello")
        assert [d.id for d in await receive(stream, 1)] == [sent.id]
        with pytest.raises(
            AuthenticationFailed, match=r"access to queue .* refused for user 'guest-"
        ) as caught:
            await limited.declare("social.#", subscription="other")
        assert "sesame" not in str(caught.value)


async def test_a_wrong_password_a_missing_virtual_host_and_an_absent_broker_are_told_apart(
    desk: Desk,
) -> None:
    host = desk.url.rpartition("@")[2]
    user = desk.settings().rabbitmq.address.username
    wrong = await desk.client(f"amqp://{user}:wrong@{host}")
    with pytest.raises(AuthenticationFailed, match=f"refused user '{user}'") as caught:
        await wrong.ping()
    assert "wrong" not in str(caught.value)
    nowhere = await desk.client(desk.url.rpartition("/")[0] + "/nowhere")
    with pytest.raises(ConnectionFailed, match="no virtual host 'nowhere'"):
        await nowhere.ping()
    absent = await desk.client("amqp://127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1.*127\.0\.0\.1:2"):
        await absent.ping()
    second = await desk.client(desk.url.replace(f"@{host}", f"@127.0.0.1:1,{host}"))
    await second.ping()


# -- attempts --------------------------------------------------------------------------------------


async def test_what_is_given_back_unhandled_is_no_attempt(desk: Desk) -> None:
    """RabbitMQ counts whatever comes back: deploys would use up the attempts of messages nobody handled."""
    pubsub = await desk.client()
    await pubsub.declare("social.#", subscription="analytics")
    sent = await pubsub.publish_many(Message("social.post", n) for n in range(60))
    for _ in range(3):
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            received = await receive(stream, 60, ack=False)
            assert {(d.topic, d.attempt) for d in received} == {("social.post", 1)}
            await received[0].release()
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        last = await receive(stream, 60)
        assert {d.id for d in last} == {message.id for message in sent}
        assert {d.attempt for d in last} == {1}
        await nothing_more(stream)


# -- faults ----------------------------------------------------------------------------------------


async def test_a_member_whose_queue_was_deleted_declares_and_joins_again(desk: Desk) -> None:
    pubsub = await desk.client()
    inbox = Inbox()
    pubsub.subscriber("social.#", subscription="analytics")(inbox)
    await pubsub.start()
    desk.api("DELETE", f"queues/%2F/{desk.namespace}.analytics")

    async def bound() -> bool:
        names = await names_on_rabbitmq(desk.settings())
        return f"queues {desk.namespace}.analytics" in names and bool(
            desk.bindings(f"{desk.namespace}.analytics")
        )

    await eventually(bound, "the queue is there again")
    sent = await pubsub.publish("social.post", "hello")
    await inbox.until_ids([sent.id])


async def test_the_retries_of_a_member_that_left_are_brought_back_by_another(desk: Desk) -> None:
    """It joined before there was a queue of retries, and hears of it."""
    first, second = await desk.client(), await desk.client()
    async with second.subscribe("social.#", subscription="analytics", window=4) as other:
        async with first.subscribe("social.#", subscription="analytics", window=4) as stream:
            await first.publish_many(Message("social.post", n) for n in range(8))
            parked = await receive(stream, 4, ack=False)
            for delivery in parked:
                await delivery.retry(0.5)
            assert {delivery.attempt for delivery in await receive(other, 4)} == {1}
        again = await receive(other, 4)
    assert {(delivery.id, delivery.attempt) for delivery in again} == {(each.id, 2) for each in parked}


async def test_a_retry_that_is_far_off_waits_on_the_broker_where_it_is_counted(desk: Desk) -> None:
    pubsub, watcher = await desk.client(), await desk.client()

    async def counted() -> bool:
        return desk.api("GET", f"queues/%2F/{quote(queue, safe='')}").get("messages_ready") == 1

    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        queue = f"{desk.namespace}.analytics:retry.512000"
        await pubsub.publish("social.post", "a")
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.retry(300)
        await eventually(counted, "it is put back")
        assert (await watcher.backlog("analytics")).waiting == 1
        assert (await pubsub.backlog("analytics")).waiting == 1


async def test_a_retry_in_hand_is_counted_by_its_member_and_outlives_it(desk: Desk) -> None:
    pubsub, watcher = await desk.client(), await desk.client()

    async def held() -> bool:
        return (await watcher.backlog("analytics")).waiting == 0

    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        await pubsub.publish("social.post", "a")
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.retry(1.5)
        await eventually(held, "it is in hand")
        assert (await pubsub.backlog("analytics")).waiting == 1
    assert (await pubsub.backlog("analytics")).waiting == 1
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        (again,) = await receive(stream, 1)
        assert (again.payload, again.attempt) == ("a", 2)


async def test_a_retry_whose_queue_was_deleted_is_stored_in_a_new_one(desk: Desk) -> None:
    pubsub = await desk.client()
    inbox: list[tuple[Any, int]] = []

    @pubsub.subscriber("social.#", subscription="analytics")
    async def handle(delivery: Delivery) -> None:
        inbox.append((delivery.payload, delivery.attempt))
        if delivery.attempt == 1:
            raise ValueError("once")

    async def seen(attempts: list[tuple[Any, int]]) -> bool:
        return inbox == attempts

    await pubsub.start()
    await pubsub.publish("social.post", "a")
    await eventually(lambda: seen([("a", 1), ("a", 2)]), "a is handled")
    desk.api("DELETE", f"queues/%2F/{quote(f'{desk.namespace}.analytics:retry.1000', safe='')}")
    await pubsub.publish("social.post", "b")
    await eventually(lambda: seen([("a", 1), ("a", 2), ("b", 1), ("b", 2)]), "b is handled")


async def test_silence_is_noticed_within_one_and_a_half_heartbeats(desk: Desk) -> None:
    address = desk.settings().rabbitmq.address
    host, port = address.hosts[0]
    with Proxy(host, port) as proxy:
        url = f"amqp://{address.username}:{address.secret}@{proxy.host}:{proxy.port}/%2F"
        pubsub = await desk.client(url, rabbitmq={"heartbeat": 2})
        await pubsub.ping()
        lost = asyncio.Event()
        pubsub.on_state(lambda state: lost.set() if state == "reconnecting" else None)
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            proxy.swallow()
            begin = time.monotonic()
            await asyncio.wait_for(lost.wait(), 10)
            assert time.monotonic() - begin < 2 * 1.5 + 1  # the second is this machine's
            proxy.restore()
            direct = await desk.client()
            sent = await direct.publish("social.post", "after")
            assert [d.id for d in await receive(stream, 1)] == [sent.id]


async def test_a_batch_nobody_wants_is_refused_one_by_one(desk: Desk) -> None:
    pubsub = await desk.client(require_subscribers=True)
    await pubsub.declare("wanted.#", subscription="analytics")
    messages = [Message(topic, n) for n, topic in enumerate(("wanted.a", "other.b", "wanted.c", "other.d"))]
    prepared = [pubsub.prepare(message) for message in messages]
    for message, done in zip(messages, prepared, strict=True):
        message.id = done.id
    with pytest.raises(SendFailed) as caught:
        await pubsub.publish_many(messages)
    assert caught.value.fates == {messages[1].id: "not stored", messages[3].id: "not stored"}
    assert (await pubsub.backlog("analytics")).waiting == 2
