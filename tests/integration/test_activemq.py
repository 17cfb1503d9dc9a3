"""What is ActiveMQ's own: the wire as a bare socket sees it, stand-by, redeclaring, what a broker refuses."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import pytest

from pubsub_facade import AsyncPubSub, Message, Settings
from pubsub_facade.backends._stomp import Parser, escape
from pubsub_facade.errors import SendFailed, TopologyConflict, UnsupportedFeature
from pubsub_facade.testing.conformance import Inbox, eventually, nothing_more, receive
from tests.conftest import broker_settings

FORMS = [
    pytest.param(form, marks=pytest.mark.broker(form)) for form in ("activemq", "activemq-virtual", "artemis")
]
CLASSIC = FORMS[:2]


class BareStomp:
    """A blocking STOMP client of a few lines, which knows nothing of this package but its destinations."""

    def __init__(self, settings: Settings) -> None:
        address = settings.activemq.address
        self._settings = settings
        self._socket = socket.create_connection(address.hosts[0], timeout=10)
        self._parser = Parser()
        self._frames: list[tuple[str, dict[str, str], bytes]] = []
        login = {"login": address.username, "passcode": address.secret}
        lines = "".join(f"{name}:{value}\n" for name, value in login.items())
        self._socket.sendall(f"CONNECT\naccept-version:1.2\nhost:any\n{lines}\n\0".encode())
        assert self.next()[0] == "CONNECTED"

    def ask(self, command: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        lines = "".join(f"{escape(name)}:{escape(value)}\n" for name, value in headers.items())
        length = f"content-length:{len(body)}\n" if body else ""
        self._socket.sendall(f"{command}\n{lines}{length}receipt:r\n\n".encode() + body + b"\0")
        command, headers, _ = self.next()
        assert (command, headers.get("receipt-id")) == ("RECEIPT", "r"), headers

    def next(self) -> tuple[str, dict[str, str], bytes]:
        while not self._frames:
            data = self._socket.recv(65536)
            assert data, "the broker closed the link"
            self._frames = self._parser.feed(data)
        return self._frames.pop(0)

    def listen(self, topic: str) -> None:
        self.ask("SUBSCRIBE", {**self._where(topic), "id": "1", "ack": "auto"})

    def send(self, topic: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.ask("SEND", {**self._where(topic), "persistent": "true", **headers}, body)

    def _where(self, topic: str) -> dict[str, str]:
        space = self._settings.namespace.replace(".", "~")
        if self._settings.activemq.flavor == "artemis":
            kinds = {"destination-type": "MULTICAST", "subscription-type": "MULTICAST"}
            return {"destination": f"{space}.{topic}", **kinds}
        virtual = "VirtualTopic." if self._settings.activemq.subscriptions == "virtual" else ""
        return {"destination": f"/topic/{virtual}{space}.{topic}"}

    def close(self) -> None:
        self._socket.close()


class Desk:
    """Clients of one form in a namespace with a dot; forgets on the broker what it declared."""

    def __init__(self, form: str) -> None:
        self._make = broker_settings(form)
        self.namespace = f"t{uuid.uuid4().hex[:8]}.amq"
        self._stack = AsyncExitStack()

    def settings(self, **section: object) -> Settings:
        if not section:
            return self._make(namespace=self.namespace)
        known = self._make(namespace=self.namespace).activemq
        values = {name: getattr(known, name) for name in known.model_fields_set}
        return self._make(namespace=self.namespace, activemq={**values, **section})

    async def client(self, **section: object) -> AsyncPubSub:
        return await self._stack.enter_async_context(AsyncPubSub(self.settings(**section)))

    def bare(self) -> BareStomp:
        bare = BareStomp(self.settings())
        self._stack.callback(bare.close)
        return bare

    async def finish(self) -> None:
        await self._stack.aclose()
        async with AsyncPubSub(self.settings()) as pubsub:
            await pubsub.delete("analytics")


@pytest.fixture
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    desk = Desk(request.param)
    yield desk
    await desk.finish()


@pytest.mark.parametrize("desk", FORMS, indirect=True)
class TestWire:
    """Headers and bodies as raw clients send and see them (docs/backends/activemq.md)."""

    async def test_a_bare_socket_reads_what_we_publish(self, desk: Desk) -> None:
        pubsub, bare = await desk.client(), desk.bare()
        await asyncio.to_thread(bare.listen, "social.post")
        sent = await pubsub.publish(
            "social.post", b"a\0b", key="42", headers={"lang": "en", "n": 3, "destination": "/queue/evil"}
        )
        command, headers, body = await asyncio.to_thread(bare.next)
        assert (command, body) == ("MESSAGE", b"a\0b")
        assert headers["pubsub-id"] == sent.id
        assert headers["pubsub-key"] == "42"
        assert (headers["lang"], headers["n"]) == ("en", "3")
        assert headers["pubsub-h-destination"] == "/queue/evil"
        assert headers["destination"].endswith(".social.post")

    async def test_what_a_bare_socket_sends_is_delivered(self, desk: Desk) -> None:
        pubsub, bare = await desk.client(), desk.bare()
        async with pubsub.subscribe("social.*", subscription="analytics") as stream:
            headers = {
                "content-type": "text/plain",
                "Über: all": "a\nb\\c",
                "JMSXGroupID": "g",
                "priority": "9",
            }
            await asyncio.to_thread(bare.send, "social.post", "grüß".encode(), headers)
            (delivery,) = await receive(stream, 1)
        assert (delivery.topic, delivery.payload) == ("social.post", "grüß")
        assert delivery.headers == {"Über: all": "a\nb\\c"}
        assert delivery.id
        assert delivery.published_at is not None

    async def test_no_header_of_a_user_becomes_one_of_the_brokers(self, desk: Desk) -> None:
        pubsub = await desk.client()
        forged = {
            "destination": "/queue/elsewhere",
            "content-length": "1",
            "receipt": "stolen",
            "transaction": "none",
            "persistent": "false",
            "expires": "1",
            "AMQ_SCHEDULED_DELAY": "60000",
            "_AMQ_SCHED_DELIVERY": "99999999999999",
            "JMSXGroupID": "g",
            "line\nbreak": "x\n\nbody",
            "a:b": "c:d",
            "back\\slash": "\\c\\n\\",
        }
        async with pubsub.subscribe("#", subscription="analytics") as stream:
            sent = await pubsub.publish_many([Message("a.b", b"1", headers=forged), Message("a.b", b"2")])
            received = await receive(stream, 2)
        assert [d.id for d in received] == [m.id for m in sent]
        assert dict(received[0].headers) == forged
        assert [d.body for d in received] == [b"1", b"2"]

    async def test_headers_that_the_broker_would_cut_the_link_for_are_refused(self, desk: Desk) -> None:
        pubsub = await desk.client()
        async with pubsub.subscribe("#", subscription="analytics") as stream:
            good, bad, many = (
                Message("a.b", 1, id="good", headers={"big": "x" * 9000}),
                Message("a.b", 2, id="bad", headers={"big": "x" * 11_000}),
                Message("a.b", 3, id="many", headers={f"h{n}": "x" for n in range(1001)}),
            )
            with pytest.raises(SendFailed, match="at most") as raised:
                await pubsub.publish_many([good, bad, many])
            assert raised.value.fates == {"bad": "not stored", "many": "not stored"}
            assert [d.id for d in await receive(stream, 1)] == ["good"]
            await nothing_more(stream)

    async def test_a_long_error_text_is_cut_to_what_a_header_can_carry(self, desk: Desk) -> None:
        pubsub = await desk.client()
        async with pubsub.subscribe("#", subscription="analytics") as stream:
            await pubsub.publish("a.b", 1)
            (delivery,) = await receive(stream, 1, ack=False)
            await delivery.reject("😀" * 2000)
            (letter,) = [letter async for letter in pubsub.dead_letters("analytics")]
        assert letter.failure is not None
        assert letter.failure.error.startswith("😀" * 300)


@pytest.mark.parametrize("desk", FORMS, indirect=True)
class TestRedeclaring:
    """Contract 3, where the broker cannot hold our patterns and another process changes them."""

    async def test_running_members_follow_another_process(self, desk: Desk) -> None:
        running, other = await desk.client(), await desk.client()
        async with running.subscribe("a.*", subscription="analytics", filter="n > 1") as stream:
            await running.publish_many([Message("a.x", n, headers={"n": n}) for n in (1, 2)])
            assert [d.payload for d in await receive(stream, 1)] == [2]
            await other.declare("a.*", "b.#", subscription="analytics")
            await other.publish_many(
                [Message(topic, topic, headers={"n": 1}) for topic in ("a.x", "b.y.z", "c")]
            )
            assert sorted(d.payload for d in await receive(stream, 2)) == ["a.x", "b.y.z"]
            await nothing_more(stream)

    async def test_running_members_hear_of_a_change_before_any_message_is_in_doubt(self, desk: Desk) -> None:
        running, other = await desk.client(), await desk.client()
        async with running.subscribe("a.*", subscription="analytics") as stream:
            await other.declare("a.*", "b.*", subscription="analytics")
            await other.publish("b.x", "added")
            assert [d.payload for d in await receive(stream, 1)] == ["added"]
            await other.declare("b.*", subscription="analytics")
            await other.publish("a.x", "removed")
            await other.publish("b.x", "kept")
            assert [d.payload for d in await receive(stream, 1)] == ["kept"]
            await nothing_more(stream)

    async def test_what_waits_outlives_a_redeclaration(self, desk: Desk) -> None:
        pubsub = await desk.client()
        await pubsub.declare("a.*", "b", subscription="analytics")
        await pubsub.publish_many([Message("a.x", "old"), Message("b", "old"), Message("c", "never")])
        await pubsub.declare("c.#", subscription="analytics")
        await pubsub.publish_many([Message("a.x", "late"), Message("c", "new")])
        async with pubsub.subscribe("c.#", subscription="analytics") as stream:
            received = await receive(stream, 3)
            assert sorted((d.topic, d.payload) for d in received) == [
                ("a.x", "old"),
                ("b", "old"),
                ("c", "new"),
            ]
            await nothing_more(stream)

    async def test_an_ordered_subscription_keeps_to_one_line(self, desk: Desk) -> None:
        pubsub = await desk.client()
        await pubsub.declare("a.*", subscription="analytics", ordered=True)
        with pytest.raises(TopologyConflict, match="cannot keep its order"):
            await pubsub.declare("b.*", subscription="analytics", ordered=True)

    async def test_members_that_declare_at_once_agree(self, desk: Desk) -> None:
        clients = [await desk.client() for _ in range(4)]
        patterns = ["a.*", "b.*", "c.#", "a.*"]
        await asyncio.gather(
            *(
                client.declare(pattern, subscription="analytics")
                for client, pattern in zip(clients, patterns, strict=True)
            )
        )
        await clients[0].declare("#", subscription="analytics")
        sent = await clients[0].publish_many([Message(f"{word}.x", word) for word in "abcd"])
        async with clients[0].subscribe("#", subscription="analytics") as stream:
            assert {d.id for d in await receive(stream, 4)} == {m.id for m in sent}
            await nothing_more(stream)


@pytest.mark.broker("activemq")
@pytest.mark.parametrize("desk", ["activemq"], indirect=True)
class TestStandingBy:
    """Durable subscriptions of Classic have one active member."""

    async def test_a_member_that_stands_by_takes_over_what_is_unsettled(self, desk: Desk) -> None:
        first, second = await desk.client(), await desk.client()
        inbox = Inbox()
        async with first.subscribe("#", subscription="analytics", window=10) as active:
            second.subscriber("#", subscription="analytics")(inbox)
            await second.start()
            sent = await first.publish_many(Message("a.b", n) for n in range(20))
            (settled, *_) = await receive(active, 10, ack=False)
            await settled.ack()
            assert not inbox.seen, "two members were active"
        await inbox.until_ids(message.id for message in sent[1:])
        assert settled.id not in inbox.ids

    async def test_a_subscription_with_an_active_member_elsewhere_is_not_deleted(self, desk: Desk) -> None:
        first, second = await desk.client(), await desk.client()
        inbox = Inbox()
        first.subscriber("#", subscription="analytics")(inbox)
        await first.start()
        with pytest.raises(TopologyConflict, match="stop it first"):
            await second.delete("analytics")
        sent = await second.publish("a.b", 1)
        await inbox.until_ids([sent.id])


@pytest.mark.parametrize("desk", CLASSIC, indirect=True)
class TestWithoutHelp:
    """A Classic broker with no scheduler that is known, and no Jolokia."""

    async def test_retries_wait_in_the_member(self, desk: Desk) -> None:
        pubsub = await desk.client(scheduler=False)
        assert not pubsub.capabilities.delay
        with pytest.raises(UnsupportedFeature, match="delay"):
            await pubsub.publish("a.b", 1, delay=1)
        async with pubsub.subscribe("#", subscription="analytics", window=2) as stream:
            await pubsub.publish_many(Message("a.b", n) for n in range(3))
            (late,) = await receive(stream, 1, ack=False)
            await late.retry(0.5)
            others = await receive(stream, 2)
            (again,) = await receive(stream, 1)
        assert [d.payload for d in others] == [1, 2]
        assert (again.id, again.attempt) == (late.id, 2)

    async def test_what_cannot_be_known_is_none(self, desk: Desk) -> None:
        pubsub = await desk.client(admin_url=None)
        assert not pubsub.capabilities.backlog
        await pubsub.declare("#", subscription="analytics")
        backlog = await pubsub.backlog("analytics")
        assert (backlog.waiting, backlog.in_flight, backlog.dead, backlog.oldest) == (None,) * 4
        assert await pubsub.dead_letters("analytics").count() == 0


@pytest.mark.broker("activemq-virtual")
@pytest.mark.parametrize("desk", ["activemq-virtual"], indirect=True)
async def test_virtual_queues_are_not_left_collecting_in_silence(desk: Desk) -> None:
    pubsub = await desk.client(admin_url=None)
    await pubsub.declare("#", subscription="analytics")
    with pytest.raises(UnsupportedFeature, match="admin_url"):
        await pubsub.delete("analytics")


@pytest.mark.parametrize("desk", FORMS, indirect=True)
async def test_a_retry_that_the_scheduler_holds_does_not_outlive_its_subscription(desk: Desk) -> None:
    pubsub = await desk.client()
    async with pubsub.subscribe("#", subscription="analytics") as stream:
        await pubsub.publish("a.b", "of the first life")
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.retry(1.5)
    await pubsub.delete("analytics")
    async with pubsub.subscribe("#", subscription="analytics") as stream:
        await pubsub.publish("a.b", "of the second life")
        assert [d.payload for d in await receive(stream, 1)] == ["of the second life"]
        with pytest.raises(TimeoutError):
            await stream.receive(3)


@pytest.mark.parametrize("desk", FORMS, indirect=True)
async def test_more_dead_letters_than_a_browser_shows_are_listed_and_removed(desk: Desk) -> None:
    pubsub = await desk.client()
    async with pubsub.subscribe("#", subscription="analytics", window=450, max_attempts=1) as stream:
        sent = await pubsub.publish_many(Message("a.b", n) for n in range(450))
        received = await receive(stream, 450, ack=False)
        await asyncio.gather(*(delivery.reject("no") for delivery in received))
    letters = pubsub.dead_letters("analytics")
    assert {letter.id async for letter in letters} == {message.id for message in sent}
    assert await letters.purge([sent[7].id, "unknown"]) == 1

    async def rest() -> bool:
        return len([letter async for letter in letters]) == 449

    await eventually(rest, "449 dead letters")
