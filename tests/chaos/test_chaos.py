"""The short form of the chaos runs: nothing that was confirmed is lost, whatever happens to whom.

``make chaos`` is the long form. The seed is drawn anew each time and shown when a run fails. ``INJURIES`` names those
to draw from, ``PATIENCE`` is how many seconds are waited for what was promised.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.chaos import scenario
from tests.chaos.world import FORMS

SEED = int(os.environ.get("SEED") or random.randrange(10**6))
PATIENCE = float(os.environ.get("PATIENCE", "60"))
INJURIES = os.environ.get("INJURIES", "").split()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "form",
    [form if form == "sqlite" else pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS],
)
def test_nothing_confirmed_is_lost(form: str, tmp_path: Path) -> None:
    result = scenario.run(
        form, tmp_path, seed=SEED, count=1500, faults=8, rate=100, patience=PATIENCE, only=INJURIES
    )
    print(scenario.HEADER, result.row(), sep="\n")
    assert not result.stuck or form == "artemis", f"seed {SEED}, after {result.faults}: {result.stuck} stuck"
    assert not result.lost_count, f"seed {SEED}, after {result.faults}: lost {result.lost}"
    assert not result.misbooked, f"not booked once: {result.misbooked}, after {result.faults}"
    assert result.booked
    assert result.published >= 2 * 1500
    assert result.duplicates <= result.bound, f"seed {SEED}: {result}"
    assert result.handled + result.dead >= 2 * result.published
    shutil.rmtree(tmp_path, ignore_errors=True)
