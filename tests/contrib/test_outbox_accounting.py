"""Accounting: relays and the broker are killed, and every committed event is published, in order by key.

No event of a rolled back transaction ever is. Twins keep their id, so that they can be told.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from brokers import native
from pubsub_facade import PubSub, Settings
from pubsub_facade.contrib.sqlalchemy import Outbox
from pubsub_facade.testing.faults import wait_until

from .servers import HERE, environment

ROWS = 20_000
KEYS = 50
AT_ONCE = 20  # rows in one transaction
PAUSE = 0.02  # s between two transactions of a writer
SEED = 6


class Relays:
    """Relay processes, killed and replaced."""

    def __init__(self, count: int, arguments: list[str], variables: dict[str, str], folder: Path) -> None:
        self._command = [sys.executable, str(HERE / "relay_script.py"), *arguments]
        self._variables = variables
        self._folder = folder
        self._running = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[bytes]:
        log = (self._folder / "relays.log").open("ab")
        with log:
            return subprocess.Popen(
                self._command, env=self._variables, cwd=self._folder, stdout=log, stderr=log
            )

    def kill_one(self, draw: random.Random) -> None:
        victim = draw.randrange(len(self._running))
        assert self._running[victim].poll() is None, (self._folder / "relays.log").read_text()[-3000:]
        self._running[victim].kill()
        self._running[victim].wait()
        self._running[victim] = self._start()

    def stop(self) -> list[int]:
        """Exit codes after SIGTERM; one that was just replaced is waited for until it can take the signal."""
        for relay in self._running:
            wait_until(partial(self._listens, relay.pid), 60, f"relay {relay.pid} to run")
            relay.terminate()
        return [relay.wait(30) for relay in self._running]

    def _listens(self, pid: int) -> bool:
        return f"relay {pid} runs\n" in (self._folder / "relays.log").read_text(errors="replace")


class Writers:
    """Threads that write rows in transactions, one in ten rolled back; each key has one writer.

    They write at least ``rows`` together, and until it is enough.
    """

    def __init__(self, engine: sa.Engine, outbox: Outbox, rows: int) -> None:
        self.committed: dict[str, list[str]] = {f"k{number}": [] for number in range(KEYS)}
        self.rolled_back: set[str] = set()
        self._engine = engine
        self._outbox = outbox
        self._share = rows // 2
        self._enough = threading.Event()
        self.threads = [threading.Thread(target=self._write, args=(number,)) for number in range(2)]
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        """Return when they have written their share."""
        self._enough.set()
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()

    def _write(self, which: int) -> None:
        draw = random.Random(SEED + which)
        keys = [key for number, key in enumerate(self.committed) if number % 2 == which]
        written = 0
        while written < self._share or not self._enough.is_set():
            time.sleep(PAUSE)
            with Session(self._engine) as session:
                sent = [
                    (key, self._outbox.publish(session, "a.b", {"n": n}, key=key).id)
                    for n, key in enumerate(draw.choices(keys, k=AT_ONCE))
                ]
                if draw.random() < 0.1:
                    session.rollback()
                    self.rolled_back.update(id for _, id in sent)
                    continue
                session.commit()
            written += AT_ONCE
            for key, id in sent:
                self.committed[key].append(id)


@pytest.mark.broker("rabbitmq")
@pytest.mark.timeout(280)
def test_relays_and_broker_are_killed_and_every_committed_event_is_published_in_order(
    tmp_path: Path, database_url: Callable[[str], str]
) -> None:
    url = database_url("postgresql")
    engine = sa.create_engine(url)
    metadata = sa.MetaData()
    outbox = Outbox(metadata, f"outbox_{uuid.uuid4().hex[:12]}")
    metadata.create_all(engine)
    broker = native.start("rabbitmq", tmp_path / "rabbitmq")
    draw = random.Random(SEED)
    try:
        config = tmp_path / "pubsub.toml"
        config.write_text(broker.settings(broker.ports)["rabbitmq"])
        variables = environment(PUBSUB_CONFIG=str(config))
        with PubSub(Settings.load(config)) as pubsub:
            pubsub.declare("a.#", subscription="count")
            relays = Relays(3, [url, outbox.table.name, "200"], variables, tmp_path)
            writers = Writers(engine, outbox, ROWS)
            for number in range(10):
                time.sleep(draw.uniform(0.2, 1.0))  # when the fault strikes, not what is waited for
                wait_until(lambda: _rows(engine, outbox) > 0, 10, "rows that the fault finds waiting")
                if number in (3, 7):
                    broker.kill()
                    broker.start()
                else:
                    relays.kill_one(draw)
            writers.join()
            wait_until(lambda: _rows(engine, outbox) == 0, 90, "the outbox to be empty")
            assert relays.stop() == [0, 0, 0]
            arrived = _arrived(pubsub, sum(map(len, writers.committed.values())))
    finally:
        broker.remove()
        metadata.drop_all(engine)
        engine.dispose()
    ids = [id for ids in arrived.values() for id in ids]
    print(f"{sum(map(len, writers.committed.values()))} rows, {len(ids) - len(set(ids))} twins")
    for key, committed in writers.committed.items():
        assert list(dict.fromkeys(arrived[key])) == committed, f"{key}: lost, or out of order"
    assert writers.rolled_back
    assert not writers.rolled_back & set(ids)


def _rows(engine: sa.Engine, outbox: Outbox) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(outbox.table)).scalar_one()


def _arrived(pubsub: PubSub, expected: int) -> dict[str, list[str]]:
    """All that waits on the broker, by key, in order."""
    arrived: dict[str, list[str]] = {}
    seen: set[str] = set()
    with pubsub.subscribe("a.#", subscription="count", window=1000) as stream:
        while True:
            try:
                delivery = stream.receive(5 if len(seen) < expected else 1)
            except TimeoutError:
                return arrived
            assert delivery.key is not None
            arrived.setdefault(delivery.key, []).append(delivery.id)
            seen.add(delivery.id)
            delivery.ack()
