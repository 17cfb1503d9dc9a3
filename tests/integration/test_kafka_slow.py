"""Slow handlers on a real Kafka: they cost no message, and no membership that nobody is told of (contract 6)."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import pytest
import pytest_asyncio

from pubsub_facade import AsyncPubSub, Delivery, Message
from pubsub_facade.testing.conformance import eventually
from tests.conftest import broker_settings
from tests.integration import foreign

pytestmark = pytest.mark.broker("kafka")

SESSION: Final = 6.0  # seconds: the least that a broker takes by default
TOO_LONG: Final = 9.0
TOTAL: Final = 20


class Bench:
    """Members of one subscription."""

    def __init__(self) -> None:
        self.namespace = "w" + secrets.token_hex(4)
        self.clients: list[AsyncPubSub] = []

    def client(self) -> AsyncPubSub:
        made = broker_settings("kafka")(namespace=self.namespace)
        section = made.kafka.model_copy(update={"session_timeout": SESSION})
        client = AsyncPubSub(broker_settings("kafka")(namespace=self.namespace, kafka=section.model_dump()))
        self.clients.append(client)
        return client

    async def member(self, handler: Callable[..., Any], **options: Any) -> AsyncPubSub:
        client = self.client()
        client.subscriber("social.x", subscription="s", **options)(handler)
        await client.start()
        return client

    async def settled(self) -> None:
        """Return when nothing waits and nothing is in hand."""

        async def done() -> bool:
            backlog = await self.clients[0].backlog("s")
            return not backlog.waiting and not backlog.in_flight

        await eventually(done, "all is settled")


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    for client in bench.clients:
        await client.close(grace=1)
    async with AsyncPubSub(broker_settings("kafka")(namespace=bench.namespace)) as client:
        await client.delete("s")
    await foreign.drop_kafka_topics(broker_settings("kafka")(namespace=bench.namespace))


def numbers() -> list[Message]:
    return [Message("social.x", number, key=str(number)) for number in range(TOTAL)]


async def test_a_handler_on_a_thread_slower_than_the_session_keeps_its_message(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[int] = []

    def handle(number: int) -> None:
        started.append(number)
        if number == 0:
            time.sleep(TOO_LONG)

    client = await bench.member(handle)
    await client.publish_many(numbers())

    async def all_started() -> bool:
        return set(started) == set(range(TOTAL))

    await eventually(all_started, "all are handled")
    await bench.settled()
    assert sorted(started) == list(range(TOTAL)), "some came twice"
    assert "went on without this member" not in caplog.text


async def test_a_handler_that_holds_up_the_loop_for_a_session_loses_nothing_and_is_told_of(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """No heartbeat can leave meanwhile: the group goes on without the member, which says so and comes back."""
    handled: list[int] = []
    redelivered: set[int] = set()

    async def handle(number: int, delivery: Delivery) -> None:
        if number == 0 and not delivery.redelivered:
            time.sleep(TOO_LONG)  # noqa: ASYNC251 - the fault under test
        if delivery.redelivered:
            redelivered.add(number)
        handled.append(number)

    with caplog.at_level(logging.WARNING, logger="pubsub_facade"):
        client = await bench.member(handle)
        await client.publish_many(numbers())

        async def all_handled() -> bool:
            return set(handled) == set(range(TOTAL)) and 0 in redelivered

        await eventually(all_handled, "all are handled, the slow one again")
        await bench.settled()
    assert "went on without this member" in caplog.text
    assert "event loop" in caplog.text
    await client.publish("social.x", 99)

    async def goes_on() -> bool:
        return 99 in handled

    await eventually(goes_on, "it is a member again")


async def test_a_handler_slower_than_a_rebalance_waits_for_it_loses_nothing(bench: Bench) -> None:
    """The group does not wait so long: its message may come again; what is handled beside it comes once."""
    handled: list[tuple[str, int]] = []
    began = asyncio.Event()

    def handler(name: str) -> Callable[..., Any]:
        async def handle(number: int) -> None:
            if name == "first" and number == 0:
                began.set()
                await asyncio.sleep(TOO_LONG)
            handled.append((name, number))

        return handle

    publisher = bench.client()
    await publisher.declare("social.x", subscription="s")
    await bench.member(handler("first"), concurrency=4)
    await publisher.publish_many(numbers())
    await began.wait()

    async def others_handled() -> bool:
        return len(handled) >= TOTAL - 1

    await eventually(others_handled, "the others are handled beside it")
    await bench.member(handler("second"), concurrency=4)

    async def slow_done() -> bool:
        return ("first", 0) in handled

    await eventually(slow_done, "the slow one is through")
    await bench.settled()
    seen = [number for _, number in handled]
    assert set(seen) == set(range(TOTAL))
    assert [number for number in set(seen) if seen.count(number) > 1] in ([], [0])
