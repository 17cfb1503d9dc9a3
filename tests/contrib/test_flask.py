"""The Flask extension: factories, several applications, the context of each message, the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask, current_app

from pubsub_facade import ConfigError, PubSub
from pubsub_facade.contrib.flask import FlaskPubSub
from pubsub_facade.testing.hub import Published, TestHub

from .conftest import ROOT

HERE = Path(__file__).parent


def app_on(hub: TestHub, extension: FlaskPubSub, namespace: str = "one") -> Flask:
    app = Flask(namespace)
    app.config["PUBSUB"] = {"url": hub.url, "namespace": namespace}
    extension.init_app(app)
    return app


def test_two_applications_in_one_process_have_a_client_each(pubsub_hub: TestHub) -> None:
    extension = FlaskPubSub()
    apps = [app_on(pubsub_hub, extension, name) for name in ("one", "two")]
    for app in apps:
        with app.app_context():
            extension.publish("a", app.name)
        assert isinstance(app.extensions["pubsub"], PubSub)
    assert [message.payload for message in Published(pubsub_hub)] == ["one", "two"]
    with pytest.raises(RuntimeError, match="application context"):
        extension.publish("a", 1)
    with pytest.raises(ConfigError, match="already"):
        extension.init_app(apps[0])
    for app in apps:
        app.extensions["pubsub"].close()


def test_each_message_has_a_context_of_its_own(pubsub_hub: TestHub) -> None:
    extension = FlaskPubSub()
    app = app_on(pubsub_hub, extension)
    seen: list[object] = []
    app.teardown_appcontext(lambda error: seen.append(type(error)))

    @extension.subscriber("a", subscription="s", max_attempts=1)
    def handle(payload: int) -> None:
        seen.append((current_app.name, payload))
        extension.publish("b", payload)
        if payload == 2:
            raise ValueError

    client: PubSub = app.extensions["pubsub"]
    client.include(extension.subscribers(app))
    client.start()
    client.publish("a", 1)
    pubsub_hub.drain()
    client.publish("a", 2)
    pubsub_hub.drain()
    client.close()
    assert seen == [("one", 1), type(None), ("one", 2), ValueError]
    assert Published(pubsub_hub).topics == ["a", "b", "a", "b"]


def test_an_async_view_publishes_on_the_process_s_links(pubsub_hub: TestHub) -> None:
    extension = FlaskPubSub()
    app = app_on(pubsub_hub, extension)

    @app.get("/")
    async def view() -> str:
        return (await extension.apublish("a", 1)).id

    for _ in range(3):
        assert app.test_client().get("/").status_code == 200
    client: PubSub = app.extensions["pubsub"]
    assert len(Published(pubsub_hub)) == 3
    assert client._client._supervisor.attempts == 1
    client.close()


def test_bad_settings_name_the_key_of_the_config() -> None:
    app = Flask("x")
    app.config["PUBSUB"] = {"backend": "sqlite", "sqlite": {"pth": "x"}}
    with pytest.raises(ConfigError, match=r"PUBSUB.*did you mean"):
        FlaskPubSub(app)
    app.config["PUBSUB"] = 5
    with pytest.raises(ConfigError, match="PUBSUB is of type int"):
        FlaskPubSub(app)


class Application:
    """`flask_app` on the embedded backend, by ``flask``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        setting = {"backend": "sqlite", "sqlite": {"path": str(folder / "pubsub.db")}}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PUBSUB_")}
        self.environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
            "FLASK_APP": "flask_app:create_app",
            "SOCIAL_PUBSUB": json.dumps(setting),
            "OUTPUT": str(folder / "output"),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flask", "pubsub", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def until(true: Callable[[], object], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def test_the_command_line_publishes_and_runs_the_application_s_handlers(tmp_path: Path) -> None:
    app = Application(tmp_path)
    for name in ("analytics", "audit"):
        assert app.run("declare", name, "social.#").returncode == 0
    done = app.run("publish", "social.post.created", '{"text": "hello"}')
    assert done.returncode == 0, done.stderr
    done = app.run("run", "--drain")
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "output").read_text().splitlines()) == ["audit hello", "hello"]
    assert app.run("nonesuch").returncode == 2
    assert app.run("run", "--health", "x").returncode == 2
    assert "sqlite.path" in app.run("config", "show").stdout


def test_options_before_the_command_hold_for_run_too(tmp_path: Path) -> None:
    app = Application(tmp_path)
    for name in ("analytics", "audit"):
        assert app.run("--namespace", "mine", "declare", name, "social.#").returncode == 0
    assert (
        app.run("--namespace", "mine", "publish", "social.post.created", '{"text": "hello"}').returncode == 0
    )
    done = app.run("run", "--drain")
    assert (done.returncode, (tmp_path / "output").exists()) == (0, False), done.stderr
    done = app.run("--debug", "--namespace", "mine", "run", "--drain")
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "output").read_text().splitlines()) == ["audit hello", "hello"]
    assert "Traceback" in app.run("--debug", "run", "--health", "x").stderr
    done = app.run("run", "--debug")
    assert done.returncode == 2
    assert done.stderr == "pubsub: --debug stands before the command: flask pubsub --debug …\n"
    assert "MODULE:OBJECT" not in app.run("run", "--help").stdout


def test_the_command_alone_shows_its_help(tmp_path: Path) -> None:
    done = Application(tmp_path).run()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: flask pubsub [OPTIONS] COMMAND")
    assert re.search("\n  run +Run the application's handlers", done.stderr)


def test_run_ends_on_sigterm(tmp_path: Path) -> None:
    app = Application(tmp_path)
    for name in ("analytics", "audit"):
        assert app.run("declare", name, "social.#").returncode == 0
    members = subprocess.Popen(
        [sys.executable, "-m", "flask", "pubsub", "run"],
        cwd=app.folder,
        env=app.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert app.run("publish", "social.post.created", '{"text": "hello"}').returncode == 0
        until(
            lambda: (
                (tmp_path / "output").exists() and len((tmp_path / "output").read_text().splitlines()) == 2
            )
        )
    finally:
        members.send_signal(signal.SIGTERM)
        output, _ = members.communicate(timeout=30)
    assert members.returncode == 0, output
