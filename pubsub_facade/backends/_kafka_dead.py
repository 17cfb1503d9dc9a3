"""The dead letters of one subscription: a compacted topic, keyed by message id.

What is there is found by folding the topic from its beginning: a later record of an id replaces the one
before, one without a value takes it away. The fold is kept and only read on, so that counting stays cheap.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from typing import Any, Final

from aiokafka.protocol.admin import DeleteRecordsRequest

from pubsub_facade.backends._kafka_cluster import EARLIEST, LATEST, Cluster
from pubsub_facade.backends._kafka_fetch import read
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_records import TP, Outgoing
from pubsub_facade.backends._kafka_wire import same

TRUSTED: Final = (
    3600.0  # seconds until the fold is made anew: compaction forgets, after a day, what was taken away
)


class DeadLetterTopic:
    """The fold of one Kafka topic.

    Arguments:
        topic: the Kafka topic; it need not exist.
    """

    def __init__(self, cluster: Cluster, producer: Producer, topic: str) -> None:
        self._cluster = cluster
        self._producer = producer
        self._tp: TP = (topic, 0)
        self._live: dict[bytes, int] = {}  # id -> offset, oldest first
        self._next = 0
        self._id: str | None = None  # of the topic that was read up to there
        self._since = 0.0

    async def refresh(self) -> int:
        """Read on; returns how many there are."""
        await self._cluster.refresh([self._tp[0]])
        if self._tp[0] not in self._cluster.topics:
            self._forget()
            return 0
        id = self._cluster.ids.get(self._tp[0])
        end = (await self._cluster.offsets({self._tp: LATEST})).get(self._tp, 0)
        if end < self._next or not same(id, self._id) or time.monotonic() - self._since > TRUSTED:
            self._forget()
        self._id = id
        start = max(self._next, (await self._cluster.offsets({self._tp: EARLIEST})).get(self._tp, 0))
        async for record in read(self._cluster, self._tp, start, end):
            if record.key is not None:
                self._live.pop(record.key, None)
                if record.value is not None:
                    self._live[record.key] = record.offset
        self._next = end
        return len(self._live)

    def _forget(self) -> None:
        self._live.clear()
        self._next = 0
        self._since = time.monotonic()

    async def records(self) -> AsyncIterator[Any]:
        """What is there now, oldest first."""
        await self.refresh()
        live = dict(self._live)
        start = min(live.values(), default=self._next)
        async for record in read(self._cluster, self._tp, start, self._next):
            if live.get(record.key) == record.offset:
                yield record

    async def discard(self, ids: Collection[str] | None) -> int:
        """Take away those with these ids (None: all); returns how many there were."""
        await self.refresh()
        keys = list(self._live) if ids is None else [id.encode() for id in ids]
        keys = [key for key in dict.fromkeys(keys) if key in self._live]
        if not keys:
            return 0
        now = int(time.time() * 1000)
        await self._producer.store({self._tp: [Outgoing(repr(key), key, None, [], now) for key in keys]})
        for key in keys:
            self._live.pop(key, None)
        if not self._live:
            await self._truncate()
        return len(keys)

    async def _truncate(self) -> None:
        """Nothing is left up to where we have read: free it now and not by and by."""
        topic, number = self._tp
        request = DeleteRecordsRequest([(topic, [(number, self._next)])], 5000)
        await self._cluster.call(self._cluster.leader(self._tp), request)
