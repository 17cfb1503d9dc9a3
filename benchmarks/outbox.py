"""Publishing from threads, and the outbox's relay: ``python -m benchmarks.outbox [--threads N] [--rows N] [--runs N]``.

Threads: 16 that share one client's confirms, beside 16 that each wait for a round trip of their own, on
one pika connection behind a lock (as one must share it) or on one each. Relay: rows from PostgreSQL to RabbitMQ,
beside each half alone, so that the limit shows. The broker is the one of ``make brokers``; PostgreSQL is started
where it is not up. Medians of the runs, which take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pika
import sqlalchemy as sa

from brokers import databases
from pubsub_facade import AsyncPubSub, Message, PubSub, Settings
from pubsub_facade.contrib.outbox import Outcome, Relay
from pubsub_facade.contrib.sqlalchemy import Outbox

ROOT = Path(__file__).resolve().parent.parent
SIZE = 256
BATCH = 500
KEYS = 1000


def settings() -> Settings:
    """RabbitMQ, in a namespace of its own."""
    config = ROOT / ".brokers" / "pubsub.rabbitmq.toml"
    return Settings.load(config, namespace=f"bench-{uuid.uuid4().hex[:8]}")


def in_threads(publish: Callable[[int], None], threads: int, count: int) -> float:
    """Publishes a second of several threads, each calling ``publish(number of the thread)``."""
    each = count // threads

    def run(thread: int) -> None:
        for _ in range(each):
            publish(thread)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, thread) for thread in range(threads)]:
            done.result()
    return each * threads / (time.perf_counter() - began)


def shared(threads: int, count: int) -> float:
    """One client for all threads."""
    with PubSub(settings()) as pubsub:
        pubsub.declare("bench.#", subscription="bench")
        body = b"x" * SIZE

        def publish(thread: int) -> None:
            pubsub.publish("bench.a", body)

        publish(0)
        rate = in_threads(publish, threads, count)
        pubsub.delete("bench")
    return rate


def alone(threads: int, count: int, connections: int) -> float:
    """Each publish waiting for its own confirm: a connection for each thread, or one for all behind a lock."""
    there = settings()
    with PubSub(there) as pubsub:
        pubsub.declare("bench.#", subscription="bench")
        links = [
            pika.BlockingConnection(pika.URLParameters(there.rabbitmq.url.get_secret_value()))
            for _ in range(connections)
        ]
        locks = [threading.Lock() for _ in range(connections)]
        channels = [link.channel() for link in links]
        for channel in channels:
            channel.confirm_delivery()
        properties = pika.BasicProperties(delivery_mode=2)
        body = b"x" * SIZE

        def publish(thread: int) -> None:
            link = thread % connections
            with locks[link]:
                channels[link].basic_publish(there.namespace, "bench.a", body, properties)

        rate = in_threads(publish, threads, count)
        for link in links:
            link.close()
        pubsub.delete("bench")
    return rate


class Table:
    """An outbox on PostgreSQL."""

    def __init__(self) -> None:
        databases.up(["postgresql"])
        self.engine = sa.create_engine(databases.DATABASES["postgresql"]().url)
        self.metadata = sa.MetaData()
        self.outbox = Outbox(self.metadata, f"bench_{uuid.uuid4().hex[:8]}")
        self.metadata.create_all(self.engine)

    def fill(self, rows: int) -> None:
        """Committed rows, as many transactions left them."""
        for start in range(0, rows, 1000):
            with self.engine.begin() as connection:
                messages = [
                    Message("bench.a", b"x" * SIZE, key=f"k{number % KEYS}")
                    for number in range(start, min(start + 1000, rows))
                ]
                self.outbox.publish_many(connection, messages)
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"ANALYZE {self.outbox.table.name}")

    def drop(self) -> None:
        self.metadata.drop_all(self.engine)
        self.engine.dispose()


async def relay(table: Table, rows: int) -> float:
    """Rows a second through one relay process."""
    async with AsyncPubSub(settings()) as pubsub:
        await pubsub.declare("bench.#", subscription="bench")
        await pubsub.publish("bench.warm", b"")
        stop = asyncio.Event()
        running = Relay(pubsub, table.outbox.store(table.engine), batch=BATCH)
        began = time.perf_counter()
        task = asyncio.create_task(running.run(stop))
        while running.published < rows:  # noqa: ASYNC110 - nothing tells when a relay has caught up
            await asyncio.sleep(0.005)
        rate = rows / (time.perf_counter() - began)
        stop.set()
        await task
        await pubsub.delete("bench")
    return rate


async def database_alone(table: Table, rows: int) -> float:
    """The same claims and settlements with nothing published."""
    store = table.outbox.store(table.engine)
    await store.open()
    lanes = [store.lane() for _ in range(2)]
    done = 0

    async def run(lane_number: int) -> None:
        nonlocal done
        lane = lanes[lane_number]
        while done < rows:
            claimed = await lane.claim(BATCH)
            if claimed:
                await lane.settle(Outcome(sent=[row.id for row in claimed]))
                done += len(claimed)

    began = time.perf_counter()
    await asyncio.gather(run(0), run(1))
    rate = rows / (time.perf_counter() - began)
    for lane in lanes:
        await lane.close()
    await store.close()
    return rate


async def broker_alone(rows: int) -> float:
    """The same batches published from memory."""
    async with AsyncPubSub(settings()) as pubsub:
        await pubsub.declare("bench.#", subscription="bench")
        await pubsub.publish("bench.warm", b"")
        messages = [Message("bench.a", b"x" * SIZE, key=f"k{number % KEYS}") for number in range(BATCH)]
        began = time.perf_counter()
        for _ in range(rows // (2 * BATCH)):
            await asyncio.gather(pubsub.publish_many(messages), pubsub.publish_many(messages))
        rate = rows / (time.perf_counter() - began)
        await pubsub.delete("bench")
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outbox")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--count", type=int, default=16_000, help="publishes from threads that share")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    threads, count = options.threads, options.count
    rates: dict[str, list[float]] = {
        f"{threads} threads, one pika connection, a round trip each": [],
        f"{threads} threads, a pika connection and a round trip each": [],
        f"{threads} threads sharing confirms": [],
        "relay, PostgreSQL to RabbitMQ": [],
        "its database half alone": [],
        "its broker half alone": [],
    }
    one, own, sharing, whole, database, broker = rates.values()
    for _ in range(options.runs):
        one.append(alone(threads, count // 8, 1))
        own.append(alone(threads, count // 8, threads))
        sharing.append(shared(threads, count))
        for into, run in ((whole, relay), (database, database_alone)):
            table = Table()
            table.fill(options.rows)
            into.append(asyncio.run(run(table, options.rows)))
            table.drop()
        broker.append(asyncio.run(broker_alone(options.rows)))
    print(f"{SIZE}-byte messages, median of {options.runs} runs\n\n| | messages a second |\n|---|---|")
    for label, values in rates.items():
        print(f"| {label} | {statistics.median(values):,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
