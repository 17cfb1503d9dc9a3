"""What Kafka cannot keep for a subscription: its definition, where it began, where it was moved to.

One compacted topic for each namespace holds the last record of each subscription (key ``sub:NAME``), of each
alias (``alias:KAFKA TOPIC``), and of the ephemeral subscriptions of each client (``here:TOKEN``). Whoever
changes a subscription says which record the change is based on: if another came in between, the change is
made again on top of that one. Never needed on the path of a message.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pubsub_facade.backends._kafka_cluster import LATEST, Cluster
from pubsub_facade.backends._kafka_fetch import read
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_records import TP, Outgoing
from pubsub_facade.backends._kafka_wire import same
from pubsub_facade.subscription import Definition, Era

SUBSCRIPTION: Final = "sub:"
ALIAS: Final = "alias:"
LEASE: Final = "here:"

CLOCKS: Final = 60.0  # seconds that a writer's clock may be behind ours
LONGEST: Final = 3600.0  # seconds that a lease counts at most, whatever it says


@dataclass(frozen=True)
class Ends:
    """Where partitions ended at a certain time: messages below were published before it.

    Arguments:
        at: seconds since the epoch.
        offsets: partitions that were not empty.
        ids: Kafka topic -> its id, of these; those made anew since have others.
    """

    at: float
    offsets: dict[TP, int]
    ids: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> list[Any]:
        topics: dict[str, dict[str, int]] = {}
        for (topic, number), offset in self.offsets.items():
            topics.setdefault(topic, {})[str(number)] = offset
        return [self.at, topics, {topic: id for topic, id in self.ids.items() if topic in topics}]

    @classmethod
    def from_json(cls, data: list[Any]) -> Ends:
        offsets = {
            (topic, int(number)): int(at) for topic, ends in data[1].items() for number, at in ends.items()
        }
        return cls(float(data[0]), offsets, dict(data[2]) if len(data) > 2 else {})


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


@dataclass(frozen=True)
class Lease:
    """The ephemeral subscriptions of one client: there until it says otherwise, or says nothing for too long.

    Arguments:
        eras: patterns and filter of each, without twins.
        until: when it ends, by our `time.monotonic`.
        over: when it ends by its writer's clock, in seconds since the epoch.
    """

    eras: tuple[Era, ...]
    until: float
    over: float

    @staticmethod
    def json_of(eras: Iterable[Era], seconds: float) -> dict[str, Any]:
        """As it is stored; it counts for ``seconds`` from then on."""
        return {"seconds": seconds, "for": [[list(era.patterns), era.filter] for era in eras]}

    @classmethod
    def from_json(cls, data: dict[str, Any], written: float, age: float) -> Lease:
        """As it was read now.

        Arguments:
            written: seconds since the epoch, by its writer's clock.
            age: seconds that it may have lain there, by our clock; 0: it is new, whatever the clocks say.
        """
        eras = tuple(
            Era(0.0, tuple(str(pattern) for pattern in patterns), None if text is None else str(text))
            for patterns, text in data["for"]
        )
        seconds = min(float(data["seconds"]), LONGEST)
        left = min(seconds, seconds + CLOCKS - age)
        return cls(eras, time.monotonic() + left, written + seconds)


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
        self.leases: dict[str, Lease] = {}  # token of a client -> its ephemeral subscriptions
        self.version = 0  # counts changes of what is held; a lease that goes on is none
        self.read_at = -math.inf  # when the last refresh began, by `time.monotonic`
        self._cluster = cluster
        self._producer = producer
        self._tp: TP = (topic, 0)
        self._held: dict[str, _Held] = {}
        self._next = 0
        self._id: str | None = None  # of the topic that was read up to there
        self._refreshing = asyncio.Lock()
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

    def definitions(self) -> Iterator[Definition]:
        """Of all subscriptions that were there at the last `refresh`."""
        for held in self._held.values():
            if held.entry is not None:
                yield held.entry.definition

    async def refresh(self) -> None:
        """Read what is new. Raises ConnectionLost."""
        asked = time.monotonic()
        async with self._refreshing:
            if self.read_at > asked:
                return  # somebody has read it since
            began = time.monotonic()
            await self._read()
            self.read_at = began

    async def _read(self) -> None:
        if self._tp[0] not in self._cluster.topics:
            await self._cluster.refresh([self._tp[0]])
            if self._tp[0] not in self._cluster.topics:
                self._reset()
                return
        id = self._cluster.ids.get(self._tp[0])
        end = (await self._cluster.offsets({self._tp: LATEST})).get(self._tp, 0)
        if end < self._next or not same(id, self._id):
            self._reset()  # made anew
        self._id = id
        news = False
        async for record in read(self._cluster, self._tp, self._next, end):
            if record.offset >= self._next:
                news |= self._take(record)
        self._next = max(self._next, end)
        if news:
            for listener in list(self._listeners.values()):
                listener()

    def _reset(self) -> None:
        self._held.clear()
        self.aliases.clear()
        self.leases.clear()
        self._next = 0
        self.version += 1

    def _take(self, record: Any) -> bool:
        """Take in one record; whether members have to look at it."""
        self._next = record.offset + 1
        key = (record.key or b"").decode("utf-8", "replace")
        entry = None
        writer = ""
        try:
            if key.startswith(LEASE):
                self._take_lease(key.removeprefix(LEASE), record)
                return False
            if record.value is not None:
                value = json.loads(record.value)
                if key.startswith(ALIAS):
                    self.aliases[key[len(ALIAS) :]] = str(value["topic"])
                    return True
                entry = Entry.from_json(value)
                writer = str(value["writer"])
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return False  # not ours
        if key.startswith(SUBSCRIPTION):
            self._held[key] = _Held(record.offset, writer, entry, self._held.get(key))
            self.version += 1
        return True

    def _take_lease(self, token: str, record: Any) -> None:
        before = self.leases.get(token)
        if record.value is None:
            self.leases.pop(token, None)
            self.version += before is not None
            return
        written = record.timestamp / 1000
        age = time.time() - written if self.read_at == -math.inf else 0.0
        lease = self.leases[token] = Lease.from_json(json.loads(record.value), written, age)
        renewed = before is not None and before.eras == lease.eras and before.until > time.monotonic()
        self.version += not renewed

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

    async def lease(self, token: str, eras: Iterable[Era], seconds: float, ended: Iterable[str]) -> None:
        """Store what ephemeral subscriptions a client has now; none: that it is gone.

        Arguments:
            ended: other clients' leases that nobody needs to know of any more.
        """
        values: dict[str, dict[str, Any] | None] = {LEASE + other: None for other in ended}
        eras = list(eras)
        values[LEASE + token] = Lease.json_of(eras, seconds) if eras else None
        await self._store_all(values)

    async def _store(self, key: str, value: dict[str, Any] | None) -> None:
        await self._store_all({key: value})

    async def _store_all(self, values: dict[str, dict[str, Any] | None]) -> None:
        now = int(time.time() * 1000)
        records = [
            Outgoing(key, key.encode(), None if value is None else json.dumps(value).encode(), [], now)
            for key, value in values.items()
        ]
        await self._producer.store({self._tp: records})
