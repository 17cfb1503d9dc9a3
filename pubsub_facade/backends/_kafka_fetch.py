"""Reading: ahead of a member on the partitions it holds, and a whole partition from end to end.

One request to each broker is under way at a time and covers all its partitions that have room; while some
have none, requests do not wait at the broker, so that a full partition is never held up by empty ones.
What transactions aborted is not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import aiokafka.errors as kafka_errors
from aiokafka.protocol.fetch import FetchRequest

from pubsub_facade.backends._kafka_cluster import (
    EARLIEST,
    READ,
    Cluster,
    Link,
    by_number,
    by_topic,
    check_rights,
)
from pubsub_facade.backends._kafka_log import Records, following
from pubsub_facade.backends._kafka_partition import Partition
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.backends._kafka_wire import FETCH_IDS, FetchRequest13, same
from pubsub_facade.errors import ConnectionLost, PubSubError

FETCH_WAIT: Final = 1.0  # seconds a request waits at the broker for something to come
FETCH_BYTES: Final = 8 << 20
PARTITION_BYTES: Final = 512 << 10
READ_COMMITTED: Final = 1
MAX_EPOCH: Final = (1 << 31) - 2
CROWDED: Final = 0.05  # seconds to wait for room, where some partitions have none and others are empty

_GONE: Final = kafka_errors.UnknownTopicOrPartitionError.errno
_OUT_OF_RANGE: Final = kafka_errors.OffsetOutOfRangeError.errno


class Fetched:
    """One partition's part of an answer."""

    __slots__ = ("code", "following", "records", "size", "tp")

    def __init__(self, version: int, topic: str, part: tuple[Any, ...], start: int) -> None:
        number, self.code, *rest = part
        if version >= FETCH_IDS:
            del rest[-1]  # tags
        aborted = rest[3] if version >= 11 else rest[-2]
        data = rest[-1] or b""
        self.tp: TP = (topic, number)
        self.size = len(data)
        self.following = following(data, start)  # the offset behind what came
        self.records = Records(data, aborted, start)


def request(offsets: dict[TP, int], wait: float, size: int = PARTITION_BYTES) -> Any:
    """A fetch request for these partitions from these offsets on.

    Arguments:
        wait: seconds to wait at the broker.
        size: bytes of each partition; one batch always comes, whatever its size.
    """
    return FetchRequest(int(wait * 1000), 1, FETCH_BYTES, READ_COMMITTED, _rows(offsets, size))


def _rows(offsets: dict[TP, int], size: int) -> list[tuple[str, list[tuple[Any, ...]]]]:
    return by_topic({tp: (offset, size) for tp, offset in offsets.items()})


def answers(
    response: Any, offsets: dict[TP, int], ids: Mapping[str, str | None] | None = None
) -> Iterator[Fetched]:
    """The answer to `request`, partition by partition.

    Arguments:
        ids: Kafka topic -> id, where it may have been asked for by id.
    """
    version = response.API_VERSION
    names: dict[Any, str] = {id: name for name, id in (ids or {}).items()}
    for topic, partitions, *_ in response.topics:
        name: str = topic if version < FETCH_IDS else names.get(topic, "")
        for part in partitions:
            if (name, part[0]) in offsets:
                yield Fetched(version, name, part, offsets[(name, part[0])])


async def read(cluster: Cluster, tp: TP, start: int, stop: int) -> AsyncIterator[Any]:
    """The records of a partition from ``start`` up to before ``stop``; ends early where the topic is gone."""
    position = start
    while position < stop:
        node = cluster.leader(tp)
        if node < 0:
            await cluster.refresh([tp[0]])
            if tp[0] not in cluster.topics:
                return
            if cluster.leader(tp) < 0:
                await asyncio.sleep(0.1)
            continue
        offsets = {tp: position}
        response = await cluster.call(node, request(offsets, FETCH_WAIT), READ)
        for fetched in answers(response, offsets):
            if fetched.code == _OUT_OF_RANGE:
                first = (await cluster.offsets({tp: EARLIEST})).get(tp, stop)
                if first <= position:
                    return  # shorter than we were told: the topic was made anew
                position = first
            elif fetched.code:
                check_rights(fetched.code, "Read", f"topic {tp[0]!r}")
                await cluster.refresh([tp[0]])
                if tp[0] not in cluster.topics:
                    return
                await asyncio.sleep(0.1)
            else:
                for record in fetched.records:
                    if record.offset >= stop:
                        return
                    yield record
                position = max(position, fetched.records.next_fetch_offset)


class _Incremental(FetchRequest):  # type: ignore[misc]
    """A fetch request within a session: by id where the broker takes that (Kafka 3.1), else by name.

    Sessions of this form are known from Kafka 2.1 on.
    """

    def __init__(
        self, session: Session, offsets: dict[TP, int], wait: float, ids: Mapping[str, str | None]
    ) -> None:
        super().__init__(int(wait * 1000), 1, FETCH_BYTES, READ_COMMITTED, _rows(offsets, PARTITION_BYTES))
        self._session = session
        self._offsets = offsets
        self._ids = ids

    def prepare(self, versions: dict[int, tuple[int, int]]) -> Any:
        if versions.get(self.API_KEY, (0, 0))[1] < FETCH_IDS:
            return super().prepare(versions)
        offsets: dict[TP, int] = {}
        for (topic, number), offset in self._offsets.items():
            id = self._ids[topic]
            if id is None:
                return super().prepare(versions)
            offsets[(id, number)] = offset
        changed, forgotten = self._session.next(offsets, "id")
        rows: list[Any] = [
            (id, [(number, -1, offset, -1, -1, size, {}) for number, offset, size in parts], {})
            for id, parts in _rows(changed, PARTITION_BYTES)
        ]
        head = (-1, self._max_wait_ms, self._min_bytes, self._max_bytes, self._isolation_level)
        place = (self._session.id, self._session.epoch)
        return FetchRequest13(
            *head, *place, rows, [(id, numbers, {}) for id, numbers in by_number(forgotten)], "", {}
        )

    def build(self, request_struct_class: Any) -> Any:
        if request_struct_class.API_VERSION < 9:
            return super().build(request_struct_class)
        changed, forgotten = self._session.next(self._offsets, "name")
        self._topics = _rows(changed, PARTITION_BYTES)
        struct = super().build(request_struct_class)
        struct.session_id, struct.session_epoch = self._session.id, self._session.epoch
        struct.forgotten_topics_data = by_number(forgotten)
        return struct


class Session:
    """What one broker knows of our fetching (KIP-227), so that neither side says again what has not changed.

    Hundreds of quiet partitions then cost nothing: a request names those that moved on, an answer those
    with something new.
    """

    __slots__ = ("_key", "_told", "epoch", "id")

    def __init__(self) -> None:
        self.id = 0
        self.epoch = 0  # of the request that was made last
        self._told: dict[TP, int] = {}
        self._key = "name"

    def request(self, offsets: dict[TP, int], wait: float, ids: Mapping[str, str | None]) -> Any:
        """As `request`, by these ids (Kafka topic -> id) as far as they are known."""
        return _Incremental(self, offsets, wait, ids)

    def next(self, offsets: dict[TP, int], key: str) -> tuple[dict[TP, int], set[TP]]:
        """Another request: which partitions to name, and which to forget.

        Arguments:
            key: what topics go by in it, "name" or "id"; a session is of one kind.
        """
        if key != self._key:
            self.id, self._key = 0, key
        told, self._told = self._told, offsets
        if not self.id:
            self.epoch = 0
            return offsets, set()
        self.epoch = self.epoch % MAX_EPOCH + 1
        changed = {tp: offset for tp, offset in offsets.items() if told.get(tp) != offset}
        return changed, told.keys() - offsets.keys()

    def answered(self, response: Any) -> bool:
        """Take in what the broker says of the session; False where the request counts for nothing."""
        if response.API_VERSION < 7:
            return True
        if response.error_code:
            self.id = 0
            return False
        self.id = response.session_id
        return True


class Fetcher:
    """Reads ahead for one member.

    Arguments:
        link: connections of its own: a request may wait at the broker.
        came: called with a partition for which something came.
        gone: called with Kafka topics that are there no more, or are others of the name; no more is read of them.
        fail: called with what cannot be mended here.
    """

    def __init__(
        self,
        cluster: Cluster,
        link: Link,
        came: Callable[[Partition], None],
        gone: Callable[[Collection[str]], None],
        fail: Callable[[PubSubError], None],
    ) -> None:
        self._cluster = cluster
        self._link = link
        self._came = came
        self._gone = gone
        self._fail = fail
        self._partitions: list[Partition] = []
        self._version = -1  # of the cluster's metadata, when there was last a task for each leader
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sessions: dict[int, Session] = {}
        self._room = asyncio.Event()

    def assign(self, partitions: Iterable[Partition]) -> None:
        """Read these and no others, each from its `fetch_from`."""
        self._partitions = list(partitions)
        self._stop()
        self._start()

    def room(self) -> None:
        """A partition has room again."""
        self._room.set()

    async def close(self) -> None:
        """Stop reading."""
        tasks = list(self._tasks.values())
        self._stop()
        if tasks:
            await asyncio.wait(tasks)

    def _stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            self._cluster.drop(self._link)  # a request waiting at the broker would hold up the next one
        self._tasks = {}

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._version = self._cluster.version
        for node in {self._cluster.leader(partition.tp) for partition in self._partitions}:
            if node not in self._tasks:
                self._tasks[node] = loop.create_task(self._run(node), name=f"pubsub-kafka-fetch-{node}")

    async def _run(self, node: int) -> None:
        try:
            while True:
                if self._version != self._cluster.version:  # somebody else learned of other leaders
                    self._start()
                mine = [part for part in self._partitions if self._cluster.leader(part.tp) == node]
                if not mine:
                    del self._tasks[node]  # its leaders have moved
                    return
                if node < 0:
                    await self._look_for_leaders()
                else:
                    await self._fetch(node, mine)
        except PubSubError as error:
            self._fail(error)

    async def _fetch(self, node: int, mine: list[Partition]) -> None:
        self._room.clear()
        hungry = [partition for partition in mine if partition.hungry]
        if not hungry:
            await self._room.wait()
            return
        crowded = len(hungry) < len(mine)
        offsets = {partition.tp: partition.fetch_from for partition in hungry}
        ids = {partition.tp[0]: partition.topic_id for partition in hungry}
        try:
            session = self._sessions.setdefault(node, Session())
            wanted = session.request(offsets, 0 if crowded else FETCH_WAIT, ids)
            response = await self._cluster.call(node, wanted, self._link)
        except ConnectionLost:
            await self._look_for_leaders()
            return
        if not session.answered(response):
            if session.epoch == 0:  # nothing that a new session would mend
                await self._look_for_leaders()
            return
        fetched = answers(response, offsets, ids)
        came, stale = await self._take(fetched, offsets, {partition.tp: partition for partition in hungry})
        if stale:
            await self._look_for_leaders()
        elif crowded and not came:
            try:
                async with asyncio.timeout(CROWDED):
                    await self._room.wait()
            except TimeoutError:
                return

    async def _take(
        self, answer: Iterable[Fetched], offsets: dict[TP, int], partitions: dict[TP, Partition]
    ) -> tuple[bool, bool]:
        came = stale = False
        for fetched in answer:
            tp = fetched.tp
            partition = partitions[tp]
            if partition.fetch_from != offsets[tp] or partition.held:
                continue  # it was moved meanwhile
            if fetched.code == _OUT_OF_RANGE:
                first = (await self._cluster.offsets({tp: EARLIEST})).get(tp, 0)
                partition.drop(first)
            elif fetched.code:
                check_rights(fetched.code, "Read", f"topic {tp[0]!r}")
                stale = True
            elif fetched.following > offsets[tp]:
                partition.feed(fetched.records, fetched.size, fetched.following)
                came = True
                self._came(partition)
        return came, stale

    async def _look_for_leaders(self) -> None:
        """Leaders move, topics vanish: ask, and read on from whoever leads now."""
        await asyncio.sleep(0.05)
        await self._cluster.refresh({partition.tp[0] for partition in self._partitions})
        topics, ids = self._cluster.topics, self._cluster.ids
        there = [
            part
            for part in self._partitions
            if part.tp[0] in topics and same(part.topic_id, ids.get(part.tp[0]))
        ]
        if len(there) < len(self._partitions):
            self._gone({part.tp[0] for part in self._partitions} - {part.tp[0] for part in there})
            self._partitions = there
        self._start()
