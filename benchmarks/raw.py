"""What a careful user of each raw driver would write: confirmed publishing, pipelined, and acknowledged consuming.

Each function publishes or consumes ``count`` messages of ``SIZE`` bytes and returns messages a second.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from pubsub_facade import Settings

SIZE = 256
BODY = b"x" * SIZE
WINDOW = 100


def _rate(count: int, begin: float) -> float:
    return count / (time.perf_counter() - begin)


# -- RabbitMQ: pika's asyncio adapter and its callbacks -------------------------------------------


async def _pika_channel(settings: Settings) -> tuple[Any, Any]:
    import pika
    from pika.adapters.asyncio_connection import AsyncioConnection

    ready: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()
    address = settings.rabbitmq.address
    host, port = address.hosts[0]
    parameters = pika.ConnectionParameters(
        host,
        port,
        address.path or "/",
        pika.PlainCredentials(address.username or "guest", address.secret or "guest"),
    )
    AsyncioConnection(
        parameters,
        on_open_callback=lambda connection: connection.channel(
            on_open_callback=lambda channel: ready.set_result((connection, channel))
        ),
        on_open_error_callback=lambda connection, error: ready.set_exception(error),
    )
    return await ready


async def _pika_queue(channel: Any, name: str) -> None:
    done = asyncio.get_running_loop().create_future()
    channel.queue_declare(
        name, durable=True, arguments={"x-queue-type": "quorum"}, callback=lambda frame: done.set_result(None)
    )
    await done


async def rabbitmq_publish(settings: Settings, queue: str, count: int) -> float:
    """pika: every message written at once up to 1,000 unconfirmed, confirms counted in ranges."""
    import pika

    connection, channel = await _pika_channel(settings)
    await _pika_queue(channel, queue)
    confirmed = 0
    wake = asyncio.Event()
    opened = asyncio.get_running_loop().create_future()

    def on_confirm(frame: Any) -> None:
        nonlocal confirmed
        confirmed = max(confirmed, frame.method.delivery_tag)
        wake.set()

    channel.confirm_delivery(on_confirm, callback=lambda frame: opened.set_result(None))
    await opened
    properties = pika.BasicProperties(delivery_mode=2, content_type="application/octet-stream")
    begin = time.perf_counter()
    for sent in range(1, count + 1):
        channel.basic_publish("", queue, BODY, properties)
        while sent - confirmed >= 1000:
            wake.clear()
            await wake.wait()
    while confirmed < count:
        wake.clear()
        await wake.wait()
    rate = _rate(count, begin)
    connection.close()
    return rate


async def rabbitmq_consume(settings: Settings, queue: str, count: int) -> float:
    """pika: a callback for each delivery, and an ack for each."""
    connection, channel = await _pika_channel(settings)
    done = asyncio.get_running_loop().create_future()
    got = 0

    def on_message(channel: Any, method: Any, properties: Any, body: bytes) -> None:
        nonlocal got
        got += 1
        channel.basic_ack(method.delivery_tag)
        if got == count:
            done.set_result(None)

    begin = time.perf_counter()
    channel.basic_qos(prefetch_count=WINDOW, callback=lambda frame: channel.basic_consume(queue, on_message))
    await done
    rate = _rate(count, begin)
    deleted = asyncio.get_running_loop().create_future()
    channel.queue_delete(queue, callback=lambda frame: deleted.set_result(None))
    await deleted
    connection.close()
    return rate


# -- Kafka: aiokafka ------------------------------------------------------------------------------


async def kafka_publish(settings: Settings, topic: str, count: int) -> float:
    """aiokafka: futures of 1,000 sends awaited together, acks=all, idempotent."""
    from aiokafka import AIOKafkaProducer

    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, acks="all", enable_idempotence=True
    )
    await producer.start()
    await producer.send_and_wait(topic, BODY)
    begin = time.perf_counter()
    for start in range(0, count, 1000):
        futures = [await producer.send(topic, BODY) for _ in range(min(1000, count - start))]
        await asyncio.gather(*futures)
    rate = _rate(count, begin)
    await producer.stop()
    return rate


async def kafka_consume(settings: Settings, topic: str, count: int) -> float:
    """aiokafka: ``getmany``, and a commit after each batch."""
    from aiokafka import AIOKafkaConsumer

    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=settings.kafka.bootstrap_servers,
        group_id=topic,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    got = 0
    begin = 0.0
    while got < count:
        batches = await consumer.getmany(timeout_ms=1000, max_records=500)
        begin = begin or time.perf_counter()
        got += sum(map(len, batches.values()))
        await consumer.commit()
    rate = _rate(count, begin)
    await consumer.stop()
    return rate


# -- ActiveMQ: stomp.py ---------------------------------------------------------------------------


def _stomp(settings: Settings, listener: Any) -> Any:
    import stomp

    address = settings.activemq.address
    connection = stomp.Connection12(list(address.hosts))
    connection.set_listener("bench", listener)
    connection.connect(address.username, address.secret, wait=True)
    return connection


async def activemq_publish(settings: Settings, queue: str, count: int) -> float:
    """stomp.py: transactions of 100, each with a receipt."""
    import stomp

    receipts = threading.Semaphore(0)

    class Listener(stomp.ConnectionListener):  # type: ignore[misc]
        def on_receipt(self, frame: Any) -> None:
            receipts.release()

    def run() -> float:
        connection = _stomp(settings, Listener())
        begin = time.perf_counter()
        for start in range(0, count, 100):
            transaction = connection.begin()
            for _ in range(min(100, count - start)):
                connection.send(f"/queue/{queue}", BODY, transaction=transaction, persistent="true")
            connection.commit(transaction, receipt=f"commit-{start}")
            receipts.acquire()
        rate = _rate(count, begin)
        connection.disconnect()
        return rate

    return await asyncio.to_thread(run)


async def activemq_consume(settings: Settings, queue: str, count: int) -> float:
    """stomp.py: a listener for each frame, and an ack for each."""
    import stomp

    done = threading.Event()

    class Listener(stomp.ConnectionListener):  # type: ignore[misc]
        connection: Any = None
        got = 0
        begin = 0.0

        def on_message(self, frame: Any) -> None:
            self.begin = self.begin or time.perf_counter()
            self.connection.ack(frame.headers["ack"])
            self.got += 1
            if self.got == count:
                done.set()

    def run() -> float:
        listener = Listener()
        listener.connection = _stomp(settings, listener)
        listener.connection.subscribe(f"/queue/{queue}", "1", ack="client-individual")
        if not done.wait(120):
            raise TimeoutError(f"{listener.got} of {count} messages within 120 s")
        rate = _rate(count, listener.begin)
        listener.connection.disconnect()
        return rate

    return await asyncio.to_thread(run)


# -- SQLite: the standard library -----------------------------------------------------------------


async def sqlite_publish(settings: Settings, table: str, count: int) -> float:
    """sqlite3: one row a message, a durable commit for each 500."""
    import sqlite3

    def run() -> float:
        database = sqlite3.connect(settings.sqlite.path.with_suffix(".raw"), isolation_level=None)
        database.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, body BLOB)"
        )
        begin = time.perf_counter()
        for start in range(0, count, 500):
            database.execute("BEGIN IMMEDIATE")
            rows = [(BODY,)] * min(500, count - start)
            database.executemany(f"INSERT INTO {table} (body) VALUES (?)", rows)
            database.execute("COMMIT")
        rate = _rate(count, begin)
        database.close()
        return rate

    return await asyncio.to_thread(run)


async def sqlite_consume(settings: Settings, table: str, count: int) -> float:
    """sqlite3: a batch of 100 rows read, then deleted in one durable commit."""
    import sqlite3

    def run() -> float:
        database = sqlite3.connect(settings.sqlite.path.with_suffix(".raw"), isolation_level=None)
        database.execute("PRAGMA synchronous=FULL")
        begin = time.perf_counter()
        got = 0
        while got < count:
            rows = database.execute(f"SELECT id, body FROM {table} ORDER BY id LIMIT 100").fetchall()
            database.execute("BEGIN IMMEDIATE")
            database.execute(f"DELETE FROM {table} WHERE id <= ?", (rows[-1][0],))
            database.execute("COMMIT")
            got += len(rows)
        rate = _rate(count, begin)
        database.close()
        return rate

    return await asyncio.to_thread(run)


RAW = {
    "sqlite": ("sqlite3", sqlite_publish, sqlite_consume),
    "rabbitmq": ("pika callbacks", rabbitmq_publish, rabbitmq_consume),
    "kafka": ("aiokafka", kafka_publish, kafka_consume),
    "activemq": ("stomp.py", activemq_publish, activemq_consume),
    "activemq-virtual": ("stomp.py", activemq_publish, activemq_consume),
    "artemis": ("stomp.py", activemq_publish, activemq_consume),
}
