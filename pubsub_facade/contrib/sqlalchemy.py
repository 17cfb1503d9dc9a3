"""The outbox and the inbox on SQLAlchemy 2, sync and async: tables in your own metadata, rows in your own session.

    outbox = Outbox(Base.metadata)
    with Session.begin() as session:
        session.add(post)
        outbox.publish(session, "social.post.created", {"author": 42})

    inbox = Inbox(Base.metadata)

    @pubsub.subscriber("social.post.*", subscription="analytics")
    @inbox.exactly_once(Session)
    def count(post: Post, session: orm.Session) -> None: ...

Alembic sees the tables like any others; on PostgreSQL add ``op.execute(outbox.notify_ddl())`` to the migration,
and the relay is woken at once. Never commits or rolls back a session that is not its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from pubsub_facade.contrib import _outbox_store
from pubsub_facade.contrib._exactly_once import MARK_COLUMNS, MARK_UNIQUE, Effect, mark_id
from pubsub_facade.contrib._outbox_sql import OutboxSql, ignoring, notify_statements
from pubsub_facade.contrib._outbox_store import LEASE, Link, SqlStore, ThreadLink, postgres_wakes
from pubsub_facade.contrib.outbox import Store, columns_of, prepare
from pubsub_facade.errors import ConfigError
from pubsub_facade.message import MAX_ID, Delivery, HeaderValue, Message
from pubsub_facade.subscription import MAX_SUBSCRIPTION

T = TypeVar("T")


class Outbox:
    """Two tables, named ``{name}`` and ``{name}_shard``, and the way to write to them.

    Arguments:
        metadata: where the tables are defined.
        name: of the first table.
        max_payload: bytes of one encoded payload at most; give the backend's limit to refuse at once what the
            relay would have to set aside.
    """

    def __init__(
        self, metadata: sa.MetaData, name: str = "pubsub_outbox", *, max_payload: int | None = None
    ) -> None:
        self.max_payload = max_payload
        big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
        large = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
        self.table = sa.Table(
            name,
            metadata,
            sa.Column("id", big, primary_key=True, autoincrement=True),
            sa.Column("shard", sa.SmallInteger, nullable=False),
            sa.Column("state", sa.SmallInteger, nullable=False),
            sa.Column("attempts", sa.Integer, nullable=False),
            sa.Column("created", sa.Double, nullable=False),
            sa.Column("due", sa.Double, nullable=False),
            sa.Column("message_id", sa.String(200), nullable=False),
            sa.Column("topic", sa.String(200), nullable=False),
            sa.Column("message_key", sa.String(1000)),
            sa.Column("headers", sa.Text, nullable=False),
            sa.Column("content_type", sa.String(200)),
            sa.Column("body", large, nullable=False),
            sa.Column("error", sa.Text, nullable=False),
            sa.Index(f"{name}_state_id", "state", "id"),
            sa.Index(f"{name}_state_due", "state", "due"),
        )
        self.shards = sa.Table(
            f"{name}_shard",
            metadata,
            sa.Column("shard", sa.SmallInteger, primary_key=True, autoincrement=False),
            sa.Column("owner", sa.String(64), nullable=False),
            sa.Column("leased_until", sa.Double, nullable=False),
        )
        for statement in self._notify_statements():
            ddl = sa.DDL(statement.replace("%", "%%"))  # type: ignore[no-untyped-call]
            ddl = ddl.execute_if(dialect="postgresql")
            sa.event.listen(self.table, "after_create", ddl)

    # -- writing ----------------------------------------------------------------------------------

    def publish(
        self,
        session: Session | sa.Connection,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        id: str | None = None,
        delay: float = 0,
    ) -> Message:
        """Write one message in the session's transaction; it is published once that is committed.

        Arguments: as `AsyncPubSub.publish`; ``delay`` works on every backend. Raises as that does before sending.
        """
        message = Message(topic, payload, key=key, headers=headers, id=id, delay=delay)
        return self.publish_many(session, [message])[0]

    def publish_many(self, session: Session | sa.Connection, messages: Iterable[Message]) -> list[Message]:
        """Write messages in the session's transaction, by one statement."""
        prepared, rows = self._rows(messages)
        if rows:
            session.execute(sa.insert(self.table), rows)
        return prepared

    async def apublish(
        self,
        session: AsyncSession | AsyncConnection,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        id: str | None = None,
        delay: float = 0,
    ) -> Message:
        """`publish` for an `AsyncSession`."""
        message = Message(topic, payload, key=key, headers=headers, id=id, delay=delay)
        return (await self.apublish_many(session, [message]))[0]

    async def apublish_many(
        self, session: AsyncSession | AsyncConnection, messages: Iterable[Message]
    ) -> list[Message]:
        """`publish_many` for an `AsyncSession`."""
        prepared, rows = self._rows(messages)
        if rows:
            await session.execute(sa.insert(self.table), rows)
        return prepared

    def _rows(self, messages: Iterable[Message]) -> tuple[list[Message], list[dict[str, Any]]]:
        prepared = [prepare(message, max_payload=self.max_payload) for message in messages]
        now = time.time()
        return prepared, [columns_of(message, now) for message in prepared]

    # -- relaying ---------------------------------------------------------------------------------

    def store(self, engine: sa.Engine | AsyncEngine, *, lease: float = LEASE, keep: bool = False) -> Store:
        """The tables as `Relay` needs them.

        Arguments:
            engine: of the database that holds them.
            lease: seconds a relay holds a shard where the database has no ``SKIP LOCKED`` (SQLite); longer than
                the relay's publish timeout.
            keep: keep sent rows until they are pruned.
        """
        sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        wakes: Callable[[], AsyncIterator[None]] | None = None
        if sync.dialect.name == "postgresql" and sync.dialect.driver.startswith("psycopg"):
            wakes = partial(postgres_wakes, partial(_psycopg, sync), self.table.name)
        elif isinstance(engine, AsyncEngine) and sync.dialect.driver == "asyncpg":
            wakes = partial(_asyncpg_wakes, engine, self.table.name)
        link: Callable[[], Link] = (
            partial(_AsyncLink, engine)
            if isinstance(engine, AsyncEngine)
            else partial(ThreadLink, partial(_connect, engine))
        )
        describe = partial(_describe, sync, self.table.name, self.shards.name)
        return SqlStore(describe, link, wakes, lease, keep=keep)

    def notify_ddl(self) -> str:
        """The trigger that wakes relays on PostgreSQL, for a migration; ``create_all`` makes it by itself.

        One statement, since asyncpg takes no two at once.
        """
        statements = "".join(f"{statement};\n" for statement in self._notify_statements())
        return f"DO $do$BEGIN\n{statements}END$do$"

    def _notify_statements(self) -> list[str]:
        return notify_statements(self.table.name)


class Inbox:
    """A table of marks, and handlers whose effect happens exactly once.

    A mark is the pair of subscription and message id, written in the transaction of the handler's effect: a
    message that comes twice finds its mark and does nothing. On MySQL and MariaDB both are bytes (UTF-8), since text
    is compared there without regard to case.

    Arguments:
        metadata: where the table is defined.
        name: of the table.
    """

    def __init__(self, metadata: sa.MetaData, name: str = "pubsub_inbox") -> None:
        self.table = sa.Table(
            name,
            metadata,
            sa.Column("subscription", _exact(MAX_SUBSCRIPTION), primary_key=True),
            sa.Column("message_id", _exact(MAX_ID), primary_key=True),
            sa.Column("handled", sa.Double, nullable=False, index=True),
        )

    def exactly_once(
        self, sessions: sessionmaker[Any] | async_sessionmaker[Any]
    ) -> Callable[[Callable[..., Any]], Callable[[Any, Delivery], Any]]:
        """Decorate a handler that takes a ``session``: what it does with that, and the mark, commit together.

        If it raises, both are rolled back and the message is retried as usual. A message without an id (a foreign
        one) cannot be told from its twin: it is handled each time. What the handler does elsewhere (mail, HTTP) is
        outside the promise.

        Arguments:
            sessions: makes the sessions; async for an async handler.
        """

        def decorate(function: Callable[..., Any]) -> Callable[[Any, Delivery], Any]:
            effect = Effect(function, ("session",))
            if effect.is_async != isinstance(sessions, async_sessionmaker):
                raise ConfigError(
                    f"handler {function.__qualname__}: give an async handler an async_sessionmaker, and a plain "
                    "one a sessionmaker"
                )
            if effect.is_async:

                async def ahandle(payload: Any, delivery: Delivery) -> None:
                    async with sessions() as session, session.begin():
                        if await self.afirst(session, delivery):
                            await effect.call(payload, delivery, session=session)

                return effect.dress(ahandle)

            def handle(payload: Any, delivery: Delivery) -> None:
                with sessions() as session, session.begin():
                    if self.first(session, delivery):
                        effect.call(payload, delivery, session=session)

            return effect.dress(handle)

        return decorate

    def first(self, session: Session, delivery: Delivery) -> bool:
        """Mark the message in the session's transaction; False where it is marked already."""
        if not delivery.id:
            return True
        connection = session.connection()
        sql = ignoring(
            connection.dialect.name,
            connection.dialect.identifier_preparer.quote(self.table.name),
            MARK_COLUMNS,
            MARK_UNIQUE,
        )
        return (
            _session(connection).change(sql, (delivery.subscription, mark_id(delivery.id), time.time())) == 1
        )

    async def afirst(self, session: AsyncSession, delivery: Delivery) -> bool:
        """`first` for an `AsyncSession`."""
        return await session.run_sync(self.first, delivery)

    def prune(self, session: Session, before: float, limit: int = 1000) -> int:
        """Delete up to ``limit`` marks older than ``before`` (seconds since the epoch); returns how many.

        A message that comes again after its mark is gone is handled again: keep marks for longer than a message
        can wait on the broker.
        """
        table = self.table
        old = session.execute(
            sa.select(table.c.subscription, table.c.message_id).where(table.c.handled < before).limit(limit)
        ).all()
        for subscription, id in old:
            session.execute(
                sa.delete(table).where(table.c.subscription == subscription, table.c.message_id == id)
            )
        return len(old)


def _exact(characters: int) -> sa.String:
    """Text of which no two count as equal.

    MySQL and MariaDB compare text without regard to case, accents and trailing blanks; the collations that do not
    are named otherwise on each, hence bytes: at most four a character.
    """
    return sa.String(characters).with_variant(mysql.VARBINARY(4 * characters), "mysql", "mariadb")


# -- links ----------------------------------------------------------------------------------------


def _describe(engine: sa.Engine, table: str, shards: str, session: _outbox_store.Session) -> OutboxSql:
    quote = engine.dialect.identifier_preparer.quote
    return OutboxSql(
        quote(table), quote(shards), skip_locked=_skips_locked(engine), vendor=engine.dialect.name
    )


def _skips_locked(engine: sa.Engine) -> bool:
    """Whether the database, which has been connected to, has ``FOR UPDATE SKIP LOCKED``."""
    dialect: Any = engine.dialect
    version = dialect.server_version_info or (0,)
    if dialect.name == "postgresql":
        return True
    if dialect.name in ("mysql", "mariadb"):
        return bool(version >= ((10, 6) if getattr(dialect, "is_mariadb", False) else (8, 0, 1)))
    return False


def _connect(engine: sa.Engine) -> _outbox_store.Session:
    return _session(engine.connect())


def _session(connection: sa.Connection) -> _outbox_store.Session:
    marks = _MARKS.get(connection.dialect.paramstyle)

    def translated(sql: str) -> str:
        if marks is None:
            return sql
        head, *tail = sql.split("%s")
        return head + "".join(marks(number) + part for number, part in enumerate(tail, 1))

    def query(sql: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        return connection.exec_driver_sql(translated(sql), tuple(values)).all()

    def change(sql: str, values: Sequence[Any]) -> int:
        return connection.exec_driver_sql(translated(sql), tuple(values)).rowcount

    return _outbox_store.Session(
        query, change, connection.commit, connection.rollback, partial(_give_up, connection)
    )


_MARKS: dict[str, Callable[[int], str]] = {
    "qmark": lambda number: "?",
    "numeric": lambda number: f":{number}",
    "numeric_dollar": lambda number: f"${number}",
}


def _give_up(connection: sa.Connection) -> None:
    connection.invalidate()
    connection.close()


class _AsyncLink(Link):
    """A connection of an `AsyncEngine`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._turn = asyncio.Lock()

    async def call(self, function: Callable[[_outbox_store.Session], T]) -> T:
        async with self._turn:
            if self._connection is None:
                self._connection = await self._engine.connect()
            try:
                return await self._connection.run_sync(lambda connection: function(_session(connection)))
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.invalidate()
                await connection.close()
            except Exception:  # it is given up, broken or not
                pass


def _psycopg(engine: sa.Engine) -> Any:
    """A psycopg connection of its own to the engine's database."""
    import psycopg

    args, options = engine.dialect.create_connect_args(engine.url)
    return psycopg.connect(*args, **options, autocommit=True)


async def _asyncpg_wakes(engine: AsyncEngine, channel: str) -> AsyncIterator[None]:
    """As `postgres_wakes`, on a connection of an engine on asyncpg."""
    told = asyncio.Event()

    def tell(*_: Any) -> None:
        told.set()

    connection = await engine.connect()
    try:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        driver.add_termination_listener(tell)
        await driver.add_listener(channel, tell)
        yield  # what was committed before the first LISTEN
        while not driver.is_closed():
            await told.wait()
            told.clear()
            if not driver.is_closed():
                yield
        raise ConnectionError("the connection that listens is lost")
    finally:
        await connection.invalidate()
        await connection.close()
