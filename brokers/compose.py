"""The brokers by ``docker-compose.test.yml``, where a docker daemon answers.

The compose project is named after the checkout, so that two of them do not share containers. Which services
this checkout started, and on which ports, is noted in ``.brokers/compose``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from brokers import ports
from brokers.broker import ROOT, STATE, BrokerError

FILE = ROOT / "docker-compose.test.yml"
PROJECT = f"pubsub-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}"
NOTES = STATE / "compose"


def available() -> bool:
    """Is there the compose command, and does a docker daemon answer?"""
    return has_command() and _succeeds(["docker", "info"])


def has_command() -> bool:
    """Is there ``docker compose``? It parses files without a daemon."""
    return shutil.which("docker") is not None and _succeeds(["docker", "compose", "version"])


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def variables(name: str, at: Mapping[str, int]) -> dict[str, str]:
    """What the compose file reads: ``BROKERS_RABBITMQ_AMQP=25672`` and so on."""
    return {f"BROKERS_{name}_{port}".upper(): str(number) for port, number in at.items()}


def _compose(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    command = ["docker", "compose", "-p", PROJECT, "-f", str(FILE), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, check=False
    )
    if done.returncode != 0:
        raise BrokerError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def running() -> list[str]:
    """The services of this checkout whose containers run."""
    return _compose("ps", "--services", "--status", "running").split()


def started(name: str) -> dict[str, int]:
    """The ports of a service this checkout started; empty where it did not."""
    note = NOTES / f"{name}.json"
    try:
        at: dict[str, int] = json.loads(note.read_text())
    except FileNotFoundError:
        return {}
    return at


def up(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Start these services and wait for their health checks; the ports of each. Running ones are left."""
    chosen = {name: started(name) or ports.for_shared(name, NOTES / name) for name in names}
    environment = {key: value for name, at in chosen.items() for key, value in variables(name, at).items()}
    try:
        _compose("up", "--detach", "--wait", "--wait-timeout", "180", *names, environment=environment)
    except BrokerError as error:
        logs = _compose("logs", "--tail", "40", *names)
        raise BrokerError(f"{error}\n{logs}") from None
    NOTES.mkdir(parents=True, exist_ok=True)
    for name, at in chosen.items():
        (NOTES / f"{name}.json").write_text(json.dumps(at))
    return chosen


def down(name: str) -> None:
    """Stop a service that `up` started, and delete its container and what it stored."""
    _compose("rm", "--stop", "--force", "--volumes", name)
    (NOTES / f"{name}.json").unlink()
