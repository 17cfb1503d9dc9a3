"""Database connections of the Django commands: lost between messages, and given back after them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psycopg
import pymysql
import pytest

from pubsub_facade import PubSub, Settings
from pubsub_facade.contrib.django.subscribing import LOOK

from .test_django import COUNT, Project, environment, until

SERVERS = ("postgresql", "mariadb")


class Database:
    """A database of this test's own on a server, and its administrator."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.name = f"lost_{os.getpid()}"
        self.url = parts._replace(path=f"/{self.name}", query="").geturl()
        there: dict[str, Any] = {"host": parts.hostname, "port": parts.port, "user": parts.username}
        self._postgresql = parts.scheme.startswith("postgresql")
        if self._postgresql:
            self._link: Any = psycopg.connect(
                **there, password=parts.password, dbname=parts.path[1:], autocommit=True
            )
        else:
            self._link = pymysql.connect(**there, password=parts.password, autocommit=True)

    def __enter__(self) -> Self:
        self._ask(f"CREATE DATABASE {self.name}")
        return self

    def __exit__(self, *raised: object) -> None:
        self.cut()
        self._ask(f"DROP DATABASE {self.name}")
        self._link.close()

    def _ask(self, sql: str, *values: object) -> Sequence[Any]:
        with contextlib.closing(self._link.cursor()) as cursor:
            cursor.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else ()

    def connections(self) -> list[int]:
        """The server's ids of the connections to this database."""
        if self._postgresql:
            rows = self._ask(
                "SELECT pid FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'",
                self.name,
            )
        else:
            rows = self._ask("SELECT id FROM information_schema.processlist WHERE db = %s", self.name)
        return [int(row[0]) for row in rows]

    def cut(self) -> int:
        """End all connections to this database, as its restart would; how many there were."""
        ids = self.connections()
        for id in ids:
            if self._postgresql:
                self._ask("SELECT pg_terminate_backend(%s)", id)
            else:
                with contextlib.suppress(pymysql.err.OperationalError):  # it has ended by itself
                    self._ask(f"KILL {id}")
        until(lambda: not set(ids) & set(self.connections()))
        return len(ids)


@pytest.fixture(params=SERVERS)
def database(request: pytest.FixtureRequest, database_url: Callable[[str], str]) -> Iterator[Database]:
    with Database(database_url(request.param)) as there:
        yield there


class Site(Project):
    """The project on a database, with its commands as processes, and a client on its broker."""

    def __init__(self, database: Database, folder: Path, max_attempts: int, **more: str) -> None:
        self.folder = folder
        self.told = folder / "notifications"
        tuning = {name: {"max_attempts": max_attempts} for name in ("analytics", "notifications")}
        setting = {
            "backend": "sqlite",
            "sqlite": {"path": str(folder / "pubsub.db")},
            "subscriptions": tuning,
        }
        self.environment = environment(
            database.url, SOCIAL_PUBSUB=json.dumps(setting), NOTIFICATIONS=str(self.told), **more
        )
        self("migrate", "--run-syncdb", "-v0")
        self.client = PubSub(Settings.load(**setting))
        self.client.declare("social.post.*", subscription="analytics")
        self.client.declare("social.post.*", subscription="notifications", filter="lang = 'en'")
        self.published = 0

    @contextlib.contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        process = self.start(*command)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=30)
            print(output)
        assert process.returncode == 0

    def publish(self, count: int = 1) -> None:
        for _ in range(count):
            self.published += 1
            self.client.publish(
                "social.post.created",
                {"author": 1, "text": f"t{self.published}"},
                headers={"lang": "en"},
            )

    def notified(self) -> list[str]:
        return self.told.read_text().split() if self.told.exists() else []

    def until_handled(self) -> None:
        """By the sync handler and by the async one; neither gave up a message."""
        for name in ("analytics", "notifications"):
            until(lambda name=name: self._settled(name))  # type: ignore[misc]
            assert self.client.backlog(name).dead == 0
        assert sorted(self.notified()) == sorted(f"t{n + 1}" for n in range(self.published))

    def _settled(self, name: str) -> bool:
        backlog = self.client.backlog(name)
        return backlog.waiting == 0 and backlog.in_flight == 0


@contextlib.contextmanager
def site(database: Database, folder: Path, max_attempts: int = 5, **more: str) -> Iterator[Site]:
    there = Site(database, folder, max_attempts, **more)
    try:
        yield there
    finally:
        there.client.close()


def test_a_lost_connection_costs_no_message_its_only_attempt(database: Database, tmp_path: Path) -> None:
    arguments = ("runsubscribers", "--concurrency", "1")  # so that the same connection is used again
    with site(database, tmp_path, max_attempts=1) as here, here.running(*arguments):
        here.publish()
        here.until_handled()
        for _ in range(2):
            assert database.cut() >= 2  # the sync handler's, the async ORM's
            time.sleep(LOOK + 0.1)  # as long as no message comes
            here.publish()
            here.until_handled()
        assert here.shell(COUNT) == "3\n"


def test_connections_lost_under_load_cost_no_message(database: Database, tmp_path: Path) -> None:
    with site(database, tmp_path) as here, here.running("runsubscribers", "--concurrency", "8"):
        for _ in range(3):
            here.publish(40)
            until(lambda: len(here.notified()) > here.published - 30)
            assert database.cut() >= 2
            here.publish(40)
            here.until_handled()
        assert here.shell(COUNT) == "240\n"


def test_no_connection_stays_open_after_a_message_where_none_is_kept(
    database: Database, tmp_path: Path
) -> None:
    with site(database, tmp_path, CONN_MAX_AGE="0") as here, here.running("runsubscribers"):
        here.publish(20)
        here.until_handled()
        until(lambda: not database.connections(), LOOK + 4)


def test_connections_are_kept_where_that_is_wished(database: Database, tmp_path: Path) -> None:
    with site(database, tmp_path) as here, here.running("runsubscribers"):
        here.publish(20)
        here.until_handled()
        time.sleep(2 * LOOK + 0.1)  # the last look at them is over
        kept = database.connections()
        assert len(kept) >= 2
        here.publish(5)
        here.until_handled()
        assert set(kept) <= set(database.connections())


WRITE = """
from pubsub_facade.contrib.django import publish_on_commit
for number in range(10):
    publish_on_commit("social.post.created", {"author": 1, "text": "x"}, headers={"lang": "en"})
"""


def test_the_relay_goes_on_after_its_connections_are_lost(database: Database, tmp_path: Path) -> None:
    with site(database, tmp_path) as here, here.running("pubsub_relay", "-v0"):
        for round in range(1, 4):
            here.shell(WRITE)
            until(lambda round=round: here.client.backlog("analytics").waiting == 10 * round)  # type: ignore[misc]
            assert database.cut() >= 1
        here.shell(WRITE)
        until(lambda: here.client.backlog("analytics").waiting == 40)
        assert here("pubsub_relay", "--lag") == "0 wait; 0 set aside\n"
