"""The contract as a test suite: what every backend passes, and what a third-party driver runs.

    import functools
    import pytest
    from pubsub_facade import Settings
    from pubsub_facade.testing.conformance import Conformance

    class TestMyBackend(Conformance):
        @pytest.fixture
        def backend_settings(self):
            return functools.partial(Settings.load, backend="mine", options={"host": "localhost"})

That is all; it needs pytest-asyncio with ``asyncio_mode = "auto"``. The suite gives each case a namespace of
its own, deletes what it declared, and asks the capabilities what to expect: what is false must be refused
with UnsupportedFeature. Optional fixtures: ``send_foreign``, a raw client's publish (contract 17),
``names_on_broker``, to see that deleting frees everything, and ``drop_namespace``, which removes from the broker
what no verb of the API removes.
"""

from __future__ import annotations

import pytest

_MODULES = (
    "_suite",
    "crash",
    "dead_letters",
    "delivery",
    "filters",
    "foreign",
    "lifecycle",
    "order",
    "patterns",
    "payloads",
    "replay",
    "retry",
    "scale",
    "subscriptions",
    "sync",
)
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES))

# ruff: noqa: E402 - asserts are rewritten in what is imported from here on
from pubsub_facade.testing.conformance._suite import (
    DEADLINE,
    Bench,
    DropNamespace,
    Inbox,
    NamesOnBroker,
    SendForeign,
    SettingsFactory,
    Suite,
    eventually,
    nothing_more,
    receive,
    until,
)
from pubsub_facade.testing.conformance.crash import Crashing
from pubsub_facade.testing.conformance.dead_letters import DeadLettering
from pubsub_facade.testing.conformance.delivery import Delivering
from pubsub_facade.testing.conformance.filters import Filtering
from pubsub_facade.testing.conformance.foreign import Foreign
from pubsub_facade.testing.conformance.lifecycle import Lifecycle
from pubsub_facade.testing.conformance.order import Ordering
from pubsub_facade.testing.conformance.patterns import Patterns
from pubsub_facade.testing.conformance.payloads import Payloads
from pubsub_facade.testing.conformance.replay import Replay
from pubsub_facade.testing.conformance.retry import Retrying
from pubsub_facade.testing.conformance.scale import Scale
from pubsub_facade.testing.conformance.subscriptions import Subscriptions
from pubsub_facade.testing.conformance.sync import Sync

__all__ = [
    "DEADLINE",
    "Bench",
    "Conformance",
    "Crashing",
    "DeadLettering",
    "Delivering",
    "DropNamespace",
    "Filtering",
    "Foreign",
    "Inbox",
    "Lifecycle",
    "NamesOnBroker",
    "Ordering",
    "Patterns",
    "Payloads",
    "Replay",
    "Retrying",
    "Scale",
    "SendForeign",
    "SettingsFactory",
    "Subscriptions",
    "Suite",
    "Sync",
    "eventually",
    "nothing_more",
    "receive",
    "until",
]


class Conformance(
    Delivering,
    Patterns,
    Subscriptions,
    Retrying,
    DeadLettering,
    Ordering,
    Filtering,
    Payloads,
    Replay,
    Lifecycle,
    Scale,
    Sync,
    Crashing,
    Foreign,
):
    """Every chapter of the contract."""
