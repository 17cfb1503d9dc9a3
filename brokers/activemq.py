"""ActiveMQ Classic from its Maven jars (its tarball is not in Maven Central): KahaDB, STOMP, Jolokia.

The full distribution serves Jolokia from its web console; here the agent answers at the same path instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from brokers import java, probe
from brokers.broker import CONF, PASSWORD, USER, Broker, BrokerError


def stomp_settings(port: int, flavor: str, subscriptions: str) -> str:
    """The ``pubsub.toml`` of a STOMP broker on ``port``."""
    return (
        f'backend = "activemq"\n\n[activemq]\nurl = "stomp://{USER}:{PASSWORD}@127.0.0.1:{port}"\n'
        f'flavor = "{flavor}"\nsubscriptions = "{subscriptions}"\n'
    )


class Classic(Broker):
    """One broker, with the scheduler, simple authentication and no anonymous access."""

    name = "activemq"

    def __init__(
        self,
        directory: Path,
        wanted_ports: Mapping[str, int] | None = None,
        *,
        extra: Sequence[str] = (),
        listeners: Sequence[str] = (),
        store: Path | None = None,
    ) -> None:
        """``store``: where the messages are; two brokers on one are primary and standby.

        The standby is `launch`-ed: it is ready only once the other has let go of the store.
        """
        super().__init__(directory, wanted_ports, extra=extra, listeners=listeners)
        self.store = (store or self.directory / "data").resolve()

    @property
    def console_url(self) -> str:
        """Jolokia; same user and password."""
        return f"http://127.0.0.1:{self.ports['jolokia']}/api/jolokia"

    def _agent(self) -> str:
        jar = next((java.LIBRARIES / "activemq").glob("jolokia-agent-jvm-*.jar"), None)
        if jar is None:
            raise BrokerError("ActiveMQ Classic is not installed: make install-brokers")
        options = {
            "host": "127.0.0.1",
            "port": str(self.ports["jolokia"]),
            "user": USER,
            "password": PASSWORD,
            "agentContext": "/api/jolokia",
            "discoveryEnabled": "false",
        }
        return f"-javaagent:{jar}=" + ",".join(f"{key}={value}" for key, value in options.items())

    @classmethod
    def answers(cls, ports: Mapping[str, int]) -> bool:
        return probe.stomp(ports["stomp"], USER, PASSWORD)

    @classmethod
    def settings(cls, ports: Mapping[str, int]) -> Mapping[str, str]:
        admin = f'admin_url = "http://127.0.0.1:{ports["jolokia"]}/api/jolokia/"\n'
        return {
            "activemq": stomp_settings(ports["stomp"], "classic", "durable") + admin,
            "activemq-virtual": stomp_settings(ports["stomp"], "classic", "virtual") + admin,
        }

    def command(self) -> list[str]:
        properties = {
            "pubsub.name": f"pubsub-{self.ports['stomp']}",
            "pubsub.host": "127.0.0.1",
            "pubsub.data": str(self.store),
            "pubsub.stomp": str(self.ports["stomp"]),
            "pubsub.openwire": str(self.ports["openwire"]),
            "activemq.home": str(self.directory),
            "activemq.base": str(self.directory),
        }
        options = [
            self._agent(),
            java.log4j(self.directory),
            *(f"-D{key}={value}" for key, value in properties.items()),
        ]
        configuration = f"xbean:file:{self.directory / 'activemq.xml'}"
        main = "org.apache.activemq.console.Main"
        return java.command("activemq", main, "start", configuration, options=options)

    def configure(self) -> None:
        text = (CONF / "activemq.xml").read_text()
        text = text.replace("<!-- extra -->", "\n".join(self.extra))
        text = text.replace("<!-- listeners -->", "\n".join(self.listeners))
        (self.directory / "activemq.xml").write_text(text)
        shutil.copy(CONF / "log4j2.properties", self.directory)
