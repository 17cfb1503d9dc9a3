"""The world that a chaos run happens in: a broker of its own, a proxy before it, and the processes.

Nothing here is shared with other tests: the broker has its own directory and ports, so that it can be
killed, and everything started is ended by its process id.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brokers import native
from brokers.broker import ROOT, STATE, Broker
from brokers.ports import DEFAULTS
from brokers.rabbitmq import RabbitMQ
from pubsub_facade.testing.faults import Proxy, Victim, wait_until
from tests.chaos.books import make_books
from tests.chaos.levers import Levers

FORMS = ("sqlite", "rabbitmq", "kafka", "activemq", "activemq-virtual", "artemis")
PUBLISHERS = 2
MEMBERS = 3
HANDED_OUT = 4  # s that RabbitMQ leaves a delivery unsettled in these runs, and that a lease in SQLite lasts
HEARTBEAT = 2  # s, of the clients in these runs: half-open links are noticed within two or three of it


class Process:
    """One workload process; killed and started again by the faults."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._arguments = arguments
        self._log = log
        self.popen = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.workload", *self._arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def victim(self) -> Victim:
        return Victim(self.popen.pid)

    def kill(self) -> None:
        if self.running:
            self.popen.kill()
        self.popen.wait()

    def wait_receiving(self, timeout: float = 60) -> None:
        """Return once this process, a member, has said that it receives for all subscriptions."""
        mark = f" {self.popen.pid} INFO "

        def said() -> bool:
            lines = self._log.read_text(errors="replace").splitlines()
            return sum(mark in line and "receiving" in line for line in lines) >= 4

        wait_until(said, timeout, f"process {self.popen.pid} to receive")

    def terminate(self, timeout: float = 40) -> int:
        """SIGTERM; returns the exit code."""
        if self.running:
            self.popen.terminate()
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"a process did not drain within {timeout} s of SIGTERM") from None

    def again(self) -> None:
        """Start it again, whatever its predecessor was in the middle of."""
        self.kill()
        self.popen = self._start()


class ImpatientRabbitMQ(RabbitMQ):
    """Looks every second for deliveries that are out for too long; left alone it does every minute."""

    def environment(self) -> dict[str, str]:
        environment = super().environment()
        environment["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] += " -rabbit channel_tick_interval 1000"
        return environment


class World:
    """Broker, proxy, publishers and members of one run.

    Arguments:
        form: backend form, one of `FORMS`.
        folder: for logs and the record of what was published and handled.
        seed: of every choice the run makes.
        count: messages each publisher publishes at least; a multiple of `workload.BATCH`.
        rate: messages a second of each publisher.
    """

    def __init__(self, form: str, folder: Path, seed: int, count: int, rate: float) -> None:
        self.form = form
        self.folder = folder
        self.seed = seed
        self.random = random.Random(seed)
        self.count = count
        self.rate = rate
        self.broker: Broker | None = None
        self.proxy: Proxy | None = None
        self.publishers: list[Process] = []
        self.members: list[Process] = []
        self.config = folder / "pubsub.toml"  # through the proxy
        self.direct = folder / "direct.toml"  # for the accountant, past it
        self.levers = Levers(folder / "levers")
        self.namespace = f"chaos-{os.getpid()}-{int(time.time())}"

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        """Everything started, and everything ended afterwards."""
        with self.serving():
            make_books(self.folder)
            try:
                self.members = [self._member() for _ in range(MEMBERS)]
                for member in self.members:
                    member.wait_receiving()
                yield self
            finally:
                for process in (*self.publishers, *self.members):
                    process.kill()

    @contextlib.contextmanager
    def serving(self) -> Iterator[World]:
        """The broker and the proxy only."""
        try:
            self._start_broker()
            yield self
        finally:
            if self.proxy is not None:
                self.proxy.stop()
            if self.broker is not None:
                self.broker.resume()
                self.broker.remove()

    def start_publishers(self) -> None:
        """Begin to publish: from now on the clock runs."""
        self.publishers = [self._publisher(number) for number in range(PUBLISHERS)]

    def _member(self) -> Process:
        return Process(
            ["consume", "--config", str(self.config), "--folder", str(self.folder)],
            self.folder / "members.log",
        )

    def _publisher(self, number: int) -> Process:
        arguments = ["publish", "--config", str(self.config), "--folder", str(self.folder)]
        arguments += ["--publisher", str(number), "--count", str(self.count), "--rate", str(self.rate)]
        return Process(arguments, self.folder / "publishers.log")

    def add_member(self) -> Process:
        member = self._member()
        self.members.append(member)
        return member

    def check_members(self, after: str) -> None:
        """AssertionError where a member has ended by itself: faults are to be survived."""
        for member in self.members:
            code = member.popen.poll()
            assert code is None, (
                f"a member ended by itself with {code} after {after}: {self.folder}/members.log"
            )

    # -- the broker -------------------------------------------------------------------------------

    def _start_broker(self) -> None:
        if self.form == "sqlite":
            self._write(
                self.config,
                {"backend": "sqlite", "sqlite": {"path": str(self.folder / "chaos.db"), "lease": HANDED_OUT}},
            )
            self._write(self.direct, tomllib.loads(self.config.read_text()))
            return
        name = self.form.partition("-")[0]
        directory = STATE / f"chaos-{self.form}"
        free = _free_ports(6)
        kafka_proxy = free.pop()
        cls = native.BROKERS[name]
        ports = {port: free.pop() for port in DEFAULTS[name]}
        extra: list[str] = []
        if name == "rabbitmq":
            cls = ImpatientRabbitMQ
            extra = [f"consumer_timeout = {HANDED_OUT * 1000}"]
        if name == "kafka":
            inner = free.pop()
            extra = [
                f"listeners=PLAINTEXT://127.0.0.1:{ports['client']},PROXIED://127.0.0.1:{inner},"
                f"CONTROLLER://127.0.0.1:{ports['controller']}",
                f"advertised.listeners=PLAINTEXT://127.0.0.1:{ports['client']},PROXIED://127.0.0.1:{kafka_proxy}",
                "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
            ]
        self.broker = cls(directory, ports, extra=extra)
        self.broker.remove()
        self.broker = cls(directory, ports, extra=extra)
        self.broker.start()
        direct = tomllib.loads(dict(cls.settings(self.broker.ports))[self.form])
        target = {"rabbitmq": "amqp", "kafka": "client"}.get(name, "stomp")
        if name == "kafka":
            self.proxy = Proxy("127.0.0.1", inner, port=kafka_proxy).start()
        else:
            self.proxy = Proxy("127.0.0.1", self.broker.ports[target]).start()
        self._write(self.direct, direct)
        section = dict(direct[direct["backend"]])
        if name == "kafka":
            section |= {"bootstrap_servers": [f"127.0.0.1:{self.proxy.port}"], "session_timeout": 6.0}
        else:
            section["url"] = section["url"].replace(f":{self.broker.ports[target]}", f":{self.proxy.port}")
            section["heartbeat"] = HEARTBEAT
        self._write(self.config, {**direct, direct["backend"]: section})

    def _write(self, path: Path, settings: dict[str, Any]) -> None:
        """A flat TOML file of one section."""
        lines = [f'backend = "{settings["backend"]}"', f'namespace = "{self.namespace}"', ""]
        lines.append(f"[{settings['backend']}]")
        for name, value in settings[settings["backend"]].items():
            text = f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')
            lines.append(f"{name} = {text}")
        path.write_text("\n".join([*lines, ""]))

    def wait_published(self, timeout: float) -> None:
        """Return once every publisher has ended by itself; one that was killed meanwhile is started again.

        They publish until this is called, and further until each has published its share.
        """
        self.levers.enough = True

        def all_done() -> bool:
            for publisher in self.publishers:
                if publisher.popen.poll() not in (None, 0):
                    publisher.again()
            return not any(publisher.running for publisher in self.publishers)

        wait_until(all_done, timeout, "the publishers to end")


def _free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count + 2)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
