"""The retries that one member has read: a line by time, and the way on for those with a longer delay.

A copy is confirmed before the one it was made from is settled. What waits here is open in its partition, so
that it comes again should the member go.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any, Final

from aiokafka.protocol.admin import DeleteRecordsRequest

from pubsub_facade.backends._kafka_cluster import Cluster
from pubsub_facade.backends._kafka_partition import Partition
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_records import TP, Outgoing, again, decode
from pubsub_facade.backends._kafka_retry import SLACK, place, ready_at
from pubsub_facade.backends._kafka_wire import same
from pubsub_facade.errors import ConnectionLost, PubSubError

log = logging.getLogger("pubsub_facade")

WAITING: Final = 500  # retries of one partition that wait in memory
PURGE_EVERY: Final = 1000  # handled records of a partition until they are deleted
AGAIN: Final = 1.0  # seconds until what could not be moved on is tried again


class Shelf:
    """What waits in a subscription's retry topic.

    Arguments:
        topic: the Kafka topic.
    """

    def __init__(self, cluster: Cluster, producer: Producer, topic: str) -> None:
        self._cluster = cluster
        self._producer = producer
        self._topic = topic
        self._sequence = itertools.count()
        self._waiting: list[
            tuple[float, int, Partition, Any, float]
        ] = []  # a heap: when, -, whose, what, due
        self._hops: list[tuple[Partition, Any, float]] = []  # to be moved on

    @property
    def next_at(self) -> float | None:
        """When the next one leaves (seconds since the epoch); None: nothing waits."""
        return self._waiting[0][0] if self._waiting else None

    def fill(self, partition: Partition) -> None:
        """Take from a partition of the retry topic what was read, as far as there is room."""
        while partition.waiting < WAITING and (record := partition.next()) is not None:
            partition.open[record.offset] = None
            partition.waiting += 1
            due = decode(record, partition.tp, own=True).due
            self._wait(ready_at(partition.tp[1], record.timestamp / 1000, due), partition, record, due)

    def ripe(self, now: float) -> list[tuple[Partition, Any]]:
        """Those whose time has come; those that have to wait on elsewhere are kept for `move_on`."""
        found = []
        waiting = self._waiting
        while waiting and waiting[0][0] <= now:
            _, _, partition, record, due = heapq.heappop(waiting)
            partition.waiting -= 1
            if due - now > SLACK:
                self._hops.append((partition, record, due))
            else:
                found.append((partition, record))
        return found

    @property
    def moving(self) -> bool:
        """Whether there is something for `move_on`."""
        return bool(self._hops)

    async def move_on(self) -> None:
        """Store those that wait on elsewhere there, and settle them here. Raises PubSubError: they are kept."""
        hops, self._hops = self._hops, []
        now = time.time()
        try:
            await self.store((again(record), due) for _, record, due in hops)
        except PubSubError:
            for partition, record, due in hops:
                if record.offset in partition.open:
                    partition.waiting += 1
                    self._wait(now + AGAIN, partition, record, due)
            raise
        for partition, record, _ in hops:
            partition.settle(record.offset)

    async def store(self, records: Iterable[tuple[Outgoing, float]]) -> None:
        """Store copies, each with the time it is due at (seconds since the epoch)."""
        count = len(self._cluster.topics.get(self._topic, ())) or 1
        now = time.time()
        spread = self._producer.turn()
        lines: dict[TP, list[Outgoing]] = {}
        for record, due in records:
            lines.setdefault((self._topic, place(due - now, spread, count)), []).append(record)
        await self._producer.store(lines)

    async def purge(self, partitions: Iterable[Partition]) -> None:
        """Delete what is handled of these: a retry topic has no other end to its records."""
        for partition in partitions:
            mark = next(iter(partition.open), partition.position)
            if partition.tp[0] != self._topic or mark - partition.purged < PURGE_EVERY:
                continue
            if not same(partition.topic_id, self._cluster.ids.get(self._topic)):
                continue  # nothing of this is handled in the topic that has the name now
            partition.purged = mark
            request = DeleteRecordsRequest([(self._topic, [(partition.tp[1], mark)])], 5000)
            try:
                await self._cluster.call(self._cluster.leader(partition.tp), request)
            except ConnectionLost as error:
                log.debug("%s: handled retries not deleted yet: %s", self._topic, error)

    def clear(self) -> None:
        """Forget all: the partitions are given up."""
        self._waiting.clear()
        self._hops.clear()

    def _wait(self, at: float, partition: Partition, record: Any, due: float) -> None:
        heapq.heappush(self._waiting, (at, next(self._sequence), partition, record, due))
