"""The short form of the chaos runs: nothing that was confirmed is lost, whatever happens to whom.

``make chaos`` is the long form. The seed is drawn anew each time and shown when a run fails. ``INJURIES`` names those
to draw from, ``PATIENCE`` is how many seconds are waited for what was promised. A loss is noted in pytest's cache as
``chaos/lost``: whoever runs failed tests a second time must not forgive it.
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
def test_nothing_confirmed_is_lost(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    print(f"seed {SEED}")
    result = scenario.run(
        form, tmp_path, seed=SEED, count=1500, faults=8, rate=100, patience=PATIENCE, only=INJURIES
    )
    print(scenario.HEADER, result.row(), sep="\n")
    breaches = result.breaches()
    cache = getattr(request.config, "cache", None)
    if cache is not None and (result.lost_count or result.misbooked):
        cache.set("chaos/lost", breaches)
    assert not breaches, f"seed {SEED}, after {result.faults}: {breaches}"
    assert result.booked
    assert result.published >= 2 * 1500
    assert result.handled + result.dead >= 2 * result.published
    shutil.rmtree(tmp_path, ignore_errors=True)
