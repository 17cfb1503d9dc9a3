"""What the README shows, on each broker: the social example by config alone, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from pubsub_facade import PubSub, Reject, Settings
from tests.conftest import FOLDER, broker_settings

ROOT = Path(__file__).resolve().parents[2]
PUBSUB = str(Path(sys.executable).with_name("pubsub"))
FORMS = ["rabbitmq", "kafka", "activemq", "activemq-virtual", "artemis"]
DEADLINE = 30.0  # s

each_form = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS]
)


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
    return {**kept, "PYTHONWARNINGS": "error", **variables}


def demo(**variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "examples/social/run.py"],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_social_example_runs_on_the_embedded_backend() -> None:
    told = demo(PUBSUB_BACKEND="sqlite")
    assert "notifications got 40 of them, each one" in told
    assert "analytics     got 40 of them, each one" in told
    assert "shared the work" in told


@each_form
def test_the_social_example_runs_by_config_alone(form: str) -> None:
    settings = broker_settings(form)()
    told = demo(PUBSUB_CONFIG=str(FOLDER / f"pubsub.{form}.toml"))
    assert "notifications got 40 of them, each one" in told
    assert "analytics     got 40 of them, each one" in told
    assert ("shared the work" in told) is PubSub(settings).capabilities.competing


@each_form
def test_the_command_line_works(form: str, tmp_path: Path) -> None:
    """Declare, publish lines, tail without taking, backlog, dead letters, replay, delete."""
    settings: Settings = broker_settings(form)(namespace=f"cli-{uuid.uuid4().hex[:8]}")
    variables = environment(
        PUBSUB_CONFIG=str(FOLDER / f"pubsub.{form}.toml"), PUBSUB_NAMESPACE=settings.namespace
    )

    def pubsub(*arguments: str, input: str = "") -> str:
        done = subprocess.run(
            [PUBSUB, *arguments],
            cwd=tmp_path,
            env=variables,
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    assert "answered in" in pubsub("ping")
    pubsub("declare", "analytics", "social.#")
    try:
        tail = subprocess.Popen(
            [PUBSUB, "tail", "social.*.created", "--json", "--count", "3"],
            cwd=tmp_path,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert tail.stderr is not None
            assert "receiving" in tail.stderr.readline()
            lines = [
                {"topic": "social.post.created", "payload": {"n": n}, "headers": {"n": n}} for n in range(3)
            ]
            assert pubsub("publish", input="\n".join(map(json.dumps, lines))) == "3 published\n"
            out, error = tail.communicate(timeout=DEADLINE)
        finally:
            tail.kill()
            tail.communicate()
        assert tail.returncode == 0, error
        assert sorted(json.loads(line)["payload"]["n"] for line in out.splitlines()) == [0, 1, 2]
        assert f"analytics\twaiting={'3' if known_backlog(settings) else '?'}" in pubsub(
            "backlog", "analytics"
        )

        bury_all(settings, 3)
        letters = [json.loads(line) for line in pubsub("dead", "analytics", "list", "--json").splitlines()]
        assert sorted(letter["payload"]["n"] for letter in letters) == [0, 1, 2]
        assert {letter["failure"]["error"] for letter in letters} == {"no use"}
        assert pubsub("dead", "analytics", "replay", letters[0]["id"]) == "replayed 1\n"
        assert pubsub("dead", "analytics", "purge", letters[1]["id"], "--yes") == "purged 1\n"
        assert [line.split("\t")[0] for line in pubsub("dead", "analytics").splitlines()] == [
            letters[2]["id"]
        ]
        with PubSub(settings) as client, client.subscribe("social.#", subscription="analytics") as stream:
            delivery = stream.receive(DEADLINE)
            assert delivery.id == letters[0]["id"]
            delivery.ack()
    finally:
        assert pubsub("delete", "analytics", "--yes") == "deleted analytics\n"


def known_backlog(settings: Settings) -> bool:
    return PubSub(settings).capabilities.backlog


def bury_all(settings: Settings, count: int) -> None:
    """Let a member reject everything that waits."""

    def refuse(payload: object) -> None:
        raise Reject("no use")

    with PubSub(settings) as member:
        member.subscriber("social.#", subscription="analytics")(refuse)
        member.start()
        deadline = time.monotonic() + DEADLINE
        while member.dead_letters("analytics").count() < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)
