"""A password is in no log, repr, error, traceback, dead letter or output, and not in the list of processes unless the
user writes it there."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pubsub_facade.testing.faults import free_port
from tests.integration.guarded import KNOWN, KNOWN_USER
from tests.integration.secured import Secured

ROOT = Path(__file__).resolve().parents[2]
PUBSUB = str(Path(sys.executable).with_name("pubsub"))
WRONG = "wrong-c8a1d06e53"
KEY = "key-90b7f1aa24"


def leaks(text: str) -> list[str]:
    """The forms of the passwords that are in a text: plain, or as the protocols carry them."""
    forms = []
    for secret in (KNOWN, WRONG, KEY):
        for plain in (secret, f"{KNOWN_USER}:{secret}", f"\0{KNOWN_USER}\0{secret}"):
            forms += [plain, base64.b64encode(plain.encode()).decode().rstrip("="), plain.encode().hex()]
    return [form for form in forms if form in text]


def test_this_test_would_see_a_password() -> None:
    assert leaks(f"amqp://app:{KNOWN}@host")
    assert leaks(base64.b64encode(f"\0{KNOWN_USER}\0{WRONG}".encode()).decode())
    assert not leaks("amqp://app:***@host")


def toml(settings: Mapping[str, Any], prefix: str = "") -> str:
    """Settings as dotted keys."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines.append(toml(value, f"{prefix}{name}."))
        else:
            plain = value if isinstance(value, int | float | list) else repr(str(value))
            lines.append(f"{prefix}{name} = {str(value).lower() if isinstance(value, bool) else plain}")
    return "\n".join(lines)


class Place:
    """Config files, and all that was said by what ran with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[tuple[str, str]] = []
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
        self._environment = {**kept, "PYTHONWARNINGS": "error"}

    def write(self, name: str, settings: Mapping[str, Any]) -> str:
        path = self.folder / f"{name}.toml"
        path.write_text(toml(settings) + "\n")
        return str(path)

    def run(self, *command: str, code: int = 0) -> str:
        """Run it; returns what came out."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, (command, done.stdout[-3000:])
        self.said.append((" ".join(command), done.stdout))
        return done.stdout

    def listed(self, *arguments: str, **environment: str) -> str:
        """What the list of processes says of ``pubsub`` and of all that it started, once it connects to a broker."""
        with socket.create_server(("127.0.0.1", 0)) as broker:
            broker.settimeout(30)
            filled = {"port": str(broker.getsockname()[1])}
            process = subprocess.Popen(
                [PUBSUB, *(each.format(**filled) for each in arguments)],
                env={
                    **self._environment,
                    **{name: url.format(**filled) for name, url in environment.items()},
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                broker.accept()[0].close()
                listing = ["ps", "-ww", "-o", "args=", "--sid", str(process.pid)]
                return subprocess.run(listing, capture_output=True, text=True, check=True).stdout
            finally:
                process.kill()
                process.wait()

    def check(self) -> None:
        for what, text in self.said:
            lines = [line for line in text.splitlines() if leaks(line)]
            assert not lines, f"{what} shows a password:\n" + "\n".join(lines[:5])[:2000]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_password_in_the_environment_or_a_file_is_not_in_the_list_of_processes(place: Place) -> None:
    url = f"amqp://{KNOWN_USER}:{KNOWN}@127.0.0.1:{{port}}/%2F"
    file = place.folder / "known.toml"
    file.write_text(f'backend = "rabbitmq"\nrabbitmq.password = "{KNOWN}"\n')
    by_name = f"amqp://{KNOWN_USER}@127.0.0.1:{{port}}/%2F"
    assert leaks(place.listed("--url", url, "tail", "#")), (
        "the list shows what the user writes on the command line"
    )
    for listed in (
        place.listed("tail", "#", PUBSUB_URL=url),
        place.listed("--url", by_name, "--config", str(file), "tail", "#"),
        place.listed("--url", by_name, "tail", "#", PUBSUB_RABBITMQ__PASSWORD=KNOWN),
    ):
        assert "tail" in listed
        assert not leaks(listed)


def with_password(secured: Secured, password: str, port: int = 0) -> dict[str, Any]:
    """Settings with a password in the place where users have it, and one of a key that is not used."""
    tls: dict[str, Any] = {"ca": secured.certificates.ca, "key_password": KEY}
    if secured.name == "kafka":
        section = {"username": KNOWN_USER, "password": password, "sasl_mechanism": "PLAIN"}
        settings = secured.settings(port or secured.sasl_port, tls, **section)
    else:
        settings = secured.settings(port or secured.port, tls)
        section = settings[settings["backend"]]
        head, _, rest = section["url"].partition("@")
        section["url"] = f"{head.partition('://')[0]}://{KNOWN_USER}:{password}@{rest}"
    if secured.name == "activemq":
        admin = secured.broker.ports["jolokia"]
        settings["activemq"]["admin_url"] = f"http://{KNOWN_USER}:{password}@127.0.0.1:{admin}/api/jolokia/"
    return {**settings, "namespace": "secrets", "connect_timeout": 3}


@pytest.mark.timeout(240)
def test_a_run_on_a_broker_shows_no_password(secured: Secured, place: Place) -> None:
    good = place.write("good", with_password(secured, KNOWN))
    wrong = place.write("wrong", with_password(secured, WRONG))
    nowhere = place.write("nowhere", with_password(secured, KNOWN, free_port()))
    said = place.run(sys.executable, "-m", "tests.integration.secretive", good, wrong, nowhere)
    assert said.rstrip().endswith("finished")
    assert "unexpected" not in said
    assert said.count("to the dead letters") == 3
    assert said.count("Traceback") >= 6
    assert "AuthenticationFailed" in said
    assert KNOWN_USER in said  # the user's name is no secret, and helps
    for arguments, code in (
        (("config", "show", "--all"), 0),
        (("config", "show", "--all", "--json"), 0),
        (("--debug", "doctor"), 0),
        (("--debug", "dead", "secrets", "list"), 2),  # it was deleted at the end
    ):
        before, rest = (arguments[:1], arguments[1:]) if arguments[0] == "--debug" else ((), arguments)
        place.run(PUBSUB, "--config", good, *before, *rest, code=code)
    assert "Traceback" in place.run(PUBSUB, "--config", wrong, "--debug", "ping", code=3)
    assert "Traceback" in place.run(PUBSUB, "--config", nowhere, "--debug", "ping", code=1)
    place.check()


@pytest.mark.timeout(120)
def test_a_run_on_the_embedded_backend_shows_no_password_of_another(place: Place) -> None:
    settings = {
        "backend": "sqlite",
        "sqlite": {"path": place.folder / "secrets.db"},
        "rabbitmq": {"url": f"amqp://{KNOWN_USER}:{KNOWN}@127.0.0.1/%2F"},
        "kafka": {"username": KNOWN_USER, "password": KNOWN},
        "activemq": {"url": f"stomp://{KNOWN_USER}:{KNOWN}@127.0.0.1"},
        "options": {"api_token": KNOWN, "password": WRONG},
    }
    good = place.write("good", settings)
    said = place.run(sys.executable, "-m", "tests.integration.secretive", good, "", "")
    assert said.rstrip().endswith("finished")
    assert said.count("to the dead letters") == 3
    place.run(PUBSUB, "--config", good, "config", "show", "--all")
    place.run(PUBSUB, "--config", good, "--debug", "doctor")
    place.check()
    assert KNOWN not in (place.folder / "secrets.db").read_bytes().decode(errors="replace")
