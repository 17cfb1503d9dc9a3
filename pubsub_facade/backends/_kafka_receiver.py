"""One member on Kafka: what it holds, hands out, parks, buries and commits.

Plain partitions are handed out in order of offset, and filtered here where the definition asks for it. The
partitions of the retry topic are read into a line by time. A partition is given up only after the handlers
that hold its messages are done (bounded), with a commit that says exactly what is not. Nothing is settled
before its copy is stored, and no commit covers what is not settled.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.protocol.admin import DeleteRecordsRequest

from pubsub_facade.backends._kafka_cluster import LATEST, Cluster
from pubsub_facade.backends._kafka_fetch import Fetcher
from pubsub_facade.backends._kafka_member import Membership, NotAMember
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_partition import Partition, Progress
from pubsub_facade.backends._kafka_pins import places
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_records import TP, Outgoing, again, decode, encode_dead, encode_retry
from pubsub_facade.backends._kafka_registry import Entry, Registry
from pubsub_facade.backends._kafka_retry import SLACK, place, ready_at
from pubsub_facade.backends._kafka_topics import Topics
from pubsub_facade.backends.base import Receiver
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.message import Delivery
from pubsub_facade.subscription import Definition, Subscription
from pubsub_facade.topics import PatternSet

log = logging.getLogger("pubsub_facade")

COMMIT_EVERY: Final = 0.15  # seconds
COMMIT_TIMEOUT: Final = 5.0
NUDGE: Final = 0.001  # seconds until a little room in the window is filled
WAITING: Final = 500  # retries of one partition that wait in memory
PURGE_EVERY: Final = 1000  # retries handled until their records are deleted
SUSPECT: Final = 2  # handings without an end, from which on a message is tried with nothing beside it


@dataclass(frozen=True)
class Shared:
    """What all receivers of one backend share."""

    cluster: Cluster
    producer: Producer
    topics: Topics
    registry: Registry
    names: Names
    session_timeout: float
    rebalance_timeout: float
    numbers: itertools.count[int]
    places: dict[str, list[str]]


class KafkaReceiver(Receiver):
    """A member of a named subscription, or the whole of an ephemeral one.

    Arguments:
        subscription: as declared.
        window: deliveries unsettled at once.
        left: called when it is closed.
    """

    def __init__(
        self,
        shared: Shared,
        subscription: Subscription,
        window: int,
        left: Callable[[KafkaReceiver], None],
    ) -> None:
        self.subscription = subscription
        self._shared = shared
        self._window = window
        self._refill = max(1, window // 4)
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._partitions: dict[TP, Partition] = {}
        self._stock: deque[Partition] = deque()  # with something fetched and not handed out
        self._ready: deque[tuple[Partition, Delivery]] = deque()  # given back, due, or to be tried
        self._waiting: list[
            tuple[float, int, Partition, Any, float]
        ] = []  # a heap: when, -, whose, what, due
        self._hops: list[tuple[Partition, Any, float]] = []
        self._sequence = itertools.count()
        self._out = 0  # handed out and not settled
        self._exclusive: Partition | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self._gone: PubSubError | None = None
        self._closed = False
        self._joined: dict[str, int] = {}  # Kafka topic -> partitions, as we last joined
        self._moves = 1 << 62  # the move that was obeyed when last joined; nothing to obey before that
        self._definition = Definition.first(subscription, 0.0)
        self._filtered = False
        number = next(shared.numbers)
        self._fetcher = Fetcher(shared.cluster, ("fetch", number), self._came, self.fail)
        self._group: Membership | None = None
        if subscription.name is not None:
            group = shared.names.group(subscription.name)
            self._group = Membership(
                shared.cluster,
                group,
                ("join", number),
                self,
                shared.session_timeout,
                shared.rebalance_timeout,
                shared.places.setdefault(group, []),
            )

    async def begin(self) -> None:
        """Join, or for an ephemeral subscription: from its return on, nothing published is missed."""
        self._entry()
        if self._group is not None:
            self._group.start()
            return
        await self._shared.cluster.refresh(None)
        await self._shared.registry.refresh()
        tps = self._tps()
        ends = await self._shared.cluster.offsets(dict.fromkeys(tps, LATEST))
        self._hold({tp: Progress(ends.get(tp, 0)) for tp in tps})

    # -- what is ours -----------------------------------------------------------------------------

    def _entry(self) -> Entry | None:
        """What the registry says of us, and take it in."""
        name = self.subscription.name
        entry = None if name is None else self._shared.registry.entry(name)
        if entry is not None:
            self._definition = entry.definition
        definition = self._definition
        self._filtered = len(definition.eras) > 1 or definition.current.filter is not None
        return entry

    def _wanted(self) -> dict[str, str | None]:
        """Kafka topic -> topic, of what we read; None for our own retries."""
        wanted: dict[str, str | None] = dict(
            self._shared.topics.matching(PatternSet(self._definition.patterns))
        )
        if self.subscription.name is not None:
            wanted[self._shared.names.retry(self.subscription.name)] = None
        return wanted

    def _tps(self) -> list[TP]:
        topics = self._shared.cluster.topics
        self._joined = {name: len(topics[name]) for name in self._wanted() if name in topics}
        return [(name, number) for name, count in self._joined.items() for number in range(count)]

    def look(self) -> None:
        """Topics, or what the registry holds, may have changed."""
        if self._closed or self._gone is not None:
            return
        entry = self._entry()
        topics = self._shared.cluster.topics
        wanted = {name: len(topics[name]) for name in self._wanted() if name in topics}
        if self._group is None:
            if wanted != self._joined:
                self._follow()
        elif entry is None:
            self.fail(ConnectionLost(f"kafka: subscription {self.subscription.name!r} was deleted"))
        elif wanted != self._joined or entry.move.number > self._moves:
            self._group.rejoin()

    def _follow(self) -> None:
        """Without a group: topics that are new are ours from their beginning, those gone are forgotten."""
        starts = {tp: Progress(0) for tp in self._tps()}
        for tp in self._partitions.keys() - starts.keys():
            self._out -= _given(self._partitions.pop(tp))
        self._hold({tp: start for tp, start in starts.items() if tp not in self._partitions})

    # -- Owner: what the membership tells ---------------------------------------------------------

    def topics(self) -> Collection[str]:
        return self._joined if self._tps() else ()

    async def assigned(self, tps: Collection[TP]) -> None:
        entry = self._entry()
        assert self._group is not None
        if entry is None:
            raise ConnectionLost(f"kafka: subscription {self.subscription.name!r} was deleted")
        retry = self._shared.names.retry(self.subscription.label)
        starts = await places(self._shared.cluster, self._group.group, retry, tps, entry)
        self._moves = entry.move.number
        partitions = self._make(starts)
        await self._commit(partitions.values())
        self._hold(starts, partitions)

    async def revoke(self) -> None:
        for partition in self._partitions.values():
            partition.held = True
        share = 0.8 if self.subscription.ordered else 0.2
        await self._until_idle(share * self._shared.rebalance_timeout)
        await self._commit_quietly(leaving=True)
        self.forfeit()

    def forfeit(self) -> None:
        self._fetcher.assign(())
        for partition in self._partitions.values():
            partition.forget()
        self._partitions.clear()
        self._stock.clear()
        self._ready.clear()
        self._waiting.clear()
        self._hops.clear()
        self._out = 0
        self._exclusive = None

    def fail(self, error: PubSubError) -> None:
        """`receive` raises this from now on."""
        if self._gone is None:
            self._gone = error
            self._wake()

    async def _until_idle(self, limit: float) -> None:
        """Wait until no handler has a message in hand; those held back for a later attempt do not count."""
        end = self._loop.time() + limit
        while any(map(_in_hand, self._partitions.values())) and self._loop.time() < end:
            await self._a_moment()

    def _make(self, starts: dict[TP, Progress]) -> dict[TP, Partition]:
        names = self._wanted()
        guess = 1 if self.subscription.max_attempts > 1 else 0
        ordered = self.subscription.ordered
        return {
            tp: Partition(tp, names.get(tp[0]), start, guess, ordered=ordered) for tp, start in starts.items()
        }

    def _hold(self, starts: dict[TP, Progress], partitions: dict[TP, Partition] | None = None) -> None:
        self._partitions.update(self._make(starts) if partitions is None else partitions)
        self._fetcher.assign(self._partitions.values())

    # -- handing out ------------------------------------------------------------------------------

    async def receive(self) -> Sequence[Delivery]:
        while True:
            if self._gone is not None:
                raise self._gone
            if self._closed:
                raise ConnectionLost("kafka: the receiver is closed")
            deliveries = self._take()
            if deliveries:
                self._commit_soon()
                return deliveries
            self._waiter = self._loop.create_future()
            if self._waiting:
                self._arm("due", max(0.0, self._waiting[0][0] - time.time()), self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self) -> list[Delivery]:
        if self._waiting:
            self._ripen(time.time())
        out: list[Delivery] = []
        room = self._window - self._out
        self._take_ready(room, out)
        if self._exclusive is None:
            for _ in range(len(self._stock)):
                if len(out) >= room:
                    break
                self._draw(self._stock.popleft(), room, out)
            self._take_ready(room, out)
        self._out += len(out)
        return out

    def _take_ready(self, room: int, out: list[Delivery]) -> None:
        ready = self._ready
        for _ in range(len(ready)):
            if len(out) >= room:
                return
            partition, delivery = ready.popleft()
            if self._exclusive not in (None, partition):
                ready.append((partition, delivery))
            elif delivery.tag[1] in partition.open:
                partition.open[delivery.tag[1]] = delivery
                partition.dirty = True
                out.append(delivery)

    def _draw(self, partition: Partition, room: int, out: list[Delivery]) -> None:
        """Hand out from one partition; it goes to the end of the line of those with something left."""
        if partition.held:
            return
        if partition.topic is None:
            self._shelve(partition)
        elif partition.cautious:
            self._try(partition)
        else:
            accepts = self._definition.accepts if self._filtered else None
            topic = partition.topic
            opened = partition.open
            partition.dirty = True
            while len(out) < room and (record := partition.next()) is not None:
                delivery = self._delivery(partition, record)
                if accepts is not None and not accepts(topic, delivery.headers, delivery.timestamp):
                    continue
                opened[record.offset] = delivery
                out.append(delivery)
        if partition.unread:
            self._stock.append(partition)
        if partition.hungry:
            self._fetcher.room()

    def _delivery(self, partition: Partition, record: Any) -> Delivery:
        topic = partition.topic
        envelope = decode(record, partition.tp, own=topic is None)
        count = partition.count(record.offset) if partition.counts or partition.doubtful else 0
        return Delivery(
            self,
            (partition, record.offset),
            self.subscription.label,
            topic or envelope.topic or partition.tp[0],
            record.value or b"",
            key=envelope.key,
            headers=envelope.headers,
            id=envelope.id,
            content_type=envelope.content_type,
            timestamp=envelope.timestamp,
            attempt=envelope.attempt + count,
            redelivered=count > 0 or partition.seen(record.offset),
            failure=envelope.failure,
        )

    def _came(self, partition: Partition) -> None:
        if partition not in self._stock:
            self._stock.append(partition)
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def hand_out(self, delivery: Delivery) -> bool:
        partition, offset = delivery.tag
        if partition.held or offset not in partition.open:
            return False
        partition.handed.add(offset)
        return True

    # -- retries: a line by time ------------------------------------------------------------------

    def _shelve(self, partition: Partition) -> None:
        """What was read of the retry topic goes in line by the time at which it leaves."""
        if partition.cautious:
            self._try(partition)
            return
        while partition.waiting < WAITING and (record := partition.next()) is not None:
            partition.open[record.offset] = None
            partition.waiting += 1
            due = decode(record, partition.tp, own=True).due
            at = ready_at(partition.tp[1], record.timestamp / 1000, due)
            heapq.heappush(self._waiting, (at, next(self._sequence), partition, record, due))
        self._ripen(time.time())

    def _ripen(self, now: float) -> None:
        """What has waited long enough is handed out, or goes where the rest of its delay is waited for."""
        waiting = self._waiting
        hopping = bool(self._hops)
        while waiting and waiting[0][0] <= now:
            _, _, partition, record, due = heapq.heappop(waiting)
            partition.waiting -= 1
            if partition.unread and partition not in self._stock:
                self._stock.append(partition)
            if due - now > SLACK:
                self._hops.append((partition, record, due))
            else:
                self._ready.append((partition, self._delivery(partition, record)))
        if self._hops and not hopping:
            self._spawn(self._hop())

    async def _hop(self) -> None:
        await asyncio.sleep(0)  # all that is due in this turn goes together
        hops, self._hops = self._hops, []
        now = time.time()
        try:
            await self._store_retries((again(record), due, now) for _, record, due in hops)
        except PubSubError as error:
            log.info("%s: retries not moved on, again in 1 s: %s", self.subscription.label, error)
            for partition, record, due in hops:
                if record.offset in partition.open:
                    partition.waiting += 1
                    heapq.heappush(self._waiting, (now + 1, next(self._sequence), partition, record, due))
            self._wake()
            return
        for partition, record, _ in hops:
            partition.settle(record.offset)
        self._commit_soon()

    async def _store_retries(self, records: Iterable[tuple[Outgoing, float, float]]) -> None:
        """Store copies, each with the time it is due at and the time now."""
        name = self._shared.names.retry(self.subscription.label)
        count = len(self._shared.cluster.topics.get(name, ())) or 1
        lines: dict[TP, list[Outgoing]] = {}
        spread = self._shared.producer.turn()
        for record, due, now in records:
            lines.setdefault((name, place(due - now, spread, count)), []).append(record)
        await self._shared.producer.store(lines)

    # -- messages that may kill ------------------------------------------------------------------

    def _try(self, partition: Partition) -> None:
        """Its last owner died: one at a time, with a commit before each that says how often it was tried."""
        if partition.trial is not None or partition.open or self._exclusive is not None:
            return
        record = partition.next()
        if record is None:
            return
        offset = record.offset
        partition.counts[offset] = partition.count(offset)
        partition.trial = offset
        partition.open[offset] = None
        if partition.counts[offset] >= SUSPECT:
            self._exclusive = partition
        self._spawn(self._trial(partition, record))

    async def _trial(self, partition: Partition, record: Any) -> None:
        delivery = self._delivery(partition, record)
        if partition.topic is None:
            pause = decode(record, partition.tp, own=True).due - time.time()
            await asyncio.sleep(max(0.0, pause))
        while self._exclusive is partition and self._out and not partition.held:
            await self._a_moment()
        partition.handed.add(record.offset)
        while not partition.held:
            try:
                await self._commit([partition])
            except NotAMember:
                return
            except ConnectionLost as error:
                log.debug("%s: %s; trying again", self.subscription.label, error)
                await asyncio.sleep(0.2)
                continue
            self._ready.append((partition, delivery))
            self._wake()
            return

    # -- settling ---------------------------------------------------------------------------------

    def _settle(self, delivery: Delivery) -> bool:
        partition, offset = delivery.tag
        if not partition.settle(offset):
            return False  # of a partition that was given up: it comes again
        self._out -= 1
        self._settled.set()
        if partition.trial == offset:
            partition.trial = None
            if self._exclusive is partition:
                self._exclusive = None
        if self._waiter is not None:
            if self._window - self._out >= self._refill or not self._out:
                self._wake()
            elif "nudge" not in self._timers:
                self._arm("nudge", NUDGE, self._wake)
        return True

    def ack(self, delivery: Delivery) -> None:
        if self._settle(delivery):
            self._commit_soon()

    def release(self, delivery: Delivery) -> None:
        partition, offset = delivery.tag
        if partition.held or offset not in partition.open:
            return
        partition.handed.discard(offset)
        partition.open[offset] = None
        self._out -= 1
        self._ready.append((partition, _afresh(delivery)))
        self._wake()

    async def park(self, deliveries: Sequence[Delivery]) -> None:
        ours = [delivery for delivery in deliveries if delivery.tag[1] in delivery.tag[0].open]
        now = time.time()
        copies = [
            (encode_retry(delivery, delivery.attempt + 1, now + delivery.delay), now + delivery.delay, now)
            for delivery in ours
        ]
        if copies:
            await self._store_retries(copies)
        for delivery in ours:
            self.ack(delivery)

    async def bury(self, deliveries: Sequence[Delivery]) -> None:
        ours = [delivery for delivery in deliveries if delivery.tag[1] in delivery.tag[0].open]
        if not ours:
            return
        name = self._shared.names.dead(self.subscription.label)
        await self._shared.topics.create_own(self._shared.topics.dead_spec(name))
        await self._shared.producer.store({(name, 0): [encode_dead(delivery) for delivery in ours]})
        for delivery in ours:
            self.ack(delivery)

    # -- committing -------------------------------------------------------------------------------

    def _commit_soon(self) -> None:
        if self._group is not None and "commit" not in self._timers and not self._closed:
            self._arm("commit", COMMIT_EVERY, lambda: self._spawn(self._commit_quietly()))

    async def _commit(self, partitions: Iterable[Partition], *, leaving: bool = False) -> None:
        """Raises NotAMember, ConnectionLost."""
        if self._group is None:
            return
        chosen = list(partitions)
        progress = {part.tp: part.progress(0 if leaving else self._window) for part in chosen}
        for partition in chosen:
            partition.dirty = False
        if not progress:
            return
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT):
                await self._group.commit(progress)
        except BaseException as error:
            for partition in chosen:
                partition.dirty = True
            if isinstance(error, TimeoutError):
                raise ConnectionLost("kafka: the commit was not answered in time") from error
            raise

    async def _commit_quietly(self, *, leaving: bool = False) -> None:
        """Commit what has changed, all where we leave; what fails is done with the next commit, or comes again."""
        chosen = [partition for partition in self._partitions.values() if leaving or partition.dirty]
        try:
            await self._commit(chosen, leaving=leaving)
        except NotAMember as error:
            log.debug("%s: not committed: %s", self.subscription.label, error)
        except ConnectionLost as error:
            log.debug("%s: not committed: %s", self.subscription.label, error)
            if not leaving:
                self._commit_soon()
        except PubSubError as error:
            self.fail(error)
        else:
            await self._purge(chosen)

    async def _purge(self, partitions: Iterable[Partition]) -> None:
        """Retries that are handled are deleted: their topic has no other end to them."""
        for partition in partitions:
            mark = next(iter(partition.open), partition.position)
            if partition.topic is None and mark - partition.purged >= PURGE_EVERY:
                partition.purged = mark
                topic, number = partition.tp
                request = DeleteRecordsRequest([(topic, [(number, mark)])], 5000)
                try:
                    await self._shared.cluster.call(self._shared.cluster.leader(partition.tp), request)
                except ConnectionLost as error:
                    log.debug("%s: handled retries not deleted yet: %s", self.subscription.label, error)

    async def flush(self) -> None:
        await self._commit_quietly()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._left(self)
        for timer in self._timers.values():
            timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        for partition in self._partitions.values():
            partition.held = True
        if self._group is not None:
            await self._group.stop()
            if self._gone is None:
                await self._commit_quietly(leaving=True)
        self.forfeit()
        await self._fetcher.close()
        if self._group is not None:
            await self._group.leave()
        self._wake()

    async def _a_moment(self) -> None:
        """Until something was settled, or a little later: a held delivery's state changes without a word."""
        try:
            async with asyncio.timeout(0.05):
                await self._settled.wait()
        except TimeoutError:
            return
        finally:
            self._settled.clear()

    # -- turns of the loop ------------------------------------------------------------------------

    def _arm(self, name: str, delay: float, action: Callable[[], None]) -> None:
        """Do something later; another timer of the name is replaced."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

        def run() -> None:
            self._timers.pop(name, None)
            action()

        self._timers[name] = self._loop.call_later(delay, run)

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine, name=f"pubsub-kafka-{self.subscription.label}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error if isinstance(error, PubSubError) else ConnectionLost(f"kafka: {error!r}"))


def _in_hand(partition: Partition) -> bool:
    """Whether a handler is at work on one of its messages; one that is held for a later attempt is not."""
    open = partition.open
    return any(
        (delivery := open.get(offset)) is not None and not delivery.delay for offset in partition.handed
    )


def _given(partition: Partition) -> int:
    """Give a partition up; returns how many of its deliveries were out."""
    given = sum(delivery is not None for delivery in partition.open.values())
    partition.forget()
    return given


def _afresh(delivery: Delivery) -> Delivery:
    """The same message, to be handed out again as the same attempt."""
    return Delivery(
        delivery.receiver,
        delivery.tag,
        delivery.subscription,
        delivery.topic,
        delivery.body,
        key=delivery.key,
        headers=delivery.headers,
        id=delivery.id,
        content_type=delivery.content_type,
        timestamp=delivery.timestamp,
        attempt=delivery.attempt,
        redelivered=True,
        failure=delivery.failure,
    )
