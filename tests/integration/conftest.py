"""The secured brokers, started once for all modules that knock at their doors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.secured import Secured


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.broker(name))
        for name in ("rabbitmq", "kafka", "activemq", "artemis")
    ],
)
def secured(request: pytest.FixtureRequest) -> Iterator[Secured]:
    """A broker with TLS and users; see `Secured`."""
    broker = Secured(request.param)
    yield broker
    broker.broker.remove()
