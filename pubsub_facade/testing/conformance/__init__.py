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
with UnsupportedFeature. Optional fixtures: ``send_foreign``, a raw client's publish (contract 17), and
``drop_namespace``, which removes from the broker what no verb of the API removes.
"""

from __future__ import annotations

import pytest

_CHAPTERS = ("_suite", "delivery", "patterns")
pytest.register_assert_rewrite(*(f"{__name__}.{chapter}" for chapter in _CHAPTERS))

from pubsub_facade.testing.conformance._suite import (  # noqa: E402 - asserts are rewritten from here on
    DropNamespace,
    SendForeign,
    SettingsFactory,
    Suite,
)
from pubsub_facade.testing.conformance.delivery import Delivering  # noqa: E402
from pubsub_facade.testing.conformance.patterns import Patterns  # noqa: E402

__all__ = [
    "Conformance",
    "Delivering",
    "DropNamespace",
    "Patterns",
    "SendForeign",
    "SettingsFactory",
    "Suite",
]


class Conformance(Delivering, Patterns):
    """Every chapter of the contract."""
