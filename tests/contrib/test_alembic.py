"""The tables under Alembic, as a user has them: a folder that ``alembic init`` made, and its commands."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from pubsub_facade import Message, PubSub
from pubsub_facade.contrib.sqlalchemy import Inbox, Outbox
from pubsub_facade.testing.hub import TestHub

from .conftest import ALL
from .servers import environment

TABLES = """
import sqlalchemy as sa
from pubsub_facade.contrib.sqlalchemy import Inbox, Outbox

metadata = sa.MetaData()
outbox = Outbox(metadata)
inbox = Inbox(metadata)
"""


@contextmanager
def database(url: str) -> Iterator[sa.URL]:
    """A database of its own beside the given one, so that nothing else is found in it."""
    there = sa.make_url(url)
    if there.get_backend_name() == "sqlite":
        yield there
        return
    name = f"alembic_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(there, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        try:
            yield there.set(database=name)
        finally:
            connection.exec_driver_sql(f"DROP DATABASE {name}")
    engine.dispose()


class Project:
    """A folder with ``tables.py`` and a migration environment."""

    def __init__(self, folder: Path, url: sa.URL, template: str = "generic") -> None:
        self.folder = folder
        self.url = url.render_as_string(hide_password=False)
        (folder / "tables.py").write_text(TABLES)
        self("init", "--template", template, "migrations")
        self._edit("alembic.ini", "driver://user:pass@localhost/dbname", self.url)
        self._edit(
            "migrations/env.py",
            "target_metadata = None",
            "import tables\ntarget_metadata = tables.metadata",
        )

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *command],
            cwd=self.folder,
            env=environment(PYTHONWARNINGS="error"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _edit(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert old in text
        (self.folder / file).write_text(text.replace(old, new))

    def revise(self) -> str:
        """Let Alembic write a revision, with the trigger where it makes the outbox; its text."""
        before = set((self.folder / "migrations" / "versions").glob("*.py"))
        self("revision", "--autogenerate", "-m", "tables")
        (path,) = set((self.folder / "migrations" / "versions").glob("*.py")) - before
        text = path.read_text()
        if "op.create_table('pubsub_outbox'" in text and "postgresql" in self.url:
            up, down, rest = text.split("    # ### end Alembic commands ###\n")
            up += "    from tables import outbox\n    op.execute(outbox.notify_ddl())\n"
            down += "    op.execute('DROP FUNCTION pubsub_outbox_notify')\n"
            text = up + down + rest
            path.write_text(text)
        return text


@pytest.mark.parametrize("kind", [*ALL, "postgresql+asyncpg", "mariadb+asyncmy"])
def test_a_revision_that_alembic_writes_makes_the_tables_and_takes_them_back(
    kind: str, database_url: Callable[[str], str], tmp_path: Path, pubsub: PubSub, pubsub_hub: TestHub
) -> None:
    name, _, driver = kind.partition("+")
    with database(database_url(name)) as url:
        at = url.set(drivername=kind) if driver else url
        project = Project(tmp_path, at, "async" if driver else "generic")
        project.revise()
        project("upgrade", "head")
        assert "No new upgrade operations detected" in project("check")
        engine = sa.create_engine(url)
        assert _tables(engine) == {"pubsub_outbox", "pubsub_outbox_shard", "pubsub_inbox", "alembic_version"}
        _use(engine, pubsub, pubsub_hub)
        if name == "postgresql":
            assert _notifying(engine) == (1, 1)
        project("downgrade", "base")
        if name == "postgresql":
            assert _notifying(engine) == (0, 0)
        assert _tables(engine) == {"alembic_version"}
        engine.dispose()


def _tables(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def _notifying(engine: sa.Engine) -> tuple[int, int]:
    """How many triggers and functions of the outbox there are."""
    named = "WHERE {} = 'pubsub_outbox_notify'"
    with engine.connect() as connection:
        return (
            connection.exec_driver_sql(
                f"SELECT COUNT(*) FROM pg_trigger {named.format('tgname')}"
            ).scalar_one(),
            connection.exec_driver_sql(
                f"SELECT COUNT(*) FROM pg_proc {named.format('proname')}"
            ).scalar_one(),
        )


def _use(engine: sa.Engine, pubsub: PubSub, hub: TestHub) -> None:
    """Write a row of 70,000 bytes, and handle two messages of almost the same id."""
    metadata = sa.MetaData()
    outbox, inbox = Outbox(metadata), Inbox(metadata)
    body = bytes(range(256)) * 275
    handled: list[str] = []

    @pubsub.subscriber("a", subscription="s")
    @inbox.exactly_once(sessionmaker(engine))
    def handle(number: int, session: Session) -> None:
        handled.append(outbox.publish(session, "b", body).id)

    pubsub.start()
    for id in ("id", "ID", "id", "id "):
        pubsub.publish_many([Message("a", 1, id=id)])
    hub.drain()
    with Session(engine) as session:
        rows = session.execute(sa.select(outbox.table.c.message_id, outbox.table.c.body)).all()
    assert sorted(tuple(row) for row in rows) == sorted((id, body) for id in handled)
    assert len(handled) == 3


def test_alembic_mends_a_table_that_compares_without_regard_to_case(
    database_url: Callable[[str], str], tmp_path: Path, pubsub: PubSub, pubsub_hub: TestHub
) -> None:
    with database(database_url("mariadb")) as url:
        engine = sa.create_engine(url)
        metadata = sa.MetaData()
        Outbox(metadata)
        inbox = Inbox(metadata)
        inbox.table.c.subscription.type = sa.String(100)
        inbox.table.c.message_id.type = sa.String(200)
        metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(sa.insert(inbox.table).values(subscription="s", message_id="Mark", handled=1))
        project = Project(tmp_path, url)
        assert "alter_column('pubsub_inbox', 'message_id'" in project.revise()
        project("upgrade", "head")
        assert "No new upgrade operations detected" in project("check")
        with engine.connect() as connection:
            assert connection.execute(sa.select(Inbox(sa.MetaData()).table.c.message_id)).scalars().all() == [
                b"Mark"
            ]
        _use(engine, pubsub, pubsub_hub)
        engine.dispose()
