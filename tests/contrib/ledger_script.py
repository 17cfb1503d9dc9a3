"""One member that books payments exactly once, for tests that kill it: URL of the database, suffix of its tables."""

from __future__ import annotations

import sys

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.orm import Session, sessionmaker

from pubsub_facade import Backoff, Delivery, PubSub
from pubsub_facade.contrib.sqlalchemy import Inbox

metadata = sa.MetaData()
inbox = Inbox(metadata, f"inbox_{sys.argv[2]}")
ledger = sa.Table(
    f"ledger_{sys.argv[2]}",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("amount", sa.Integer, nullable=False),
)
engine = sa.create_engine(sys.argv[1], pool_size=10)
pubsub = PubSub()


class Payment(BaseModel):
    amount: int


@pubsub.subscriber("pay.*", subscription="ledger", concurrency=4, max_attempts=20, backoff=Backoff(0.05, 0.2))
@inbox.exactly_once(sessionmaker(engine))
def book(payment: Payment, delivery: Delivery, session: Session) -> None:
    session.execute(sa.insert(ledger).values(amount=payment.amount))
    if payment.amount % 10 == 0 and delivery.attempt == 1:
        raise RuntimeError("after the effect, before the commit")


if __name__ == "__main__":
    pubsub.run(grace=10)
