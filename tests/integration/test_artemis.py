"""What is Artemis' own: it puts aside what was handed out ten times and not settled, unless it is told not to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pubsub_facade import AsyncPubSub
from pubsub_facade.backends.activemq import ActivemqBackend
from pubsub_facade.testing.conformance import receive
from tests.integration.test_activemq import Desk

pytestmark = pytest.mark.broker("artemis")

OFTEN = 12  # more than Artemis takes by default


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk("artemis")
    yield desk
    await desk.finish()


async def put_aside(pubsub: AsyncPubSub) -> int:
    """How many messages are among Artemis' own dead letters, which no facade looks into."""
    backend = pubsub._supervisor.backend
    assert isinstance(backend, ActivemqBackend)
    reply_to = f"{backend.form.space}$reply"
    count: int = await backend.session.manage("queue.DLQ", "getMessageCount", reply_to=reply_to)
    return count


async def take_and_go(desk: Desk, queue: str) -> None:
    """Take the first of a queue and leave without settling it, again and again.

    In good order: when a link ends without a word Artemis itself may lose sight of a message (`tests.chaos.stuck`).
    """
    for _ in range(OFTEN):
        bare = desk.bare()
        headers = {
            "destination": queue,
            "id": "1",
            "ack": "client-individual",
            "subscription-type": "ANYCAST",
        }
        await asyncio.to_thread(bare.ask, "SUBSCRIBE", headers)
        command, received, _ = await asyncio.to_thread(bare.next)
        assert command == "MESSAGE", received
        await asyncio.to_thread(bare.ask, "DISCONNECT", {})
        bare.close()


@pytest.mark.parametrize("queue", [".#::{space}$sub.analytics$#", "$retry.analytics"])
async def test_what_members_left_unsettled_is_handed_out_again(desk: Desk, queue: str) -> None:
    pubsub = await desk.client()
    async with pubsub.subscribe("#", subscription="analytics") as stream:
        await pubsub.publish("a.b", "parked")
        await pubsub.publish("a.b", "waiting")
        parked, _ = await receive(stream, 2, ack=False)
        await parked.retry(0.01)
    space = desk.settings().namespace.replace(".", "~")
    before = await put_aside(pubsub)
    await take_and_go(desk, space + queue.format(space=space))
    async with pubsub.subscribe("#", subscription="analytics") as stream:
        assert {delivery.payload for delivery in await receive(stream, 2)} == {"parked", "waiting"}
    assert await put_aside(pubsub) == before


@pytest.mark.parametrize("kind", ["record", "dead", "demand"])
async def test_what_is_only_read_is_read_as_often_as_wanted(desk: Desk, kind: str) -> None:
    pubsub = await desk.client()
    async with pubsub.subscribe("#", subscription="analytics") as stream:
        sent = await pubsub.publish("a.b", "buried")
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.reject("no")
    space = desk.settings().namespace.replace(".", "~")
    before = await put_aside(pubsub)
    await take_and_go(desk, f"{space}$demand" if kind == "demand" else f"{space}${kind}.analytics")
    for _ in range(OFTEN):
        assert [letter.id async for letter in pubsub.dead_letters("analytics")] == [sent.id]
    assert await put_aside(pubsub) == before
