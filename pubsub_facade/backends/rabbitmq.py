"""RabbitMQ 3.10 to 4.x, by pika on the facade's loop.

Two links: one publishes, one consumes. A memory or disk alarm stops the broker from reading a link that
has published; on the same link acks would wait behind, and consumers could not free what the alarm is
about. The second is opened when something is first consumed or declared. If either ends, every member
joins again: its copies go out on one link and its acks on the other.

What exists on the broker, and how a message looks there: docs/backends/rabbitmq.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Final

from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends import _rabbitmq_names as named
from pubsub_facade.backends import _rabbitmq_wire as mapping
from pubsub_facade.backends._rabbitmq_confirms import Confirms, Outcome, Outgoing
from pubsub_facade.backends._rabbitmq_dead import DeadLetterQueues
from pubsub_facade.backends._rabbitmq_doctor import examine
from pubsub_facade.backends._rabbitmq_link import MISMATCH, Channel, ChannelClosed, Link, connect, unused
from pubsub_facade.backends._rabbitmq_names import LEVELS, Arguments, Names, Record, level_for
from pubsub_facade.backends._rabbitmq_receiver import RabbitmqReceiver
from pubsub_facade.backends._rabbitmq_topology import Topology
from pubsub_facade.backends._required import unheard
from pubsub_facade.backends.base import Backend, Backlog, Capabilities, Finding, Receiver
from pubsub_facade.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionFailed,
    ConnectionLost,
    SendFailed,
    TopologyConflict,
)
from pubsub_facade.message import Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscription import Definition, Subscription

CLOSE_TIMEOUT: Final = 5.0  # s for members to leave in good order
_TRAITS: Final = ("'type'", "'durable'", "'auto_delete'", "'internal'")
"""Of an exchange: one that differs from ours in one of these would lose messages; arguments of its own are fine."""

MAX_PATIENCE: Final = 600.0  # s for an answer, where link after link got none


class _Notices:
    """Hears from all processes of changed definitions."""

    def __init__(self, backend: RabbitmqBackend) -> None:
        self._backend = backend

    def content(self, content: frames.Content) -> None:
        with contextlib.suppress(ValueError):  # nothing of ours
            self._backend.noticed(Record.from_json(content.body))

    def confirmed(self, tag: int, multiple: bool, stored: bool) -> None:
        return

    def empty(self) -> None:
        return


class RabbitmqBackend(Backend):
    """``[rabbitmq]`` in the settings says where it is and who we are there."""

    name = "rabbitmq"
    pipeline = 4

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._namespace = settings.namespace
        if self._namespace.split(".")[0] == "amq":
            raise ConfigError(
                f"namespace {self._namespace!r} is RabbitMQ's own: choose one that does not begin with 'amq'"
            )
        self._own = settings.rabbitmq
        self._hosts = deque(settings.rabbitmq.address.hosts)  # the one to try first leads
        self._patience = 0.0  # s that the next link waits for an answer at least
        self._out: Link | None = None  # publishes
        self._in: Link | None = None  # consumes, and everything that has an answer
        self._sends: Confirms | None = None
        self._copies: Confirms | None = None
        self._topology: Topology | None = None
        self._dead: DeadLetterQueues | None = None
        self._hears = False
        self._receivers: list[RabbitmqReceiver] = []
        self._turn = asyncio.Lock()  # keeps sends in order where one must wait before it writes
        self._joining = asyncio.Lock()
        self._hashes: bool | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            durable=True,
            shared=True,
            competing=True,
            stored_attempts=True,
            delay=True,
            replay=False,
            require_subscribers=True,
            backlog=True,
            max_payload=self._own.max_payload,
        )

    # -- links ------------------------------------------------------------------------------------

    async def open(self) -> None:
        link = await self._connect("publishing")
        try:
            await self._declare_exchange(link, self._namespace, "topic")
            await self._declare_exchange(link, named.notices(self._namespace), "fanout")
            self._sends = await Confirms.open(link)
            self._copies = await Confirms.open(link)
        except BaseException:
            await link.leave()
            raise
        link.on_lost.append(functools.partial(self._lost, link))
        self._out = link

    async def _connect(self, purpose: str) -> Link:
        own, failures = self._own, []
        for host, port in list(self._hosts):
            try:
                link = await connect(
                    host,
                    port,
                    own.address,
                    own.tls,
                    heartbeat=own.heartbeat,
                    timeout=self.settings.connect_timeout,
                    name=f"pubsub-facade {self._namespace} {purpose}",
                )
            except AuthenticationFailed:
                raise
            except ConnectionFailed as error:
                failures.append(error)
            else:
                self._hosts.rotate(-self._hosts.index((host, port)))
                link.patience = max(link.patience, self._patience)
                return link
        if len(failures) == 1:
            raise failures[0]
        raise ConnectionFailed("; ".join(map(str, failures))) from failures[-1]

    async def _declare_exchange(self, link: Link, exchange: str, kind: str) -> None:
        """A user who may only publish has no right to declare: to that one it is enough that it is there."""
        try:
            async with link.brief_channel() as channel:
                await channel.call(channel.pika.exchange_declare, exchange, exchange_type=kind, durable=True)
        except ChannelClosed as error:
            if error.code != MISMATCH:
                raise ConnectionFailed(str(error)) from error
            if any(trait in str(error) for trait in _TRAITS):
                raise TopologyConflict(
                    f"{error}: exchange {exchange!r} is not ours; choose another namespace, or delete it"
                ) from error
        except AuthenticationFailed as denied:
            try:
                async with link.brief_channel() as channel:
                    await channel.call(channel.pika.exchange_declare, exchange, passive=True)
            except ChannelClosed:
                raise denied from None

    def _lost(self, link: Link, error: ConnectionLost) -> None:
        if not link.left and self._hosts[0] == (link.params.host, link.params.port):
            self._hosts.rotate(-1)  # it may take us again, and be cut off from its cluster
        if (
            link.given_up
        ):  # longer and longer, where it is no better on the next: a queue may have lost its quorum
            soon = asyncio.get_running_loop().time() - link.begun < 4 * link.patience
            self._patience = min(2 * link.patience, MAX_PATIENCE) if soon else 0.0
        for receiver in self._receivers:
            receiver.fail(error)

    def _publishing(self) -> Link:
        if self._out is None or self._out.error is not None:
            raise (self._out.error if self._out is not None else None) or ConnectionLost("rabbitmq: not open")
        return self._out

    async def _consuming(self) -> Topology:
        """The link that consumes, opened if it is not there."""
        self._publishing()
        async with self._joining:
            if self._topology is not None and self._in is not None and self._in.error is None:
                return self._topology
            try:
                link = await self._connect("consuming")
            except AuthenticationFailed:
                raise
            except ConnectionFailed as error:
                raise ConnectionLost(str(error)) from error
            if self._out is None or self._copies is None:
                await link.leave()
                raise ConnectionLost("rabbitmq: closed")
            link.on_lost.append(functools.partial(self._lost, link))
            self._in = link
            self._hears = False
            self._dead = DeadLetterQueues(link)
            self._topology = Topology(
                self._namespace,
                link,
                self._copies,
                Arguments(self._own.replicas),
                self._own.ordered_queues,
                self._can_hash,
            )
            return self._topology

    async def _can_hash(self) -> bool:
        """Whether the broker has the consistent-hash exchange: where not, trying it costs the link."""
        if self._hashes is None:
            link = await self._connect("asking for plugins")
            try:
                async with link.brief_channel() as channel:
                    name = f"{self._namespace}:probe.{uuid.uuid4().hex}"
                    await channel.call(
                        channel.pika.exchange_declare,
                        name,
                        exchange_type="x-consistent-hash",
                        auto_delete=True,
                    )
                    await channel.call(channel.pika.exchange_delete, name)
                self._hashes = True
            except ConnectionLost:
                self._hashes = False
            finally:
                await link.leave()
        return self._hashes

    async def close(self) -> None:
        receivers = list(self._receivers)
        if receivers:
            leaving = asyncio.gather(*(receiver.close() for receiver in receivers), return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await leaving
        links = [link for link in (self._in, self._out) if link is not None]
        self._in = self._out = self._topology = self._dead = self._sends = self._copies = None
        await asyncio.gather(*(link.leave() for link in links))

    async def ping(self) -> None:
        self._publishing()
        for link in (self._out, self._in):
            if link is not None and not link.blocked:  # during an alarm it answers nothing, but lives
                async with link.brief_channel():
                    pass

    # -- publish ----------------------------------------------------------------------------------

    async def send(self, messages: Sequence[Message]) -> None:
        future = self.begin(messages)
        if future is None:
            async with self._turn:
                sends = await self._able_to_send()
                delayed = any(message.delay for message in messages)
                exchanges = await self._delays(messages) if delayed else {}
                future = sends.write(
                    [self._outgoing(message, exchanges) for message in messages], self._failure
                )
        await future

    def begin(self, messages: Sequence[Message]) -> asyncio.Future[Outcome] | None:
        sends = self._sends
        if sends is None or sends.error is not None or self._turn.locked():
            return None
        if any(message.delay for message in messages):
            return None
        return sends.write([self._outgoing(message, {}) for message in messages], self._failure)

    async def _able_to_send(self) -> Confirms:
        """The channel for publishing; anew where the broker closed the last one over a right since granted."""
        link = self._publishing()
        if self._sends is None or self._sends.error is not None:
            self._sends = await Confirms.open(link)
        return self._sends

    async def _delays(self, messages: Sequence[Message]) -> dict[int, str]:
        topology = await self._consuming()
        levels = {level_for(message.delay)[0] for message in messages if message.delay}
        return {level: await topology.delay_exchange(level) for level in levels}

    def _outgoing(self, message: Message, delays: dict[int, str]) -> Outgoing:
        if message.delay:
            level, ms = level_for(message.delay)
            due = time.time() + message.delay if message.delay * 1000 > LEVELS[-1] else None
            properties = mapping.encode(message, expiration=ms, due=due)
            return Outgoing(
                message.id, delays[level], message.topic, properties, message.body, mandatory=True
            )
        return Outgoing(
            message.id,
            self._namespace,
            message.topic,
            mapping.encode(message),
            message.body,
            mandatory=self.settings.require_subscribers,
        )

    def _failure(self, outcome: Outcome) -> SendFailed | None:
        if not outcome.returned and not outcome.refused:
            return None
        reasons = []
        if outcome.returned:
            reasons.append(unheard("rabbitmq", outcome.returning, outcome.count))
            if self._topology is not None:
                self._topology.distrust(outcome)
        if outcome.refused:
            reasons.append(
                f"rabbitmq: {len(outcome.refused)} of {outcome.count} messages were refused by a queue: is it full, or "
                "without its quorum?"
            )
        return SendFailed("; ".join(reasons), outcome.fates)

    async def resend(self, subscription: str, messages: Sequence[Message]) -> None:
        topology = await self._consuming()
        record = await topology.record(subscription)
        if record is None:
            raise SendFailed(
                f"rabbitmq: no subscription {subscription!r}: declare it first",
                {message.id: "not stored" for message in messages},
            )
        names = record.names
        outcome = await topology.copies.write(
            [
                Outgoing(
                    message.id,
                    names.hash if record.spread else "",
                    message.topic if record.spread else names.queue,
                    mapping.encode(message, with_topic=True),
                    message.body,
                    mandatory=True,
                )
                for message in messages
            ]
        )
        if outcome.fates:
            raise SendFailed(f"rabbitmq: not stored for subscription {subscription!r}", outcome.fates)

    # -- subscriptions ----------------------------------------------------------------------------

    async def declare(self, subscription: Subscription) -> None:
        topology = await self._consuming()
        await topology.declare(subscription)

    async def delete(self, subscription: str) -> None:
        topology = await self._consuming()
        await topology.delete(subscription)

    async def inspect(self, subscription: str) -> Backlog:
        """In flight is known while all members are in this process: AMQP does not tell it, nor any age."""
        topology = await self._consuming()
        names = self._names(subscription)
        assert self._dead is not None
        while True:
            before = self._dead.ended
            counts = await topology.inspect(subscription)
            looked_at = await self._dead.held(names.dead)
            if before == self._dead.ended:  # else some of them were back before they were counted
                break
        if counts is None:
            return Backlog(0, 0, 0, None, declared=False)
        mine = [receiver for receiver in self._receivers if receiver.is_of(names)]
        in_flight = None
        if sum(receiver.consumers for receiver in mine) == counts.consumers:
            in_flight = sum(receiver.unsettled for receiver in mine)
        held = sum(receiver.waiting for receiver in mine)
        return Backlog(counts.waiting + held, in_flight, counts.dead + looked_at, None)

    async def consume(self, subscription: Subscription, window: int) -> Receiver:
        topology = await self._consuming()
        link = topology.link
        await self._listen(link)
        record: Record | None = None
        filtering: Definition | None = None
        if subscription.name is not None:
            record = await topology.record(subscription.name)
            if record is None:
                raise ConnectionLost(f"rabbitmq: subscription {subscription.name!r} was deleted")
        elif subscription.filter is not None:
            filtering = Definition.first(subscription, 0.0)
        channel = await link.open_channel()
        receiver = RabbitmqReceiver(
            channel,
            topology,
            topology.copies,
            subscription,
            window,
            record,
            filtering,
            self._receivers.remove,
        )
        self._receivers.append(receiver)
        try:
            if record is None:
                queue = await self._ephemeral(channel, subscription)
                await receiver.join([queue], None)
            else:
                apart = None if record.definition.ordered else record.names.apart
                await receiver.join(record.queues, apart)
        except BaseException:
            await receiver.close()
            raise
        return receiver

    async def _ephemeral(self, channel: Channel, subscription: Subscription) -> str:
        """A queue that only this link can use, and that goes with its consumer."""
        queue = f"{self._namespace}:ephemeral.{uuid.uuid4().hex}"
        await channel.call(
            channel.pika.queue_declare,
            queue,
            exclusive=True,
            auto_delete=True,
            arguments={"x-queue-type": "classic"},
        )
        for pattern in subscription.patterns:
            await channel.call(channel.pika.queue_bind, queue, self._namespace, pattern)
        return queue

    async def _listen(self, link: Link) -> None:
        """Hear of definitions changed by other processes, from the first member on."""
        if self._hears:
            return
        self._hears = True
        channel = await link.open_channel()
        link.attach(channel.number, _Notices(self))
        queue = f"{named.notices(self._namespace)}.{uuid.uuid4().hex}"
        pika = channel.pika
        await channel.call(pika.queue_declare, queue, exclusive=True, arguments={"x-queue-type": "classic"})
        await channel.call(pika.queue_bind, queue, named.notices(self._namespace), "")
        await channel.call(pika.basic_consume, queue, unused, auto_ack=True)

    def noticed(self, record: Record) -> None:
        """A subscription has changed: its members here go by the new definition from now on."""
        if self._topology is not None:
            self._topology.noticed(record)
        for receiver in self._receivers:
            receiver.learn(record)

    async def diagnose(self) -> list[Finding]:
        hashes = await self._can_hash()
        link = await self._connect("diagnosing")
        try:
            return await examine(
                link, self._namespace, Arguments(self._own.replicas), self._own.ordered_queues, hashes
            )
        finally:
            await link.leave()

    # -- dead letters -----------------------------------------------------------------------------

    async def dead(self, subscription: str) -> AsyncIterator[Message]:
        await self._consuming()
        assert self._dead is not None
        async with contextlib.aclosing(self._dead.browse(self._names(subscription).dead)) as letters:
            async for letter in letters:
                yield letter

    async def discard(self, subscription: str, ids: Collection[str] | None) -> int:
        await self._consuming()
        assert self._dead is not None
        return await self._dead.discard(self._names(subscription).dead, ids)

    def _names(self, subscription: str) -> Names:
        return Names(self._namespace, subscription)
