"""More cases of the Django project, each file in a process of its own; see ``test_django.py`` for the first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import ALL, ROOT
from .test_django import environment, run_cases


def test_settings_come_from_the_places_that_are_told(tmp_path: Path) -> None:
    run_cases("settings_cases.py", "sqlite:///app.sqlite3", tmp_path)


@pytest.mark.parametrize("database", ALL)
def test_a_second_database_and_a_second_alias(
    database: str, database_url: Callable[[str], str], tmp_path: Path
) -> None:
    first, second = database_url(database), database_url(database)
    run_cases("databases_cases.py", first, tmp_path, OTHER_DATABASE_URL=second)


@pytest.mark.parametrize("database", ALL)
def test_a_second_application_and_what_applications_declare(
    database: str, database_url: Callable[[str], str], tmp_path: Path
) -> None:
    run_cases("apps_cases.py", database_url(database), tmp_path, MORE_APPS="project.mail")


def test_tests_that_say_nothing_of_a_broker_are_on_memory(tmp_path: Path) -> None:
    away = {
        "url": "amqp://127.0.0.1:1",
        "namespace": "shop",
        "publish_timeout": 0.5,
        "require_subscribers": True,
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django", "test", "project.runner_cases"],
        env=environment(
            "sqlite:///app.sqlite3",
            SOCIAL_PUBSUB=json.dumps({"default": away, "audit": "amqp://127.0.0.1:1"}),
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Ran 8 tests", done.stderr, re.MULTILINE), done.stderr


def test_a_subscribers_module_that_does_not_import_is_told(tmp_path: Path) -> None:
    application = tmp_path / "broken"
    application.mkdir()
    (application / "__init__.py").touch()
    (application / "subscribers.py").write_text("import no_such_module\n")
    done = subprocess.run(
        [sys.executable, "-m", "django", "check"],
        env=environment("sqlite:///app.sqlite3", MORE_APPS="broken"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "No module named 'no_such_module'" in done.stderr


UNINSTALLED = """
import django
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from pubsub_facade import ConfigError
from pubsub_facade.contrib.django import publish_on_commit
from pubsub_facade.contrib.django.relaying import store
for call in (lambda: publish_on_commit("a", 1), store):
    try:
        call()
    except ConfigError as error:
        print(error)
"""


def test_tables_without_the_application_are_refused_with_the_remedy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNINSTALLED],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = 'add "pubsub_facade.contrib.django" to INSTALLED_APPS: its tables are part of it'
    assert done.stdout.splitlines() == [told, told], done.stderr
