"""A user whom the broker lets in, and who may do nothing there, is told at once which right is missing on what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import pytest
import pytest_asyncio
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

from brokers.broker import PASSWORD, USER
from brokers.rabbitmq import RabbitMQ
from pubsub_facade import AsyncPubSub, AuthenticationFailed, PubSubError, SendFailed, Settings
from tests.integration.guarded import BARRED, BARRED_USER, grant
from tests.integration.secured import Secured

PATIENCE = 15.0  # s, far below the 30 that publish would try again for
USED: Final = "used"
"""A namespace in which others publish and receive."""

NEEDED: Final = {
    "rabbitmq": {
        "publish first": ("exchange 'first'", "configure"),
        "publish": ("exchange 'used'", "write"),
        "declare": ("queue 'used.barred:lock'", "configure"),
        "join": ("queue 'used.held:lock'", "configure"),
        "tail": ("queue 'used:notices.", "configure"),
    },
    "kafka": {
        "publish first": ("topic 'first.a'", "Create"),
        "publish": ("topic 'used.a'", "Write"),
        "declare": ("topic 'used...registry'", "Read"),
        "join": ("topic 'used...registry'", "Read"),
        "tail": ("topic 'used...registry'", "Read"),
    },
    "activemq": {
        "publish first": ("topic://first.a", "write to"),
        "publish": ("topic://used.a", "write to"),
        "declare": ("queue://used$record.barred", "read from"),
        "join": ("queue://used$record.held", "read from"),
        "tail": ("topic://used.>", "read from"),
    },
    "artemis": {
        "publish first": ("address first.a", "CREATE_ADDRESS"),
        "publish": ("address used.a", "SEND"),
        "declare": ("address used$reply", "CREATE_ADDRESS"),
        "join": ("address used$reply", "CREATE_ADDRESS"),
        "tail": ("address used.#", "CREATE_ADDRESS"),
    },
}
"""What is in the way at each step: the thing, as the broker calls it, and the right on it."""


def client_of(secured: Secured, namespace: str, username: str, password: str) -> AsyncPubSub:
    return AsyncPubSub(Settings(**secured.settings_of(username, password, namespace)))


@pytest_asyncio.fixture
async def used(secured: Secured) -> None:
    """Another user has made all that a namespace needs, and a subscription; on Kafka the barred one may see it."""
    async with client_of(secured, USED, USER, PASSWORD) as client:
        await client.declare("#", subscription="held")
        await client.publish("a", 1)
    if secured.name == "kafka":
        admin = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{secured.plain_port}")
        await admin.start()
        try:
            topic, prefixed, describe, allow = 2, 4, 8, 3
            await admin._send_request(
                CreateAclsRequest(topic, USED, prefixed, f"User:{BARRED_USER}", "*", describe, allow)
            )
        finally:
            await admin.close()


async def refused(
    secured: Secured, step: str, attempt: Callable[[AsyncPubSub], Awaitable[object]], namespace: str = USED
) -> PubSubError:
    """The error that the attempt ends in: soon, naming the thing and the right, without the password."""
    began = time.monotonic()
    client = client_of(secured, namespace, BARRED_USER, BARRED)
    async with client:
        with pytest.raises(PubSubError) as caught:
            await asyncio.wait_for(attempt(client), 2 * PATIENCE)
    assert time.monotonic() - began < PATIENCE
    text = str(caught.value)
    assert BARRED not in text
    thing, right = NEEDED[secured.name][step]
    assert thing in text
    assert right in text.replace(thing, "")
    return caught.value


async def publish(client: AsyncPubSub) -> None:
    await client.publish("a", 1)


async def tail(client: AsyncPubSub) -> None:
    async with client.subscribe("#") as stream:
        await stream.receive()


def member_of(subscription: str) -> Callable[[AsyncPubSub], Awaitable[None]]:
    async def serve(client: AsyncPubSub) -> None:
        client.subscriber("#", subscription=subscription)(_nothing)
        await client.serve(asyncio.Event(), 1)

    return serve


def _nothing(payload: object) -> None:
    return


async def test_publishing_what_nobody_has_published_before_is_refused_at_once(secured: Secured) -> None:
    error = await refused(secured, "publish first", publish, "first")
    assert isinstance(error, AuthenticationFailed | SendFailed), repr(error)


@pytest.mark.usefixtures("used")
async def test_publishing_without_the_right_is_refused_at_once(secured: Secured) -> None:
    error = await refused(secured, "publish", publish)
    assert isinstance(error, SendFailed), repr(error)
    # RabbitMQ closes the channel, and does not say on which of the messages under way.
    assert set(error.fates.values()) == {"unknown" if secured.name == "rabbitmq" else "not stored"}


@pytest.mark.usefixtures("used")
async def test_declaring_without_the_right_is_refused_at_once(secured: Secured) -> None:
    error = await refused(secured, "declare", lambda client: client.declare("#", subscription="barred"))
    assert isinstance(error, AuthenticationFailed), repr(error)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(("step", "subscription"), [("declare", "barred"), ("join", "held")])
async def test_a_member_without_the_right_ends_with_the_reason(
    secured: Secured, step: str, subscription: str
) -> None:
    """``pubsub run`` exits by it: waiting would not mend it."""
    error = await refused(secured, step, member_of(subscription))
    assert isinstance(error, AuthenticationFailed), repr(error)


@pytest.mark.usefixtures("used")
async def test_an_ephemeral_member_without_the_right_ends_with_the_reason(secured: Secured) -> None:
    error = await refused(secured, "tail", tail)
    assert isinstance(error, AuthenticationFailed), repr(error)


@pytest.mark.parametrize(
    "secured", [pytest.param("rabbitmq", marks=pytest.mark.broker("rabbitmq"))], indirect=True
)
@pytest.mark.usefixtures("used")
async def test_the_right_to_publish_is_enough_to_publish(secured: Secured) -> None:
    """On RabbitMQ, where declaring an exchange that is there needs one more."""
    broker = secured.broker
    assert isinstance(broker, RabbitMQ)
    grant(broker, BARRED_USER, write=f"^{USED}$")
    try:
        async with client_of(secured, USED, BARRED_USER, BARRED) as client:
            await client.publish("a", 2)
    finally:
        grant(broker, BARRED_USER)
