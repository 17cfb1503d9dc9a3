"""One member on Kafka: what it holds, hands out, parks and buries; `_kafka_commits` tells its group.

Plain partitions are handed out in order of offset, and filtered here where the definition asks for it. The
partitions of the retry topic are read into a line by time. A partition is given up only after the handlers
that hold its messages are done (bounded), with a commit that says exactly what is not. Nothing is settled
before its copy is stored, and no commit covers what is not settled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from pubsub_facade.backends._kafka_cluster import LATEST
from pubsub_facade.backends._kafka_commits import Commits
from pubsub_facade.backends._kafka_fetch import Fetcher
from pubsub_facade.backends._kafka_member import Membership, NotAMember
from pubsub_facade.backends._kafka_partition import Partition, Progress
from pubsub_facade.backends._kafka_pins import places
from pubsub_facade.backends._kafka_records import TP, afresh, decode, encode_dead, encode_retry
from pubsub_facade.backends._kafka_registry import Entry
from pubsub_facade.backends._kafka_shared import Shared
from pubsub_facade.backends._kafka_shelf import Shelf
from pubsub_facade.backends._kafka_wire import same
from pubsub_facade.backends.base import Receiver
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.message import Delivery
from pubsub_facade.subscription import Definition, Subscription
from pubsub_facade.topics import PatternSet

log = logging.getLogger("pubsub_facade")

JOIN_WAIT: Final = 5.0  # seconds
FRESH: Final = 0.2  # seconds that the list of topics may be old when we join
NUDGE: Final = 0.001  # seconds until a little room in the window is filled
GONE: Final = (0, None)  # of a topic in `There` that is to be looked at anew
SUSPECT: Final = 2  # handings without an end, from which on a message is tried with nothing beside it

There = dict[str, tuple[int, str | None]]
"""Of what a member reads and is there: Kafka topic -> how many partitions, and its id."""


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
        self._shelf = Shelf(shared.cluster, shared.producer, shared.names.retry(subscription.label))
        self._out = 0  # handed out and not settled
        self._suspects: deque[tuple[Partition, Any]] = deque()  # to be tried alone
        self._exclusive: Partition | None = None  # whose message is tried with nothing beside it
        self._waiter: asyncio.Future[None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self._in_group = asyncio.Event()
        self._gone: PubSubError | None = None
        self._closed = False
        self._seen: object = None  # what `look` saw last
        self._joined: There = {}  # as we last joined
        self._moves = 1 << 62  # the move that was obeyed when last joined; nothing to obey before that
        self._define(Definition.first(subscription, 0.0))
        number = next(shared.numbers)
        self._fetcher = Fetcher(shared.cluster, ("fetch", number), self._came, self._lost, self.fail)
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
        self._commits = Commits(
            self._group,
            self._partitions,
            window,
            self._shelf,
            spawn=self._spawn,
            came=self._came,
            fail=self.fail,
        )

    async def begin(self) -> None:
        """Join, or for an ephemeral subscription: from its return on, nothing published is missed."""
        self._entry()
        if self._group is not None:
            self._group.start()
            await self._until_joined()
            return
        await self._shared.cluster.refresh(None)
        await self._shared.registry.refresh()
        tps, ids = self._tps(), self._shared.cluster.ids
        ends = await self._shared.cluster.offsets(dict.fromkeys(tps, LATEST))
        self._hold({tp: Progress(ends.get(tp, 0), topic_id=ids.get(tp[0])) for tp in tps})
        await self._shared.presence.enter(self, self.subscription)  # last: what is accepted for us now comes

    async def _until_joined(self) -> None:
        """Until we share in the work; where others' handlers keep the group waiting, it goes on behind us."""
        try:
            async with asyncio.timeout(JOIN_WAIT):
                await self._in_group.wait()
        except TimeoutError:
            log.debug("%s: the group is not ready yet", self.subscription.label)
        if self._gone is not None:
            raise self._gone

    # -- what is ours -----------------------------------------------------------------------------

    def _entry(self) -> Entry | None:
        """What the registry says of us, and take it in."""
        name = self.subscription.name
        entry = None if name is None else self._shared.registry.entry(name)
        if entry is not None and entry.definition != self._definition:
            self._define(entry.definition)
        return entry

    def _define(self, definition: Definition) -> None:
        self._definition = definition
        self._patterns = PatternSet(definition.patterns)
        self._filtered = len(definition.eras) > 1 or definition.current.filter is not None

    def _wanted(self) -> dict[str, str | None]:
        """Kafka topic -> topic, of what we read; None for our own retries."""
        wanted: dict[str, str | None] = dict(self._shared.topics.matching(self._patterns))
        if self.subscription.name is not None:
            wanted[self._shared.names.retry(self.subscription.name)] = None
        return wanted

    def _there(self) -> There:
        topics, ids = self._shared.cluster.topics, self._shared.cluster.ids
        return {name: (len(topics[name]), ids.get(name)) for name in self._wanted() if name in topics}

    def _tps(self) -> list[TP]:
        self._joined = self._there()
        return [(name, number) for name, (count, _) in self._joined.items() for number in range(count)]

    def look(self) -> None:
        """Topics, or what the registry holds, may have changed."""
        if self._closed or self._gone is not None:
            return
        entry = self._entry()
        seen = (self._shared.cluster.version, entry, len(self._shared.registry.aliases))
        if seen == self._seen:
            return
        self._seen = seen
        wanted = self._there()
        if self._group is None:
            if wanted != self._joined:
                self._follow()
        elif entry is None:
            self.fail(ConnectionLost(f"kafka: subscription {self.subscription.name!r} was deleted"))
        elif wanted != self._joined or entry.move.number > self._moves:
            self._group.rejoin()

    def _follow(self) -> None:
        """Without a group: topics that are new are ours from their beginning, those gone are forgotten."""
        before = self._joined
        tps, ids = self._tps(), self._shared.cluster.ids
        starts = {tp: Progress(0, topic_id=ids.get(tp[0])) for tp in tps}
        for tp, partition in list(self._partitions.items()):
            id = ids.get(tp[0])
            back = before.get(tp[0]) == GONE and (id is None or partition.topic_id is None)
            if tp not in starts or back or not same(partition.topic_id, id):
                self._out -= self._partitions.pop(tp).forget()
        self._hold({tp: start for tp, start in starts.items() if tp not in self._partitions})

    def _lost(self, names: Collection[str]) -> None:
        """Nothing is read of these any more: `look` has to, whether they are there again by then or not."""
        for name in names:
            self._joined[name] = GONE
        self._seen = None

    # -- Owner: what the membership tells ---------------------------------------------------------

    async def topics(self) -> Collection[str]:
        await self._shared.cluster.refresh(None, age=FRESH)
        self._tps()
        return self._joined

    async def assigned(self, tps: Collection[TP]) -> None:
        entry = self._entry()
        assert self._group is not None
        if entry is None:
            raise ConnectionLost(f"kafka: subscription {self.subscription.name!r} was deleted")
        retry = self._shared.names.retry(self.subscription.label)
        starts = await places(self._shared.cluster, self._group.group, retry, tps, entry)
        self._moves = entry.move.number
        self._hold(starts)
        self._in_group.set()

    async def revoke(self) -> None:
        for partition in self._partitions.values():
            partition.held = True
        share = 0.8 if self.subscription.ordered else 0.2
        await self._until_idle(share * self._shared.rebalance_timeout)
        await self._commits.quietly(leaving=True)
        self.forfeit()

    def forfeit(self) -> None:
        self._fetcher.assign(())
        for partition in self._partitions.values():
            partition.forget()
        self._partitions.clear()
        self._stock.clear()
        self._ready.clear()
        self._suspects.clear()
        self._shelf.clear()
        self._out = 0
        self._exclusive = None

    def fail(self, error: PubSubError) -> None:
        """`receive` raises this from now on."""
        if self._gone is None:
            self._gone = error
            self._in_group.set()
            self._wake()

    async def _until_idle(self, limit: float) -> None:
        """Wait until no handler has a message in hand; those held back for a later attempt do not count."""
        end = self._loop.time() + limit
        while any(part.in_hand for part in self._partitions.values()) and self._loop.time() < end:
            await self._a_moment()

    def _make(self, starts: dict[TP, Progress]) -> dict[TP, Partition]:
        names = self._wanted()
        guess = 1 if self.subscription.max_attempts > 1 else 0
        ordered = self.subscription.ordered
        return {
            tp: Partition(tp, names.get(tp[0]), start, guess, ordered=ordered) for tp, start in starts.items()
        }

    def _hold(self, starts: dict[TP, Progress]) -> None:
        self._partitions.update(self._make(starts))
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
                self._commits.soon()
                return deliveries
            self._waiter = self._loop.create_future()
            if (at := self._shelf.next_at) is not None:
                self._arm("due", max(0.0, at - time.time()), self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _take(self) -> list[Delivery]:
        if self._shelf.next_at is not None:
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
        if not partition.marked and self._group is not None:
            self._commits.mark(partition)
            return
        if partition.topic is None:
            self._shelf.fill(partition)
            self._ripen(time.time())
        elif partition.cautious:
            if partition.trial is None and (record := partition.next()) is not None:
                partition.open[record.offset] = None
                self._try(partition, record)
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

    def _ripen(self, now: float) -> None:
        """What has waited long enough is handed out, or goes where the rest of its delay is waited for."""
        moving = self._shelf.moving
        for partition, record in self._shelf.ripe(now):
            if partition.doubtful and partition.seen(record.offset):
                self._try(partition, record)
            else:
                self._ready.append((partition, self._delivery(partition, record)))
            if partition.unread and partition not in self._stock:
                self._stock.append(partition)
        if self._shelf.moving and not moving:
            self._spawn(self._move_on())

    async def _move_on(self) -> None:
        await asyncio.sleep(0)  # all that is due in this turn goes together
        try:
            await self._shelf.move_on()
        except PubSubError as error:
            log.info("%s: retries not moved on yet: %s", self.subscription.label, error)
        self._commits.soon()
        self._wake()

    # -- messages that may kill ------------------------------------------------------------------

    def _try(self, partition: Partition, record: Any) -> None:
        """Its last owner died: one at a time, with a commit before each that says how often it was tried."""
        self._suspects.append((partition, record))
        self._try_next()

    def _try_next(self) -> None:
        for _ in range(len(self._suspects)):
            if self._exclusive is not None:
                return
            partition, record = self._suspects.popleft()
            if partition.held:
                continue
            if partition.trial is not None:
                self._suspects.append((partition, record))
                continue
            partition.trial = record.offset
            partition.counts[record.offset] = count = partition.count(record.offset)
            if count >= SUSPECT:
                self._exclusive = partition
            self._spawn(self._trial(partition, record))

    async def _trial(self, partition: Partition, record: Any) -> None:
        delivery = self._delivery(partition, record)
        while self._exclusive is partition and self._out and not partition.held:
            await self._a_moment()
        partition.handed.add(record.offset)
        while not partition.held:
            try:
                # What was handled stays so, should we die now.
                await self._commits.commit([*self._commits.dirty(), partition])
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
            self._try_next()
        if self._waiter is not None:
            if self._window - self._out >= self._refill or not self._out:
                self._wake()
            elif "nudge" not in self._timers:
                self._arm("nudge", NUDGE, self._wake)
        return True

    def ack(self, delivery: Delivery) -> None:
        if self._settle(delivery):
            self._commits.soon()

    def release(self, delivery: Delivery) -> None:
        partition, offset = delivery.tag
        if partition.held or offset not in partition.open:
            return
        partition.handed.discard(offset)
        partition.open[offset] = None
        self._out -= 1
        self._ready.append((partition, afresh(delivery)))
        self._wake()

    async def park(self, deliveries: Sequence[Delivery]) -> None:
        ours = [delivery for delivery in deliveries if delivery.tag[1] in delivery.tag[0].open]
        now = time.time()
        if ours:
            dues = [now + delivery.delay for delivery in ours]
            copies = [encode_retry(each, each.attempt + 1, due) for each, due in zip(ours, dues, strict=True)]
            await self._shelf.store(zip(copies, dues, strict=True))
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

    # -- leaving ----------------------------------------------------------------------------------

    async def flush(self) -> None:
        await self._commits.quietly()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._close()
        finally:  # cut short, too: who waits in `receive` is told
            self._wake()

    async def _close(self) -> None:
        self._left(self)
        self._commits.stop()
        for timer in self._timers.values():
            timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        for partition in self._partitions.values():
            partition.held = True
        if self._group is not None:
            await self._group.stop()
            if self._gone is None:
                await self._commits.quietly(leaving=True)
        self.forfeit()
        await self._fetcher.close()
        if self._group is not None:
            await self._group.leave()
        elif self._gone is None:
            await self._shared.presence.leave(self)
        else:
            self._shared.presence.forget(self)

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
