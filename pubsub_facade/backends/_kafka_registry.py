"""What Kafka cannot keep for a subscription: its definition, where it began, where it was moved to.

One compacted topic for each namespace holds the last record of each subscription (key ``sub:NAME``) and of
each alias (``alias:KAFKA TOPIC``). Whoever changes a record says which one the change is based on: if
another came in between, the change is made again on top of that one. Never needed on the path of a message.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from pubsub_facade.backends._kafka_cluster import LATEST, Cluster
from pubsub_facade.backends._kafka_fetch import read
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_records import TP, Outgoing
from pubsub_facade.subscription import Definition

SUBSCRIPTION: Final = "sub:"
ALIAS: Final = "alias:"


@dataclass(frozen=True)
class Ends:
    """Where partitions ended at a certain time: messages below were published before it.

    Arguments:
        at: seconds since the epoch.
        offsets: partitions that were not empty.
    """

    at: float
    offsets: dict[TP, int]

    def to_json(self) -> list[Any]:
        topics: dict[str, dict[str, int]] = {}
        for (topic, number), offset in self.offsets.items():
            topics.setdefault(topic, {})[str(number)] = offset
        return [self.at, topics]

    @classmethod
    def from_json(cls, data: list[Any]) -> Ends:
        offsets = {
            (topic, int(number)): int(at) for topic, ends in data[1].items() for number, at in ends.items()
        }
        return cls(float(data[0]), offsets)


@dataclass(frozen=True)
class Move:
    """Where a subscription goes on: the members carry it out, each for the partitions it holds, once.

    Its declaration is one (to the "end"), so that what an earlier subscription of the name committed counts
    for nothing; a seek is another.

    Arguments:
        number: later ones have higher numbers.
        to: seconds since the epoch, or "beginning" or "end".
        ends: where everything ended when it was asked for.
    """

    number: int
    to: float | str
    ends: Ends


@dataclass(frozen=True)
class Entry:
    """What the registry holds of one subscription.

    Arguments:
        definition: its patterns and filters, now and before.
        move: where it began, or was moved to last.
        pins: where topics ended when patterns that mean them were added.
    """

    definition: Definition
    move: Move
    pins: tuple[Ends, ...] = ()

    def origin(self, tp: TP) -> Ends:
        """Where a partition begins of which nothing was committed since the last move."""
        later = [ends for ends in self.pins if tp in ends.offsets and ends.at > self.move.ends.at]
        return later[0] if later else self.move.ends

    def pinned(self, ends: Ends) -> Entry:
        """With the pins of topics that were added."""
        return replace(self, pins=(*self.pins, ends)) if ends.offsets else self

    def to_json(self) -> dict[str, Any]:
        return {
            "definition": json.loads(self.definition.to_json()),
            "move": [self.move.number, self.move.to, self.move.ends.to_json()],
            "pins": [ends.to_json() for ends in self.pins],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        number, to, ends = data["move"]
        return cls(
            Definition.from_json(json.dumps(data["definition"]).encode()),
            Move(int(number), to, Ends.from_json(ends)),
            tuple(Ends.from_json(ends) for ends in data["pins"]),
        )


class _Held:
    """The last record of a key, and the one before it."""

    __slots__ = ("before", "entry", "offset", "writer")

    def __init__(self, offset: int, writer: str, entry: Entry | None, before: _Held | None) -> None:
        self.offset = offset
        self.writer = writer
        self.entry = entry
        self.before = before
        if before is not None:
            before.before = None


class Registry:
    """The registry of one namespace, as far as it was read.

    Arguments:
        topic: its Kafka topic.
        create: makes that topic where it is missing.
    """

    def __init__(self, cluster: Cluster, producer: Producer, topic: str) -> None:
        self.aliases: dict[str, str] = {}  # Kafka topic -> topic
        self._cluster = cluster
        self._producer = producer
        self._tp: TP = (topic, 0)
        self._held: dict[str, _Held] = {}
        self._next = 0
        self._listeners: dict[object, Callable[[], None]] = {}

    def listen(self, owner: object, listener: Callable[[], None] | None) -> None:
        """Call ``listener`` when something was read; None: no more."""
        if listener is None:
            self._listeners.pop(owner, None)
        else:
            self._listeners[owner] = listener

    def entry(self, subscription: str) -> Entry | None:
        """What is known of a subscription since the last `refresh`; None: nothing."""
        held = self._held.get(SUBSCRIPTION + subscription)
        return None if held is None else held.entry

    async def refresh(self) -> None:
        """Read what is new. Raises ConnectionLost."""
        if self._tp[0] not in self._cluster.topics:
            await self._cluster.refresh([self._tp[0]])
            if self._tp[0] not in self._cluster.topics:
                self._reset()
                return
        end = (await self._cluster.offsets({self._tp: LATEST})).get(self._tp, 0)
        if end < self._next:
            self._reset()  # made anew
        news = False
        async for record in read(self._cluster, self._tp, self._next, end):
            if record.offset >= self._next:
                self._take(record)
                news = True
        self._next = max(self._next, end)
        if news:
            for listener in list(self._listeners.values()):
                listener()

    def _reset(self) -> None:
        self._held.clear()
        self.aliases.clear()
        self._next = 0

    def _take(self, record: Any) -> None:
        self._next = record.offset + 1
        key = (record.key or b"").decode("utf-8", "replace")
        entry = None
        writer = ""
        try:
            if record.value is not None:
                value = json.loads(record.value)
                if key.startswith(ALIAS):
                    self.aliases[key[len(ALIAS) :]] = str(value["topic"])
                    return
                entry = Entry.from_json(value)
                writer = str(value["writer"])
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return  # not ours
        if key.startswith(SUBSCRIPTION):
            self._held[key] = _Held(record.offset, writer, entry, self._held.get(key))

    async def change(self, subscription: str, change: Callable[[Entry | None], Entry]) -> None:
        """Store what ``change`` makes of the present entry, unless that is the same.

        It is made again on top of a change by somebody else that came between reading and writing.
        """
        key = SUBSCRIPTION + subscription
        base = self._held.get(key)
        while True:
            before = None if base is None else base.entry
            entry = change(before)
            if entry == before:
                return
            writer = uuid.uuid4().hex
            last = self._held.get(key)
            await self._store(key, entry.to_json() | {"writer": writer})
            await self.refresh()
            held = self._held.get(key)
            if held is not None and held.writer == writer:
                if held.before is None or held.before is last:
                    return
                held = held.before
            base = held

    async def remove(self, subscription: str) -> None:
        """Forget a subscription."""
        await self._store(SUBSCRIPTION + subscription, None)
        await self.refresh()

    async def write_alias(self, name: str, topic: str) -> None:
        """Note whose alias a Kafka topic is, before there is one of that name."""
        await self._store(ALIAS + name, {"topic": topic, "at": time.time()})
        await self.refresh()

    async def _store(self, key: str, value: dict[str, Any] | None) -> None:
        data = None if value is None else json.dumps(value).encode()
        record = Outgoing(key, key.encode(), data, [], int(time.time() * 1000))
        await self._producer.store({self._tp: [record]})
