"""Databases for the framework integrations: SQLite in a file, PostgreSQL and MariaDB started natively.

``DATABASES=postgresql`` in the environment leaves the others out by name, which is said; one that is not left out and
cannot be started fails its tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from brokers import databases  # noqa: E402

ALL = ("sqlite", "postgresql", "mariadb")


@pytest.fixture(scope="session")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The SQLAlchemy URL of a database by name, which serves from then on."""

    def url(name: str) -> str:
        if name == "sqlite":
            return f"sqlite:///{tmp_path_factory.mktemp('database') / 'test.sqlite3'}"
        if databases.left_out(name):
            pytest.skip(f"{name} is left out by {databases.LEFT_OUT}")
        databases.up([name])
        return databases.DATABASES[name]().url

    return url


@pytest.fixture(scope="session", autouse=True)
def _databases_down_at_the_end() -> Iterator[None]:
    """Stop the databases at the end of a run that found them down (not under xdist, whose workers share them)."""
    import os

    before = {name for name in databases.DATABASES if databases.DATABASES[name]().running()}
    yield
    if "PYTEST_XDIST_WORKER" not in os.environ:
        databases.down([name for name in databases.DATABASES if name not in before])
