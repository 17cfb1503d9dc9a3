"""Kafka: a topic is a Kafka topic, a subscription is a consumer group (docs/backends/kafka.md).

What Kafka cannot say, one small compacted topic holds: the definition of each subscription and where it
began. This file joins the parts: `_kafka_cluster` (the link), `_kafka_producer` (storing), `_kafka_receiver`
(a member), `_kafka_topics`, `_kafka_registry`, `_kafka_presence` and `_kafka_demand` (required subscribers),
`_kafka_dead`. It retries nothing that the supervisor retries.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

from aiokafka.protocol.admin import DeleteGroupsRequest

from pubsub_facade._tasks import cancel
from pubsub_facade.backends import _kafka_fetch as fetching
from pubsub_facade.backends._kafka_cluster import (
    GROUP,
    LATEST,
    READ,
    Cluster,
    backoff,
    by_leader,
    check_rights,
)
from pubsub_facade.backends._kafka_dead import DeadLetterTopic
from pubsub_facade.backends._kafka_demand import Demand
from pubsub_facade.backends._kafka_doctor import examine
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_partition import Progress
from pubsub_facade.backends._kafka_pins import places
from pubsub_facade.backends._kafka_presence import Presence
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_receiver import KafkaReceiver
from pubsub_facade.backends._kafka_records import TP, Outgoing, dead_letter, decode, encode, encode_retry
from pubsub_facade.backends._kafka_registry import Ends, Entry, Move, Registry
from pubsub_facade.backends._kafka_shared import Shared
from pubsub_facade.backends._kafka_shelf import Shelf
from pubsub_facade.backends._kafka_topics import Spec, Topics
from pubsub_facade.backends._kafka_wire import Metadata
from pubsub_facade.backends._required import send_wanted
from pubsub_facade.backends.base import Backend, Backlog, Capabilities, Finding, Position, Receiver
from pubsub_facade.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionLost,
    PubSubError,
    SendFailed,
)
from pubsub_facade.message import Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscription import Definition, Subscription
from pubsub_facade.topics import PatternSet

log = logging.getLogger("pubsub_facade")

REBALANCE_TIMEOUT: Final = 30.0  # seconds that a group waits for its members' handlers
CLOSE_TIMEOUT: Final = 5.0
HEAD_BYTES: Final = 16 << 10  # read of each partition to learn how old its head is

_NO_GROUP: Final = {0, 69}  # deleted, or never there
_NOT_EMPTY: Final = 68


class KafkaBackend(Backend):
    """The Kafka driver; ``[kafka]`` in the settings."""

    name = "kafka"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._names = Names(settings.namespace)
        self._shared: Shared | None = None
        self._receivers: set[KafkaReceiver] = set()
        self._watch: asyncio.Task[None] | None = None
        self._dead: dict[str, DeadLetterTopic] = {}
        self._places_left: dict[str, list[str]] = {}  # group -> member ids that could not leave
        self._demand: Demand | None = None  # where subscribers are required
        self._token = uuid.uuid4().hex  # names us in the registry, after a lost link too

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            durable=True,
            shared=True,
            competing=True,
            stored_attempts=True,
            delay=False,
            replay=True,
            require_subscribers=True,
            backlog=True,
            max_payload=self.settings.kafka.max_payload,
        )

    # -- life -------------------------------------------------------------------------------------

    async def open(self) -> None:
        settings = self.settings.kafka
        slow = {"join": REBALANCE_TIMEOUT + 10, "fetch": fetching.FETCH_WAIT + 10}
        cluster = Cluster(settings, self.settings.connect_timeout, slow)
        try:
            await cluster.open()
        except BaseException:
            await cluster.close()
            raise
        producer = Producer(cluster, settings.compression, self.settings.publish_timeout, self._restore)
        registry = Registry(cluster, producer, self._names.registry)
        self._dead = {}
        self._shared = Shared(
            cluster,
            producer,
            Topics(cluster, self._names, settings, registry.aliases),
            registry,
            Presence(registry, self._token, self._ensure_registry),
            self._names,
            settings.session_timeout,
            REBALANCE_TIMEOUT,
            itertools.count(1),
            self._places_left,
        )
        registry.listen(self, self._look)
        if self.settings.require_subscribers:
            self._demand = Demand(registry, self._ensure_registry, 2 * settings.metadata_max_age)
            self._watch_on()

    async def close(self) -> None:
        shared, self._shared = self._shared, None
        self._demand = None
        if self._watch is not None:
            await cancel(self._watch)
            self._watch = None
        if self._receivers:
            closing = [asyncio.ensure_future(receiver.close()) for receiver in self._receivers]
            _, late = await asyncio.wait(closing, timeout=CLOSE_TIMEOUT)
            await cancel(*late)
            self._receivers.clear()
        if shared is not None:
            shared.presence.stop()
            await shared.cluster.close()

    async def ping(self) -> None:
        await self._open.cluster.call_any(Metadata(()))

    @property
    def _open(self) -> Shared:
        if self._shared is None:
            raise ConnectionLost("kafka: not connected")
        return self._shared

    def _look(self) -> None:
        for receiver in list(self._receivers):
            receiver.look()

    def _watch_on(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(
                self._keep_watch(), name="pubsub-kafka-watch"
            )

    async def _keep_watch(self) -> None:
        """See topics and definitions that others make; only where there are receivers, or demand is asked for."""
        shared = self._open
        try:
            while True:
                await asyncio.sleep(self.settings.kafka.metadata_max_age)
                if self._receivers:
                    await shared.cluster.refresh(None)
                await shared.registry.refresh()
                self._look()
        except PubSubError as error:  # a publish that needs the registry asks, and is told, by itself
            for receiver in list(self._receivers):
                receiver.fail(error)

    # -- publishing -------------------------------------------------------------------------------

    async def send(self, messages: Sequence[Message]) -> None:
        if self._demand is None:
            await self._store(messages)
        else:
            await send_wanted(self.name, messages, self._demand.unwanted, self._store)

    async def _ensure_registry(self) -> None:
        await self._open.topics.create_own(self._open.topics.registry_spec(self._names.registry))

    async def _store(self, messages: Sequence[Message]) -> None:
        shared = self._open
        known = shared.topics.known
        missing = {message.topic for message in messages if message.topic not in known}
        if missing:
            try:
                await self._make_topics(missing)
            except (AuthenticationFailed, ConfigError) as error:
                raise SendFailed(str(error), {message.id: "not stored" for message in messages}) from error
        topics = shared.cluster.topics
        producer = shared.producer
        lines: dict[TP, list[Outgoing]] = {}
        places: dict[str, tuple[str, int, int]] = {}
        for message in messages:
            found = places.get(message.topic)
            if found is None:
                name = known[message.topic]
                count = len(topics.get(name, ())) or 1
                found = places[message.topic] = (name, count, producer.turn() % count)
            name, count, number = found
            record = encode(message)
            if record.key is not None:
                number = producer.partition(record.key, count)
            line = lines.get((name, number))
            if line is None:
                line = lines[(name, number)] = []
            line.append(record)
        await producer.store(lines)

    async def _make_topics(self, topics: Collection[str]) -> None:
        """Find them, create those that are nowhere, under an alias where Kafka refuses their own name."""
        shared = self._open
        missing = await shared.topics.locate(topics)
        if not missing:
            return
        by_name = {self._names.topic(topic): topic for topic in missing}
        aliased = {name: topic for name, topic in by_name.items() if self._names.is_alias(name)}
        await self._register_aliases(aliased)
        refused = await shared.topics.create([shared.topics.spec(name) for name in by_name])
        if refused:
            aliased = {self._names.alias(by_name[name]): by_name[name] for name in refused}
            await self._register_aliases(aliased)
            await shared.topics.create([shared.topics.spec(name) for name in aliased])
            by_name = {name: topic for name, topic in by_name.items() if name not in refused} | aliased
        for name, topic in by_name.items():
            shared.topics.known[topic] = (
                name  # not asked for again: another broker may not have heard of it yet
            )
        self._look()

    async def _register_aliases(self, aliased: dict[str, str]) -> None:
        if aliased:
            await self._ensure_registry()
            for name, topic in aliased.items():
                await self._open.registry.write_alias(name, topic)

    async def _restore(self, names: set[str]) -> None:
        """Kafka topics that somebody deleted under us are made again, as they were."""
        topics = self._open.topics
        own = {topics.registry_spec(self._names.registry)[0]: topics.registry_spec}
        await topics.create([own.get(name, self._spec_of)(name) for name in names])

    def _spec_of(self, name: str) -> Spec:
        topics = self._open.topics
        if self._names.parse(name) is None and not self._names.is_alias(name):
            return topics.dead_spec(name) if "...dead." in name else topics.retry_spec(name)
        return topics.spec(name)

    async def resend(self, subscription: str, messages: Sequence[Message]) -> None:
        shared = self._open
        name = self._names.retry(subscription)
        await shared.registry.refresh()
        if shared.registry.entry(subscription) is None:
            raise SendFailed(
                f"kafka: no subscription {subscription!r}: declare it first",
                {message.id: "not stored" for message in messages},
            )
        await shared.topics.create_own(shared.topics.retry_spec(name))
        now = time.time()
        records = [(encode_retry(message, message.attempt, now), now) for message in messages]
        await Shelf(shared.cluster, shared.producer, name).store(records)

    # -- subscriptions ----------------------------------------------------------------------------

    async def declare(self, subscription: Subscription) -> None:
        assert subscription.name is not None
        shared = self._open
        topics, registry = shared.topics, shared.registry
        await registry.refresh()
        entry = registry.entry(subscription.name)
        retry = self._names.retry(subscription.name)
        if entry is not None and entry.definition.redeclared(subscription, 0.0) is entry.definition:
            await topics.create_own(topics.retry_spec(retry))
            return
        await self._ensure_registry()
        await topics.create_own(topics.retry_spec(retry))
        ends = await self._ends(subscription.patterns, retry)
        await registry.refresh()  # after the ends: whoever declared meanwhile began no later than we do

        def change(before: Entry | None) -> Entry:
            if before is None:
                move = Move(int(ends.at * 1000), "end", ends)
                return Entry(Definition.first(subscription, ends.at), move)
            definition = before.definition.redeclared(subscription, ends.at)
            if definition is before.definition:
                return before
            kept = PatternSet(before.definition.patterns)
            added = {
                tp: offset
                for tp, offset in ends.offsets.items()
                if tp[0] != retry and not kept.matches(self._topic_of(tp))
            }
            return replace(before, definition=definition).pinned(Ends(ends.at, added, ends.ids))

        await registry.change(subscription.name, change)
        self._look()

    def _topic_of(self, tp: TP) -> str:
        return self._names.parse(tp[0]) or self._open.registry.aliases.get(tp[0], "")

    async def _ends(self, patterns: Iterable[str], *more: str) -> Ends:
        """Where the topics of these patterns, and these Kafka topics, end now."""
        shared = self._open
        await shared.cluster.refresh(None)
        names = [*shared.topics.matching(PatternSet(patterns)), *more]
        tps = [(name, number) for name in names for number in range(len(shared.cluster.topics.get(name, ())))]
        ids = (
            shared.cluster.ids
        )  # from before the offsets: a topic made anew in between counts from its beginning
        found = await shared.cluster.offsets(dict.fromkeys(tps, LATEST))
        offsets = {tp: offset for tp, offset in found.items() if offset > 0}
        return Ends(time.time(), offsets, {name: ids[name] for name, _ in offsets if name in ids})

    async def delete(self, subscription: str) -> None:
        shared = self._open
        await shared.registry.refresh()
        if shared.registry.entry(subscription) is not None:
            await shared.registry.remove(subscription)  # members see it and leave
        for receiver in [each for each in self._receivers if each.subscription.name == subscription]:
            receiver.fail(ConnectionLost(f"kafka: subscription {subscription!r} was deleted"))
            await receiver.close()
        await self._remove_topic(self._names.dead(subscription))
        self._dead.pop(subscription, None)
        if await self._delete_group(subscription):
            await self._remove_topic(self._names.retry(subscription))

    async def _remove_topic(self, name: str) -> None:
        await self._open.cluster.refresh([name])
        if name in self._open.cluster.topics:
            await self._open.topics.remove([name])

    async def _delete_group(self, subscription: str) -> bool:
        """Delete the group once its members have left; False where somebody declares the name anew meanwhile.

        The new subscription counts from its own declaration, whatever the group has committed before.
        """
        shared = self._open
        group = self._names.group(subscription)
        for pause in backoff(self.settings.kafka.session_timeout + 5):
            node = await shared.cluster.coordinator(group)
            response = await shared.cluster.call(node, DeleteGroupsRequest([group]), GROUP)
            code = response.results[0][1]
            if code in _NO_GROUP:
                return True
            check_rights(code, "Delete", f"group {group!r}")
            if code != _NOT_EMPTY:
                shared.cluster.coordinator_moved(group)
            await shared.registry.refresh()
            if shared.registry.entry(subscription) is not None:
                return False
            await asyncio.sleep(pause)
        raise PubSubError(
            f"kafka: group {group!r} still has members: stop them, then delete the subscription"
        )

    async def consume(self, subscription: Subscription, window: int) -> Receiver:
        shared = self._open
        receiver = KafkaReceiver(shared, subscription, window, self._receivers.discard)
        self._receivers.add(receiver)
        try:
            await receiver.begin()
        except BaseException:
            await receiver.close()
            raise
        self._watch_on()
        return receiver

    # -- looking ----------------------------------------------------------------------------------

    async def inspect(self, subscription: str) -> Backlog:
        shared = self._open
        for receiver in list(self._receivers):
            if receiver.subscription.name == subscription:
                await receiver.flush()
        await shared.cluster.refresh(None)
        await shared.registry.refresh()
        entry = shared.registry.entry(subscription)
        if entry is None:
            return Backlog(0, 0, 0, None, declared=False)
        there = await self._places(subscription, entry)
        ends = await shared.cluster.offsets(dict.fromkeys(there, LATEST))
        waiting = in_flight = 0
        heads: dict[TP, int] = {}
        for tp, progress in there.items():
            end = ends.get(tp, 0)
            reached = max(progress.reached, progress.offset)
            flying = sum(1 for offset in progress.open if offset < end) if progress.window else 0
            in_flight += flying
            behind = max(0, end - reached) + (0 if progress.window else len(progress.open))
            waiting += behind
            if behind:
                heads[tp] = reached if progress.window or not progress.open else progress.offset
        dead = await self._dead_letters(subscription).refresh()
        return Backlog(waiting, in_flight, dead, await self._oldest(heads))

    async def _places(self, subscription: str, entry: Entry) -> dict[TP, Progress]:
        """Where the subscription is on each of its partitions."""
        shared = self._open
        names = [
            *shared.topics.matching(PatternSet(entry.definition.patterns)),
            self._names.retry(subscription),
        ]
        tps = [(name, number) for name in names for number in range(len(shared.cluster.topics.get(name, ())))]
        return await places(shared.cluster, self._names.group(subscription), names[-1], tps, entry)

    async def _oldest(self, heads: dict[TP, int]) -> float | None:
        """The age in seconds of the oldest message at these places, as far as one request shows them."""
        cluster = self._open.cluster
        found: list[float] = []
        for node, tps in by_leader(cluster, heads).items():
            if node < 0:
                continue
            offsets = {tp: heads[tp] for tp in tps}
            response = await cluster.call(node, fetching.request(offsets, 0, HEAD_BYTES), READ)
            for fetched in fetching.answers(response, offsets):
                own = self._names.parse(fetched.tp[0]) is None
                record = None if fetched.code else next(fetched.records, None)
                if record is not None:
                    timestamp = decode(record, fetched.tp, own=own).timestamp
                    found += [] if timestamp is None else [timestamp]
        return max(0.0, time.time() - min(found)) if found else None

    def _dead_letters(self, subscription: str) -> DeadLetterTopic:
        if subscription not in self._dead:
            shared = self._open
            name = self._names.dead(subscription)
            self._dead[subscription] = DeadLetterTopic(shared.cluster, shared.producer, name)
        return self._dead[subscription]

    async def dead(self, subscription: str) -> AsyncIterator[Message]:
        async for record in self._dead_letters(subscription).records():
            yield dead_letter(record, (self._names.dead(subscription), 0), subscription)

    async def discard(self, subscription: str, ids: Collection[str] | None) -> int:
        return await self._dead_letters(subscription).discard(ids)

    async def diagnose(self) -> list[Finding]:
        timeout = self.settings.connect_timeout
        return await examine(self._open.cluster, self._names, self.settings.kafka, timeout)

    async def seek(self, subscription: str, to: Position) -> None:
        shared = self._open
        await shared.registry.refresh()
        entry = shared.registry.entry(subscription)
        if entry is None:
            return
        ends = await self._ends(entry.definition.patterns, self._names.retry(subscription))
        target: float | str = to.timestamp() if isinstance(to, datetime) else to
        if isinstance(target, float) and target > ends.at:
            target = "end"

        def change(before: Entry | None) -> Entry:
            base = before or entry
            return Entry(base.definition, Move(base.move.number + 1, target, ends))

        await shared.registry.change(subscription, change)
        self._look()
