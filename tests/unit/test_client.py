"""`AsyncPubSub` over its life: starting in part, serving, pinging, bad input."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from pubsub_facade import (
    AsyncPubSub,
    ConfigError,
    ConnectionFailed,
    ConnectionLost,
    MessageError,
    Settings,
    Subscribers,
    TopicError,
    TopologyConflict,
)
from pubsub_facade.backends.memory import Hub
from pubsub_facade.testing.conformance import DEADLINE, Inbox, receive, until


@pytest.fixture
def name() -> Iterator[str]:
    name = f"client-{uuid.uuid4().hex}"
    yield name
    Hub.drop(name)


@pytest.fixture
def hub(name: str) -> Hub:
    return Hub.named(name)


@pytest.fixture
async def pubsub(name: str) -> AsyncIterator[AsyncPubSub]:
    client = AsyncPubSub(Settings.load(url=f"memory://{name}", reconnect_min=0.01, reconnect_max=0.05))
    yield client
    await client.close(grace=2)


async def test_a_start_that_fails_leaves_nothing_running_and_can_be_tried_again(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    first, second = Inbox(), Inbox()
    pubsub.subscriber("a", subscription="first")(first)
    pubsub.subscriber("a", subscription="second")(second)
    hub.fail("consume", TopologyConflict("not now"))
    with pytest.raises(TopologyConflict):
        await pubsub.start()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("pubsub-")]
    assert all(not queue.receivers for queue in hub.namespaces["pubsub"].queues.values())
    await pubsub.start()
    await pubsub.start()  # all are running: does nothing
    sent = await pubsub.publish("a", 1)
    for inbox in (first, second):
        await inbox.until_ids([sent.id])
        assert len(inbox.seen) == 1


async def test_a_broker_that_is_away_fails_start_and_is_waited_for_by_serve(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    inbox = Inbox()
    pubsub.subscriber("a", subscription="s")(inbox)
    hub.fail("open", ConnectionFailed("nobody there"))
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await pubsub.start()
    for _ in range(3):
        hub.fail("open", ConnectionFailed("still nobody"))
    stop = asyncio.Event()
    serving = asyncio.create_task(pubsub.serve(stop))
    sent = await pubsub.publish("a", 1)
    await until(lambda: pubsub.state == "connected", "connected in the end")
    again = await pubsub.publish("a", 2)
    await inbox.until_ids([again.id])
    stop.set()
    await asyncio.wait_for(serving, DEADLINE)
    assert sent.id
    assert [pubsub.state] == ["closed"]


async def test_serve_ends_with_the_error_of_a_member_that_cannot_go_on(pubsub: AsyncPubSub, hub: Hub) -> None:
    pubsub.subscriber("a", subscription="s")(Inbox())
    serving = asyncio.create_task(pubsub.serve(asyncio.Event()))
    await until(lambda: bool(pubsub._members), "the member works")
    hub.fail("declare", TopologyConflict("somebody made it another kind of queue"))
    hub.fail("receive", ConnectionLost("cut"))
    await pubsub.publish("a", 1)
    with pytest.raises(TopologyConflict, match="another kind"):
        await asyncio.wait_for(serving, DEADLINE)
    assert [pubsub.state] == ["closed"]


async def test_a_ping_that_fails_says_so_and_the_next_one_connects_again(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    states: list[str] = []
    pubsub.on_state(states.append)
    await pubsub.ping()
    hub.fail("ping", ConnectionLost("cut"))
    with pytest.raises(ConnectionLost):
        await pubsub.ping()
    assert states[-1] == "reconnecting"
    await pubsub.ping()
    assert states[-1] == "connected"


async def test_arguments_that_cannot_work_are_refused_at_once(pubsub: AsyncPubSub) -> None:
    for window in (0, -1, 1.5, True, "9"):
        with pytest.raises(MessageError, match="window"):
            pubsub.subscribe("a", window=window)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="namespace"):
        AsyncPubSub(pubsub.settings, namespace="other")
    with pytest.raises(
        ConfigError, match="'artemis': artemis is backend 'activemq' with flavor 'artemis'; known"
    ):
        AsyncPubSub(backend="artemis")
    with pytest.raises(ConfigError, match="unknown backend"):
        AsyncPubSub(backend="pigeon")
    assert pubsub.state == "idle"


def test_a_decorator_without_parentheses_is_told_how_to_be_written(pubsub: AsyncPubSub) -> None:
    def notify(post: dict[str, str]) -> None: ...

    for decorate in (pubsub.subscriber, Subscribers().subscriber, pubsub.subscribe):
        with pytest.raises(TopicError) as raised:
            decorate(notify)  # type: ignore[operator]
        assert "notify is a function" in str(raised.value)
        assert 'write @subscriber("social.post.*", subscription="...")' in str(raised.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "subscription s: 1 delivery was not finished within 0.01 s; it comes again"),
        (2, "subscription s: 2 deliveries were not finished within 0.01 s; they come again"),
    ],
)
async def test_what_was_not_finished_at_the_end_is_told_once(
    pubsub: AsyncPubSub, caplog: pytest.LogCaptureFixture, count: int, text: str
) -> None:
    begun, gate = threading.Semaphore(0), threading.Event()

    def handle(payload: int) -> None:
        begun.release()
        gate.wait()

    pubsub.subscriber("a", subscription="s", concurrency=2)(handle)
    await pubsub.start()
    for number in range(count):
        await pubsub.publish("a", number)
        assert await asyncio.to_thread(begun.acquire, timeout=DEADLINE)
    await pubsub.close(grace=0.01)
    gate.set()
    assert [line.getMessage() for line in caplog.records if "not finished" in line.getMessage()] == [text]
    assert pubsub.left == count


async def test_dead_letters_are_browsed_on_a_new_link_when_the_old_one_is_lost(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        await pubsub.publish("a", 1)
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.reject("bad")
    hub.fail("resend", ConnectionLost("cut"))
    assert await pubsub.dead_letters("s").replay() == 1
    assert await pubsub.dead_letters("s").count() == 0
    assert (await pubsub.backlog("s")).waiting == 1
