"""Effects that must happen exactly once, whatever chaos does: a member's bookings, in a database of their own.

The booking and the inbox's mark commit together, so that a message that comes again books nothing. What is
counted at the end is the database alone.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from pubsub_facade import AsyncPubSub, Backoff, Delivery
from pubsub_facade.contrib.sqlalchemy import Inbox

BOOKS: Final = "books"
BOOKED: Final = "chaos.t0.created"  # one of those that are published: enough to meet every fault
FAILS_EVERY: Final = 13  # after its effect, before it commits

_metadata = sa.MetaData()
_inbox = Inbox(_metadata, "inbox")
_bookings = sa.Table(
    "bookings",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("message", sa.String, nullable=False),
)


def make_books(folder: Path) -> None:
    """Make the database of one run, before any member starts."""
    engine = _open(folder)
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    _metadata.create_all(engine)
    engine.dispose()


def _open(folder: Path) -> sa.Engine:
    return sa.create_engine(f"sqlite:///{folder / 'books.db'}", connect_args={"timeout": 30})


def keep_books(pubsub: AsyncPubSub, folder: Path) -> None:
    """Add the subscription `BOOKS` to a member."""

    @_inbox.exactly_once(sessionmaker(_open(folder)))
    def book(payload: dict[str, Any], delivery: Delivery, session: Session) -> None:
        session.execute(sa.insert(_bookings).values(message=delivery.id))
        if payload["number"] % FAILS_EVERY == 0 and delivery.attempt == 1:
            raise RuntimeError("after the effect, before the commit")

    pubsub.subscriber(
        BOOKED, subscription=BOOKS, concurrency=4, max_attempts=50, backoff=Backoff(initial=0.2, maximum=1)
    )(book)


def bookings(folder: Path) -> collections.Counter[str]:
    """How often each message was booked."""
    engine = _open(folder)
    try:
        with engine.connect() as connection:
            return collections.Counter(connection.scalars(sa.select(_bookings.c.message)))
    finally:
        engine.dispose()
