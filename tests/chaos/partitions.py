"""Nodes of a cluster that do not reach one another, while clients reach each of them.

The node that is cut off is the one that all clients are on. It still answers them, and knows no better at
first: what it takes in and cannot share with the majority is not confirmed, or was never there.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Final

from brokers.broker import Broker
from brokers.networks import Network
from tests.chaos.clusters import AWAY, Cluster, Fault

RETURNED: Final = 40.0  # s until a node that was cut off must be back by itself


def _lure(cluster: Cluster, node: Broker) -> None:
    """All clients on this node: the others are out of their reach for a moment."""
    if cluster.form == "rabbitmq":  # a client of Kafka is on all nodes at once
        others = [proxy for proxy in cluster.proxies if proxy is not cluster.proxy_of(node)]
        for proxy in others:
            proxy.refuse()
        cluster.wait_each_served()
        for proxy in others:
            proxy.restore()
    cluster.wait_each_served()


def _during(cluster: Cluster, node: Broker, cut: AbstractContextManager[None]) -> None:
    with cut:
        cluster.tell(f"cut off node {node.directory.name}")
        cluster.wait_each_served()
        time.sleep(AWAY)
        cluster.wait_each_served()
    cluster.tell("healed")
    try:
        cluster.wait_whole(node, RETURNED)
    except TimeoutError:  # RabbitMQ may hang when it starts again: docs/backends/rabbitmq.md
        if cluster.form != "rabbitmq":
            raise
        cluster.wait_each_served()
        node.kill()
        node.start()
        cluster.tell("started again the node that was cut off: it did not come back by itself")
        cluster.wait_whole(node)
    cluster.wait_each_served()


def _network(cluster: Cluster) -> Network:
    assert cluster.network is not None
    return cluster.network


def _cut_off(cluster: Cluster, node: Broker) -> None:
    _lure(cluster, node)
    others = [each.host for each in cluster.nodes if each is not node]
    _during(cluster, node, _network(cluster).parted(node.host, others))


def leader_cut_off(cluster: Cluster) -> None:
    """The majority chooses another leader; the old one must confirm nothing."""
    _cut_off(cluster, cluster.leader())


def node_cut_off(cluster: Cluster) -> None:
    """One that follows."""
    leader = cluster.leader()
    _cut_off(cluster, cluster.random.choice([node for node in cluster.nodes if node is not leader]))


def leader_not_heard(cluster: Cluster) -> None:
    """What the leader sends reaches no other node; what they send reaches it."""
    node = cluster.leader()
    _lure(cluster, node)
    others = [each.host for each in cluster.nodes if each is not node]
    _during(cluster, node, _network(cluster).silenced(node.host, others))


PARTITIONS: Final[tuple[Fault, ...]] = (leader_cut_off, node_cut_off, leader_not_heard)
FORMS: Final = ("rabbitmq", "kafka")
