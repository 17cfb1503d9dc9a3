"""The brokers' machinery, as far as it needs no broker: the compose file, ports, pid files, selection by name."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from brokers import compose, ports, probe, shared
from brokers.broker import CONF, PASSWORD, ROOT, USER, BrokerError
from brokers.native import BROKERS
from brokers.process import Daemon
from brokers.waiting import wait_until
from pubsub_facade import Settings

FORMS = [
    ("rabbitmq", "rabbitmq"),
    ("kafka", "kafka"),
    ("activemq", "activemq"),
    ("activemq-virtual", "activemq"),
    ("artemis", "activemq"),
]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def compose_text() -> str:
    """The compose file with each variable's default filled in."""
    return VARIABLE.sub(lambda found: found[2], compose.FILE.read_text())


def services() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(compose_text())["services"]
    return loaded


def test_the_compose_file_is_valid() -> None:
    assert len(compose_spec.PyCompose.from_yaml(compose_text())) == len(BROKERS)


def test_the_compose_parser_refuses_a_misspelt_key() -> None:
    with pytest.raises(ValueError, match="healthcheckk"):
        compose_spec.PyCompose.from_yaml(compose_text().replace("healthcheck:", "healthcheckk:"))


@pytest.mark.skipif(not compose.has_command(), reason="no docker compose command on this machine")
def test_docker_compose_accepts_the_file() -> None:
    done = subprocess.run(
        ["docker", "compose", "-f", str(compose.FILE), "config", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_compose_file_has_each_broker_with_a_health_check_and_a_pinned_image() -> None:
    assert set(services()) == set(BROKERS)
    for name, service in services().items():
        assert service["healthcheck"]["test"], name
        assert re.fullmatch(r"[a-z/]+:[\w.-]*\d[\w.-]*", service["image"]), name


def test_compose_publishes_on_loopback_the_ports_that_the_settings_name() -> None:
    for name, service in services().items():
        published = [port.split(":")[:2] for port in service["ports"]]
        assert all(host == "127.0.0.1" for host, _ in published), name
        known = {str(number) for number in ports.DEFAULTS[name].values()}
        assert {number for _, number in published} <= known, name


def test_compose_reads_only_variables_that_are_set_for_it() -> None:
    given: dict[str, str] = {}
    for name, at in ports.DEFAULTS.items():
        given |= compose.variables(name, at)
    for variable, default in VARIABLE.findall(compose.FILE.read_text()):
        assert given.get(variable) == default


def test_compose_mounts_files_that_exist() -> None:
    mounts = [mount for service in services().values() for mount in service.get("volumes", ())]
    assert mounts
    for mount in mounts:
        assert (compose.FILE.parent / mount.split(":")[0]).is_file(), mount


def test_compose_gives_the_user_and_password_that_the_settings_name() -> None:
    assert f"default_pass = {PASSWORD}" in (CONF / "rabbitmq.conf").read_text()
    assert f'username="{USER}" password="{PASSWORD}"' in (CONF / "activemq.xml").read_text()
    assert services()["artemis"]["environment"]["ARTEMIS_PASSWORD"] == PASSWORD


def test_the_stomp_health_check_passes_only_for_a_broker_that_lets_us_in() -> None:
    script = services()["activemq"]["healthcheck"]["test"][3].replace("$$", "$")
    with socket.create_server(("127.0.0.1", 0)) as server:
        check = ["bash", "-c", script.replace("61613", str(server.getsockname()[1]))]
        for answer, code in ((b"CONNECTED\n", 0), (b"ERROR\nmes\n", 1)):
            process = subprocess.Popen(check, stderr=subprocess.DEVNULL)
            link, _ = server.accept()
            frame = b""
            while not frame.endswith(b"\n\n\0"):
                frame += link.recv(1024)
            assert frame.startswith(b"CONNECT\n")
            assert b"passcode:pubsub\n" in frame
            link.sendall(answer)
            assert process.wait(10) == code
            link.close()


@pytest.mark.parametrize(("form", "backend"), FORMS)
def test_the_settings_written_for_each_backend_form_load(form: str, backend: str, tmp_path: Path) -> None:
    texts = {
        form: text
        for name, broker in BROKERS.items()
        for form, text in broker.settings(ports.DEFAULTS[name]).items()
    }
    assert sorted(texts) == sorted(form for form, _ in FORMS)
    file = tmp_path / "pubsub.toml"
    file.write_text(texts[form])
    assert Settings.load(file).backend == backend


def test_an_unknown_broker_is_refused_with_the_known_names() -> None:
    with pytest.raises(BrokerError, match=r"rabitmq.*rabbitmq, kafka, activemq, artemis"):
        shared.select("rabitmq")


def test_brokers_are_selected_by_name_all_by_default_and_none_by_an_empty_list() -> None:
    assert shared.select(None) == ["rabbitmq", "kafka", "activemq", "artemis"]
    assert shared.select("artemis, kafka") == ["kafka", "artemis"]
    assert shared.select("") == []


def test_those_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    shared.left_out(["kafka"])
    assert "rabbitmq, activemq, artemis" in capsys.readouterr().err


def test_a_port_base_moves_every_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKERS_PORT_BASE", "11000")
    moved = [number for name in BROKERS for number in ports.preferred(name).values()]
    assert sorted(moved) == list(range(11000, 11000 + len(moved)))


def test_a_taken_port_is_replaced_by_a_free_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = ports.free(1)[0]
    monkeypatch.setenv("BROKERS_PORT_BASE", str(base))
    with socket.create_server(("127.0.0.1", base)):
        chosen = ports.for_shared("rabbitmq", tmp_path)
    assert chosen["amqp"] != base
    assert chosen["dist"] == ports.preferred("rabbitmq")["dist"]


def test_an_instance_keeps_its_ports(tmp_path: Path) -> None:
    first = ports.for_instance("kafka", tmp_path)
    assert ports.for_instance("kafka", tmp_path) == first
    assert ports.for_instance("kafka", tmp_path / "other") != first


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``docker`` that only notes how it was called, and fails as long as there is a file ``fail``."""
    calls = tmp_path / "calls"
    command = tmp_path / "bin" / "docker"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\necho "port=$BROKERS_KAFKA_CLIENT $*" >> {calls}\n'
        f'case "$*" in *" up "*) test ! -e {tmp_path}/fail;; *logs*) echo "the log";; esac\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("BROKERS_BY", "compose")
    monkeypatch.setattr(shared, "STATE", tmp_path)
    monkeypatch.setattr(compose, "NOTES", tmp_path / "compose")
    return calls


def test_compose_starts_a_broker_on_a_free_port_and_stops_what_it_started(docker: Path) -> None:
    assert shared.up(["kafka"]) == ["kafka"]
    (port,) = [word for word in docker.read_text().split() if word.startswith("port=") and word != "port="]
    assert re.search(r" up .*--wait.* kafka$", docker.read_text(), re.MULTILINE)
    settings = docker.with_name("pubsub.kafka.toml")
    assert f"127.0.0.1:{port.removeprefix('port=')}" in settings.read_text()
    shared.down(["kafka", "artemis"])
    stops = [line for line in docker.read_text().splitlines() if " rm " in line]
    assert len(stops) == 1
    assert stops[0].endswith(" kafka")
    assert not settings.exists()


def test_a_broker_that_compose_cannot_start_shows_its_log(docker: Path) -> None:
    docker.with_name("fail").touch()
    with pytest.raises(BrokerError, match="the log"):
        shared.up(["kafka"])
    assert not docker.with_name("pubsub.kafka.toml").exists()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "it.pid", tmp_path / "it.log")
    daemon.start([sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(60)"])
    yield daemon
    daemon.kill()


def test_a_process_is_found_again_by_its_pid_file(daemon: Daemon) -> None:
    again = Daemon(daemon.pid_file, daemon.log)
    assert again.pid() == daemon.pid() is not None
    wait_until(lambda: "hello" in daemon.log.read_text(), 10, "its output")
    again.stop(10)
    assert daemon.pid() is None


def test_a_process_may_outlive_what_started_it_without_a_warning(tmp_path: Path) -> None:
    Daemon(tmp_path / "it.pid", tmp_path / "it.log").start(
        [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    gc.collect()  # a warning here would be an error
    again = Daemon(tmp_path / "it.pid", tmp_path / "it.log")
    assert again.pid() is not None
    again.kill()
    assert again.pid() is None


def test_a_pid_that_belongs_to_somebody_else_now_is_not_signalled(daemon: Daemon) -> None:
    record = json.loads(daemon.pid_file.read_text())
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        stale = Daemon(daemon.pid_file.with_name("stale.pid"), daemon.log)
        stale.pid_file.write_text(json.dumps({**record, "pid": other.pid, "started": record["started"] - 1}))
        assert stale.pid() is None
        assert not stale.signal(signal.SIGKILL)
        stale.stop(1)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_paused_process_is_alive_and_can_be_stopped(daemon: Daemon) -> None:
    daemon.pause()
    assert daemon.pid() is not None
    daemon.stop(10)
    assert daemon.pid() is None


def test_a_port_that_only_listens_is_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        assert not probe.amqp(port)
        assert not probe.kafka(port)
        assert not probe.stomp(port, USER, PASSWORD)


def test_commands_run_without_brokers_return_their_exit_code() -> None:
    command = [sys.executable, "-m", "brokers", "run", "", "--", sys.executable, "-c", "raise SystemExit(7)"]
    environment = {**os.environ, "BROKERS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "LEFT OUT" in done.stderr


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java on this machine")
def test_a_broker_that_does_not_start_shows_the_tail_of_its_log(tmp_path: Path) -> None:
    broker = BROKERS["kafka"](tmp_path, extra=["process.roles=nonsense"])
    broker.configure = lambda: None  # type: ignore[method-assign]
    with pytest.raises(BrokerError, match=r"(?s)kafka ended while starting.*kafka\.log"):
        broker.start(30)


def test_a_command_run_with_brokers_is_left_the_time_to_clean_up_when_told_to_end(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "try:\n    print('up', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('cleaned', flush=True); sys.exit(3)\n"
    )
    command = [sys.executable, "-m", "brokers", "run", "", "--", sys.executable, str(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.read() == "cleaned\n"
        assert process.wait(10) == 3
