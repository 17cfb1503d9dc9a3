"""The conformance suite on the backends that need no broker."""

from __future__ import annotations

import functools

import pytest

from pubsub_facade import Settings
from pubsub_facade.testing.conformance import Conformance, SettingsFactory


class TestMemory(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return functools.partial(Settings.load, backend="memory")
