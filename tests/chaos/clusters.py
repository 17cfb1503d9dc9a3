"""Brokers of several nodes, as those run them who outgrew one machine, and what happens to their nodes.

Three RabbitMQ nodes with quorum queues, three Kafka brokers (replication 3, two of them in sync), two ActiveMQ
Classic brokers on one store. Clients reach each node by a proxy of its own, and know all nodes by their config.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import itertools
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.protocol.metadata import MetadataRequest

from brokers import ports
from brokers.activemq import Classic
from brokers.broker import PASSWORD, STATE, USER, Broker
from brokers.kafka import Kafka
from brokers.networks import Network
from brokers.process import LOOPBACK
from brokers.rabbitmq import RabbitMQ
from brokers.waiting import wait_until
from pubsub_facade.testing.faults import Proxy
from tests.chaos.scenario import Result, settle_accounts
from tests.chaos.workload import SUBSCRIPTIONS
from tests.chaos.world import HEARTBEAT, World

NODES: Final = 3
LINES: Final = 60  # that publishers and members write down each, until clients count as served
AWAY: Final = float(os.environ.get("AWAY") or 5)  # s that a node is away
SERVED: Final = 60.0  # s until clients must be served by the nodes that are left


class Cluster(World):
    """As `World`, with several nodes, and a proxy before each. A subclass says which broker it is."""

    form: str
    nodes: Sequence[Broker] = ()

    def __init__(self, folder: Path, seed: int, network: Network | None = None) -> None:
        super().__init__(self.form, folder, seed, count=10**6, rate=60)
        self.network = network
        self.hosts = network.hosts if network else [LOOPBACK] * NODES
        self.proxies: list[Proxy] = []
        self._told = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[World]:
        try:
            with super().running():
                yield self
        finally:
            for proxy in self.proxies:
                proxy.stop()
            for node in reversed(self.nodes):
                if node.log.exists():
                    shutil.copy(node.log, self.folder / f"node-{node.directory.name}.log")
                node.remove()
            shutil.rmtree(self._place, ignore_errors=True)

    def _start_broker(self) -> None:
        for name in ("1", "2", "3"):
            self._node(self._place / name).remove()
        self.nodes = self._start_nodes()
        self._configure(self.direct, [f"{node.host.address}:{port}" for node, port in self._addresses()])
        self._configure(self.config, [f"{proxy.host}:{proxy.port}" for proxy in self.proxies])

    @property
    def _place(self) -> Path:
        return STATE / f"cluster-{self.form}"

    def _configure(self, path: Path, at: list[str]) -> None:
        lines = [f'namespace = "{self.namespace}"', "connect_timeout = 3", *self._settings(",".join(at))]
        path.write_text("\n".join([*lines, ""]))

    # -- what each broker does its own way ----------------------------------------------------------

    def _node(self, directory: Path) -> Broker:
        """A node in this directory that can be removed."""
        raise NotImplementedError

    def _start_nodes(self) -> list[Broker]:
        """Start all nodes and make `proxies`."""
        raise NotImplementedError

    def _addresses(self) -> list[tuple[Broker, int]]:
        """Each node and its client port."""
        raise NotImplementedError

    def _settings(self, hosts: str) -> list[str]:
        """Lines of ``pubsub.toml``."""
        raise NotImplementedError

    def leader(self) -> Broker:
        """The node that leads what one subscription waits in."""
        raise NotImplementedError

    def whole(self, node: Broker) -> bool:
        """Whether nothing would stop if this node ended now."""
        raise NotImplementedError

    def revive(self, node: Broker) -> None:
        """Start a node that is down."""
        node.start()

    # -- what faults use ----------------------------------------------------------------------------

    def proxy_of(self, node: Broker) -> Proxy:
        return self.proxies[list(self.nodes).index(node)]

    def wait_whole(self, node: Broker, timeout: float = SERVED) -> None:
        """Return once this node may end, as an operator would wait before the next step."""
        wait_until(lambda: self.whole(node), timeout, f"the redundancy of {node.directory.name}")
        self.tell(f"whole again, with node {node.directory.name}")

    def tell(self, what: str) -> None:
        """A line for whoever looks on: where the time goes."""
        now = time.monotonic()
        print(f"{self.form} cluster: {now - self._told:.1f} s: {what}", flush=True)
        self._told = now

    def wait_served(self) -> None:
        """Return once messages were published, and then others handled for each subscription, since the call."""
        self._wait_grown(["published-*"])
        self._wait_grown([f"handled-{name}-*" for name in SUBSCRIPTIONS])
        self.tell("served")

    def wait_each_served(self) -> None:
        """As `wait_served`, of each publisher and each member."""
        self._wait_grown([f"published-{number}" for number in range(len(self.publishers))])
        self._wait_grown([f"handled-*-{member.popen.pid}" for member in self.members])
        self.tell("each served")

    def _wait_grown(self, patterns: Sequence[str]) -> None:
        before = {pattern: self._lines(pattern) for pattern in patterns}
        for pattern in patterns:
            wait_until(
                lambda pattern=pattern: self._lines(pattern) >= before[pattern] + LINES,  # type: ignore[misc]
                SERVED,
                f"progress in {pattern}",
            )

    def _lines(self, pattern: str) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob(pattern))


class RabbitmqCluster(Cluster):
    """Each queue is a quorum queue of all three nodes."""

    form = "rabbitmq"

    def _node(self, directory: Path) -> Broker:
        return RabbitMQ(directory)

    def _start_nodes(self) -> list[Broker]:
        extra = ["cluster_partition_handling = pause_minority", "net_ticktime = 6"]
        first = RabbitMQ(self._place / "1", extra=extra, host=self.hosts[0])
        first.start()
        extra += [
            "cluster_formation.peer_discovery_backend = classic_config",
            f"cluster_formation.classic_config.nodes.1 = {first.node}",
        ]
        nodes: list[Broker] = [first]
        for name, host in zip(("2", "3"), self.hosts[1:], strict=True):
            node = RabbitMQ(self._place / name, leader=first, extra=extra, host=host)
            node.start()
            nodes.append(node)
        self.nodes = nodes
        self.proxies = [Proxy(node.host.address, node.ports["amqp"]).start() for node in nodes]
        wait_until(self._united, 30, "three nodes in one cluster")
        return nodes

    def _united(self) -> bool:
        """Whether each node sees all three, and none was parted from another and has not got over it."""
        try:
            seen = [each for node in self.nodes for each in self._ask("/nodes", node)]
        except OSError:
            return False
        return len(seen) == NODES**2 and all(
            each["running"] and each.get("partitions") == [] for each in seen
        )

    def _addresses(self) -> list[tuple[Broker, int]]:
        return [(node, node.ports["amqp"]) for node in self.nodes]

    def _settings(self, hosts: str) -> list[str]:
        url = f"amqp://{USER}:{PASSWORD}@{hosts}/%2F"
        return ['backend = "rabbitmq"', "[rabbitmq]", f'url = "{url}"', f"heartbeat = {HEARTBEAT}"]

    def _ask(self, path: str, node: Broker | None = None) -> Any:
        """The answer of the management API of one node, or of the first that answers."""
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        error: OSError | None = None
        for each in [node] if node is not None else self.nodes or [RabbitMQ(self._place / "1")]:
            url = f"http://{each.host.address}:{each.ports['management']}/api{path}"
            request = urllib.request.Request(url, headers={"Authorization": f"Basic {token}"})
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as raised:
                raised.close()
                error = raised
            except OSError as raised:
                error = raised
        assert error is not None
        raise error

    def leader(self) -> Broker:
        told: dict[str, Any] = {}

        def known() -> bool:  # once the first statistics of the queue are in
            told.update(self._ask(f"/queues/%2F/{self.namespace}.{SUBSCRIPTIONS[0]}"))
            return "leader" in told

        wait_until(known, 30, "the name of a queue's leader")
        return next(node for node in self.nodes if isinstance(node, RabbitMQ) and node.node == told["leader"])

    def whole(self, node: Broker) -> bool:
        try:
            critical = self._ask("/health/checks/node-is-quorum-critical", node)
        except OSError:
            return False
        return bool(critical["status"] == "ok") and self._united()


class KafkaCluster(Cluster):
    """Each node is broker and controller; the topics' partitions are on all three, with two in sync at least."""

    form = "kafka"

    def _node(self, directory: Path) -> Broker:
        return Kafka(directory)

    def _start_nodes(self) -> list[Broker]:
        chosen = [
            dict(zip(("client", "controller", "proxied", "proxy"), ports.free(4), strict=True))
            for _ in range(NODES)
        ]
        voters = ",".join(
            f"{number}@{host.address}:{at['controller']}"
            for number, (host, at) in enumerate(zip(self.hosts, chosen, strict=True), 1)
        )
        nodes: list[Kafka] = []
        for number, (host, at) in enumerate(zip(self.hosts, chosen, strict=True), 1):
            own = host.address
            extra = [
                f"node.id={number}",
                f"controller.quorum.voters={voters}",
                f"listeners=PLAINTEXT://{own}:{at['client']},PROXIED://{own}:{at['proxied']},"
                f"CONTROLLER://{own}:{at['controller']}",
                f"advertised.listeners=PLAINTEXT://{own}:{at['client']},PROXIED://127.0.0.1:{at['proxy']}",
                "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "offsets.topic.replication.factor=3",
                "replica.lag.time.max.ms=4000",
            ]
            inner = {name: at[name] for name in ("client", "controller")}
            node = Kafka(self._place / str(number), inner, extra=extra, host=host)
            node.launch()
            nodes.append(node)
            self.proxies.append(Proxy(own, at["proxied"], port=at["proxy"]).start())
        for node in nodes:
            node.wait_ready()
        return [*nodes]

    def _addresses(self) -> list[tuple[Broker, int]]:
        return [(node, node.ports["client"]) for node in self.nodes]

    def _settings(self, hosts: str) -> list[str]:
        return [
            'backend = "kafka"',
            "[kafka]",
            f"bootstrap_servers = {json.dumps(hosts.split(','))}",
            "partitions = 2",
            "replication_factor = 3",
            "min_insync_replicas = 2",
            "session_timeout = 6",
        ]

    def _partitions(self, node: Broker) -> list[dict[str, Any]]:
        """Those of the topics of this run, as this broker knows them: one that is cut off knows no better."""

        async def ask() -> list[dict[str, Any]]:
            admin = AIOKafkaAdminClient(bootstrap_servers=f"{node.host.address}:{node.ports['client']}")
            await admin.start()
            try:
                number = list(self.nodes).index(node) + 1
                answer = await admin._send_request_to_node(number, MetadataRequest(None, False))
                topics = answer.to_object()["topics"]
                mine = [topic for topic in topics if topic["topic"].startswith(self.namespace)]
                return [each for topic in mine for each in topic["partitions"]]
            finally:
                await admin.close()

        return asyncio.run(ask())

    def leader(self) -> Broker:
        led = collections.Counter(int(each["leader"]) for each in self._partitions(self.nodes[0]))
        return self.nodes[led.most_common(1)[0][0] - 1]

    def whole(self, node: Broker) -> bool:
        try:
            seen = [each for one in self.nodes for each in self._partitions(one)]
        except (KafkaError, OSError, TimeoutError):
            return False
        return bool(seen) and all(len(each["isr"]) == NODES for each in seen)


class ClassicPair(Cluster):
    """A primary and a standby: the one that holds the store's lock serves."""

    form = "activemq"

    def _node(self, directory: Path) -> Broker:
        return Classic(directory)

    def _start_nodes(self) -> list[Broker]:
        primary, standby = (
            Classic(self._place / name, store=self._place / "1" / "data") for name in ("1", "2")
        )
        primary.start()
        standby.launch()
        self.proxies = [Proxy("127.0.0.1", node.ports["stomp"]).start() for node in (primary, standby)]
        return [primary, standby]

    def _addresses(self) -> list[tuple[Broker, int]]:
        return [(node, node.ports["stomp"]) for node in self.nodes]

    def _settings(self, hosts: str) -> list[str]:
        url = f"stomp://{USER}:{PASSWORD}@{hosts}"
        return ['backend = "activemq"', "[activemq]", f'url = "{url}"', f"heartbeat = {HEARTBEAT}"]

    def leader(self) -> Broker:
        return next(node for node in self.nodes if node.ready())

    def whole(self, node: Broker) -> bool:
        return all(each.running() for each in self.nodes) and any(each.ready() for each in self.nodes)

    def revive(self, node: Broker) -> None:
        node.launch()


CLUSTERS: Final[dict[str, type[Cluster]]] = {
    cluster.form: cluster for cluster in (RabbitmqCluster, KafkaCluster, ClassicPair)
}


# -- what can happen ------------------------------------------------------------------------------------


def leader_killed(cluster: Cluster) -> None:
    """The others serve before it is back."""
    node = cluster.leader()
    node.kill()
    cluster.tell("killed")
    cluster.wait_served()
    cluster.revive(node)
    cluster.tell("started")
    cluster.wait_whole(node)


def rolling_restart(cluster: Cluster) -> None:
    """While the first is away, who starts finds the next address of its config."""
    for node in cluster.nodes:
        node.stop()
        if node is cluster.nodes[0]:
            cluster.members[0].again()
            cluster.publishers[0].again()
            cluster.members[0].wait_receiving()
            cluster.wait_served()
        cluster.revive(node)
        cluster.tell("restarted")
        cluster.wait_whole(node)
    cluster.wait_served()


def node_away(cluster: Cluster) -> None:
    """Any node, for a while: what it missed it must catch up with."""
    node = cluster.random.choice(cluster.nodes)
    node.stop()
    cluster.wait_served()
    time.sleep(AWAY)
    cluster.wait_served()
    cluster.revive(node)
    cluster.wait_whole(node)


def partition_from_the_leader(cluster: Cluster) -> None:
    """Clients and the leader do not reach each other; the nodes do. All is served once it is over, at the latest."""
    proxy = cluster.proxy_of(cluster.leader())
    proxy.swallow()
    time.sleep(3 * HEARTBEAT)
    if cluster.form == "rabbitmq":  # any node passes on to the leader
        cluster.wait_served()
    proxy.restore()
    cluster.wait_served()


Fault = Callable[[Cluster], None]

FAULTS: Final[tuple[Fault, ...]] = (
    partition_from_the_leader,
    leader_killed,
    node_away,
    rolling_restart,
)


def run(cluster: Cluster, faults: Sequence[Fault], patience: float = 60) -> Result:
    """Publish and handle while each of ``faults`` happens once, then settle accounts.

    Arguments:
        patience: seconds to wait, after the last fault, for what was promised.
    """
    begin = time.monotonic()
    result = Result(f"{cluster.form} cluster", cluster.seed, [])
    with cluster.running():
        cluster.start_publishers()
        cluster.wait_served()
        for fault in faults:
            fault(cluster)
            result.faults.append(fault.__name__)
            cluster.tell(fault.__name__)
        for publisher in cluster.publishers:
            publisher.kill()
        asyncio.run(settle_accounts(cluster, result, patience))
        for member in cluster.members:
            member.terminate()
    result.longest_gap = longest_pause(cluster.folder)
    result.seconds = time.monotonic() - begin
    return result


def longest_pause(folder: Path) -> float:
    """The longest time, in seconds, in which no member handled anything, while messages were published."""
    lines = [line for path in folder.glob("handled-*") for line in path.read_text().splitlines()]
    times = sorted(float(line.split()[1]) for line in lines if line.count(" ") == 2)
    return max((after - before for before, after in itertools.pairwise(times)), default=0.0)
