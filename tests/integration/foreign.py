"""Raw clients of each broker, which know nothing of this package but where its messages are (docs/backends)."""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiokafka
import pika
from aiokafka.admin import AIOKafkaAdminClient

from brokers import ports
from pubsub_facade import Settings
from pubsub_facade.address import Address
from tests.conftest import FOLDER


async def to_rabbitmq(settings: Settings, topic: str, body: bytes, headers: Mapping[str, str]) -> None:
    """A confirmed publish to the exchange named after the namespace."""

    def publish() -> None:
        url = settings.rabbitmq.url.get_secret_value()
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            properties = pika.BasicProperties(headers=dict(headers))
            channel.basic_publish(settings.namespace, topic, body, properties)

    await asyncio.to_thread(publish)


async def to_kafka(settings: Settings, topic: str, body: bytes, headers: Mapping[str, str]) -> None:
    """A record on the topic ``namespace.topic``, which the broker makes if it is not there."""
    servers = settings.kafka.bootstrap_servers
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=servers) as producer:
        await producer.send_and_wait(
            f"{settings.namespace}.{topic}",
            body,
            headers=[(name, value.encode()) for name, value in headers.items()],
        )


async def to_activemq(settings: Settings, topic: str, body: bytes, headers: Mapping[str, str]) -> None:
    """A SEND with a receipt over a bare socket."""
    virtual = settings.activemq.subscriptions == "virtual"
    if settings.activemq.flavor == "artemis":
        where = {"destination": f"{settings.namespace}.{topic}", "destination-type": "MULTICAST"}
    else:
        where = {"destination": f"/topic/{'VirtualTopic.' if virtual else ''}{settings.namespace}.{topic}"}
    address = settings.activemq.address
    host, port = address.hosts[0]
    assert not address.secure, "this raw client speaks no TLS"
    reader, writer = await asyncio.open_connection(host, port)
    login = {"login": address.username or "", "passcode": address.secret or ""}
    _write(writer, "CONNECT", {"accept-version": "1.2", "host": host, **login})
    assert (await _command(reader)) == "CONNECTED"
    length = {"content-length": str(len(body)), "persistent": "true", "receipt": "sent"}
    _write(writer, "SEND", {**where, **length, **headers}, body)
    assert (await _command(reader)) == "RECEIPT"
    writer.close()
    await writer.wait_closed()


def _write(writer: asyncio.StreamWriter, command: str, headers: Mapping[str, str], body: bytes = b"") -> None:
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    writer.write(f"{command}\n{lines}\n".encode() + body + b"\0")


async def _command(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(10):
        frame = await reader.readuntil(b"\0")
    return frame.lstrip().split(b"\n", 1)[0].decode()


async def names_on_rabbitmq(settings: Settings) -> set[str]:
    """Queues and exchanges, by the management plugin."""
    address = settings.rabbitmq.address
    port = _port("rabbitmq", "management")
    names: set[str] = set()
    for kind in ("queues", "exchanges"):
        url = f"http://127.0.0.1:{port}/api/{kind}?columns=name"
        found = await asyncio.to_thread(_json, url, address)
        names.update(f"{kind} {each['name']}" for each in found)
    return _of_namespace(names, settings)


async def names_on_kafka(settings: Settings) -> set[str]:
    """Topics and consumer groups."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        topics = {f"topics {name}" for name in await admin.list_topics()}
        groups = {f"groups {name}" for name, _ in await admin.list_consumer_groups()}
    finally:
        await admin.close()
    return _of_namespace(topics | groups, settings)


async def names_on_activemq(settings: Settings) -> set[str]:
    """Queues, topics and durable subscriptions, by Jolokia."""
    artemis = settings.activemq.flavor == "artemis"
    if artemis:
        url = f"http://127.0.0.1:{_port('artemis', 'console')}/console/jolokia/read/"
        url += "org.apache.activemq.artemis:broker=*"
        kinds = ["QueueNames", "AddressNames"]
    else:
        url = f"http://127.0.0.1:{_port('activemq', 'jolokia')}/api/jolokia/read/"
        url += "org.apache.activemq:type=Broker,brokerName=*"
        kinds = ["Queues", "Topics", "DurableTopicSubscribers", "InactiveDurableTopicSubscribers"]
    read = await asyncio.to_thread(_json, f"{url}/{','.join(kinds)}", settings.activemq.address)
    (found,) = read["value"].values()
    names: set[str] = set()
    for kind in kinds:
        names.update(
            f"{kind} {each['objectName'] if isinstance(each, dict) else each}" for each in found[kind]
        )
    return _of_namespace(names, settings)


def _of_namespace(names: set[str], settings: Settings) -> set[str]:
    return {name for name in names if settings.namespace in name and "Advisory" not in name}


def _port(broker: str, what: str) -> int:
    return (ports.recorded(FOLDER / broker) or ports.DEFAULTS[broker])[what]


def _json(url: str, address: Address) -> Any:
    token = base64.b64encode(f"{address.username}:{address.secret}".encode()).decode()
    request = urllib.request.Request(
        url, headers={"Authorization": f"Basic {token}", "Origin": "http://127.0.0.1"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


async def drop_kafka_topics(settings: Settings) -> None:
    """Remove the topics of a namespace, which no verb of the API does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        mine = [name for name in await admin.list_topics() if name.startswith(settings.namespace)]
        if mine:
            await admin.delete_topics(mine)
    finally:
        await admin.close()
