"""The outbox's store over a Django database: the relay's statements on a connection in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from django.db import connections, router

from pubsub_facade.client import AsyncPubSub
from pubsub_facade.contrib._outbox_sql import OutboxSql
from pubsub_facade.contrib._outbox_store import LEASE, Session, SqlStore, ThreadLink, postgres_wakes
from pubsub_facade.contrib.django.clients import DEFAULT, client
from pubsub_facade.contrib.outbox import Lag, Relay, Store


def store(using: str | None = None, *, lease: float = LEASE, keep: bool = False) -> Store:
    """The outbox of a database alias as `Relay` needs it. Arguments: as `Outbox.store` on SQLAlchemy."""
    from pubsub_facade.contrib.django.models import OutboxMessage

    alias = using or router.db_for_write(OutboxMessage)
    wakes = None
    if _is_psycopg3(alias):
        wakes = partial(postgres_wakes, partial(_listening, alias), OutboxMessage._meta.db_table)
    return SqlStore(
        partial(_sql, alias), partial(ThreadLink, partial(_connect, alias)), wakes, lease, keep=keep
    )


def _sql(alias: str, session: Session) -> OutboxSql:
    from pubsub_facade.contrib.django.models import OutboxMessage, OutboxShard

    connection = connections[alias]
    quote = connection.ops.quote_name
    return OutboxSql(
        quote(OutboxMessage._meta.db_table),
        quote(OutboxShard._meta.db_table),
        skip_locked=connection.features.has_select_for_update_skip_locked,
        vendor=connection.vendor,
    )


def _connect(alias: str) -> Session:
    """This thread's connection, whose transactions end where the relay says."""
    connection = connections[alias]
    connection.set_autocommit(False)

    def query(sql: str, values: Sequence[Any]) -> Sequence[Sequence[Any]]:
        with connection.cursor() as cursor:
            cursor.execute(sql, tuple(values))
            rows: Sequence[Sequence[Any]] = cursor.fetchall()
            return rows

    def change(sql: str, values: Sequence[Any]) -> int:
        with connection.cursor() as cursor:
            cursor.execute(sql, tuple(values))
            return int(cursor.rowcount)

    return Session(query, change, connection.commit, connection.rollback, partial(_give_up, alias))


def _give_up(alias: str) -> None:
    connections[alias].close()
    del connections[alias]


def _is_psycopg3(alias: str) -> bool:
    connection = connections[alias]
    if connection.vendor != "postgresql":
        return False
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    return bool(is_psycopg3)


def _listening(alias: str) -> Any:
    connection: Any = connections[alias]
    return connection.Database.connect(**connection.get_connection_params(), autocommit=True)


async def relay(
    stop: asyncio.Event | None, *, using: str | None = None, alias: str = DEFAULT, **options: Any
) -> Relay:
    """Publish an outbox until ``stop`` is set; None: until it is empty.

    Arguments:
        using: database alias; None: where the router writes the outbox.
        alias: of the ``PUBSUB`` setting.
        options: of `Relay`.
    """
    async with AsyncPubSub(client(alias).settings) as pubsub:
        running = Relay(pubsub, store(using, keep=bool(options.get("keep"))), **options)
        if stop is None:
            await running.drain()
        else:
            await running.run(stop)
        return running


async def lag(using: str | None = None) -> Lag:
    """How far the relay of an outbox is behind: the metric to watch."""
    looked = store(using)
    try:
        return await looked.lag()
    finally:
        await looked.close()
