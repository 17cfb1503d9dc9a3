"""What must exist on the broker: declared, changed, counted, deleted.

RabbitMQ cannot say which patterns a queue is bound by, and keeps no notes. A small queue beside each
subscription holds its `Record`; an exclusive queue, which dies with its connection, is the lock under
which it is read and changed, so that members of two versions of an application can declare at once.
Every step may be repeated: queues, then the record, then bindings, then what is no longer bound.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from pubsub_facade import wire
from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends import _rabbitmq_names as named
from pubsub_facade.backends._rabbitmq_confirms import Confirms, Outcome, Outgoing
from pubsub_facade.backends._rabbitmq_gets import Gets
from pubsub_facade.backends._rabbitmq_link import LOCKED, MISMATCH, NOT_FOUND, Channel, ChannelClosed, Link
from pubsub_facade.backends._rabbitmq_names import Arguments, Names, Record
from pubsub_facade.backends._rabbitmq_wire import returns_of
from pubsub_facade.errors import ConnectionLost, TopologyConflict
from pubsub_facade.message import new_id
from pubsub_facade.subscription import Definition, Subscription

LOCK_TIMEOUT: Final = 30.0  # s to wait for others who declare the same subscription
REQUEUE_TIMEOUT: Final = 1.0  # s until a record that a lost member had in hand is back in its queue
MAX_RECORDS: Final = 32  # kept; each change adds one, and their number tells members of a change
MAX_READS: Final = 10_000  # of a record until it is written anew: its delivery limit is far above


@dataclass(frozen=True, slots=True)
class Counts:
    """What the broker says of one subscription's queues.

    Arguments:
        waiting: messages that are not handed out.
        dead: dead letters.
        consumers: of all members in all processes.
    """

    waiting: int
    dead: int
    consumers: int


class Topology:
    """The things of one namespace, over one pair of links.

    Arguments:
        link: for everything that has an answer.
        copies: for records and notices.
        arguments: how queues are declared.
        spread: queues of a new ordered subscription.
        can_hash: tells whether the broker has the consistent-hash exchange.
    """

    def __init__(
        self,
        namespace: str,
        link: Link,
        copies: Confirms,
        arguments: Arguments,
        spread: int,
        can_hash: Any,
    ) -> None:
        self._namespace = namespace
        self.link = link
        self.copies = copies
        self._arguments = arguments
        self._spread = spread
        self._can_hash = can_hash
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._records: dict[str, tuple[int, Record]] = {}  # name -> how many records there were, the newest
        self._levels: set[str] = set()  # queues of waiting messages declared on this link
        self._refusing: set[str] = set()  # of those: refuse messages, for want of a quorum or a limit reached

    def names(self, subscription: str) -> Names:
        return Names(self._namespace, subscription)

    # -- declare ----------------------------------------------------------------------------------

    async def declare(self, subscription: Subscription) -> Record:
        """`Backend.declare`; returns what is remembered from now on."""
        assert subscription.name is not None
        names = self.names(subscription.name)
        async with self._alone(names), Gets.open(self.link) as gets, self.link.brief_channel() as channel:
            try:
                await self._declare_queue(channel, names.definition, self._arguments.quorum())
                known = await self._read(gets, names)
                record = await self._wanted(names, subscription, known[-1][1] if known else None)
                try:
                    await self._declare_queues(channel, record)
                    if not known:
                        await self._harden(channel)
                except ChannelClosed:
                    if not known:
                        await self._delete_queues([names.definition])
                    raise
                await self._remember(gets, known, record)
                await self._bind(channel, record)
            except ChannelClosed as error:
                raise _conflict(names, error) from error
        return record

    async def _wanted(self, names: Names, subscription: Subscription, known: Record | None) -> Record:
        now = time.time()
        if known is None:
            spread = 0
            if subscription.ordered and self._spread > 1 and await self._can_hash():
                spread = self._spread
            definition = Definition.first(subscription, now)
            return Record(names.namespace, names.subscription, definition, spread)
        if known.names != names:
            raise TopologyConflict(
                f"rabbitmq: queue {names.queue!r} is that of subscription {known.subscription!r} in namespace "
                f"{known.namespace!r}: choose another name or namespace"
            )
        if known.definition.ordered != subscription.ordered:
            is_, be = ("ordered", "unordered") if known.definition.ordered else ("unordered", "ordered")
            raise TopologyConflict(
                f"rabbitmq: subscription {names.subscription!r} is {is_} and cannot become {be} with what waits in "
                "it: declare a new name, let members empty the old one, delete it"
            )
        return replace(known, definition=known.definition.redeclared(subscription, now))

    async def _declare_queues(self, channel: Channel, record: Record) -> None:
        names, make = record.names, self._arguments
        if record.definition.ordered:
            for queue in record.queues:
                await self._declare_queue(channel, queue, make.ordered())
        else:
            for queue in (names.queue, names.apart):
                await self._declare_queue(channel, queue, make.quorum())
        await self._declare_queue(channel, names.dead, make.quorum())
        if record.spread:
            await channel.call(
                channel.pika.exchange_declare,
                names.hash,
                exchange_type="x-consistent-hash",
                durable=True,
                arguments={"hash-header": wire.KEY},
            )
            for queue in record.queues:
                await channel.call(channel.pika.queue_bind, queue, names.hash, named.HASH_WEIGHT)

    async def _declare_queue(self, channel: Channel, queue: str, arguments: dict[str, Any]) -> None:
        await channel.call(channel.pika.queue_declare, queue, durable=True, arguments=arguments)

    async def _harden(self, channel: Channel) -> None:
        """Let new quorum queues survive a kill of the broker from now on.

        The last one made is without a leader for ever if its node is killed within about a second (tried on
        3.10.8): the making of the next one writes down what is missing.
        """
        queue = f"{self._namespace}:next.{uuid.uuid4().hex}"
        await self._declare_queue(channel, queue, self._arguments.quorum())
        await channel.call(channel.pika.queue_delete, queue)

    async def _bind(self, channel: Channel, record: Record) -> None:
        current = record.definition.current.patterns
        names, pika = record.names, channel.pika
        for pattern in current:
            if record.spread:
                await channel.call(pika.exchange_bind, names.hash, names.namespace, pattern)
            else:
                await channel.call(pika.queue_bind, names.queue, names.namespace, pattern)
        for pattern in record.definition.patterns.difference(current):
            if record.spread:
                await channel.call(pika.exchange_unbind, names.hash, names.namespace, pattern)
            else:
                await channel.call(pika.queue_unbind, names.queue, names.namespace, pattern)

    # -- records ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _alone(self, names: Names) -> AsyncIterator[None]:
        """Be the only one, in all processes, who reads or changes this subscription's records."""
        async with self._locks[names.subscription]:
            channel = await self._locked(names)
            try:
                yield
            finally:
                if channel.error is None:
                    await channel.call(channel.pika.queue_delete, names.lock)
                    await channel.close()

    async def _locked(self, names: Names) -> Channel:
        end = time.monotonic() + LOCK_TIMEOUT
        pause = 0.005
        while True:
            channel = await self.link.open_channel()
            try:
                await channel.call(
                    channel.pika.queue_declare,
                    names.lock,
                    exclusive=True,
                    arguments={"x-queue-type": "classic"},
                )
                return channel
            except ChannelClosed as error:
                if error.code != LOCKED:
                    raise
                if time.monotonic() > end:
                    raise ConnectionLost(
                        f"{self.link.title}: somebody else has been declaring {names.subscription!r} "
                        f"for {LOCK_TIMEOUT:g} s"
                    ) from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 1.5, 0.2)

    async def _read(self, gets: Gets, names: Names) -> list[tuple[frames.Content, Record]]:
        """All records, the newest last; they are out on ``gets``. Only with the lock."""
        end = time.monotonic() + REQUEUE_TIMEOUT
        while True:
            found: list[tuple[frames.Content, Record]] = []
            for content in await gets.all(names.definition):
                try:
                    found.append((content, Record.from_json(content.body)))
                except ValueError:  # nothing of ours
                    gets.ack(content)
            if found or time.monotonic() > end or not await self._has_queue(names):
                return sorted(found, key=lambda each: each[1].age)
            await asyncio.sleep(0.05)

    async def _has_queue(self, names: Names) -> bool:
        return await self._exists(names.queue) or await self._exists(names.ordered(0))

    async def _exists(self, queue: str) -> bool:
        async with self.link.brief_channel() as channel:
            try:
                await channel.call(channel.pika.queue_declare, queue, passive=True)
            except ChannelClosed as error:
                if error.code != NOT_FOUND:
                    raise
                return False
            return True

    async def _remember(
        self, gets: Gets, known: Sequence[tuple[frames.Content, Record]], record: Record
    ) -> None:
        count = len(known)
        worn = any(returns_of(content) > MAX_READS for content, _ in known)
        if not known or known[-1][1] != record or worn:
            await self._store(record)
            count += 1
        if worn or count > MAX_RECORDS:
            kept = known[-1][0] if not worn and known[-1][1] == record else None
            for content, _ in known:
                if content is not kept:
                    gets.ack(content)
                    count -= 1
        self._records[record.subscription] = (count, record)

    async def _store(self, record: Record) -> None:
        body = record.to_json()
        id = new_id()
        properties = frames.properties(
            {}, content_type="application/json", message_id=id, timestamp=time.time()
        )
        outcome = await self.copies.write(
            [Outgoing(id, "", record.names.definition, properties, body, mandatory=True)]
        )
        if outcome.fates:
            raise ConnectionLost(f"{self.link.title}: queue {record.names.definition!r} refuses messages")
        await self.copies.write(
            [
                Outgoing(
                    id,
                    named.notices(record.namespace),
                    record.subscription,
                    properties,
                    body,
                    mandatory=False,
                )
            ]
        )

    async def versions(self, channel: Channel, names: Names) -> int:
        """How many records there are: one more with each change."""
        answer = await channel.call(channel.pika.queue_declare, names.definition, passive=True)
        return int(answer.message_count)

    async def record(self, subscription: str, channel: Channel | None = None) -> Record | None:
        """What is remembered of a subscription now; None where there is none of this name.

        Arguments:
            channel: to ask on; it is closed where there is no such subscription.
        """
        names = self.names(subscription)
        try:
            if channel is None:
                async with self.link.brief_channel() as brief:
                    count = await self.versions(brief, names)
            else:
                count = await self.versions(channel, names)
        except ChannelClosed as error:
            if error.code != NOT_FOUND:
                raise
            self._records.pop(subscription, None)
            return None
        cached = self._records.get(subscription)
        if cached is not None and cached[0] == count:
            return cached[1]
        async with self._alone(names), Gets.open(self.link) as gets:
            known = await self._read(gets, names)
            if known:
                self._records[subscription] = (len(known), known[-1][1])
        return known[-1][1] if known else None

    def noticed(self, record: Record) -> None:
        """Another process has changed a subscription."""
        self._records.pop(record.subscription, None)

    # -- queues where messages wait ---------------------------------------------------------------

    async def retry_level(self, names: Names, level: int) -> int:
        """``level``, or the next longer one whose queue does not refuse messages; its queue is declared."""
        while names.retry(level) in self._refusing and level < named.LEVELS[-1]:
            level *= 2
        if names.retry(level) not in self._levels:
            await self.declare_retries(names, level)
        return level

    async def declare_retries(self, names: Names, level: int) -> None:
        """Declare the queue in which messages wait ``level`` ms at most for their next attempt, then tell the members.

        Alone: who consumes from a queue that another is about to make loses the link (tried on 3.10.8).
        """
        async with self._alone(names), Gets.open(self.link) as gets:
            known = await self._read(gets, names)
            if not known:
                raise ConnectionLost(f"rabbitmq: subscription {names.subscription!r} was deleted")
            async with self.link.brief_channel() as channel:
                try:
                    await self._declare_queue(channel, names.retry(level), self._arguments.quorum())
                    if level not in known[-1][1].levels:
                        await self._harden(channel)
                except ChannelClosed as error:
                    raise _conflict(names, error) from error
            levels = tuple(sorted({*known[-1][1].levels, level}))
            await self._remember(gets, known, replace(known[-1][1], levels=levels))
        self._levels.add(names.retry(level))

    async def delay_exchange(self, level: int) -> str:
        """The exchange that lets messages wait ``level`` ms at most before they are published, declared."""
        namespace = self._namespace
        name = named.delay(namespace, level)
        if name in self._levels:
            return name
        due, sink = named.due_exchange(namespace), named.sink(namespace)
        async with self.link.brief_channel() as channel:
            pika = channel.pika
            await channel.call(pika.exchange_declare, due, exchange_type="fanout", durable=True)
            await channel.call(pika.exchange_declare, name, exchange_type="fanout", durable=True)
            await self._declare_queue(channel, sink, self._arguments.quorum(**{"x-max-length": 1}))
            await self._declare_queue(channel, name, self._arguments.handing_on(level, due))
            await self._harden(channel)
            await channel.call(pika.queue_bind, sink, due, "")
            await channel.call(pika.exchange_bind, namespace, due, "")
            await channel.call(pika.queue_bind, name, name, "")
        self._levels.add(name)
        return name

    def distrust(self, outcome: Outcome) -> None:
        """Messages were not stored where they should wait: declare queues anew, leave out those that refuse."""
        if outcome.returned:
            self._levels.clear()
        self._refusing.update(outcome.refusing)

    # -- count and delete -------------------------------------------------------------------------

    async def inspect(self, subscription: str) -> Counts | None:
        """What waits and who consumes; None where there is no such subscription."""
        record = await self.record(subscription)
        if record is None:
            return None
        names = record.names
        consumed = list(record.queues)
        if not record.definition.ordered:
            consumed.append(names.apart)
        counts = await self._counts([*consumed, *map(names.retry, record.levels), names.dead])
        return Counts(
            waiting=sum(ready for ready, _ in counts[:-1]),
            dead=counts[-1][0],
            consumers=sum(consumers for _, consumers in counts[: len(consumed)]),
        )

    async def _counts(self, queues: Sequence[str]) -> list[tuple[int, int]]:
        """Messages ready in each queue, and its consumers."""
        counts: list[tuple[int, int]] = []
        while len(counts) < len(queues):
            async with self.link.brief_channel() as channel:
                try:
                    for queue in queues[len(counts) :]:
                        answer = await channel.call(channel.pika.queue_declare, queue, passive=True)
                        counts.append((int(answer.message_count), int(answer.consumer_count)))
                except ChannelClosed as error:
                    if error.code != NOT_FOUND:
                        raise
                    counts.append((0, 0))  # somebody has deleted it
        return counts

    async def delete(self, subscription: str) -> None:
        """`Backend.delete`: the record goes last, so that what was begun can be ended."""
        names = self.names(subscription)
        record = await self.record(subscription)
        async with self._alone(names):
            queues = [names.queue, names.apart, names.dead, *map(names.retry, named.LEVELS)]
            if record is not None:
                queues += record.queues
            await self._delete_queues(queues)
            async with self.link.brief_channel() as channel:
                await channel.call(channel.pika.exchange_delete, names.hash)
            await self._delete_queues([names.definition])
        self._records.pop(subscription, None)
        self._levels.difference_update(map(names.retry, named.LEVELS))

    async def _delete_queues(self, queues: Sequence[str]) -> None:
        async with self.link.brief_channel() as channel:
            for queue in dict.fromkeys(queues):
                await channel.call(channel.pika.queue_delete, queue)


def _conflict(names: Names, error: ChannelClosed) -> Exception:
    if error.code != MISMATCH:
        return error
    return TopologyConflict(
        f"{error}: what is there under the names of subscription {names.subscription!r} is not as we declare it; "
        "choose another name, or empty and delete it"
    )
