"""The conformance suite on the backends that need no broker."""

from __future__ import annotations

import functools
import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from pubsub_facade import Settings
from pubsub_facade.backends.memory import Hub
from pubsub_facade.testing.conformance import Conformance, NamesOnBroker, SendForeign, SettingsFactory

pytestmark = pytest.mark.conformance


class TestMemory(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return functools.partial(Settings.load, backend="memory")

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        async def names(settings: Settings) -> set[str]:
            return set(Hub.named("").namespaces[settings.namespace].queues)

        return names


class TestSqlite(Conformance):
    @pytest.fixture
    def backend_settings(self, tmp_path: Path) -> SettingsFactory:
        return functools.partial(
            Settings.load, backend="sqlite", sqlite={"path": tmp_path / "pubsub.db", "lease": 1.0}
        )

    @pytest.fixture
    def send_foreign(self) -> SendForeign:
        """Any SQL client's publish: a row in the inbox."""

        async def send(settings: Settings, topic: str, body: bytes, headers: Mapping[str, str]) -> None:
            with closing(sqlite3.connect(settings.sqlite.path)) as connection, connection:
                connection.execute(
                    "INSERT INTO inbox (namespace, topic, body, headers) VALUES (?, ?, ?, ?)",
                    (settings.namespace, topic, body, json.dumps(dict(headers))),
                )

        return send

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        """Rows, by what they are for."""

        async def names(settings: Settings) -> set[str]:
            with closing(sqlite3.connect(settings.sqlite.path)) as connection:
                found = {
                    f"subscription {name}" for (name,) in connection.execute("SELECT name FROM subscriptions")
                }
                for table in ("deliveries", "dead", "dropped"):
                    found |= {f"{table} {row}" for row in connection.execute(f"SELECT * FROM {table}")}
                return found

        return names
