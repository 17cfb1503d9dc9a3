"""The contract as a state machine: thousands of steps on the embedded backends, hundreds on the real brokers.

``MODEL_EXAMPLES`` and ``MODEL_STEPS`` are how often, and with how many steps, it is tried on the embedded file and on
each real broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pubsub_facade import Settings
from tests.chaos.model import ContractMachine
from tests.chaos.world import FORMS
from tests.conftest import broker_settings

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "0"))
STEPS = int(os.environ.get("MODEL_STEPS", "0"))

pytestmark = pytest.mark.timeout(600 + EXAMPLES * STEPS)


def hold_against_the_model(make: Callable[[str], Settings], examples: int, steps: int, **how: object) -> None:
    """How: attributes of `ContractMachine`."""
    machine = type("Machine", (ContractMachine,), {"settings": staticmethod(make), **how})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # a failing step waits its patience out: shrinking would take an hour
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_memory_does_what_the_model_says() -> None:
    hold_against_the_model(
        lambda namespace: Settings(url=f"memory://{namespace}", namespace=namespace, reconnect_max=0.05),
        60,
        60,
    )


def test_sqlite_does_what_the_model_says(tmp_path: Path) -> None:
    hold_against_the_model(
        lambda namespace: Settings(
            backend="sqlite", namespace=namespace, reconnect_max=0.05, sqlite={"path": tmp_path / "m.db"}
        ),
        EXAMPLES or 25,
        STEPS or 50,
        has_file=True,
    )


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS if form != "sqlite"]
)
def test_a_broker_does_what_the_model_says(form: str) -> None:
    load = broker_settings(form)
    hold_against_the_model(
        lambda namespace: load(namespace=namespace, reconnect_max=0.05),
        EXAMPLES or 8,
        STEPS or 40,
        has_link=True,
        moment=0.3,
    )
