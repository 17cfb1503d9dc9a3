"""The Kafka topics of one namespace: which there are, which a pattern means, and how new ones are made.

Owns the settings of every topic we create. Nothing is created by asking, and nothing of another namespace
is looked at.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import aiokafka.errors as kafka_errors
from aiokafka.protocol.admin import CreateTopicsRequest, DeleteTopicsRequest

from pubsub_facade.backends._kafka_cluster import ADMIN_TIMEOUT, Cluster, backoff, check_rights, explain
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_retry import PARTITIONS
from pubsub_facade.errors import ConfigError, ConnectionLost, PubSubError, TopologyConflict
from pubsub_facade.settings import KafkaSettings
from pubsub_facade.topics import PatternSet

log = logging.getLogger("pubsub_facade")

HEADROOM: Final = 1 << 20  # bytes for headers and key beside the largest payload
CREATE_PATIENCE: Final = 30.0  # seconds

Spec = tuple[str, int, int, dict[str, str]]
"""A Kafka topic to be: name, partitions and replicas (-1: the broker's default), settings."""

_EXISTS: Final = kafka_errors.TopicAlreadyExistsError.errno
_COLLIDES: Final = kafka_errors.InvalidTopicError.errno
_CONFIG: Final = {37, 38, 39, 40, 44}  # partitions, replicas, placement, settings, policy


class Topics:
    """The topics of one namespace on one cluster.

    Arguments:
        aliases: Kafka topic -> topic, for those that could not have their own name; kept by the registry.
    """

    def __init__(
        self, cluster: Cluster, names: Names, settings: KafkaSettings, aliases: Mapping[str, str]
    ) -> None:
        self._cluster = cluster
        self._names = names
        self._settings = settings
        self._aliases = aliases
        self.known: dict[str, str] = {}  # topic -> Kafka topic, of those that were there

    # -- looking ----------------------------------------------------------------------------------

    def matching(self, patterns: PatternSet) -> dict[str, str]:
        """Kafka topic -> topic, of those that are there and that the patterns mean."""
        found: dict[str, str] = {}
        for name in self._cluster.topics:
            topic = self._names.parse(name)
            if topic is None and name in self._aliases:
                topic = self._aliases[name]
            if topic is not None and patterns.matches(topic):
                found[name] = topic
        return found

    async def locate(self, topics: Iterable[str]) -> set[str]:
        """Find where these topics are and note it in `known`; returns those that are nowhere."""
        wanted = set(topics)
        plain = {topic: self._names.topic(topic) for topic in wanted}
        alias = {topic: self._names.alias(topic) for topic in wanted}
        await self._cluster.refresh({*plain.values(), *alias.values()})
        for topic in wanted:
            for name in (plain[topic], alias[topic]):
                if name in self._cluster.topics:
                    self.known[topic] = name
                    break
            else:
                self.known.pop(topic, None)
        return {topic for topic in wanted if topic not in self.known}

    # -- making -----------------------------------------------------------------------------------

    def spec(self, name: str) -> Spec:
        """A user's topic, by the settings."""
        settings = self._settings
        configs = self._common()
        if settings.retention is not None:
            configs["retention.ms"] = str(int(settings.retention * 1000))
        return name, settings.partitions or -1, settings.replication_factor or -1, configs

    def retry_spec(self, name: str) -> Spec:
        """A subscription's own copies: kept until they are handled, however long that takes."""
        configs = self._common() | {"retention.ms": "-1", "retention.bytes": "-1"}
        return name, PARTITIONS, self._settings.replication_factor or -1, configs

    def dead_spec(self, name: str) -> Spec:
        """Dead letters: kept until they are discarded, one by one (compaction) or all (deletion)."""
        configs = self._common() | {"cleanup.policy": "compact,delete", "retention.ms": "-1"}
        return name, 1, self._settings.replication_factor or -1, configs | {"retention.bytes": "-1"}

    def registry_spec(self, name: str) -> Spec:
        """Definitions of subscriptions: the last of each is kept."""
        configs = self._common() | {"cleanup.policy": "compact", "segment.bytes": str(1 << 20)}
        return name, 1, self._settings.replication_factor or -1, configs

    def _common(self) -> dict[str, str]:
        configs = {"max.message.bytes": str(self._settings.max_payload + HEADROOM)}
        if self._settings.min_insync_replicas is not None:
            configs["min.insync.replicas"] = str(self._settings.min_insync_replicas)
        return configs

    async def create(self, specs: Collection[Spec]) -> set[str]:
        """Create Kafka topics in one request and wait until each has its leaders; those that exist are fine.

        Returns the names that Kafka refuses because another's name is too like them. Raises ConfigError for
        settings the cluster cannot meet, AuthenticationFailed where we have no right to.
        """
        wanted = {spec[0]: spec for spec in specs}
        refused: set[str] = set()
        for pause in backoff(CREATE_PATIENCE):
            rows: list[Any] = [
                (name, count, copies, [], list(configs.items()))
                for name, count, copies, configs in wanted.values()
            ]
            response = await self._cluster.call_controller(CreateTopicsRequest(rows, 10_000, False))
            for name, code, *text in response.topic_errors:
                if code in (0, _EXISTS):
                    wanted.pop(name, None)
                elif code == _COLLIDES:
                    refused.add(name)
                    wanted.pop(name, None)
                else:
                    self._check(name, code, text[0] if text and text[0] else explain(code))
            if not wanted:
                break
            await self._cluster.refresh(())
            await asyncio.sleep(pause)
        else:
            raise ConnectionLost(f"kafka: topic {next(iter(wanted))!r} could not be created in time")
        await self._await_leaders({spec[0] for spec in specs} - refused)
        return refused

    def _check(self, name: str, code: int, text: str) -> None:
        check_rights(code, "Create (or Describe, where it is there)", f"topic {name!r}")
        if code in _CONFIG:
            raise ConfigError(
                f"kafka: topic {name!r} cannot be created: {text}; see partitions, replication_factor, "
                "min_insync_replicas in [kafka]"
            )
        log.debug("kafka: topic %s not created yet: %s", name, text)

    async def create_own(self, spec: Spec) -> None:
        """Create a Kafka topic of our own unless it is there."""
        name = spec[0]
        if name in self._cluster.topics:
            return
        await self._cluster.refresh([name])
        if name not in self._cluster.topics and await self.create([spec]):
            raise TopologyConflict(
                f"kafka: {name!r} cannot be created because another topic's name equals it once dots are read as "
                "underscores: choose another namespace or subscription name"
            )

    async def _await_leaders(self, names: set[str]) -> None:
        for pause in backoff(CREATE_PATIENCE):
            await self._cluster.refresh(names)
            found = self._cluster.topics
            names = {name for name in names if name not in found or -1 in found[name]}
            if not names:
                return
            await asyncio.sleep(pause)
        raise ConnectionLost(f"kafka: topic {next(iter(names))!r} has no leader for each of its partitions")

    async def remove(self, names: Collection[str]) -> None:
        """Delete Kafka topics of our own; those that are not there are fine."""
        if not names:
            return
        wanted = set(names)
        for pause in backoff(CREATE_PATIENCE):
            response: Any = await self._cluster.call_controller(
                DeleteTopicsRequest(list(wanted), int(ADMIN_TIMEOUT * 1000))
            )
            for name, code in response.topic_error_codes:
                if code in (0, kafka_errors.UnknownTopicOrPartitionError.errno):
                    wanted.discard(name)
                elif code == 73:
                    raise PubSubError(
                        "kafka: topics cannot be deleted: delete.topic.enable is off on the broker"
                    )
                else:
                    check_rights(code, "Delete", f"topic {name!r}")
            if not wanted:
                break
            await self._cluster.refresh(())
            await asyncio.sleep(pause)
        await self._cluster.refresh(names)


def _row(name: str, partitions: int, replicas: int, configs: Mapping[str, str]) -> tuple[Any, ...]:
    """As the request wants it: the replicas are placed by Kafka."""
    return name, partitions, replicas, [], list(configs.items())
