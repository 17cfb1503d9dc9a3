"""Kafka from its Maven jars: one process that is broker and controller, with no ZooKeeper and no tarball."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from brokers import java, probe
from brokers.broker import CONF, Broker, BrokerError


class Kafka(Broker):
    """One node; ``extra`` lines may make it one of several (``node.id``, ``controller.quorum.voters``)."""

    name = "kafka"
    format_options: Sequence[str] = ()
    """Further ones of the tool that prepares the empty store, such as ``--add-scram``."""

    cluster = base64.urlsafe_b64encode(hashlib.md5(b"pubsub-facade").digest()).decode().rstrip("=")

    @property
    def bootstrap(self) -> str:
        """The address clients are given."""
        return f"{self.host.address}:{self.ports['client']}"

    @property
    def _properties(self) -> str:
        return str(self.directory / "server.properties")

    @classmethod
    def answers(cls, ports: Mapping[str, int]) -> bool:
        return probe.kafka(ports["client"])

    @classmethod
    def settings(cls, ports: Mapping[str, int]) -> Mapping[str, str]:
        servers = f'["127.0.0.1:{ports["client"]}"]'
        return {"kafka": f'backend = "kafka"\n\n[kafka]\nbootstrap_servers = {servers}\n'}

    def ready(self) -> bool:
        return probe.kafka(self.ports["client"], self.host.address)

    def command(self) -> list[str]:
        return java.command("kafka", "kafka.Kafka", self._properties, options=[java.log4j(self.directory)])

    def configure(self) -> None:
        controller = f"{self.host.address}:{self.ports['controller']}"
        own = [
            f"listeners=PLAINTEXT://{self.bootstrap},CONTROLLER://{controller}",
            f"advertised.listeners=PLAINTEXT://{self.bootstrap}",
            f"controller.quorum.voters=1@{controller}",
            f"log.dirs={self.directory / 'data'}",
        ]
        lines = [(CONF / "server.properties").read_text(), *own, *self.listeners, *self.extra]
        (self.directory / "server.properties").write_text("\n".join([*lines, ""]))
        shutil.copy(CONF / "log4j2.properties", self.directory)
        if not (self.directory / "data" / "meta.properties").exists():
            self._format()

    def _format(self) -> None:
        """Write the cluster's id into the empty data directory."""
        command = java.command(
            "kafka", "kafka.tools.StorageTool", "format", "-t", self.cluster, "-c", self._properties,
            *self.format_options, options=["-XX:TieredStopAtLevel=1"],
        )  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode != 0:
            raise BrokerError(f"formatting Kafka's storage failed\n{done.stdout}{done.stderr}")
