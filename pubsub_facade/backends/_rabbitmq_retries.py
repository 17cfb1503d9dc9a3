"""Brings back what waits for its next attempt: each member watches the queues that its subscription's retries wait in.

A quorum queue could hand them on by itself when they expire, and after the loss of a node what it was
handing on is stuck until the queue's leader changes once more (tried on 3.10.8). So members take them in
hand, and when their time has come store them in the subscription's queue and only then ack them. What is
far off stays in its queue, where it is counted, and where no acknowledgement timeout looks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends import _rabbitmq_wire as mapping
from pubsub_facade.backends._rabbitmq_confirms import Confirms, Outgoing
from pubsub_facade.backends._rabbitmq_link import NOT_FOUND, Channel, ChannelClosed, unused
from pubsub_facade.backends._rabbitmq_names import Record
from pubsub_facade.backends._rabbitmq_topology import Topology
from pubsub_facade.errors import ConnectionLost, PubSubError

HELD: Final = 100  # of one queue in one member's hand, and moved together
FAR: Final = 60.0  # s until its time that a message is put back rather than held
LOOKS: Final = 8  # at a queue that holds only what is far off, while the longest it may hold passes
PAUSE: Final = 1.0  # s after something went wrong
LEAVE_TIMEOUT: Final = 3.0  # s for what is being moved to be confirmed when the member leaves


class Hand:
    """What one member has in hand of one queue, the soonest first.

    Arguments:
        level: how long, in seconds, the queue is for.
    """

    def __init__(self, level: float) -> None:
        self.news = asyncio.Event()
        self.error: PubSubError | None = None
        self._level = level
        self._held: list[tuple[float, int, frames.Content]] = []

    def __len__(self) -> int:
        return len(self._held)

    def content(self, content: frames.Content) -> None:
        """`Sink`: no clock makes it wait for longer than its queue is for."""
        due = mapping.due_of(content)
        now = time.time()
        heapq.heappush(self._held, (min(due, now + self._level), content.tag, content))
        self.news.set()

    def confirmed(self, tag: int, multiple: bool, stored: bool) -> None:
        return

    def empty(self) -> None:
        return

    def fail(self, error: PubSubError) -> None:
        """Nothing is in hand any more: all of it is back in the queue."""
        self.error = error
        self._held.clear()
        self.news.set()

    def away(self) -> float | None:
        """Seconds until the next one's time; None where none is in hand."""
        return self._held[0][0] - time.time() if self._held else None

    def due(self) -> list[frames.Content]:
        """Takes out those whose time has come."""
        now = time.time()
        contents = []
        while self._held and self._held[0][0] <= now:
            contents.append(heapq.heappop(self._held)[2])
        return contents

    def again(self, contents: Iterable[frames.Content]) -> None:
        """They could not be moved: they are tried again in a while."""
        at = time.time() + PAUSE
        for content in contents:
            heapq.heappush(self._held, (at, content.tag, content))


class Retries:
    """One member's watch over the queues of its subscription's retries.

    Arguments:
        copies: where they are stored again.
        fail: told what waiting cannot mend.
    """

    def __init__(
        self, topology: Topology, copies: Confirms, record: Record, fail: Callable[[PubSubError], None]
    ) -> None:
        self._topology = topology
        self._copies = copies
        self._names = record.names
        self._spread = record.spread
        self._fail = fail
        self._closing = asyncio.Event()
        self._hands: dict[int, Hand] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def watch(self, levels: Iterable[int]) -> None:
        """See to these from now on, as well as to those before."""
        for level in levels:
            if level not in self._tasks and not self._closing.is_set():
                name = f"pubsub-retries-{self._names.retry(level)}"
                task = self._tasks[level] = asyncio.create_task(self._serve(level), name=name)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(ConnectionLost(f"rabbitmq: {task.get_name()} ended: {error!r}"))

    @property
    def held(self) -> int:
        """How many are in hand: of those that wait, the ones that the broker does not count."""
        return sum(map(len, self._hands.values()))

    async def close(self) -> None:
        """Put back what is in hand; what is being moved is settled first."""
        self._closing.set()
        for hand in self._hands.values():
            hand.news.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=LEAVE_TIMEOUT)
            for task in late:
                task.cancel()

    # -- one queue ----------------------------------------------------------------------------------

    async def _serve(self, level: int) -> None:
        """Look after one queue until the member leaves or its link is lost."""
        link = self._topology.link
        while not self._closing.is_set():
            try:
                nap = await self._look_after(level)
            except PubSubError as error:
                if link.error is not None or self._copies.error is not None:
                    return  # the member is told by the link, and joins again
                if not isinstance(error, ConnectionLost):
                    self._fail(error)
                    return
                nap = PAUSE  # the queue was deleted, or could not be had: it is made anew
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(nap):
                    await self._closing.wait()

    async def _look_after(self, level: int) -> float:
        """Consume from one queue; returns how long, in seconds, there is nothing to do for it."""
        queue = self._names.retry(level)
        hand = self._hands[level] = Hand(level / 1000)
        try:
            async with self._topology.link.brief_channel() as channel:
                channel.on_closed.append(hand.fail)
                channel.pika.add_on_cancel_callback(
                    lambda _: hand.fail(ConnectionLost(f"rabbitmq: {queue!r} was deleted"))
                )
                self._topology.link.attach(channel.number, hand)
                await channel.call(channel.pika.basic_qos, prefetch_count=HELD)
                if await self._consume(channel, level):
                    return await self._hold(channel, hand, level)
        finally:
            del self._hands[level]
        return 0.0

    async def _hold(self, channel: Channel, hand: Hand, level: int) -> float:
        """Hold what comes and move it when its time has come, until there is only what is far off."""
        while not self._closing.is_set():
            if hand.error is not None:
                raise hand.error
            hand.news.clear()
            if due := hand.due():
                await self._move(channel, hand, due)
                continue
            away = hand.away()
            if away is not None and away > FAR:
                return min(away, level / 1000 / LOOKS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(away):
                    await hand.news.wait()
        return 0.0

    async def _consume(self, channel: Channel, level: int) -> bool:
        """False: somebody had deleted the queue, and it was made anew; the channel is closed."""
        try:
            await channel.call(channel.pika.basic_consume, self._names.retry(level), unused)
        except ChannelClosed as error:
            if error.code != NOT_FOUND:
                raise
            await self._topology.declare_retries(self._names, level)
            return False
        return True

    async def _move(self, channel: Channel, hand: Hand, contents: Sequence[frames.Content]) -> None:
        """Store them in the subscription's queue, then ack those that were stored."""
        outgoing = [self._again(content) for content in contents]
        outcome = await self._copies.write(outgoing)
        fates = outcome.fates
        stored = []
        for content, copy in zip(contents, outgoing, strict=True):
            if copy.id in fates:
                hand.again([content])
            else:
                stored.append(frames.ack(channel.number, content.tag, multiple=False))
        if channel.error is None and stored:
            self._topology.link.write(stored)

    def _again(self, content: frames.Content) -> Outgoing:
        delivery, _ = mapping.read_delivery(None, self._names.subscription, content)
        properties = mapping.encode_copy(
            delivery, delivery.id, attempt=delivery.attempt, failure=delivery.failure
        )
        exchange, key = (self._names.hash, delivery.topic) if self._spread else ("", self._names.queue)
        return Outgoing(delivery.id, exchange, key, properties, delivery.body, mandatory=True)
