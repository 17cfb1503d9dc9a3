"""The outbox on SQLAlchemy, on each database: what is committed is published, in order by key, and nothing else."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pubsub_facade import (
    AsyncPubSub,
    Backoff,
    ConnectionLost,
    Message,
    MessageError,
    PayloadTooLarge,
    SendFailed,
    TopicError,
)
from pubsub_facade.backends.memory import Hub
from pubsub_facade.contrib._outbox_store import SqlStore
from pubsub_facade.contrib.outbox import SENT, Lag, Relay
from pubsub_facade.contrib.sqlalchemy import Outbox
from pubsub_facade.testing.hub import Published, TestHub

from .conftest import ALL


class Desk:
    """An outbox on one database, and clients on this test's hub."""

    def __init__(self, url: str, hub: TestHub) -> None:
        self.engine = sa.create_engine(url)
        self.hub = hub
        self.metadata = sa.MetaData()
        self.outbox = Outbox(self.metadata, f"outbox_{uuid.uuid4().hex[:12]}", max_payload=1 << 20)
        self.metadata.create_all(self.engine)
        self.pubsub = AsyncPubSub(hub.settings())
        self.published = Published(hub)

    def write(self, topic: str, payload: Any, **options: Any) -> None:
        with Session(self.engine) as session, session.begin():
            self.outbox.publish(session, topic, payload, **options)

    def relay(self, **options: Any) -> Relay:
        keep = bool(options.get("keep"))
        lease = options.pop("lease", 30.0)
        return Relay(self.pubsub, self.outbox.store(self.engine, keep=keep, lease=lease), **options)

    async def lag(self) -> Lag:
        store = self.outbox.store(self.engine)
        try:
            return await store.lag()
        finally:
            await store.close()

    def rows(self, state: int | None = None) -> int:
        query = sa.select(sa.func.count()).select_from(self.outbox.table)
        if state is not None:
            query = query.where(self.outbox.table.c.state == state)
        with self.engine.connect() as connection:
            return connection.execute(query).scalar_one()


@pytest.fixture(params=ALL)
def desk(
    request: pytest.FixtureRequest, database_url: Callable[[str], str], pubsub_hub: TestHub
) -> Iterator[Desk]:
    desk = Desk(database_url(request.param), pubsub_hub)
    yield desk
    desk.metadata.drop_all(desk.engine)
    desk.engine.dispose()


@pytest.fixture
async def running(desk: Desk) -> AsyncIterator[Callable[..., None]]:
    """Run relays until the test ends."""
    stop = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    def start(**options: Any) -> None:
        tasks.append(asyncio.create_task(desk.relay(**options).run(stop)))

    yield start
    stop.set()
    await asyncio.gather(*tasks)
    await desk.pubsub.close(1)


async def until(true: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


async def test_a_message_arrives_as_it_was_written(desk: Desk) -> None:
    desk.write(
        "a.b", {"x": [1, "ü", None]}, key="k", headers={"n": 1, "f": 1.5, "b": True, "s": "ü\n"}, id="my-id"
    )
    desk.write("a.raw", bytes(range(256)))
    desk.write("a.text", "plain ✓")
    desk.write("a.empty", b"")
    assert await desk.relay().drain() == 4
    first, raw, text, empty = desk.published
    assert (first.topic, first.payload, first.key, first.id) == ("a.b", {"x": [1, "ü", None]}, "k", "my-id")
    assert first.headers == {"n": 1, "f": 1.5, "b": True, "s": "ü\n"}
    assert type(first.headers["b"]) is bool
    assert (raw.payload, text.payload, empty.payload) == (bytes(range(256)), "plain ✓", b"")
    assert desk.rows() == 0


async def test_a_transaction_that_is_rolled_back_publishes_nothing(desk: Desk) -> None:
    with Session(desk.engine) as session:
        desk.outbox.publish(session, "a", "never")
        session.rollback()
    desk.write("a", "once")
    await desk.relay().drain()
    assert [message.payload for message in desk.published] == ["once"]


async def test_what_cannot_be_sent_is_refused_when_it_is_written(desk: Desk) -> None:
    with Session(desk.engine) as session:
        with pytest.raises(TopicError):
            desk.outbox.publish(session, "a..b", 1)
        with pytest.raises(MessageError):
            desk.outbox.publish(session, "a", object())
        with pytest.raises(PayloadTooLarge):
            desk.outbox.publish(session, "a", b"x" * ((1 << 20) + 1))
    assert desk.rows() == 0


async def test_a_relay_is_woken_by_a_commit(desk: Desk, running: Callable[..., None]) -> None:
    running()
    desk.write("a", 1)
    await until(lambda: len(desk.published) == 1)
    await asyncio.sleep(0)
    began = time.monotonic()
    desk.write("a", 2)
    await until(lambda: len(desk.published) == 2)
    assert time.monotonic() - began < 0.8


async def test_several_relays_keep_the_order_of_each_key(desk: Desk, running: Callable[..., None]) -> None:
    count = 600
    with Session(desk.engine) as session, session.begin():
        for number in range(count):
            desk.outbox.publish(session, "a", number, key=f"k{number % 7}")
    for _ in range(3):
        running(batch=20)
    await until(lambda: len(desk.published) >= count)
    await until(lambda: desk.rows() == 0)
    by_key: dict[str | None, list[int]] = {}
    for message in desk.published:
        by_key.setdefault(message.key, []).append(message.payload)
    assert sum(map(len, by_key.values())) == count
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


async def test_an_absent_broker_is_waited_for_and_not_held_against_the_rows(
    desk: Desk, running: Callable[..., None]
) -> None:
    desk.hub.fail("send", ConnectionLost("the test cut it"))
    for _ in range(5):
        desk.hub.fail("open", ConnectionLost("the test keeps it away"))
    running(max_attempts=1, publish_timeout=0.1)
    desk.write("a", 1)
    await until(lambda: len(desk.published) == 1)
    assert (await desk.lag()).failed == 0


async def test_a_refused_row_waits_holds_its_key_only_and_is_set_aside_in_the_end(
    desk: Desk, running: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, "poison", whole=True)
    desk.write("a", "poison", key="k")
    desk.write("a", "after", key="k")
    desk.write("a", "other", key="j")
    running(max_attempts=3, backoff=Backoff(0.3, 0.3, jitter=0))
    await until(lambda: len(desk.published) == 1)
    assert [message.payload for message in desk.published] == ["other"]
    await until(lambda: len(desk.published) == 2)
    assert [message.payload for message in desk.published] == ["other", "after"]
    assert (await desk.lag()).failed == 1
    with desk.engine.connect() as connection:
        row = connection.execute(sa.select(desk.outbox.table)).one()
    assert (row.attempts, "refuses poison" in row.error) == (3, True)


async def test_a_refused_row_does_not_hold_keys_that_are_almost_its_own(
    desk: Desk, running: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, "poison", whole=True)
    desk.write("a", "poison", key="ké")
    running(backoff=Backoff(3600, 3600, jitter=0))
    await until(lambda: _attempts(desk) == [1])
    alike = ["Ké", "ke", "ké ", "ke\u0301", "🙂"]
    for key in ["ké", *alike]:
        desk.write("a", key, key=key)
    await until(lambda: _attempts(desk) == [0, 1])
    assert sorted(message.payload for message in desk.published) == sorted(alike)


def _attempts(desk: Desk) -> list[int]:
    """Of the rows that are there."""
    with desk.engine.connect() as connection:
        return sorted(connection.execute(sa.select(desk.outbox.table.c.attempts)).scalars())


async def test_one_poison_row_does_not_fail_the_rest_of_its_batch(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, "poison", whole=True)
    for number in range(20):
        desk.write("a", "poison" if number == 13 else number)
    relay = desk.relay(max_attempts=1)
    assert await relay.drain() == 19
    assert relay.set_aside == 1
    assert sorted(message.payload for message in desk.published) == [n for n in range(20) if n != 13]


def _refuse(monkeypatch: pytest.MonkeyPatch, text: str, *, whole: bool = False) -> None:
    """Let the broker refuse messages with this payload: one by one, or the batch they come in."""
    from pubsub_facade.backends.memory import MemoryBackend

    send = MemoryBackend.send

    async def refusing(self: MemoryBackend, messages: Any) -> None:
        bad = [message for message in messages if message.body == text.encode()]
        if bad and whole:
            raise SendFailed(f"refuses {text}", {message.id: "unknown" for message in messages})
        good = [message for message in messages if message not in bad]
        if good:
            await send(self, good)
        if bad:
            raise SendFailed(f"refuses {text}", {message.id: "not stored" for message in bad})

    monkeypatch.setattr(MemoryBackend, "send", refusing)


async def test_a_delay_works_without_the_broker(desk: Desk, running: Callable[..., None]) -> None:
    running()
    desk.write("a", "later", delay=0.6)
    written = time.time()
    desk.write("a", "now")
    await until(lambda: len(desk.published) == 2)
    now, later = desk.published
    assert (now.payload, later.payload) == ("now", "later")
    assert later.timestamp is not None
    assert 0.55 <= later.timestamp - written < 3


async def test_lag_says_how_far_behind_and_pruning_deletes_what_is_old(desk: Desk) -> None:
    assert await desk.lag() == Lag(0, 0, None)
    desk.write("a", 1)
    desk.write("a", 2, delay=3600)
    lag = await desk.lag()
    assert (lag.waiting, lag.failed) == (2, 0)
    assert lag.oldest is not None
    assert 0 <= lag.oldest < 10
    await desk.relay(keep=3600).drain()
    assert desk.rows() == 2
    assert (await desk.lag()).waiting == 1
    store = desk.outbox.store(desk.engine)
    assert await store.prune(time.time() - 60, 10) == 0
    assert await store.prune(time.time() + 60, 10) == 1
    await store.close()
    assert desk.rows() == 1


async def test_a_relay_prunes_a_thousand_rows_at_a_time_and_keeps_what_is_not_old_enough(
    desk: Desk, running: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session(desk.engine) as session, session.begin():
        desk.outbox.publish_many(session, [Message("a", n) for n in range(2300)])
        session.execute(sa.update(desk.outbox.table).values(state=SENT, due=time.time() - 3700))
    desk.write("a", "new")
    pruned: list[int] = []
    prune = SqlStore.prune

    async def counting(self: SqlStore, before: float, limit: int) -> int:
        pruned.append(await prune(self, before, limit))
        return pruned[-1]

    monkeypatch.setattr(SqlStore, "prune", counting)
    running(keep=3600)
    await until(lambda: len(pruned) >= 4 and len(desk.published) == 1)
    assert pruned == [1000, 1000, 300, 0]
    await until(lambda: desk.rows(SENT) == 1)
    assert desk.rows() == 1


async def test_a_relay_that_stops_answering_loses_its_shards(desk: Desk) -> None:
    store = desk.outbox.store(desk.engine, lease=0.5)
    await store.open()
    lane = store.lane()
    desk.write("a", 1)
    rows = await lane.claim(10)
    assert len(rows) == 1
    other = desk.relay()
    assert await other.drain() == 0  # held
    if desk.engine.dialect.name == "sqlite":
        await until(lambda: time.time() > rows[0].message.timestamp + 0.6)  # type: ignore[operator]
    else:
        await lane._link.close()  # type: ignore[attr-defined]
    assert await other.drain() == 1
    await lane.close()
    await store.close()


def test_the_hub_is_dropped_after_each_test() -> None:
    assert not [name for name in Hub._hubs if name.startswith("test-")]


@pytest.mark.parametrize(
    "driver", ["sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "mariadb+asyncmy"]
)
async def test_an_async_engine_writes_and_relays(
    driver: str, database_url: Callable[[str], str], pubsub_hub: TestHub
) -> None:
    name, _, dialect = driver.partition("+")
    url = sa.make_url(database_url(name)).set(drivername=f"{name}+{dialect}")
    engine = create_async_engine(url)
    metadata = sa.MetaData()
    outbox = Outbox(metadata, f"outbox_{uuid.uuid4().hex[:12]}")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    stop = asyncio.Event()
    async with AsyncPubSub(pubsub_hub.settings()) as pubsub:
        relay = asyncio.create_task(Relay(pubsub, outbox.store(engine)).run(stop))
        published = Published(pubsub_hub)
        async with AsyncSession(engine) as session, session.begin():
            for number in range(50):
                await outbox.apublish(session, "a", number, key="k", headers={"n": number})
        async with AsyncSession(engine) as session:
            await outbox.apublish(session, "a", "never")
            await session.rollback()
        await until(lambda: len(published) >= 50)
        assert [message.payload for message in published] == list(range(50))
        stop.set()
        await relay
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
    await engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_the_trigger_of_a_migration_wakes_the_relay_until_its_connection_is_lost(
    driver: str, database_url: Callable[[str], str]
) -> None:
    url = sa.make_url(database_url("postgresql"))
    engine = create_async_engine(url.set(drivername=f"postgresql+{driver}"))
    metadata = sa.MetaData()
    outbox = Outbox(metadata, f"Outbox_{uuid.uuid4().hex[:12]}")
    name = outbox.table.name
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.exec_driver_sql(f'DROP FUNCTION "{name}_notify" CASCADE')
        await connection.execute(sa.text(outbox.notify_ddl()))  # as Alembic's op.execute does
    store = outbox.store(engine)
    wakes = store.wakes()
    await anext(wakes)  # listens from here on
    async with AsyncSession(engine) as session, session.begin():
        await outbox.apublish(session, "a", 1)
    await asyncio.wait_for(anext(wakes), 10)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE query = 'LISTEN \"{name}\"' AND pid <> pg_backend_pid()"
        )
    with pytest.raises((psycopg.OperationalError, ConnectionError)):
        await asyncio.wait_for(anext(wakes), 10)
    await store.close()
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
    await engine.dispose()


async def test_a_claim_reads_the_head_of_a_long_line_only(
    database_url: Callable[[str], str], pubsub_hub: TestHub
) -> None:
    desk = Desk(database_url("postgresql"), pubsub_hub)
    name = desk.outbox.table.name
    with desk.engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO {name} (shard, state, attempts, created, due, message_id, topic, headers, body, error) "
            "SELECT (g * 7) %% 32, 0, 0, 0, 0, 'm' || g, 'a', '', '', '' FROM generate_series(1, 50000) g"
        )
    store = desk.outbox.store(desk.engine)
    await store.open()
    lane = store.lane()
    assert len(await lane.claim(100)) == 100
    ((read,),) = await lane._link.call(  # type: ignore[attr-defined]
        lambda session: session.query(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = %s", (name,)
        )
    )
    assert read < 5000
    await lane.close()
    await store.close()
    desk.metadata.drop_all(desk.engine)
    desk.engine.dispose()
