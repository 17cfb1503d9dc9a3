"""The inbox on SQLAlchemy: a ledger whose sum must match, however often messages come."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from pubsub_facade import AsyncPubSub, Backoff, ConfigError, Delivery, Message, PubSub
from pubsub_facade.contrib.sqlalchemy import Inbox
from pubsub_facade.testing.hub import TestHub

from .conftest import ALL

ASYNC = ("sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "mariadb+asyncmy")

ALIKE = (
    *("ab", "aB", "AB"),  # by case
    *("áb", "a\u0301b", "ａｂ"),  # by accent, by composition, by width
    *("ab ", "ab  ", "ab\t"),  # by what is trailing
    *("🙂", "🙃", "straße", "strasse"),
    *("x" * 200, "x" * 201, "x" * 200 + "X", "x" * 250, "x" * 249 + "y"),  # by what is past the column
)
"""Ids that one or another collation, or a column's end, takes for the same."""


class Payment(BaseModel):
    amount: int


class Books:
    """A ledger and an inbox in one database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = sa.create_engine(url)
        self.metadata = sa.MetaData()
        suffix = uuid.uuid4().hex[:12]
        self.inbox = Inbox(self.metadata, f"inbox_{suffix}")
        self.ledger = sa.Table(
            f"ledger_{suffix}",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("amount", sa.Integer, nullable=False),
        )
        self.metadata.create_all(self.engine)

    def sum(self) -> int:
        with self.engine.connect() as connection:
            total = sa.select(sa.func.coalesce(sa.func.sum(self.ledger.c.amount), 0))
            return int(connection.execute(total).scalar_one())


@pytest.fixture(params=ALL)
def books(request: pytest.FixtureRequest, database_url: Callable[[str], str]) -> Iterator[Books]:
    books = Books(database_url(request.param))
    yield books
    books.metadata.drop_all(books.engine)
    books.engine.dispose()


def test_the_effect_happens_once_however_often_the_message_comes(
    books: Books, pubsub: PubSub, pubsub_hub: TestHub
) -> None:
    attempts: list[int] = []

    @pubsub.subscriber("pay.*", subscription="ledger", concurrency=4, backoff=Backoff(0, 0))
    @books.inbox.exactly_once(sessionmaker(books.engine))
    def book(payment: Payment, delivery: Delivery, session: Session) -> None:
        """Books it."""
        session.execute(sa.insert(books.ledger).values(amount=payment.amount))
        attempts.append(payment.amount)
        if payment.amount % 3 == 0 and delivery.attempt == 1:
            raise RuntimeError("after the effect, before the commit")

    assert (book.__name__, book.__doc__) == ("book", "Books it.")
    pubsub.start()
    payments = [Message("pay.made", {"amount": amount}) for amount in range(1, 31)]
    sent = pubsub.publish_many(payments)
    pubsub.publish_many([Message(message.topic, message.payload, id=message.id) for message in sent])
    pubsub_hub.drain()
    pubsub.publish_many([Message(message.topic, message.payload, id=message.id) for message in sent[:10]])
    pubsub_hub.drain()
    assert books.sum() == sum(range(1, 31))
    assert len(attempts) >= 40  # those that raised did happen, and were undone


@pytest.mark.parametrize("names", [("one", "two"), ("Ledger", "ledger")])
def test_two_subscriptions_each_have_the_effect(
    names: tuple[str, str], books: Books, pubsub: PubSub, pubsub_hub: TestHub
) -> None:
    for name in names:

        @pubsub.subscriber("pay", subscription=name)
        @books.inbox.exactly_once(sessionmaker(books.engine))
        def book(amount: int, session: Session) -> None:
            session.execute(sa.insert(books.ledger).values(amount=amount))

    pubsub.start()
    pubsub.publish("pay", 5, id="same")
    pubsub.publish("pay", 5, id="same")
    pubsub_hub.drain()
    assert books.sum() == 10


def test_ids_that_are_almost_the_same_each_have_their_effect(
    books: Books, pubsub: PubSub, pubsub_hub: TestHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    _admit_foreign_ids(monkeypatch)

    @pubsub.subscriber("pay", subscription="ledger")
    @books.inbox.exactly_once(sessionmaker(books.engine))
    def book(amount: int, session: Session) -> None:
        session.execute(sa.insert(books.ledger).values(amount=amount))

    pubsub.start()
    for _ in range(2):
        pubsub.publish_many([Message("pay", 1 << bit, id=id) for bit, id in enumerate(ALIKE)])
    pubsub_hub.drain()
    assert bin(books.sum()) == bin((1 << len(ALIKE)) - 1)


def test_a_mark_that_the_database_refuses_is_not_taken_for_one_that_is_there(
    books: Books, pubsub: PubSub, pubsub_hub: TestHub
) -> None:
    with books.engine.begin() as connection:
        if books.engine.dialect.name == "sqlite":
            refuse = "CREATE TRIGGER {0}_no BEFORE INSERT ON {0} BEGIN SELECT RAISE(ABORT, 'no'); END"
        else:
            refuse = "ALTER TABLE {0} ADD CONSTRAINT {0}_no CHECK (handled < 0)"
        connection.exec_driver_sql(refuse.format(books.inbox.table.name))

    @pubsub.subscriber("pay", subscription="ledger", max_attempts=1)
    @books.inbox.exactly_once(sessionmaker(books.engine))
    def book(delivery: Delivery, session: Session) -> None: ...

    pubsub.start()
    pubsub.publish("pay", 1, id="refused")
    pubsub_hub.drain()
    assert [letter.id for letter in pubsub.dead_letters("ledger")] == ["refused"]


def _admit_foreign_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ids be published that only messages of foreign clients have."""
    monkeypatch.setattr("pubsub_facade.message.MAX_ID", 10_000)


def test_old_marks_are_pruned_a_few_at_a_time(books: Books, pubsub: PubSub, pubsub_hub: TestHub) -> None:
    @pubsub.subscriber("pay", subscription="ledger")
    @books.inbox.exactly_once(sessionmaker(books.engine))
    def book(delivery: Delivery, session: Session) -> None: ...

    pubsub.start()
    pubsub.publish_many([Message("pay", number) for number in range(5)])
    pubsub_hub.drain()
    with Session(books.engine) as session, session.begin():
        assert books.inbox.prune(session, 0) == 0
        assert books.inbox.prune(session, 1e12, limit=3) == 3
        assert books.inbox.prune(session, 1e12) == 2


@pytest.mark.parametrize("driver", ASYNC)
async def test_an_async_handler_has_its_effect_once(
    driver: str,
    database_url: Callable[[str], str],
    async_pubsub: AsyncPubSub,
    pubsub_hub: TestHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _admit_foreign_ids(monkeypatch)
    name, _, dialect = driver.partition("+")
    books = Books(database_url(name))
    engine = create_async_engine(sa.make_url(books.url).set(drivername=f"{name}+{dialect}"))

    @async_pubsub.subscriber("pay", subscription="ledger", concurrency=2)
    @books.inbox.exactly_once(async_sessionmaker(engine))
    async def book(payment: Payment, session: AsyncSession) -> None:
        await session.execute(sa.insert(books.ledger).values(amount=payment.amount))

    await async_pubsub.start()
    for _ in range(2):
        await async_pubsub.publish_many(
            [Message("pay", {"amount": 1 << bit}, id=id) for bit, id in enumerate(ALIKE)]
        )
    await pubsub_hub.adrain()
    assert bin(books.sum()) == bin((1 << len(ALIKE)) - 1)
    await async_pubsub.close()
    await engine.dispose()
    books.metadata.drop_all(books.engine)
    books.engine.dispose()


def test_a_handler_that_cannot_get_its_session_is_refused() -> None:
    inbox = Inbox(sa.MetaData())
    with pytest.raises(ConfigError, match="session"):

        @inbox.exactly_once(sessionmaker())
        def no_session(payload: dict[str, int]) -> None: ...

    with pytest.raises(ConfigError, match="async_sessionmaker"):

        @inbox.exactly_once(sessionmaker())
        async def mixed(payload: dict[str, int], session: AsyncSession) -> None: ...
