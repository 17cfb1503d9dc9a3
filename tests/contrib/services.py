"""An application of each framework in an empty folder, and its services as the real commands that users start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pubsub_facade import PubSub

from .conftest import ROOT
from .servers import environment

DEADLINE = 30.0  # s for anything that should happen at once, on a busy machine

HANDLING = """
import signal, threading, time
from pathlib import Path

def note(word):
    with open("notes", "a") as file:
        file.write(f"{word}\\n")

def handle(payload: str) -> None:
    note(f"begin {payload}")
    deadline = time.monotonic() + 30
    while payload == "slow" and not Path("go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if payload == "signal":
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    note(f"end {payload}")
"""
SETTINGS = """
import os
SECRET_KEY = "only-for-tests"
USE_TZ = True
ROOT_URLCONF = "urls"
INSTALLED_APPS = ["pubsub_facade.contrib.django", "social"]
MIDDLEWARE = ["pubsub_facade.contrib.django.middleware.UnavailableMiddleware"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.path.abspath("app.sqlite3")}}
DATABASES["default"]["OPTIONS"] = {"timeout": 30}
"""
FILES = {
    "handling.py": HANDLING,
    "settings.py": SETTINGS,
    "urls.py": "urlpatterns = []\n",
    "social/__init__.py": "",
    "social/subscribers.py": """
from handling import handle
from pubsub_facade.contrib.django import subscriber

subscriber("sync.#", subscription="sync")(handle)
""",
    "app.py": """
from flask import Flask
from handling import handle
from pubsub_facade.contrib.flask import FlaskPubSub

pubsub = FlaskPubSub()
pubsub.subscriber("sync.#", subscription="sync")(handle)

def create_app():
    app = Flask(__name__)
    pubsub.init_app(app)
    return app
""",
    "served.py": """
from fastapi import FastAPI
from handling import handle
from pubsub_facade import AsyncPubSub
from pubsub_facade.contrib.fastapi import health_router, lifespan

pubsub = AsyncPubSub()
pubsub.subscriber("sync.#", subscription="sync")(handle)
app = FastAPI(lifespan=lifespan(pubsub, subscribers=True))
app.include_router(health_router())
""",
}
SUBSCRIBERS = {"django": ("django", "runsubscribers"), "flask": ("flask", "pubsub", "run")}
RELAY = ("django", "pubsub_relay")


def health(port: int, path: str = "/") -> tuple[int, dict[str, Any]]:
    """Status and facts that a health address answers; (0, {}) while nobody does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, dict(json.load(answer))
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(json.load(error))
    except OSError:
        return 0, {}


def until(true: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
    """Wait until it is so; AssertionError with ``what`` where it is not in time."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"it did not come to pass: {what}"
        time.sleep(0.02)


class Service:
    """A command that goes on until it is ended; what it says is read line by line."""

    def __init__(self, site: Site, command: tuple[str, ...], variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=site.folder,
            env={**site.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a server's workers end with it
        )
        self.said: list[str] = []

    def wait_for(self, words: str) -> None:
        """Read until a line holds ``words``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError(f"{words!r} was not said: {''.join(self.said)}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; its exit code and all that it said."""
        self.process.send_signal(number)
        return self.result()

    def result(self, timeout: float = DEADLINE) -> tuple[int, str]:
        rest, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, "".join(self.said) + rest


class Site:
    """Applications of Django, Flask and FastAPI with the same handler, on the embedded backend unless told otherwise.

    Arguments:
        folder: empty; its ``notes`` say what the handler did, and a file ``go`` lets slow messages end.
        config: text of ``pubsub.toml``.
    """

    def __init__(self, folder: Path, config: str = 'backend = "sqlite"\n') -> None:
        self.folder = folder
        for name, text in {**FILES, "pubsub.toml": config}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        self.environment = environment(
            PYTHONPATH=os.pathsep.join([str(ROOT), str(folder)]),
            PYTHONWARNINGS="error",
            DJANGO_SETTINGS_MODULE="settings",
            FLASK_APP="app:create_app",
        )
        self._started: list[Service] = []

    def client(self, **overrides: Any) -> PubSub:
        """What a test itself publishes and receives with, in the same place."""
        return PubSub(sqlite={"path": self.folder / "pubsub.db"}, backend="sqlite", **overrides)

    def start(self, *command: str, **variables: str) -> Service:
        """A service that is ended at the latest with the test."""
        self._started.append(Service(self, command, variables))
        return self._started[-1]

    def run(self, *command: str, **variables: str) -> tuple[int, str]:
        """Exit code and output of a command that ends by itself."""
        return self.start(*command, **variables).result(60)

    @property
    def notes(self) -> list[str]:
        """What the handler did so far."""
        file = self.folder / "notes"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for_note(self, word: str, times: int = 1) -> None:
        until(lambda: self.notes.count(word) >= times, f"note {word!r}")

    @property
    def overlap(self) -> int:
        """How many messages were in the handler at once, at most."""
        most = now = 0
        for note in self.notes:
            now += 1 if note.startswith("begin") else -1
            most = max(most, now)
        return most

    def go(self) -> None:
        """Let slow messages end."""
        (self.folder / "go").touch()

    def close(self) -> None:
        for each in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGKILL)
            each.process.communicate()
