"""RabbitMQ from Debian's package, beside (never instead of) a system service of the same name.

Each instance has a port mapper (epmd) of its own, in the foreground and with a pid file: the one the broker
would start by itself outlives it. The nodes of a cluster share one, and the last to stop takes it down.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from brokers import probe
from brokers.broker import CONF, PASSWORD, READY, USER, Broker, BrokerError
from brokers.process import LOOPBACK, Daemon, Host

SCRIPTS = Path("/usr/lib/rabbitmq/bin")
ACCOUNT = "rabbitmq"
# The management plugin takes 5 s to stop, doing nothing; an application is given 2 s.
_KERNEL = ("-kernel", "shutdown_timeout", "2000", "inet_dist_use_interface")


def amqp_url(port: int, address: str = LOOPBACK.address) -> str:
    """Where clients of the broker on ``port`` connect, with user and password."""
    return f"amqp://{USER}:{PASSWORD}@{address}:{port}/%2F"


class RabbitMQ(Broker):
    """One node. As root it runs as Debian's user ``rabbitmq``, where that user can reach the directory."""

    name = "rabbitmq"

    def __init__(
        self,
        directory: Path,
        wanted_ports: Mapping[str, int] | None = None,
        *,
        extra: Sequence[str] = (),
        listeners: Sequence[str] = (),
        leader: RabbitMQ | None = None,
        host: Host = LOOPBACK,
    ) -> None:
        """``leader``: the node whose cluster this one is to join (see `join`)."""
        self.leader = leader
        wanted = dict(wanted_ports or {})
        if leader is not None:
            wanted["epmd"] = leader.ports["epmd"]
        super().__init__(directory, wanted or None, extra=extra, listeners=listeners, host=host)
        self.mapper: Daemon = (
            Daemon(self.directory / "epmd.pid", self.directory / "epmd.log", user=self.account(), host=host)
            if leader is None or leader.host != host
            else leader.mapper
        )

    @classmethod
    def answers(cls, ports: Mapping[str, int]) -> bool:
        return probe.amqp(ports["amqp"])

    @classmethod
    def settings(cls, ports: Mapping[str, int]) -> Mapping[str, str]:
        return {"rabbitmq": f'backend = "rabbitmq"\n\n[rabbitmq]\nurl = "{amqp_url(ports["amqp"])}"\n'}

    @property
    def node(self) -> str:
        """The Erlang node's name."""
        at = "localhost" if self.host == LOOPBACK else self.host.address
        return f"pubsub-{self.ports['dist']}@{at}"

    @property
    def url(self) -> str:
        """Where clients connect, with user and password."""
        return amqp_url(self.ports["amqp"], self.host.address)

    @property
    def management_url(self) -> str:
        """The HTTP API; same user and password."""
        return f"http://{self.host.address}:{self.ports['management']}/api"

    def account(self) -> str | None:
        if os.geteuid() != 0:
            return None
        try:
            pwd.getpwnam(ACCOUNT)
        except KeyError:
            return None
        reachable = all(folder.stat().st_mode & 0o001 for folder in self.directory.parents)
        return ACCOUNT if reachable else None

    def environment(self) -> dict[str, str]:
        at = str(self.directory)
        interface = f"{{{self.host.address.replace('.', ',')}}}"
        return {
            "HOME": at,
            "RUNNING_UNDER_SYSTEMD": "true",  # makes the script become the broker instead of its parent
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_MNESIA_BASE": f"{at}/data",
            "RABBITMQ_LOG_BASE": f"{at}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": f"{at}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{at}/enabled_plugins",
            "RABBITMQ_DIST_PORT": str(self.ports["dist"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": " ".join([*_KERNEL, interface]),
            "ERL_EPMD_PORT": str(self.ports["epmd"]),
            "ERL_EPMD_ADDRESS": self.host.address,
            "RABBITMQ_USE_LONGNAME": "false" if self.host == LOOPBACK else "true",
        }

    def command(self) -> list[str]:
        return [str(SCRIPTS / "rabbitmq-server")]

    def configure(self) -> None:
        listeners = [
            f"listeners.tcp.1 = {self.host.address}:{self.ports['amqp']}",
            f"management.tcp.ip = {self.host.address}",
            f"management.tcp.port = {self.ports['management']}",
        ]
        shared = (CONF / "rabbitmq.conf").read_text()
        lines = [shared, *listeners, *self.listeners, *self.extra]
        (self.directory / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        shutil.copy(CONF / "enabled_plugins", self.directory)
        if self.leader is not None:
            shutil.copy(self.leader.directory / ".erlang.cookie", self.directory)
        account = self.account()
        if account is not None:
            for path in [self.directory, *self.directory.rglob("*")]:
                shutil.chown(path, account, account)

    def ready(self) -> bool:
        return probe.amqp(self.ports["amqp"], self.host.address)

    def launch(self) -> None:
        self.mapper.start(["epmd", "-port", str(self.ports["epmd"]), "-address", self.host.address])
        super().launch()

    def ctl(self, *arguments: str, timeout: float = 60) -> str:
        """Run ``rabbitmqctl`` on this node; its output, or BrokerError."""
        account = self.account()
        done = subprocess.run(
            [str(SCRIPTS / "rabbitmqctl"), *arguments],
            env={**os.environ, **self.environment()},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=timeout,
            user=account,
            group=account,
            extra_groups=[] if account else None,
            check=False,
        )
        if done.returncode != 0:
            raise BrokerError(f"rabbitmqctl {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def join(self) -> None:
        """Make this running node, which has a ``leader``, one of its cluster; what it held is dropped."""
        if self.leader is None:
            raise BrokerError(f"{self.node} was not given a node to join")
        self.ctl("stop_app")
        self.ctl("reset")
        self.ctl("join_cluster", self.leader.node)
        self.ctl("start_app")
        self.wait_ready(READY)

    def stop(self, grace: float = 30) -> None:
        super().stop(grace)
        if not probe.erlang_nodes(self.ports["epmd"], self.host.address):
            self.mapper.stop(5)
