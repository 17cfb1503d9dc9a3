"""The conformance suite on every form of every real broker. ``-m conformance -n 4`` runs it as stress."""

from __future__ import annotations

import functools

import pytest

from pubsub_facade.testing.conformance import (
    Conformance,
    DropNamespace,
    NamesOnBroker,
    SendForeign,
    SettingsFactory,
)
from tests.conftest import broker_settings
from tests.integration import foreign

pytestmark = pytest.mark.conformance


@pytest.mark.broker("rabbitmq")
class TestRabbitmq(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("rabbitmq")

    @pytest.fixture
    def send_foreign(self) -> SendForeign:
        return foreign.to_rabbitmq

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        return foreign.names_on_rabbitmq


@pytest.mark.broker("kafka")
class TestKafka(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        settings = broker_settings("kafka")
        kafka = settings(namespace="any").kafka.model_copy(update={"session_timeout": 6.0})
        return functools.partial(settings, kafka=kafka.model_dump())

    @pytest.fixture
    def send_foreign(self) -> SendForeign:
        return foreign.to_kafka

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        return foreign.names_on_kafka

    @pytest.fixture
    def drop_namespace(self) -> DropNamespace:
        return foreign.drop_kafka_topics


@pytest.mark.broker("activemq")
class TestActivemqDurable(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("activemq")

    @pytest.fixture
    def send_foreign(self) -> SendForeign:
        return foreign.to_activemq

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        return foreign.names_on_activemq


@pytest.mark.broker("activemq-virtual")
class TestActivemqVirtual(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("activemq-virtual")

    @pytest.fixture
    def send_foreign(self) -> SendForeign:
        return foreign.to_activemq

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        return foreign.names_on_activemq


@pytest.mark.broker("artemis")
class TestArtemis(Conformance):
    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        return broker_settings("artemis")

    @pytest.fixture
    def send_foreign(self) -> SendForeign:
        return foreign.to_activemq

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker:
        return foreign.names_on_activemq
