"""One member on RabbitMQ: a channel that consumes, acks merged once per turn of the loop, copies by confirm.

A message that kills its process must end in the dead letters, and those that were merely in its company
must not. RabbitMQ counts for each message how often it came back, for the guilty and their company alike.
So what came back is stored anew as its next attempt; what came back twice goes into a queue apart, from
which each member takes one at a time: there, the count of one is its own (`_rabbitmq_trials` for ordered
subscriptions, which cannot set aside). What is given back unhandled is stored anew too, uncounted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from pubsub_facade.acks import LowWaterMark
from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends import _rabbitmq_wire as mapping
from pubsub_facade.backends._rabbitmq_confirms import Confirms, Outgoing
from pubsub_facade.backends._rabbitmq_link import Channel, unused
from pubsub_facade.backends._rabbitmq_names import Names, Record, level_for
from pubsub_facade.backends._rabbitmq_retries import Retries
from pubsub_facade.backends._rabbitmq_topology import Topology
from pubsub_facade.backends._rabbitmq_trials import Trials
from pubsub_facade.backends.base import Receiver, Timer
from pubsub_facade.errors import ConnectionLost, PubSubError, SendFailed
from pubsub_facade.message import Delivery, new_id
from pubsub_facade.subscription import Definition, Subscription

APART: Final = "apart"  # consumer tag of the queue of what came back twice
IDLE_FLUSH: Final = 0.5  # s after which acks above a stuck delivery are sent, however few
GIVE_BACK_TIMEOUT: Final = 3.0  # s for what is unsettled to be stored anew by a member that leaves
QUIET: Final = 0.02  # s without an arrival until nothing is taken to be on its way
MAX_PREFETCH: Final = 65535
TRIALS_AFTER: Final = 0.2  # s from joining on, for all queues to have delivered
PATIENCE: Final = 2.0  # s that one on trial may be in hand before the next one is tried beside it
EARLY: Final = 1.0  # s before its time that a message may be handed out: clocks differ


class RabbitmqReceiver(Receiver):
    """A member of a named subscription, or of an ephemeral one (``record`` is None).

    Arguments:
        channel: its own.
        filtering: of an ephemeral one.
        forget: told when it is closed.
    """

    def __init__(
        self,
        channel: Channel,
        topology: Topology,
        copies: Confirms,
        subscription: Subscription,
        window: int,
        record: Record | None,
        filtering: Definition | None,
        forget: Callable[[RabbitmqReceiver], None],
    ) -> None:
        self._channel = channel
        self._link = channel.link
        self._topology = topology
        self._copies = copies
        self._label = subscription.label
        self._window = window
        self._max_attempts = subscription.max_attempts
        self._record = record
        self._filtering = filtering if record is None else record.filtering
        self._forget = forget
        self._trials = Trials() if record is not None and record.definition.ordered else None
        self._sets_aside = record is not None and self._trials is None
        self._retries = None if record is None else Retries(topology, copies, record, self.fail)
        self._loop = asyncio.get_running_loop()
        self._mark: LowWaterMark[int] = LowWaterMark()
        self._arrived: deque[frames.Content] = deque()
        self._ready: deque[Delivery] = deque()  # may be handed out next
        self._suspects: list[frames.Content] = []  # to be set aside
        self._early: list[tuple[Delivery, float]] = []  # to be parked until their time
        self._refused: list[Delivery] = []  # by the filter, as far as we know
        self._out: dict[int, Delivery] = {}  # handed out and not settled, by tag
        self._returning: list[Delivery] = []  # to be given back
        self._giving_back: asyncio.Task[None] | None = None
        self._held: set[int] = set()  # of these: wait for their next attempt in the member
        self._waiter: asyncio.Future[None] | None = None
        self._flushing = False
        self._idle_flush: asyncio.TimerHandle | None = None
        self._trials_from = self._loop.time() + TRIALS_AFTER
        self._impatient = False
        self._patience: asyncio.TimerHandle | None = None  # with the one on trial
        self._error: PubSubError | None = None
        self._closed = False
        self._consumers: list[str] = []
        channel.on_closed.append(self.fail)
        channel.pika.add_on_cancel_callback(self._cancelled)
        self._link.attach(channel.number, self)

    async def join(self, queues: Sequence[str], apart: str | None) -> None:
        """Begin to consume.

        Arguments:
            queues: share the window between them.
            apart: from here one is taken at a time.
        """
        prefetch = max(1, min(self._window, MAX_PREFETCH) // len(queues))
        await self._channel.call(self._channel.pika.basic_qos, prefetch_count=prefetch)
        for index, queue in enumerate(queues):
            await self._consume(queue, str(index))
        if apart is not None:
            await self._channel.call(self._channel.pika.basic_qos, prefetch_count=1)
            await self._consume(apart, APART)
        if self._retries is not None and self._record is not None:
            self._retries.watch(self._record.levels)

    async def _consume(self, queue: str, tag: str) -> None:
        self._consumers.append(tag)
        await self._channel.call(self._channel.pika.basic_consume, queue, unused, consumer_tag=tag)

    # -- Sink ---------------------------------------------------------------------------------------

    def content(self, content: frames.Content) -> None:
        self._mark.delivered(content.tag)
        self._arrived.append(content)
        if self._waiter is not None:
            self._wake()

    def confirmed(self, tag: int, multiple: bool, stored: bool) -> None:
        return

    def empty(self) -> None:
        return

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _cancelled(self, frame: Any) -> None:
        self._consumers.remove(frame.method.consumer_tag)
        self.fail(ConnectionLost(f"rabbitmq: a queue of subscription {self._label!r} was deleted"))

    def fail(self, error: PubSubError) -> None:
        """The link is gone, or what was consumed from: `receive` raises."""
        if self._error is None:
            self._error = error
            self._wake()

    def learn(self, record: Record) -> None:
        """A subscription was declared anew, by whichever process."""
        if self._record is not None and self._record.names == record.names:
            self._record = record
            self._filtering = record.filtering
            if self._retries is not None:
                self._retries.watch(record.levels)

    def is_of(self, names: Names) -> bool:
        """Whether this is a member of that subscription."""
        return self._record is not None and self._record.names == names

    @property
    def consumers(self) -> int:
        """How many queues it consumes from."""
        return len(self._consumers)

    @property
    def waiting(self) -> int:
        """Retries that it holds until their time comes."""
        return 0 if self._retries is None else self._retries.held

    @property
    def unsettled(self) -> int:
        """Deliveries that have arrived and are not settled."""
        return self._mark.unsettled

    # -- receive ----------------------------------------------------------------------------------

    async def receive(self) -> Sequence[Delivery]:
        while True:
            if self._error is not None or self._closed:
                raise self._error or ConnectionLost(f"rabbitmq: subscription {self._label!r}: left")
            if self._suspects or self._early or self._refused:
                await self._put_away()
            if self._trials is not None and self._trials.on_trial and not self._busy:
                await self._acquit()
            batch = self._take()
            if batch:
                for delivery in batch:
                    self._out[delivery.tag] = delivery
                return batch
            if self._suspects or self._early or self._refused:
                continue
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    @property
    def _busy(self) -> int:
        return len(self._out) - len(self._held)

    @property
    def _beside(self) -> int:
        """How many in hand speak against a trial now; before all queues have told what they have: one."""
        assert self._trials is not None
        if self._trials.suspects and self._loop.time() < self._trials_from:
            self._loop.call_at(self._trials_from, self._wake)
            return max(1, self._busy)
        return 0 if self._impatient else self._busy

    def _take(self) -> list[Delivery]:
        room = self._window - len(self._out)
        batch: list[Delivery] = []
        ready, arrived = self._ready, self._arrived
        while ready and len(batch) < room:
            batch.append(ready.popleft())
        if self._trials is not None:
            while arrived:
                self._trials.push(arrived.popleft())
            while len(batch) < room and (found := self._trials.pop(self._beside + len(batch))) is not None:
                self._sort(*found, batch)
            if self._trials.on_trial and self._patience is None:
                self._patience = self._loop.call_later(PATIENCE, self._lose_patience)
            return batch
        while arrived and len(batch) < room:
            content = arrived.popleft()
            returns = 0
            if content.redelivered and self._sets_aside:
                returns = mapping.returns_of(content)
                if returns and content.consumer != APART:
                    self._suspects.append(content)
                    continue
            self._sort(content, returns, True, batch)
        return batch

    def _sort(self, content: frames.Content, returns: int, may_condemn: bool, batch: list[Delivery]) -> None:
        delivery, due = mapping.read_delivery(self, self._label, content)
        if returns:
            counted = delivery.attempt + returns
            delivery.attempt = (
                counted if may_condemn else max(delivery.attempt, min(counted, self._max_attempts))
            )
        if content.consumer == APART:
            delivery.redelivered = True
        if due and due - time.time() > EARLY:
            self._early.append((delivery, due))
        elif self._accepts(delivery):
            batch.append(delivery)
        else:
            self._refused.append(delivery)

    def _accepts(self, delivery: Delivery) -> bool:
        filtering = self._filtering
        return filtering is None or filtering.accepts(delivery.topic, delivery.headers, delivery.timestamp)

    async def _put_away(self) -> None:
        """What is not handed out: set aside, parked until its time, dropped by the filter."""
        if self._suspects:
            copies = [self._struck(content) for content in self._suspects]
            await self._store(copies)
            self._suspects.clear()
        if self._early:
            now = time.time()
            parked = [
                (delivery, await self._waiting(delivery, due - now, delivery.attempt))
                for delivery, due in self._early
            ]
            await self._store(parked)
            self._early.clear()
        if self._refused:
            await self._drop()

    def _struck(self, content: frames.Content) -> tuple[Delivery, Outgoing]:
        """The next attempt of what was out when a process or link was lost: one at a time from the second on.

        It gets one more trial whatever the count says: it may have been in bad company.
        """
        assert self._record is not None
        names = self._record.names
        delivery, _ = mapping.read_delivery(self, self._label, content)
        attempt = max(delivery.attempt, min(delivery.attempt + 1, self._max_attempts))
        queue = names.apart if mapping.is_struck(content) else names.queue
        return delivery, self._copy(delivery, queue, attempt=attempt, struck=True)

    async def _drop(self) -> None:
        """Ack what the filter refuses, once it is known to be the newest: a new one may want it."""
        if self._record is not None:
            record = await self._topology.record(self._label, self._channel)
            if record is None:
                raise ConnectionLost(f"rabbitmq: subscription {self._label!r} was deleted")
            if record != self._record:
                self.learn(record)
        for delivery in self._refused:
            if self._accepts(delivery):
                self._ready.append(delivery)
            else:
                self._settle(delivery)
        self._refused.clear()

    async def _acquit(self) -> None:
        """End a trial once the broker has seen the ack: the next one may kill this process."""
        assert self._record is not None
        assert self._trials is not None
        self._flush_all()
        await self._topology.versions(self._channel, self._record.names)
        self._end_trial()
        self._impatient = False

    def _end_trial(self) -> None:
        assert self._trials is not None
        self._trials.end()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _lose_patience(self) -> None:
        """What is in hand that long kills nobody, and its owner may be waiting for more before it settles."""
        self._end_trial()
        self._impatient = True
        self._wake()

    # -- settle -----------------------------------------------------------------------------------

    def ack(self, delivery: Delivery) -> None:
        if self._settle(delivery) and self._waiter is not None:
            self._wake()

    def _settle(self, delivery: Delivery) -> bool:
        tag = delivery.tag
        if not self._mark.settle(tag):
            return False
        self._out.pop(tag, None)
        if self._held:
            self._held.discard(tag)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return True

    def release(self, delivery: Delivery) -> None:
        if self._trials is not None:
            # In order means: with all that came after it. They are in line already, so all come again.
            self._loop.call_soon(
                self.fail, ConnectionLost("a delivery was given back: all come again, in order")
            )
        elif self._sets_aside:
            if self._mark.is_open(delivery.tag):
                self._returning.append(delivery)
                if self._giving_back is None:
                    self._giving_back = self._loop.create_task(self._give_back(), name="pubsub-give-back")
        elif self._mark.settle_singly(delivery.tag):
            del self._out[delivery.tag]
            if self._channel.error is None:
                self._link.write([frames.nack(self._channel.number, delivery.tag, requeue=True)])
            self._wake()

    async def _give_back(self) -> None:
        """Store anew, as the same attempt, what was given back: RabbitMQ would count its return."""
        assert self._record is not None
        queue = self._record.names.queue
        try:
            while self._returning:
                deliveries, self._returning = self._returning, []
                copies = [(d, self._copy(d, queue, attempt=d.attempt)) for d in deliveries]
                await self._store(copies)
        except PubSubError as error:  # all that is unsettled comes again
            self.fail(
                ConnectionLost(f"rabbitmq: {len(deliveries)} deliveries could not be given back: {error}")
            )
        finally:
            self._giving_back = None

    def hold(self, delivery: Delivery, wake: Callable[[Delivery], None]) -> Timer:
        def again(delivery: Delivery) -> None:
            self._held.discard(delivery.tag)
            wake(delivery)

        self._held.add(delivery.tag)
        self._wake()
        return super().hold(delivery, again)

    def _flush(self) -> None:
        self._flushing = False
        if self._channel.error is not None:
            return
        mark = self._mark.take_mark()
        singles = self._mark.take_singles(max(1, self._window // 2))
        self._tell(mark, singles)
        if self._idle_flush is None:
            self._idle_flush = self._loop.call_later(IDLE_FLUSH, self._flush_all)

    def _flush_all(self) -> None:
        if self._idle_flush is not None:
            self._idle_flush.cancel()
            self._idle_flush = None
        if self._channel.error is None:
            self._tell(self._mark.take_mark(), self._mark.take_singles(1))

    def _tell(self, mark: int | None, singles: list[int]) -> None:
        number = self._channel.number
        data = [] if mark is None else [frames.ack(number, mark, multiple=True)]
        data += [frames.ack(number, tag, multiple=False) for tag in singles]
        if data:
            self._link.write(data)

    async def flush(self) -> None:
        self._flush_all()
        await asyncio.sleep(0)  # the link writes once per turn

    # -- copies -----------------------------------------------------------------------------------

    async def park(self, deliveries: Sequence[Delivery]) -> None:
        mine = self._open(deliveries)
        copies = [
            (delivery, await self._waiting(delivery, delivery.delay, delivery.attempt + 1))
            for delivery in mine
        ]
        await self._store(copies)

    async def bury(self, deliveries: Sequence[Delivery]) -> None:
        mine = self._open(deliveries)
        if mine:
            assert self._record is not None
            dead = self._record.names.dead
            copies = [(delivery, self._copy(delivery, dead)) for delivery in mine]
            await self._store(copies)

    def _open(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those that are not settled; raises where the link is gone and all come again."""
        if self._closed:
            return []
        if self._error is not None:
            raise self._error
        return [delivery for delivery in deliveries if self._mark.is_open(delivery.tag)]

    async def _waiting(self, delivery: Delivery, delay: float, attempt: int) -> Outgoing:
        """A copy that returns after ``delay`` seconds."""
        assert self._record is not None
        names = self._record.names
        if delay <= 0:
            return self._copy(delivery, names.queue, attempt=attempt)
        level = await self._topology.retry_level(names, level_for(delay)[0])
        if self._retries is not None:
            self._retries.watch([level])
        return self._copy(delivery, names.retry(level), attempt=attempt, due=time.time() + delay)

    def _copy(
        self,
        delivery: Delivery,
        queue: str,
        *,
        attempt: int = 1,
        due: float | None = None,
        struck: bool = False,
    ) -> Outgoing:
        id = delivery.id or new_id()
        properties = mapping.encode_copy(
            delivery,
            id,
            attempt=attempt,
            failure=delivery.failure,
            due=due,
            struck=struck,
        )
        return Outgoing(id, "", queue, properties, delivery.body, mandatory=True)

    async def _store(self, copies: Sequence[tuple[Delivery, Outgoing]]) -> None:
        """Have copies confirmed, then settle the originals. Raises where one was not stored."""
        if not copies:
            return
        outcome = await self._copies.write([copy for _, copy in copies])
        fates = outcome.fates
        for delivery, copy in copies:
            if copy.id not in fates:
                self._settle(delivery)
        self._wake()
        if fates:
            self._topology.distrust(outcome)
            raise SendFailed(
                f"rabbitmq: {len(fates)} copies were not stored in {copies[0][1].routing_key!r} and its like: "
                "deleted, full, or without its quorum?",
                fates,
            )

    # -- leave ------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        """Leave a subscription without order, or an ephemeral one."""
        if self._giving_back is not None:
            await asyncio.wait([self._giving_back], timeout=GIVE_BACK_TIMEOUT)
        if self._sets_aside:
            await self._quiet()
        for consumer in self._consumers:
            await self._channel.call(self._channel.pika.basic_cancel, consumer)
        if self._sets_aside:
            # During an alarm it would take too long: then all comes back, and is counted.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GIVE_BACK_TIMEOUT):
                    self._returning = [*self._out.values(), *self._ready, *self._untouched()]
                    await self._give_back()
        self._flush_all()

    async def _quiet(self) -> None:
        """Wait until nothing more arrives: what is on its way when a consumer is cancelled comes back, and counts.

        Nothing is handed out or settled any more, so that the window is soon full, or the queue empty.
        """
        end = self._loop.time() + 10 * QUIET
        while self._loop.time() < end:
            before = self._mark.unsettled
            await asyncio.sleep(QUIET)
            if self._mark.unsettled == before:
                return

    def _untouched(self) -> Iterator[Delivery]:
        """What has arrived for the first time and was not handed out."""
        for content in self._arrived:
            if not content.redelivered:
                yield mapping.read_delivery(self, self._label, content)[0]

    async def _leave_in_order(self) -> None:
        """End the channel by an error: what is out comes back before the next member gets anything.

        A consumer that is cancelled, or whose channel is closed, hands over first and returns afterwards.
        """
        assert self._record is not None
        self._flush_all()
        await self._topology.versions(self._channel, self._record.names)
        await self._channel.call(
            self._channel.pika.queue_declare, f"{self._record.names.queue}:leaving", passive=True
        )

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake()
        channel = self._channel
        if self._retries is not None:
            await self._retries.close()
        try:
            if channel.error is None:
                await (self._leave_in_order() if self._trials is not None else self._leave())
        except PubSubError:
            pass  # the link is gone: all that is unsettled comes again
        finally:
            self._mark = LowWaterMark()
            for timer in (self._idle_flush, self._patience):
                if timer is not None:
                    timer.cancel()
            self._forget(self)
        await channel.close()
