"""More cases of the Django project, each file in a process of its own; see ``test_django.py`` for the first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .test_django import HERE, environment


def run(cases: str, url: str, folder: Path, **more: str) -> int:
    """Run a file of cases; how many passed, and none may do anything else."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--create-db", "-W", "error",
         "-o", "addopts=", "--timeout", "60", "--rootdir", str(HERE / "project"), str(HERE / "project" / cases)],
        cwd=folder,
        env=environment(url, TEST_DATABASE=f"test_{os.getpid()}", **more),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"(\d+) passed in", done.stdout)
    assert told, done.stdout
    return int(told[1])


def test_settings_come_from_the_places_that_are_told(tmp_path: Path) -> None:
    assert run("settings_cases.py", "sqlite:///app.sqlite3", tmp_path) == 8
