"""The soak run measures and judges; ``make soak`` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from brokers.broker import ROOT
from tests.chaos.soak import FIELDS, findings

RATE = 200
FLAT = [(60.0, 20, 3, 9, float(RATE))] * 40


def test_a_short_run_is_flat_and_written_down(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos.soak", "--minutes", "0.2", "--rate", str(RATE)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "soak-sqlite.csv").read_text().splitlines()
    assert lines[0].split(",") == list(FIELDS)
    assert len(lines) > 8
    ElementTree.fromstring((tmp_path / "soak-sqlite.svg").read_text())


@pytest.mark.parametrize(
    ("at", "step", "said"),
    [
        (0, 2.0, "resident MiB grew"),
        (1, 1, "file descriptors grew"),
        (2, 1, "threads grew"),
        (3, 1, "tasks grew"),
    ],
)
def test_what_grows_is_told(at: int, step: float, said: str) -> None:
    growing = [
        (*values[:at], values[at] + step * number, *values[at + 1 :]) for number, values in enumerate(FLAT)
    ]
    assert not findings(FLAT, RATE)
    assert said in findings(growing, RATE)[0]


def test_a_rate_that_is_not_kept_up_is_told() -> None:
    assert "of 400" in findings(FLAT, 2 * RATE)[0]
