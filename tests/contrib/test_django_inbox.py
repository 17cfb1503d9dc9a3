"""The inbox in Django, on each database: the cases of ``project/marks.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ALL
from .test_django import HERE, environment


@pytest.mark.parametrize("database", ALL)
def test_the_cases_of_the_inbox_pass(
    database: str, database_url: Callable[[str], str], tmp_path: Path
) -> None:
    more = {"TEST_DATABASE": f"test_marks_{os.getpid()}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--create-db", "-W", "error",
         "-o", "addopts=", "--timeout", "60", "--rootdir", str(HERE / "project"), str(HERE / "project" / "marks.py")],
        cwd=tmp_path,
        env=environment(database_url(database), **more),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
