"""One natively started broker: what starting, breaking and stopping it means, whichever it is.

A subclass says which ports and files it has, how its process is started, and how to ask whether it serves.
All state lives in the instance's directory; several instances of one broker run at once, each in its own.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from brokers import ports
from brokers.process import LOOPBACK, Daemon, Host
from brokers.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".brokers"
CONF = Path(__file__).resolve().parent / "conf"
USER = "pubsub"
PASSWORD = "pubsub"
READY = 90.0


class BrokerError(Exception):
    """A broker could not be installed, started or stopped; the text says why, with the tail of its log."""


class Broker(ABC):
    """A broker in ``directory``.

    Parameters:
        directory: holds its data, configuration, log, ports and pid.
        ports: by name; those not given are as last time, else free ones.
        extra: lines added to its configuration (``rabbitmq.conf``, ``server.properties``, or XML elements
            within ``<broker>`` on Classic and ``<core>`` on Artemis); a later line wins over ours.
        listeners: further connector or acceptor elements of the two ActiveMQ brokers, such as TLS ones.
        host: where it runs (RabbitMQ and Kafka; see `brokers.networks`).
    """

    name: ClassVar[str]

    def __init__(
        self,
        directory: Path,
        wanted_ports: Mapping[str, int] | None = None,
        *,
        extra: Sequence[str] = (),
        listeners: Sequence[str] = (),
        host: Host = LOOPBACK,
    ) -> None:
        self.host = host
        self.directory = directory.resolve()
        self.extra = tuple(extra)
        self.listeners = tuple(listeners)
        self.ports = ports.for_instance(self.name, self.directory, wanted_ports)
        self.log = self.directory / f"{self.name}.log"
        self._log_start = 0
        self.daemon = Daemon(
            self.directory / f"{self.name}.pid", self.log, self.environment(), self.account(), host
        )

    @classmethod
    @abstractmethod
    def answers(cls, ports: Mapping[str, int]) -> bool:
        """Does the broker behind these loopback ports serve clients now?"""

    @classmethod
    @abstractmethod
    def settings(cls, ports: Mapping[str, int]) -> Mapping[str, str]:
        """The text of ``pubsub.toml`` for each backend form that a broker behind these ports serves."""

    @abstractmethod
    def command(self) -> list[str]:
        """The command line of the process."""

    @abstractmethod
    def configure(self) -> None:
        """Write the configuration; called before each start."""

    def environment(self) -> dict[str, str]:
        """What the process finds in its environment beside ours."""
        return {}

    def account(self) -> str | None:
        """The user to run as where we are root; None: as we are."""
        return None

    def ready(self) -> bool:
        """Does it serve clients now?"""
        return self.answers(self.ports)

    def running(self) -> bool:
        """Does the process live? It may be paused, or not ready yet."""
        return self.daemon.pid() is not None

    def start(self, timeout: float = READY) -> None:
        """Start it unless it runs, and return once it serves; BrokerError after ``timeout`` seconds."""
        self.launch()
        self.wait_ready(timeout)

    def launch(self) -> None:
        """Start the process unless it runs, and return at once."""
        if not self.running():
            self.configure()
            self._log_start = self.log.stat().st_size if self.log.exists() else 0
            self.daemon.start(self.command())

    def wait_ready(self, timeout: float = READY) -> None:
        """Return once it serves; BrokerError when its process ends first, or after ``timeout`` seconds."""
        try:
            wait_until(lambda: not self.running() or self.ready(), timeout, f"{self.name}'s readiness")
        except TimeoutError as error:
            raise self.failure(str(error)) from None
        if not self.running():
            raise self.failure(f"{self.name} ended while starting")

    def failure(self, what: str) -> BrokerError:
        """An error that carries the tail of the log since the process was started."""
        text = self.log.read_bytes()[self._log_start :] if self.log.exists() else b"(no log)"
        lines = text.decode(errors="replace").splitlines()
        return BrokerError("\n".join([what, f"--- {self.log}", *lines[-40:]]))

    def kill(self) -> None:
        """``kill -9``: no goodbye to clients, nothing flushed."""
        self.daemon.kill()

    def stop(self, grace: float = 30) -> None:
        """An orderly shutdown within ``grace`` seconds, then ``kill -9``."""
        self.daemon.stop(grace)

    def restart(self, timeout: float = READY) -> None:
        """An orderly shutdown, and up again on the same ports and data."""
        self.stop()
        self.start(timeout)

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing is answered."""
        self.daemon.pause()

    def resume(self) -> None:
        """Let a paused broker go on."""
        self.daemon.resume()

    def remove(self) -> None:
        """Stop it and delete its directory."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
