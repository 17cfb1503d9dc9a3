"""The contract as a state machine: thousands of steps on the embedded backends, hundreds on the real brokers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pubsub_facade import Settings
from tests.chaos.model import ContractMachine

pytestmark = pytest.mark.timeout(300)


def hold_against_the_model(make: Callable[[str], Settings], examples: int, steps: int) -> None:
    machine = type("Machine", (ContractMachine,), {"settings": staticmethod(make)})
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
        25,
        50,
    )
