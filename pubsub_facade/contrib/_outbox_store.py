"""The outbox's store and lanes over any database link: what SQLAlchemy and Django have in common.

A link runs functions on one database connection, one at a time, off the loop where that connection blocks. A link
whose function raised has lost its connection and makes a new one for the next.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pubsub_facade.contrib._outbox_sql import OutboxSql, Run
from pubsub_facade.contrib.outbox import Lag, Lane, Outcome, Row, Store

T = TypeVar("T")

POLL: Final = 0.2  # s between looks where the database does not wake the relay
POLL_WOKEN: Final = 1.0  # s where it does: what no wake tells (a shard let go) is seen by then
LEASE: Final = 30.0  # s that a relay without row locks holds a shard


@dataclass(frozen=True, slots=True)
class Session(Run):
    """A connection: its statements, and the end of its transaction. A transaction begins by itself."""

    commit: Callable[[], None]
    rollback: Callable[[], None]
    close: Callable[[], None]


class Link(ABC):
    """One database connection, made at first use."""

    @abstractmethod
    async def call(self, function: Callable[[Session], T]) -> T:
        """Run ``function`` on the connection; if it raises, the connection is given up."""

    @abstractmethod
    async def close(self) -> None:
        """Give up the connection; what is open on it is rolled back. Never raises."""


class ThreadLink(Link):
    """A blocking connection, in a thread of its own.

    Arguments:
        connect: makes it; called in that thread.
    """

    def __init__(self, connect: Callable[[], Session]) -> None:
        self._connect = connect
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="pubsub-outbox")
        self._session: Session | None = None
        self._closed = False

    async def call(self, function: Callable[[Session], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._call, function)

    def _call(self, function: Callable[[Session], T]) -> T:
        if self._session is None:
            self._session = self._connect()
        try:
            return function(self._session)
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            except Exception:  # it is given up because it is broken
                pass

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._executor, self._drop)
            self._executor.shutdown(wait=False)


class SqlLane(Lane):
    """A `Lane` over a link: row locks held by an open transaction, or leases where there are none."""

    def __init__(self, link: Link, sql: OutboxSql, lease: float, *, keep: bool) -> None:
        self._link = link
        self._sql = sql
        self._lease = lease
        self._keep = keep
        self._owner = uuid.uuid4().hex
        self._holding = False

    async def claim(self, limit: int) -> list[Row]:
        rows = await self._link.call(lambda session: self._claim(session, limit))
        self._holding = bool(rows)
        return rows

    def _claim(self, session: Session, limit: int) -> list[Row]:
        sql, now = self._sql, time.time()
        shards = sql.with_work(session, now)
        session.commit()
        if not shards:
            return []
        if sql.skip_locked:
            held = sql.lock(session, shards)
        else:
            held = sql.lease(session, shards, self._owner, now, now + self._lease)
        rows = sql.fetch(session, held, now, limit) if held else []
        if not sql.skip_locked:
            if held and not rows:
                sql.let_go(session, self._owner)
            session.commit()
        elif not rows:
            session.rollback()
        return rows

    async def settle(self, outcome: Outcome) -> None:
        await self._link.call(lambda session: self._settle(session, outcome))
        self._holding = False

    def _settle(self, session: Session, outcome: Outcome) -> None:
        if not self._sql.skip_locked:
            self._sql.let_go(session, self._owner)
        self._sql.settle(session, outcome, time.time(), keep=self._keep)
        session.commit()

    async def abandon(self) -> None:
        if self._holding and not self._sql.skip_locked:
            try:
                await self._link.call(lambda session: self._settle(session, Outcome()))
            except Exception:  # the lease ends by itself
                pass
        elif self._holding:
            try:
                await self._link.call(lambda session: session.rollback())
            except Exception:  # the connection is gone, and its locks with it
                pass
        self._holding = False

    async def close(self) -> None:
        await self.abandon()
        await self._link.close()


class SqlStore(Store):
    """A `Store` over links.

    Arguments:
        sql: the statements.
        link: makes a link.
        wakes: as `Store.wakes`; None: the database cannot tell.
        lease: seconds that a lane holds a shard where there are no row locks.
        keep: whether sent rows are kept until they are pruned.
    """

    def __init__(
        self,
        sql: Callable[[Session], OutboxSql],
        link: Callable[[], Link],
        wakes: Callable[[], AsyncIterator[None]] | None,
        lease: float,
        *,
        keep: bool,
    ) -> None:
        self.poll = POLL if wakes is None else POLL_WOKEN
        self._describe = sql
        self._link_to = link
        self._wakes = wakes
        self._lease = lease
        self._keep = keep
        self._sql: OutboxSql | None = None
        self._link: Link | None = None

    async def open(self) -> None:
        if self._sql is None:
            self._sql = await self._here().call(self._prepare)

    def _prepare(self, session: Session) -> OutboxSql:
        sql = self._describe(session)
        sql.seed(session)
        session.commit()
        return sql

    def _here(self) -> Link:
        if self._link is None:
            self._link = self._link_to()
        return self._link

    async def _ask(self, question: Callable[[OutboxSql, Session], T]) -> T:
        await self.open()
        sql = self._sql
        assert sql is not None

        def ask(session: Session) -> T:
            answer = question(sql, session)
            session.commit()
            return answer

        return await self._here().call(ask)

    def lane(self) -> Lane:
        assert self._sql is not None, "open the store first"
        return SqlLane(self._link_to(), self._sql, self._lease, keep=self._keep)

    async def wakes(self) -> AsyncIterator[None]:
        if self._wakes is not None:
            async for wake in self._wakes():
                yield wake

    async def next_due(self) -> float | None:
        return await self._ask(lambda sql, session: sql.next_due(session))

    async def lag(self) -> Lag:
        return await self._ask(lambda sql, session: sql.lag(session, time.time()))

    async def prune(self, before: float, limit: int) -> int:
        return await self._ask(lambda sql, session: sql.prune(session, before, limit))

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()


async def postgres_wakes(connect: Callable[[], Any], channel: str) -> AsyncIterator[None]:
    """Yields when PostgreSQL notifies ``channel``; raises when the connection is lost.

    Arguments:
        connect: makes a psycopg 3 connection in autocommit mode; blocks.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    connection: Any = None
    cancelled = False

    def listen() -> None:
        nonlocal connection
        connection = connect()
        if not cancelled:
            connection.execute(f'LISTEN "{channel}"')
        if cancelled:
            connection.close()  # nobody else will: who asked is gone

    try:
        await asyncio.to_thread(listen)
        loop.add_reader(connection.fileno(), readable.set)
        yield  # what was committed before the first LISTEN
        while True:
            await readable.wait()
            readable.clear()
            if [*connection.notifies(timeout=0)]:
                yield
    finally:
        cancelled = True
        if connection is not None:
            if not connection.closed:
                loop.remove_reader(connection.fileno())
            connection.close()
