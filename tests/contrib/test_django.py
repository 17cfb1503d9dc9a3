"""The Django integration: the project's own cases on each database, and its commands as real processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

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


def run_cases(cases: str, url: str, folder: Path, **more: str) -> int:
    """Run a file of the project's cases in a process of its own; how many there are: all pass, none is skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--create-db", "-W", "error",
         "-o", "addopts=", "--timeout", "60", "--rootdir", str(HERE / "project"), str(HERE / "project" / cases)],
        cwd=folder,
        env=environment(url, **{"TEST_DATABASE": f"test_{os.getpid()}", **more}),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    passed = re.search(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    assert passed, done.stdout
    return int(passed[1])


@pytest.mark.parametrize("database", ALL)
def test_the_cases_of_the_project_pass(
    database: str, database_url: Callable[[str], str], tmp_path: Path
) -> None:
    assert run_cases("cases.py", database_url(database), tmp_path) >= 20


class Project:
    """The project on SQLite and the embedded backend, in one folder, run by its real commands."""

    def __init__(self, folder: Path, *, migrated: bool = True, **more: str) -> None:
        self.folder = folder
        setting = {"backend": "sqlite", "sqlite": {"path": str(folder / "pubsub.db")}}
        self.environment = environment(
            f"sqlite:///{folder / 'app.sqlite3'}",
            SOCIAL_PUBSUB=json.dumps(setting),
            NOTIFICATIONS=str(folder / "notifications"),
            **more,
        )
        if migrated:
            self("migrate", "--run-syncdb", "-v0")

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "django", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def __call__(self, *arguments: str) -> str:
        """Standard output of a command that succeeds."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shell(self, code: str) -> str:
        """What ``manage.py shell`` prints."""
        return self("shell", "-v0", "-c", code)

    def start(self, *arguments: str, to: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "django", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=to,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def until(true: Callable[[], object], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


COUNT = "from project.social.models import *; print(sum(Count.objects.values_list('posts', flat=True)))"
WRITE = """
from django.db import transaction
from pubsub_facade.contrib.django import publish_on_commit
with transaction.atomic():
    for number in range(20):
        publish_on_commit("social.post.created", {"author": number % 3, "text": f"t{number}"}, headers={"lang": "en"})
try:
    with transaction.atomic():
        publish_on_commit("social.post.created", {"author": 0, "text": "never"})
        raise ZeroDivisionError
except ZeroDivisionError:
    pass
"""


def test_an_event_goes_from_the_shell_by_outbox_and_relay_to_the_handlers(project: Project) -> None:
    project("pubsub", "declare", "analytics", "social.post.*")
    project("pubsub", "declare", "notifications", "social.post.*", "--filter", "lang = 'en'")
    project.shell(WRITE)
    assert project("pubsub_relay", "--lag").startswith("20 wait")
    assert project("pubsub_relay", "--drain", "-v0") == "published 20\n"
    assert project("pubsub_relay", "--lag") == "0 wait; 0 set aside\n"
    done = project.run("runsubscribers", "--drain", "--concurrency", "3")
    assert done.returncode == 0, done.stderr
    assert project.shell(COUNT) == "20\n"
    texts = (project.folder / "notifications").read_text().split()
    assert sorted(texts) == sorted(f"t{number}" for number in range(20))


def test_runsubscribers_serves_until_sigterm_tells_its_health_and_leaves_nothing(project: Project) -> None:
    port = free_port()
    members = project.start("runsubscribers", "--health", str(port))
    try:
        until(lambda: health(port) is not None and health(port)["healthy"])
        assert health(port)["members"] == {"analytics": True, "notifications": True}
        project.shell(
            "from pubsub_facade.contrib.django import publish\n"
            "for n in range(10): publish('social.post.created', {'author': 1, 'text': f't{n}'})"
        )
        until(lambda: project.shell(COUNT) == "10\n")
    finally:
        members.send_signal(signal.SIGTERM)
        output, _ = members.communicate(timeout=30)
    assert members.returncode == 0, output
    assert "finishing what is in hand" in output


def test_a_relay_tells_its_start_and_its_end(project: Project) -> None:
    project.shell(WRITE)
    with (project.folder / "log").open("w") as file:
        relay = project.start("pubsub_relay", to=file)
    try:
        until(lambda: project("pubsub_relay", "--lag").startswith("0 wait"))
    finally:
        relay.send_signal(signal.SIGTERM)
        relay.wait(30)
    first, *_, last = (project.folder / "log").read_text().splitlines()
    assert first.endswith("publishing the outbox of database 'default' to sqlite")
    assert last.endswith("stopped; published 20 from the outbox of database 'default'")
    told = project.run("pubsub_relay", "--help").stdout
    assert "on loopback, unless HOST is given (in a container 0.0.0.0:8080)" in " ".join(told.split())


def test_exit_codes_are_true(project: Project) -> None:
    assert project.run("runsubscribers", "nonesuch").returncode == 2
    project.environment["SOCIAL_PUBSUB"] = json.dumps({"backend": "sqlite", "sqlte": {}})
    done = project.run("runsubscribers", "--skip-checks")
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr
    assert project.run("check").returncode == 1
    assert project.run("pubsub_relay", "--drain", "--skip-checks").returncode == 2
    assert project.run("pubsub", "backlog", "x").returncode == 2


def test_a_table_that_is_missing_ends_each_command_in_one_line(tmp_path: Path) -> None:
    project = Project(tmp_path, migrated=False)
    project("pubsub", "declare", "analytics", "social.post.*")
    project("pubsub", "publish", "social.post.created", '{"author": 1, "text": "x"}')
    for command, table in (
        ("runsubscribers --drain", "pubsub_inbox"),
        ("pubsub_relay", "pubsub_outbox"),
        ("pubsub_relay --drain", "pubsub_outbox"),
        ("pubsub_relay --lag", "pubsub_outbox"),
        ("pubsub_prune", "pubsub_inbox"),
    ):
        done = project.run(*command.split())
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"CommandError: table {table} is not in database 'default': run python manage.py migrate"
        ]
    assert '"waiting": 1' in project("pubsub", "backlog", "analytics", "--json")
    assert project.run("runsubscribers", "notifications", "--drain").returncode == 0  # marks nothing

    project.environment["DATABASE_URL"] = f"sqlite:///{tmp_path}/no_such_folder/app.sqlite3"
    for command in ("pubsub_relay --lag", "pubsub_prune"):
        done = project.run(*command.split())
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            "CommandError: database 'default': OperationalError: unable to open database file"
        ]


def test_the_command_line_has_djangos_settings(project: Project) -> None:
    shown = json.loads(project("pubsub", "config", "show", "--json"))
    assert shown["sqlite.path"]["value"] == str(project.folder / "pubsub.db")
    project("pubsub", "declare", "mine", "a.#")
    project("pubsub", "publish", "a.b", "hello")
    assert '"waiting": 1' in project("pubsub", "backlog", "mine", "--json")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def health(port: int) -> dict[str, Any] | None:
    """What the health address answers; None while nobody does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        with error:
            return dict(json.load(error))
    except OSError:
        return None


class Reloading:
    """``runsubscribers --reload`` over a module ``watched.changing``."""

    def __init__(self, project: Project) -> None:
        code = project.folder / "watched"
        code.mkdir()
        (code / "__init__.py").touch()
        self.module = code / "changing.py"
        self.module.write_text("VALUE = 1\n")
        project.environment["PYTHONPATH"] += os.pathsep + str(project.folder)
        project.environment["DJANGO_WATCHED"] = "watched.changing"
        self._port = free_port()
        self._stamps = itertools.count(int(time.time()) + 5)
        self.log = project.folder / "log"
        with self.log.open("w") as log:
            self.process = project.start("runsubscribers", "--reload", "--health", str(self._port), to=log)

    def healthy(self) -> bool:
        return bool((health(self._port) or {}).get("healthy"))

    def change(self, text: str, seen: Callable[[], bool]) -> None:
        """Until it is seen: it looks at the files once a second, and does not know those yet that change before its
        first look.
        """
        self.module.write_text(text)

        def touched() -> bool:
            stamp = next(self._stamps)
            os.utime(self.module, (stamp, stamp))
            return seen()

        until(touched)

    def started_after(self, before: set[int]) -> Callable[[], bool]:
        return lambda: bool(_children(self.process.pid)) and not _children(self.process.pid) & before

    def end(self) -> None:
        for child in _children(self.process.pid):
            os.kill(child, signal.SIGTERM)
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def reloading(project: Project) -> Iterator[Reloading]:
    reloading = Reloading(project)
    yield reloading
    reloading.end()


def test_reload_starts_again_when_code_changes(reloading: Reloading) -> None:
    until(reloading.healthy)
    reloading.change("VALUE = 22\n", reloading.started_after(_children(reloading.process.pid)))
    until(reloading.healthy)


def test_reload_outlives_a_file_that_was_saved_half_done(reloading: Reloading) -> None:
    until(reloading.healthy)
    waiting = "the code does not start (exit code 1): waiting for it to change"
    reloading.change("VALUE = (\n", lambda: waiting in reloading.log.read_text())
    assert "SyntaxError" in reloading.log.read_text()
    assert reloading.process.poll() is None
    reloading.module.write_text("VALUE = (1)\n")
    until(reloading.healthy)


def _children(pid: int) -> set[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in found.read_text().split()} if found.exists() else set()
