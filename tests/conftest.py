"""Which real brokers the tests need: all, or those that the environment's ``BROKERS`` names (comma list).

A broker that is needed and is not there fails its tests; nothing is skipped. A broker left out by name is
shown in the header, and its tests are deselected.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

import pytest

from pubsub_facade import Settings
from pubsub_facade.backends import backend_class, known_backends
from pubsub_facade.testing.conformance import SettingsFactory

BROKERS: Final = ("rabbitmq", "kafka", "activemq", "artemis")
FOLDER: Final = Path(__file__).parent.parent / ".brokers"


def required() -> list[str]:
    """The brokers whose tests run."""
    chosen = os.environ.get("BROKERS")
    names = BROKERS if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = [name for name in names if name not in BROKERS]
    if unknown:
        raise pytest.UsageError(f"BROKERS names {', '.join(unknown)}: there are {', '.join(BROKERS)}")
    return list(names)


def broker_settings(form: str) -> SettingsFactory:
    """How to make settings for a broker form (``activemq-virtual`` is a form of ``activemq``)."""
    file = FOLDER / f"pubsub.{form}.toml"
    if not file.is_file():
        pytest.fail(
            f"broker {form!r} is needed and {file.name} is not there: start it with 'make brokers', or leave it "
            "out by name: BROKERS=rabbitmq,kafka,...",
            pytrace=False,
        )
    return functools.partial(Settings.load, file)


def pytest_configure(config: pytest.Config) -> None:
    for (
        name
    ) in known_backends():  # here, not within a test: rewriting asserts in deep recursion crashes Python 3.11
        backend_class(name)
    config.addinivalue_line("markers", "cluster: three nodes of a broker at once: make test-clusters")
    config.addinivalue_line("markers", "conformance: a case of the conformance suite")


def pytest_report_header() -> str:
    left_out = [name for name in BROKERS if name not in required()]
    return f"brokers: {', '.join(required()) or 'none'}" + (
        f"; LEFT OUT by BROKERS: {', '.join(left_out)}" if left_out else ""
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of brokers left out by name."""
    left_out = []
    for item in items:
        marker = item.get_closest_marker("broker")
        if marker is not None and marker.args and marker.args[0].partition("-")[0] not in required():
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
