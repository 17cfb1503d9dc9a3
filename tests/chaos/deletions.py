"""Something is deleted on the broker under running members: they must find it out, and receive again.

It is the spare subscription that is hit, on topics of its own: what waited in it is gone for good, which the
accounts of the others must not be asked to show. What counts is that what is published later arrives.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import quote

from aiokafka.admin import AIOKafkaAdminClient

from brokers.activemq import Classic
from brokers.artemis import Artemis
from brokers.broker import PASSWORD, USER
from brokers.kafka import Kafka
from brokers.rabbitmq import RabbitMQ
from pubsub_facade import AsyncPubSub, Message, PubSubError, Settings
from tests.chaos.workload import SPARE
from tests.chaos.world import World

FOUND_AGAIN: Final = (
    60.0  # s until something published after the deletion is handled, a broker's own start included
)
TOPIC: Final = f"{SPARE}.again"
MORE: Final = 20  # messages that must all arrive once one did

Deletion = Callable[[World, AsyncPubSub], Awaitable[None]]


async def subscription_by_the_facade(world: World, pubsub: AsyncPubSub) -> None:
    """As an operator does it by mistake: ``pubsub delete spare``."""
    await pubsub.delete(SPARE)


async def queue_on_rabbitmq(world: World, pubsub: AsyncPubSub) -> None:
    assert isinstance(world.broker, RabbitMQ)
    name = quote(f"{world.namespace}.{SPARE}", safe="")
    await asyncio.to_thread(http, "DELETE", f"{world.broker.management_url}/queues/%2F/{name}", None)


async def topic_on_kafka(world: World, pubsub: AsyncPubSub) -> None:
    assert isinstance(world.broker, Kafka)
    admin = AIOKafkaAdminClient(bootstrap_servers=world.broker.bootstrap)
    await admin.start()
    try:
        name = f"{world.namespace}.{TOPIC}"
        await admin.delete_topics([name])
        async with asyncio.timeout(FOUND_AGAIN):
            while name in await admin.list_topics():  # noqa: ASYNC110  the broker tells only who asks
                await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def topic_on_classic(world: World, pubsub: AsyncPubSub) -> None:
    """A durable subscription that is active cannot be removed there; a topic it listens to can."""
    await _removed_on_classic(world, "removeTopic", f"{world.namespace}.{TOPIC}")


async def retries_on_classic(world: World, pubsub: AsyncPubSub) -> None:
    await _removed_on_classic(world, "removeQueue", f"{world.namespace}$retry.{SPARE}")


async def queue_on_classic(world: World, pubsub: AsyncPubSub) -> None:
    await _removed_on_classic(
        world, "removeQueue", f"Consumer.{SPARE}.VirtualTopic.{world.namespace}.{SPARE}.>"
    )


async def _removed_on_classic(world: World, operation: str, name: str) -> None:
    assert isinstance(world.broker, Classic)
    bean = "org.apache.activemq:type=Broker,brokerName=*"
    await _jolokia(world.broker.console_url, bean, f"{operation}(java.lang.String)", name)


async def queue_on_artemis(world: World, pubsub: AsyncPubSub) -> None:
    assert isinstance(world.broker, Artemis)
    await _jolokia(
        world.broker.console_url,
        "org.apache.activemq.artemis:broker=*",
        "destroyQueue(java.lang.String,boolean)",
        f"{world.namespace}$sub.{SPARE}${SPARE}.#",
        True,
    )


DELETIONS: Final[dict[str, tuple[Deletion, ...]]] = {
    "sqlite": (subscription_by_the_facade,),
    "rabbitmq": (queue_on_rabbitmq, subscription_by_the_facade),
    "kafka": (topic_on_kafka, subscription_by_the_facade),
    "activemq": (topic_on_classic, retries_on_classic),
    "activemq-virtual": (queue_on_classic, retries_on_classic, subscription_by_the_facade),
    "artemis": (queue_on_artemis, subscription_by_the_facade),
}


async def delete(world: World, deletion: Deletion) -> None:
    """Carry it out, and return once the members receive again; AssertionError where they never do."""
    async with AsyncPubSub(Settings.load(world.direct)) as pubsub:
        await _arrives(world, pubsub, "before the deletion")
        await deletion(world, pubsub)
        await _arrives(world, pubsub, f"after {deletion.__name__}")
        more = {message.id for message in await pubsub.publish_many([Message(TOPIC, n) for n in range(MORE)])}
        deadline = time.monotonic() + FOUND_AGAIN
        while missing := more - handled(world):
            assert time.monotonic() < deadline, f"{len(missing)} of {MORE} after {deletion.__name__} are lost"
            await asyncio.sleep(0.05)


async def _arrives(world: World, pubsub: AsyncPubSub, when: str) -> None:
    """Publish until one is handled: nobody has promised those that went to what was being deleted."""
    ids: set[str] = set()
    deadline = time.monotonic() + FOUND_AGAIN
    while not ids & handled(world):
        assert time.monotonic() < deadline, f"{when}: nothing arrives any more on {SPARE}"
        try:
            ids.add((await pubsub.publish(TOPIC, when)).id)
        except PubSubError as error:
            print(f"{world.form}: {when}: not published: {error}")
        await asyncio.sleep(0.2)


def handled(world: World) -> set[str]:
    """Ids that members handled for the spare subscription so far."""
    return {
        line.split()[0]
        for path in world.folder.glob(f"handled-{SPARE}-*")
        for line in path.read_text().splitlines()
        if line.count(" ") == 2
    }


# -- by the brokers' own management --------------------------------------------------------------------


async def _jolokia(console: str, broker: str, operation: str, *arguments: object) -> None:
    url = f"{console}/"
    found = await asyncio.to_thread(http, "POST", url, {"type": "search", "mbean": broker})
    request = {"type": "exec", "mbean": found["value"][0], "operation": operation, "arguments": arguments}
    answer = await asyncio.to_thread(http, "POST", url, request)
    assert answer["status"] == 200, answer


def http(method: str, url: str, body: Any) -> Any:
    """Ask a broker's management; the JSON of its answer, or OSError."""
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json", "Origin": url}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        text = answer.read()
    return json.loads(text) if text else None
