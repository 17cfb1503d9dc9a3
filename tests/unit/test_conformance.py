"""The conformance suite on the backends that need no broker."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from pubsub_facade import Settings
from pubsub_facade.testing.conformance import Conformance, SettingsFactory


class TestMemory(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return functools.partial(Settings.load, backend="memory")


class TestSqlite(Conformance):
    @pytest.fixture
    def backend_settings(self, tmp_path: Path) -> SettingsFactory:
        return functools.partial(
            Settings.load, backend="sqlite", sqlite={"path": tmp_path / "pubsub.db", "lease": 1.0}
        )
