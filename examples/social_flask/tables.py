"""What the social network remembers, with an outbox and an inbox beside it, in one SQLite file."""

import os
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from pubsub_facade.contrib.sqlalchemy import Inbox, Outbox

STATE = Path(os.environ.get("SOCIAL_STATE", Path(__file__).resolve().parent))


class Base(DeclarativeBase):
    """All tables."""


class Post(Base):
    """Somebody posted something."""

    __tablename__ = "post"

    id: Mapped[int] = mapped_column(primary_key=True)
    author: Mapped[str]
    text: Mapped[str]


class Notification(Base):
    """What the notifications service told the author's followers."""

    __tablename__ = "notification"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Count(Base):
    """What the analytics service counted."""

    __tablename__ = "count"

    author: Mapped[str] = mapped_column(primary_key=True)
    posts: Mapped[int]


outbox = Outbox(Base.metadata)
inbox = Inbox(Base.metadata)
engine = sa.create_engine(f"sqlite:///{STATE / 'social.sqlite3'}", connect_args={"timeout": 20})
Session = sessionmaker(engine)
