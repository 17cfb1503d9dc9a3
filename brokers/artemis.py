"""ActiveMQ Artemis from the tarball in Maven Central; its own tool makes the instance's directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from brokers import java, probe
from brokers.activemq import stomp_settings
from brokers.broker import PASSWORD, USER, Broker, BrokerError

_ACCEPTORS_END = "</acceptors>"
_CORE_END = "</core>"
# A developer's disk is often fuller than a server's; above the limit the broker blocks its publishers.
_DISK_LIMIT = ("<max-disk-usage>90<", "<max-disk-usage>99<")


class Artemis(Broker):
    """One broker, whose single acceptor speaks STOMP, AMQP and its own protocol; the console has Jolokia."""

    name = "artemis"

    @property
    def _instance(self) -> Path:
        return self.directory / "instance"

    @property
    def console_url(self) -> str:
        """Jolokia; same user and password."""
        return f"http://127.0.0.1:{self.ports['console']}/console/jolokia"

    @classmethod
    def answers(cls, ports: Mapping[str, int]) -> bool:
        return probe.stomp(ports["stomp"], USER, PASSWORD)

    @classmethod
    def settings(cls, ports: Mapping[str, int]) -> Mapping[str, str]:
        return {"artemis": stomp_settings(ports["stomp"], "artemis", "durable")}

    def command(self) -> list[str]:
        return [str(self._instance / "bin" / "artemis"), "run"]

    def environment(self) -> dict[str, str]:
        return {"JAVA_ARGS_APPEND": "-Xms128m -Djava.net.preferIPv4Stack=true"}

    def configure(self) -> None:
        broker_xml = self._instance / "etc" / "broker.xml"
        pristine = broker_xml.with_suffix(f".{self.ports['stomp']}-{self.ports['console']}")
        if not pristine.exists():
            self._create()
            pristine.write_text(broker_xml.read_text())
        text = pristine.read_text().replace(*_DISK_LIMIT)
        text = text.replace(_ACCEPTORS_END, "\n".join([*self.listeners, _ACCEPTORS_END]))
        text = text.replace(_CORE_END, "\n".join([*self.extra, _CORE_END]))
        broker_xml.write_text(text)

    def _create(self) -> None:
        tool = next((java.LIBRARIES / "artemis").glob("*/bin/artemis"), None)
        if tool is None:
            raise BrokerError("Artemis is not installed: make install-brokers")
        ports = ["--default-port", str(self.ports["stomp"]), "--http-port", str(self.ports["console"])]
        only = [f"--no-{protocol}-acceptor" for protocol in ("amqp", "hornetq", "mqtt", "stomp")]
        command = [
            str(tool), "create", str(self._instance), "--silent", "--force", "--require-login",
            "--user", USER, "--password", PASSWORD, "--host", "127.0.0.1", "--http-host", "127.0.0.1",
            "--nio", "--relax-jolokia", "--java-memory", "512M", *ports, *only,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode != 0:
            raise BrokerError(f"artemis create failed\n{done.stdout}{done.stderr}")
