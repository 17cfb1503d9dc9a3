"""Start any broker natively by its name: the entrance for tests that break brokers on purpose.

    broker = native.start("kafka", tmp_path / "kafka")
    broker.kill()
    broker.start()

An instance in a directory of its own disturbs nobody; the ones that everybody shares are `brokers.shared`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from brokers.activemq import Classic
from brokers.artemis import Artemis
from brokers.broker import Broker
from brokers.kafka import Kafka
from brokers.rabbitmq import RabbitMQ

BROKERS: Mapping[str, type[Broker]] = {broker.name: broker for broker in (RabbitMQ, Kafka, Classic, Artemis)}


def start(
    name: str,
    directory: Path,
    ports: Mapping[str, int] | None = None,
    *,
    extra: Sequence[str] = (),
    listeners: Sequence[str] = (),
) -> Broker:
    """A broker of this name in ``directory``, serving. See `Broker` for the parameters."""
    broker = BROKERS[name](directory, ports, extra=extra, listeners=listeners)
    broker.start()
    return broker
