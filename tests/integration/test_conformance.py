"""The conformance suite on every form of every real broker. ``-m conformance -n 4`` runs it as stress."""

from __future__ import annotations

import pytest

from pubsub_facade.testing.conformance import Conformance, SettingsFactory
from tests.conftest import broker_settings

pytestmark = pytest.mark.conformance


@pytest.mark.broker("rabbitmq")
class TestRabbitmq(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("rabbitmq")


@pytest.mark.broker("kafka")
class TestKafka(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("kafka")


@pytest.mark.broker("activemq")
class TestActivemqDurable(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("activemq")


@pytest.mark.broker("activemq-virtual")
class TestActivemqVirtual(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("activemq-virtual")


@pytest.mark.broker("artemis")
class TestArtemis(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("artemis")
