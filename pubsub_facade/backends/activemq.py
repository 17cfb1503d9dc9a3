"""ActiveMQ over STOMP, in three forms: Classic with durable subscriptions, Classic with virtual topics, Artemis.

This module moves messages; what a form calls things is `_activemq_forms`', what a member receives is
`_activemq_receiver`'s. A batch is one STOMP transaction confirmed by one receipt. What the broker cannot
remember of a subscription is stored in a queue beside it (`_activemq_record`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from pubsub_facade import wire
from pubsub_facade.backends._activemq_demand import Demand
from pubsub_facade.backends._activemq_doctor import examine_artemis, examine_classic
from pubsub_facade.backends._activemq_forms import Artemis, Durable, Form, Virtual, everything
from pubsub_facade.backends._activemq_receiver import ActivemqReceiver
from pubsub_facade.backends._activemq_record import Record, places_for
from pubsub_facade.backends._activemq_session import Session, store
from pubsub_facade.backends._activemq_watch import Place, Watch
from pubsub_facade.backends._activemq_wire import RECORD, Letter, MessageCodec, foreign_id
from pubsub_facade.backends._required import send_wanted
from pubsub_facade.backends._stomp import BrokerRefused, Link
from pubsub_facade.backends.base import Backend, Backlog, Capabilities, Finding, Receiver
from pubsub_facade.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    Fate,
    MessageError,
    SendFailed,
)
from pubsub_facade.message import Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscription import Subscription
from pubsub_facade.topics import REMEMBERED

PING: Final = "ping"


class ActivemqBackend(Backend):
    """``backend = "activemq"``; ``flavor`` and ``subscriptions`` of ``[activemq]`` choose the form."""

    name = "activemq"
    pipeline = 4

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.section = settings.activemq
        self.form: Form
        if self.section.flavor == "artemis":
            self.form = Artemis(settings)
        elif self.section.subscriptions == "virtual":
            self.form = Virtual(settings)
        else:
            self.form = Durable(settings)
        self.session = Session(settings)
        self.demand = Demand(self.session, self.form)
        self.watch = (
            None if self.section.flavor == "artemis" else Watch(self.session, self._removed, self._unwatched)
        )
        self.codec = MessageCodec()
        self._schedules = self.section.flavor == "artemis" or self.section.scheduler
        self._lines: dict[str, str] = {}  # topic -> encoded header lines
        self._receivers: list[ActivemqReceiver] = []
        self.unmended: dict[tuple[str, Place], float] = {}

    @property
    def capabilities(self) -> Capabilities:
        artemis = self.section.flavor == "artemis"
        return Capabilities(
            durable=True,
            shared=True,
            competing=self.form.competing,
            stored_attempts=False,
            delay=self._schedules,
            replay=False,
            require_subscribers=True,
            backlog=artemis or self.section.admin_url is not None,
            max_payload=self.section.max_payload,
        )

    # -- life -------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self.session.open()
        self.demand.reset()
        if self.watch is not None:
            self.watch.reset()

    async def close(self) -> None:
        if self.watch is not None:
            await self.watch.close()
        await asyncio.gather(*(receiver.close() for receiver in list(self._receivers)))
        await self.session.close()

    async def ping(self) -> None:
        link = self.session.main
        await link.ask("BEGIN", {"transaction": PING})
        await link.ask("ABORT", {"transaction": PING})

    # -- publishing -------------------------------------------------------------------------------

    async def send(self, messages: Sequence[Message]) -> None:
        if self.settings.require_subscribers:
            await send_wanted(self.name, messages, self.demand.unwanted, self._publish)
        else:
            await self._publish(messages)

    async def _publish(self, messages: Sequence[Message]) -> None:
        await self._send(messages, [self._topic_lines(message) for message in messages])

    async def resend(self, subscription: str, messages: Sequence[Message]) -> None:
        lines = self.form.queue_lines(self.form.queue("retry", subscription))
        await self._send(messages, [lines] * len(messages), copies=True)

    def _topic_lines(self, message: Message) -> str:
        lines = self._lines.get(message.topic)
        if lines is None:
            if len(self._lines) >= REMEMBERED:
                self._lines.clear()
            lines = self._lines[message.topic] = self.form.topic_lines(message.topic)
        return lines + self.due_lines(message.delay) if message.delay else lines

    def due_lines(self, delay: float) -> str:
        """Header lines by which the broker delivers ``delay`` seconds later; "" where it cannot."""
        return f"AMQ_SCHEDULED_DELAY:{max(1, int(delay * 1000))}\n" if self._schedules and delay > 0 else ""

    def due_headers(self, delay: float) -> dict[str, str]:
        """Headers by which a member waits ``delay`` seconds, where the broker cannot."""
        return {} if self._schedules or delay <= 0 else {wire.DUE: repr(time.time() + delay)}

    async def _send(self, messages: Sequence[Message], lines: Sequence[str], *, copies: bool = False) -> None:
        link = self.session.main
        letters: list[Letter] = []
        ids: list[str] = []
        fates: dict[str, Fate] = {}
        reasons: list[str] = []
        for message, line in zip(messages, lines, strict=True):
            try:
                letter = self.codec.copy(message, line, 1) if copies else self.codec.letter(message, line)
            except MessageError as error:
                fates[message.id] = "not stored"
                reasons.append(str(error))
            else:
                letters.append(letter)
                ids.append(message.id)
        if letters:
            try:
                await store(link, letters)
            except BrokerRefused as error:
                if len(letters) == 1 and error.sure:
                    fates[ids[0]] = "not stored"
                    reasons.append(_mend(error))
                else:
                    await self._send_singly(letters, ids, fates, reasons)
        if fates:
            raise SendFailed(
                f"activemq: {len(fates)} of {len(messages)} messages were refused: {reasons[0]}", fates
            )

    async def _send_singly(
        self, letters: Sequence[Letter], ids: Sequence[str], fates: dict[str, Fate], reasons: list[str]
    ) -> None:
        """One refused message undoes its transaction: find it, and send the others.

        On a link of their own, one after the other, because Artemis ends the link at each refusal.
        """
        link: Link | None = None
        try:
            for letter, id in zip(letters, ids, strict=True):
                if link is None or link.lost is not None:
                    link = await self.session.connect()
                try:
                    await store(link, [letter])
                except BrokerRefused as error:
                    fates[id] = "not stored" if error.sure else "unknown"
                    reasons.append(_mend(error))
                    await link.close()
        except ConnectionFailed as error:
            raise ConnectionLost(str(error)) from error
        finally:
            if link is not None:
                await link.close()

    # -- subscriptions ----------------------------------------------------------------------------

    async def record(self, name: str) -> Record | None:
        """What is stored of a subscription; None where nothing is."""
        return (await self._read(name))[0]

    async def _read(self, name: str) -> tuple[Record | None, list[str]]:
        frames = await self.form.records(self.session, name)
        records = []
        for _, body in frames:
            try:
                records.append(Record.from_json(body))
            except ValueError:
                continue  # not ours
        return Record.merged(records), [headers[RECORD] for headers, _ in frames if RECORD in headers]

    async def declare(self, subscription: Subscription) -> None:
        with _rights():
            await self._declare(subscription)

    async def _declare(self, subscription: Subscription) -> None:
        assert subscription.name is not None
        name, ordered = subscription.name, subscription.ordered
        wanted = places_for(subscription.patterns, ordered=ordered)
        old, stored = await self._read(name)
        new = Record.declared(subscription, old, wanted)
        known = old.places if old is not None else ()
        fresh = [cover for cover in new.places if cover not in known]
        await self.form.create(self.session, name, new.places, fresh, ordered=ordered)
        if new is old and len(stored) == 1:
            await self.demand.confirm(name, new)
            return
        await self.demand.prepare()
        left = await self.demand.entries(name) if stored else []
        # Again: its places exist only now, so only from now on its new patterns count.
        new = Record.declared(subscription, old, wanted)
        queue = self.form.queue("record", name)
        letter = Letter(self.form.queue_lines(queue), {RECORD: uuid.uuid4().hex}, new.to_json())
        await store(self.session.main, [letter, self.demand.entry(name, new)])
        await self.demand.remove(left)
        if stored:
            await self.form.sweep(self.session, queue, lambda headers: headers.get(RECORD) in stored)
            await self._notify(name)

    async def set_apart(self, name: str, topic: str) -> Record:
        """The record of a subscription that is to have a place for this very topic; stored where it had none."""
        old, stored = await self._read(name)
        if old is None:
            raise ConnectionLost(f"activemq: subscription {name!r} is not there any more")
        new = old.with_apart(topic)
        if new is not old:
            queue = self.form.queue("record", name)
            letter = Letter(self.form.queue_lines(queue), {RECORD: uuid.uuid4().hex}, new.to_json())
            await store(self.session.main, [letter])
            await self.form.sweep(self.session, queue, lambda headers: headers.get(RECORD) in stored)
            await self._notify(name)
        return new

    async def _notify(self, name: str) -> None:
        """Tell members everywhere to read the record again."""
        await store(self.session.main, [Letter(self.form.notice_lines(), {}, name.encode())])

    async def delete(self, subscription: str) -> None:
        record, stored = await self._read(subscription)
        for receiver in list(self._receivers):
            if receiver.subscription.name == subscription:
                await receiver.close()
        # Members elsewhere declare anew as soon as something is removed: the entries they leave then stay.
        left = await self.demand.all_entries(subscription)
        if record is not None or stored:
            await self.form.remove(self.session, subscription, record.places if record is not None else ())
        await self.demand.remove(left)
        if record is not None or stored:
            await self._notify(subscription)

    async def consume(self, subscription: Subscription, window: int) -> Receiver:
        if self.watch is not None and subscription.name is not None:
            await self.watch.ready()
        receiver = ActivemqReceiver(self, subscription, window, self._receivers.remove)
        self._receivers.append(receiver)
        try:
            with _rights():
                await receiver.join()
        except BaseException:
            if receiver in self._receivers:
                self._receivers.remove(receiver)
            raise
        return receiver

    def _removed(self, gone: Place) -> None:
        for receiver in list(self._receivers):
            receiver.removed(gone)

    def _unwatched(self, error: ConnectionLost) -> None:
        for receiver in list(self._receivers):
            receiver.unwatched(error)

    async def inspect(self, subscription: str) -> Backlog:
        record = await self.record(subscription)
        if record is None:
            none = 0 if self.capabilities.backlog else None
            return Backlog(none, none, none, None, declared=False)
        backlog = await self.form.count(self.session, subscription, record.places)
        # Of topics apart the broker counts for the wider place what it will never hand out.
        return replace(backlog, waiting=None) if record.apart else backlog

    async def diagnose(self) -> list[Finding]:
        examine = examine_artemis if self.section.flavor == "artemis" else examine_classic
        return await examine(self.session, self.form, self.section)

    # -- dead letters -----------------------------------------------------------------------------

    async def dead(self, subscription: str) -> AsyncIterator[Message]:
        frames = await self.form.sweep(self.session, self.form.queue("dead", subscription), lambda _: False)
        for headers, body in frames:
            yield self.codec.message("", headers, body)

    async def discard(self, subscription: str, ids: Collection[str] | None) -> int:
        wanted = everything if ids is None else lambda headers: _id_of(headers) in ids
        frames = await self.form.sweep(self.session, self.form.queue("dead", subscription), wanted)
        return sum(1 for headers, _ in frames if wanted(headers))


@contextmanager
def _rights() -> Iterator[None]:
    try:
        yield
    except BrokerRefused as error:
        if error.denied:
            raise AuthenticationFailed(f"activemq: {_mend(error)}") from error
        raise


def _mend(error: BrokerRefused) -> str:
    """What the broker said, and what to do where it is a matter of rights."""
    return f"{error}: grant the user this right" if error.denied else str(error)


def _id_of(headers: Mapping[str, str]) -> str:
    return headers.get(wire.ID) or foreign_id(headers)
