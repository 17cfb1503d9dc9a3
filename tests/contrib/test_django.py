"""The Django integration: the project's own cases on each database, and its commands as real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ALL, ROOT

HERE = Path(__file__).parent


def environment(url: str, **more: str) -> dict[str, str]:
    """What a process of the project needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PUBSUB_", "PYTEST_"))}
    path = os.pathsep.join([str(ROOT), str(HERE)])
    return {
        **kept,
        "PYTHONPATH": path,
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "DATABASE_URL": url,
        **more,
    }


@pytest.mark.parametrize("database", ALL)
def test_the_cases_of_the_project_pass(
    database: str, database_url: Callable[[str], str], tmp_path: Path
) -> None:
    more = {"TEST_DATABASE": f"test_{os.getpid()}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--create-db", "-W", "error",
         "-o", "addopts=", "--timeout", "60", "--rootdir", str(HERE / "project"), str(HERE / "project" / "cases.py")],
        cwd=tmp_path,
        env=environment(database_url(database), **more),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 20
    assert "skipped" not in done.stdout
