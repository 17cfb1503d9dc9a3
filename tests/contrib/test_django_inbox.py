"""The inbox in Django, on each database: the cases of ``project/marks.py``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ALL
from .test_django import run_cases


@pytest.mark.parametrize("database", ALL)
def test_the_cases_of_the_inbox_pass(
    database: str, database_url: Callable[[str], str], tmp_path: Path
) -> None:
    passed = run_cases(
        "marks.py", database_url(database), tmp_path, TEST_DATABASE=f"test_marks_{os.getpid()}"
    )
    assert passed == 3
