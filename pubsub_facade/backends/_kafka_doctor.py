"""What `pubsub doctor` asks of Kafka: brokers, copies, and how long what we rely on is kept.

Reads metadata and configuration, changes nothing. Values that the settings leave open are the broker's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka.protocol.admin import DescribeConfigsRequest
from aiokafka.protocol.metadata import MetadataRequest

from pubsub_facade.address import host_port
from pubsub_facade.backends._kafka_cluster import Cluster, explain
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends.base import Finding
from pubsub_facade.errors import ConnectionLost
from pubsub_facade.settings import KafkaSettings

BROKER: Final = (
    "auto.create.topics.enable",
    "default.replication.factor",
    "min.insync.replicas",
    "offset.metadata.max.bytes",
    "offsets.retention.minutes",
    "offsets.topic.replication.factor",
    "delete.topic.enable",
    "unclean.leader.election.enable",
)
TOPIC: Final = ("max.message.bytes", "min.insync.replicas", "unclean.leader.election.enable")
IDLE_DAYS: Final = 30  # that a subscription without members should be remembered
METADATA: Final = 4096  # bytes that a commit may say beside an offset

_BROKER_RESOURCE: Final = 4
_TOPIC_RESOURCE: Final = 2

Config = Mapping[str, str]


@dataclass
class Seen:
    """What one look at the cluster showed.

    Arguments:
        brokers: node -> where clients are sent to.
        configs: of each broker that answered.
        errors: of those that did not.
        topics: of our namespace: replicas and in-sync replicas of each partition.
        topic_configs: of those.
        unreachable: bootstrap servers that nobody listens at.
    """

    brokers: dict[int, str]
    configs: dict[int, Config] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    topics: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    topic_configs: dict[str, Config] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)


async def examine(
    cluster: Cluster, names: Names, settings: KafkaSettings, connect_timeout: float
) -> list[Finding]:
    """All findings. Raises ConnectionLost where no broker answers."""
    seen = await look(cluster, names)
    seen.unreachable = [
        server for server in settings.bootstrap_servers if not await _listens(server, connect_timeout)
    ]
    return findings(seen, settings)


async def look(cluster: Cluster, names: Names) -> Seen:
    """Ask each broker for its configuration, and any for the topics of our namespace."""
    metadata = await cluster.call_any(MetadataRequest(None, False))
    seen = Seen({node: f"{host}:{port}" for node, host, port, *_ in metadata.brokers})
    for node in seen.brokers:
        try:
            described = await _describe(cluster, node, _BROKER_RESOURCE, [str(node)], BROKER)
        except ConnectionLost as error:
            seen.errors[node] = str(error)
        else:
            seen.configs[node] = described.get(str(node), {})
    for _, topic, _, partitions in metadata.topics:
        if topic.startswith(f"{names.root}...") or names.parse(topic) is not None:
            seen.topics[topic] = [(len(replicas), len(isr)) for _, _, _, replicas, isr, *_ in partitions]
    if seen.topics and seen.configs:
        node = next(iter(seen.configs))
        seen.topic_configs = await _describe(cluster, node, _TOPIC_RESOURCE, [*seen.topics], TOPIC)
    return seen


async def _describe(
    cluster: Cluster, node: int, kind: int, names: Sequence[str], wanted: Sequence[str]
) -> dict[str, Config]:
    request = DescribeConfigsRequest([(kind, name, list(wanted)) for name in names])
    response: Any = await cluster.call(node, request)
    found: dict[str, Config] = {}
    for code, text, _, name, entries in response.resources:
        if code:
            found[name] = {"error": text or explain(code)}
        else:
            found[name] = {entry[0]: entry[1] for entry in entries if entry[1] is not None}
    return found


async def _listens(server: str, timeout: float) -> bool:
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(*host_port(server, 9092))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


# -- what it means --------------------------------------------------------------------------------------


def findings(seen: Seen, settings: KafkaSettings) -> list[Finding]:
    """What was seen, judged. Pure."""
    config: Config = next(iter(seen.configs.values()), {})
    out = [*_brokers(seen), *_copies(seen, settings, config)]
    if "error" in config:
        mend = "grant DescribeConfigs on the cluster to this user"
        return [*out, Finding("warning", f"the brokers' configuration is not shown: {config['error']}", mend)]
    return [*out, *_configuration(config), *_topics(seen, settings)]


def _brokers(seen: Seen) -> Iterator[Finding]:
    for server in seen.unreachable:
        yield Finding(
            "warning", f"nobody listens at {server} of bootstrap_servers", "start that broker, or take it out"
        )
    for node, error in seen.errors.items():
        yield Finding(
            "problem",
            f"broker {node} cannot be reached where the cluster sends clients ({seen.brokers[node]}): {error}",
            "set advertised.listeners of that broker to an address that clients reach, or start it",
        )
    if not seen.errors:
        yield Finding("ok", f"reached {_many(len(seen.brokers), 'broker')}")


def _copies(seen: Seen, settings: KafkaSettings, config: Config) -> Iterator[Finding]:
    """Whether the topics we create can be made, are safe, and survive a broker."""
    brokers = len(seen.brokers)
    factor = settings.replication_factor or int(config.get("default.replication.factor", 1))
    insync = settings.min_insync_replicas or int(config.get("min.insync.replicas", 1))
    if factor > brokers:
        yield Finding(
            "problem",
            f"replication_factor {factor} is more than there are brokers ({brokers}): no topic can be created",
            "start the missing brokers, or lower kafka.replication_factor",
        )
    elif insync > factor:
        yield Finding(
            "problem",
            f"min_insync_replicas {insync} is more than the replication factor {factor}: nothing can be published",
            "set kafka.min_insync_replicas below kafka.replication_factor",
        )
    elif factor == 1:
        yield Finding(
            "warning",
            f"replication factor 1 on {_many(brokers, 'broker')}: a lost disk loses messages, a lost broker stops all",
            "three brokers, kafka.replication_factor = 3, kafka.min_insync_replicas = 2",
        )
    elif insync == 1:
        yield Finding(
            "warning",
            f"min_insync_replicas 1: what is confirmed may be on one of {factor} brokers only",
            "set kafka.min_insync_replicas = 2",
        )
    elif insync == factor:
        yield Finding(
            "warning",
            f"min_insync_replicas is the replication factor ({factor}): one broker down stops publishing",
            f"set kafka.min_insync_replicas = {factor - 1}, or one more replica",
        )
    else:
        yield Finding(
            "ok", f"new topics have {factor} copies, {insync} of them in sync when a message is confirmed"
        )


def _configuration(config: Config) -> Iterator[Finding]:
    if config.get("unclean.leader.election.enable") == "true":
        yield Finding(
            "problem",
            "unclean.leader.election.enable: a broker that lacks confirmed messages may become leader",
            "set unclean.leader.election.enable=false",
        )
    if config.get("delete.topic.enable") == "false":
        yield Finding(
            "warning",
            "delete.topic.enable is off: subscriptions cannot be deleted",
            "set delete.topic.enable=true",
        )
    if int(config.get("offset.metadata.max.bytes", METADATA)) < METADATA:
        yield Finding(
            "problem",
            f"offset.metadata.max.bytes is {config['offset.metadata.max.bytes']}: commits may be refused",
            f"set offset.metadata.max.bytes={METADATA}",
        )
    if config.get("auto.create.topics.enable") == "true":
        yield Finding(
            "warning",
            "auto.create.topics.enable: a name that another client mistypes becomes a topic with default settings",
            "set auto.create.topics.enable=false: this package creates its topics itself",
        )
    else:
        yield Finding("ok", "no topic is created by accident")
    days = int(config.get("offsets.retention.minutes", 10080)) / 1440
    if days < IDLE_DAYS:
        yield Finding(
            "warning",
            f"offsets.retention.minutes is {days:g} days: a subscription without members for longer begins again where "
            "it was declared, and much comes twice",
            f"set offsets.retention.minutes={IDLE_DAYS * 1440}, or more than your longest pause",
        )
    else:
        yield Finding("ok", f"a subscription without members is remembered for {days:g} days")


def _topics(seen: Seen, settings: KafkaSettings) -> Iterator[Finding]:
    """Those that are there, whoever made them."""
    configs = seen.topic_configs
    small = [
        name
        for name, config in configs.items()
        if int(config.get("max.message.bytes", settings.max_payload)) < settings.max_payload
    ]
    if small:
        yield Finding(
            "problem",
            f"max.message.bytes is below kafka.max_payload ({settings.max_payload}) on {_some(small)}",
            "raise it with kafka-configs, or lower kafka.max_payload",
        )
    stuck = [
        name
        for name, partitions in seen.topics.items()
        if any(copies < int(configs.get(name, {}).get("min.insync.replicas", 1)) for copies, _ in partitions)
    ]
    if stuck:
        yield Finding(
            "problem",
            f"fewer copies than min.insync.replicas on {_some(stuck)}: nothing can be published there",
            "add replicas (kafka-reassign-partitions), or lower min.insync.replicas of these topics",
        )
    behind = [
        name for name, partitions in seen.topics.items() if any(isr < copies for copies, isr in partitions)
    ]
    if behind:
        yield Finding(
            "warning",
            f"copies are missing or behind on {_some(behind)}",
            "look after the brokers that hold them",
        )
    if seen.topics and not (small or stuck or behind):
        yield Finding("ok", f"{_many(len(seen.topics), 'topic')} of this namespace, all copies in sync")


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
