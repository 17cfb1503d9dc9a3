"""Storing records: idempotent batches, all replicas, in order per partition.

The batches are built here with aiokafka's record layer, because its producer costs a future and a task
switch a message, loses a partition for good after one refused batch, and cannot be closed while the broker
is away. A batch goes again as the same bytes until the broker has answered, so that no retry here makes a
twin. Only after a lost link, or a fate that stays unknown, does the producer take a new identity.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import aiokafka.errors as kafka_errors
from aiokafka.partitioner import murmur2
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from pubsub_facade.backends._kafka_cluster import PRODUCE, Cluster, by_leader, explain, lacks
from pubsub_facade.backends._kafka_records import TP, Outgoing
from pubsub_facade.errors import ConnectionLost, Fate, SendFailed

BATCH_BYTES: Final = 512 << 10  # uncompressed; a single record may be larger
NEVER: Final = (1 << 31) - 1  # ms, for a transaction there is none of
REMEMBERED: Final = 10_000  # keys whose partition hash is kept

_CODECS: Final = {
    "none": 0,
    "gzip": DefaultRecordBatch.CODEC_GZIP,
    "snappy": DefaultRecordBatch.CODEC_SNAPPY,
    "lz4": DefaultRecordBatch.CODEC_LZ4,
    "zstd": DefaultRecordBatch.CODEC_ZSTD,
}
_STORED: Final = {0, kafka_errors.DuplicateSequenceNumber.errno}
_TOO_LARGE: Final = {10, 18}  # the record, or the batch of records
_STRANGER: Final = {
    45,
    47,
    49,
    59,
}  # sequence, epoch or producer id unknown to the broker: nothing was stored
_UNCLEAR: Final = {-1, 7, 20}  # unknown server error, timed out, not enough replicas after the append
_ALONE: Final = {7, 19, 20}  # the broker waited for the other replicas in vain: is it cut off from them?


class _Identity:
    """A producer id and the next sequence number of each partition under it."""

    __slots__ = ("epoch", "id", "sequences")

    def __init__(self, id: int, epoch: int) -> None:
        self.id = id
        self.epoch = epoch
        self.sequences: dict[TP, int] = {}


class _Line:
    """What one call has for one partition: a batch under way, and what comes after it."""

    __slots__ = ("batch", "code", "data", "identity", "limit", "rest", "tp", "unclear")

    def __init__(self, tp: TP, records: Sequence[Outgoing]) -> None:
        self.tp = tp
        self.rest = deque(records)
        self.batch: list[Outgoing] = []
        self.data: bytes | None = None
        self.identity: _Identity | None = None
        self.limit = BATCH_BYTES
        self.unclear = False  # the batch may be stored
        self.code = 0  # the last refusal

    def build(self, identity: _Identity, codec: int) -> None:
        """Make the next batch, unless one is under way."""
        if self.data is not None:
            return
        sequence = identity.sequences.get(self.tp, 0)
        builder = DefaultRecordBatchBuilder(2, codec, 0, identity.id, identity.epoch, sequence, self.limit)
        rest, batch = self.rest, self.batch
        while rest:
            record = rest[0]
            if not builder.append(len(batch), record.timestamp, record.key, record.value, record.headers):
                break
            batch.append(rest.popleft())
        self.identity = identity
        self.data = bytes(builder.build())

    def stored(self) -> None:
        """The batch is on the broker."""
        assert self.identity is not None
        sequence = self.identity.sequences.get(self.tp, 0) + len(self.batch)
        self.identity.sequences[self.tp] = sequence & NEVER
        self.batch, self.data, self.unclear = [], None, False

    def undo(self) -> None:
        """The batch is certainly not on the broker: make another of the same records."""
        self.rest.extendleft(reversed(self.batch))
        self.batch, self.data, self.unclear = [], None, False


class Producer:
    """Stores records on one cluster.

    Arguments:
        cluster: the link.
        compression: codec of the batches, as in the settings.
        patience: seconds to try again where leaders or replicas are missing.
        restore: makes Kafka topics that have vanished again.
    """

    def __init__(
        self,
        cluster: Cluster,
        compression: str,
        patience: float,
        restore: Callable[[set[str]], Awaitable[None]],
    ) -> None:
        self._cluster = cluster
        self._codec = _CODECS[compression]
        self._patience = patience
        self._restore = restore
        self._identity: _Identity | None = None
        self._locks: dict[str, asyncio.Lock] = {}
        self._hashes: dict[bytes, int] = {}
        self._turn = random.randrange(1 << 16)

    # -- choosing partitions ----------------------------------------------------------------------

    def partition(self, key: bytes, count: int) -> int:
        """The partition of a key, as Kafka's Java clients choose it."""
        hashed = self._hashes.get(key)
        if hashed is None:
            if len(self._hashes) >= REMEMBERED:
                self._hashes.clear()
            hashed = self._hashes[key] = int(murmur2(key)) & 0x7FFFFFFF
        return hashed % count

    def turn(self) -> int:
        """Another number each time, to spread what has no key: one partition for all of a batch."""
        self._turn += 1
        return self._turn

    # -- storing ----------------------------------------------------------------------------------

    async def store(self, records: Mapping[TP, Sequence[Outgoing]]) -> None:
        """Return when all are stored on all in-sync replicas.

        Raises SendFailed with the fate of each record that is not, by its id; ConnectionLost where no
        broker answers. Calls for one Kafka topic are served in the order in which they are made.
        """
        locks = [self._locks.setdefault(topic, asyncio.Lock()) for topic in sorted({tp[0] for tp in records})]
        held: list[asyncio.Lock] = []
        try:
            for lock in locks:
                await lock.acquire()
                held.append(lock)
            await self._store([_Line(tp, list(wanted)) for tp, wanted in records.items()])
        finally:
            for lock in held:
                lock.release()

    async def _store(self, lines: list[_Line]) -> None:
        end = time.monotonic() + self._patience
        failed: dict[str, Fate] = {}
        why = ""
        pause = 0.0
        try:
            while lines:
                if pause:
                    await asyncio.sleep(pause)
                if self._identity is None:
                    self._identity, lacking = await self._new_identity(lines[0].tp[0])
                if self._identity is None:
                    why = lacking
                    for line in lines:
                        line.code = -1
                        failed.update(self._fates(line))
                    break
                for line in lines:
                    line.build(self._identity, self._codec)
                await self._round(lines)
                late = time.monotonic() > end
                for line in lines:
                    text = self._judge(line, late=late)
                    if text:
                        why = text
                        failed.update(self._fates(line))
                stuck = any(line.data is not None for line in lines)
                lines = [line for line in lines if line.batch or line.rest]
                pause = min(max(pause * 2, 0.02), 1.0) if stuck else 0.0
                if stuck and lines:
                    await self._find_leaders(lines)
        except BaseException:
            self._identity = None  # something may be stored under the numbers we would give out again
            raise
        if failed:
            raise SendFailed(f"kafka: {len(failed)} messages not stored: {why}", failed)

    async def _round(self, lines: list[_Line]) -> None:
        """Send the batch of each line once; answers are noted in the lines."""
        by_tp = {line.tp: line for line in lines}
        nodes = by_leader(self._cluster, by_tp)
        for tp in nodes.pop(-1, []):
            by_tp[tp].code = kafka_errors.LeaderNotAvailableError.errno
        if len(nodes) == 1:
            ((node, tps),) = nodes.items()
            await self._ask(node, [by_tp[tp] for tp in tps])
        elif nodes:
            await asyncio.gather(*(self._ask(node, [by_tp[tp] for tp in tps]) for node, tps in nodes.items()))

    async def _ask(self, node: int, lines: list[_Line]) -> None:
        topics: dict[str, list[tuple[int, bytes]]] = {}
        for line in lines:
            assert line.data is not None
            topics.setdefault(line.tp[0], []).append((line.tp[1], line.data))
            line.code = -1
        request = ProduceRequest(None, -1, 10_000, list(topics.items()))
        try:
            response = await self._cluster.call(node, request, PRODUCE)
        except ConnectionLost:
            self._cluster.doubt(node)
            for line in lines:
                line.unclear = True
            return
        codes = {(topic, part[0]): part[1] for topic, parts in response.topics for part in parts}
        for line in lines:
            line.code = codes.get(line.tp, -1)
            if line.code in _ALONE:
                self._cluster.doubt(node)

    def _judge(self, line: _Line, *, late: bool) -> str:
        """What an answer means for a line; a text where the batch under way has failed for good."""
        code = line.code
        if code in _STORED:
            line.stored()
        elif code in _STRANGER:
            line.undo()
            if line.identity is self._identity:
                self._identity = None
            if late:
                return explain(code)
        elif code in _TOO_LARGE and len(line.batch) > 1:
            line.limit = max(1, line.limit // 4) if len(line.batch) > 4 else 1
            line.undo()
        elif code in _UNCLEAR or kafka_errors.for_code(code).retriable:
            line.unclear = line.unclear or code in _UNCLEAR
            if late:
                return f"{line.tp[0]}: {explain(code)}"
        else:
            return lacks(code, "Write", f"topic {line.tp[0]!r}") or f"{line.tp[0]}: {explain(code)}"
        return ""

    def _fates(self, line: _Line) -> dict[str, Fate]:
        """A batch has failed; what comes behind it has too, unless the batch was one record that is too large."""
        fate: Fate = "unknown" if line.unclear else "not stored"
        fates: dict[str, Fate] = {record.id: fate for record in line.batch}
        if line.unclear:
            self._identity = None
        line.batch, line.data, line.unclear = [], None, False
        if line.code not in _TOO_LARGE:
            fates.update({record.id: "not stored" for record in line.rest})
            line.rest.clear()
        return fates

    async def _find_leaders(self, lines: list[_Line]) -> None:
        topics = {line.tp[0] for line in lines}
        await self._cluster.refresh(topics)
        gone = {topic for topic in topics if topic not in self._cluster.topics}
        if gone:
            await self._restore(gone)
        for line in lines:
            count = len(self._cluster.topics.get(line.tp[0], ()))
            if 0 < count <= line.tp[1]:  # made anew, with fewer partitions
                line.undo()
                line.tp = (line.tp[0], line.tp[1] % count)

    async def _new_identity(self, topic: str) -> tuple[_Identity | None, str]:
        """None and the reason where this user has no right to publish, on ``topic`` or at all."""
        for _ in range(20):
            response: Any = await self._cluster.call_any(InitProducerIdRequest(None, NEVER))
            if not response.error_code:
                return _Identity(response.producer_id, response.producer_epoch), ""
            lacking = lacks(response.error_code, "Write", f"topic {topic!r}")
            if lacking:
                return None, f"{lacking}, or IdempotentWrite on the cluster where Kafka is older than 2.8"
            if not kafka_errors.for_code(response.error_code).retriable:
                break
            await asyncio.sleep(0.1)
        raise ConnectionLost(f"kafka: no producer id: {explain(response.error_code)}")
