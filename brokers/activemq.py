"""ActiveMQ Classic from its Maven jars (the ready-made tarball is not in Maven Central), with KahaDB and STOMP."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from brokers import java, probe
from brokers.broker import CONF, PASSWORD, USER, Broker
from brokers.process import Daemon


def stomp_settings(port: int, flavor: str, subscriptions: str) -> str:
    """The ``pubsub.toml`` of a STOMP broker on ``port``."""
    return (
        f'backend = "activemq"\n\n[activemq]\nurl = "stomp://{USER}:{PASSWORD}@127.0.0.1:{port}"\n'
        f'flavor = "{flavor}"\nsubscriptions = "{subscriptions}"\n'
    )


class Classic(Broker):
    """One broker. Two on one ``pubsub.data`` are primary and standby: the second waits for the store's lock."""

    name = "activemq"

    def _daemon(self) -> Daemon:
        properties = {
            "pubsub.name": f"pubsub-{self.ports['stomp']}",
            "pubsub.host": "127.0.0.1",
            "pubsub.data": str(self.directory / "data"),
            "pubsub.stomp": str(self.ports["stomp"]),
            "pubsub.openwire": str(self.ports["openwire"]),
            "activemq.home": str(self.directory),
            "activemq.base": str(self.directory),
        }
        options = [java.log4j(self.directory), *(f"-D{key}={value}" for key, value in properties.items())]
        configuration = f"xbean:file:{self.directory / 'activemq.xml'}"
        return Daemon(
            java.command(
                "activemq", "org.apache.activemq.console.Main", "start", configuration, options=options
            ),
            self.directory / "activemq.pid",
            self.log,
        )

    def _configure(self) -> None:
        text = (CONF / "activemq.xml").read_text()
        text = text.replace("<!-- extra -->", "\n".join(self.extra))
        text = text.replace("<!-- listeners -->", "\n".join(self.listeners))
        (self.directory / "activemq.xml").write_text(text)
        shutil.copy(CONF / "log4j2.properties", self.directory)

    def ready(self) -> bool:
        return probe.stomp(self.ports["stomp"], USER, PASSWORD)

    def settings(self) -> Mapping[str, str]:
        port = self.ports["stomp"]
        return {
            "activemq": stomp_settings(port, "classic", "durable"),
            "activemq-virtual": stomp_settings(port, "classic", "virtual"),
        }
