"""Raw clients of each broker, which know nothing of this package but where its messages are (docs/backends)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiokafka
import pika
from aiokafka.admin import AIOKafkaAdminClient

from pubsub_facade import Settings


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
