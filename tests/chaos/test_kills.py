"""``kill -9`` at random points of publishing and settling leaves the embedded file whole, and loses nothing.

``KILLS=1000`` is the long form. The seed is drawn anew each time and shown when a run fails.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from brokers.broker import ROOT
from tests.chaos.kills import BATCH, LEASE, PROCESSES, SUBSCRIPTIONS

KILLS = int(os.environ.get("KILLS", "100"))
SEED = int(os.environ.get("SEED") or random.randrange(10**6))
WINDOW = 100  # deliveries in hand at most, by the client's default


@pytest.mark.timeout(60 + KILLS)
def test_processes_killed_at_random_lose_nothing_and_leave_the_file_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.kills", str(tmp_path), str(KILLS), str(SEED)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    told = f"seed {SEED}: {done.stdout}{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    accounts = json.loads(done.stdout)
    print(told)
    assert accounts["integrity"] == ["ok"]
    assert accounts["lost"] == {name: [] for name in SUBSCRIPTIONS}, told
    assert accounts["published"] > KILLS, told
    assert accounts["settled_after"] < LEASE + 3, f"what the dead had in hand came too late: {told}"
    assert accounts["duplicates"] <= (KILLS + PROCESSES) * len(SUBSCRIPTIONS) * (WINDOW + BATCH), told
