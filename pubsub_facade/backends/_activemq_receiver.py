"""One member of a subscription on ActiveMQ: its links, its window, and whether a message is the subscription's.

The broker cannot hold our patterns and filters (`_activemq_record`), so each message is judged here by the
stored record. Another process may have changed the record since it was read: a message is only ever turned
down by a record read after the message came. No task per message: acks are written once a turn of the loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Final, Protocol

from pubsub_facade._tasks import cancel
from pubsub_facade.backends._activemq_demand import EPHEMERAL, RENEWAL, Demand
from pubsub_facade.backends._activemq_forms import Form
from pubsub_facade.backends._activemq_record import Record, places_for
from pubsub_facade.backends._activemq_session import Session, store
from pubsub_facade.backends._activemq_watch import Place
from pubsub_facade.backends._activemq_wire import LIFE, Letter, MessageCodec, is_internal, reserved
from pubsub_facade.backends._stomp import ClientBusy, Frame, Link, ack_frames
from pubsub_facade.backends.base import Receiver
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.filters import Filter
from pubsub_facade.message import Delivery
from pubsub_facade.subscription import Definition, Subscription

log = logging.getLogger("pubsub_facade")

STAND_BY: Final = 0.05, 1.0  # s between looks whether the active member has gone, from first to longest
FRESH: Final = 60.0  # s that what was removed is worth mending by the next member: others may have by then
EARLY: Final = 1000  # messages received before their time at most (brokers without a scheduler)


class Home(Protocol):
    """What a receiver needs of its backend."""

    session: Session
    form: Form
    codec: MessageCodec
    demand: Demand

    unmended: dict[tuple[str, Place], float]
    """What was removed under members that have not got over it, for the next to join; and when it was."""

    async def record(self, name: str) -> Record | None: ...
    async def set_apart(self, name: str, topic: str) -> Record: ...
    def due_lines(self, delay: float) -> str: ...
    def due_headers(self, delay: float) -> dict[str, str]: ...


class _Source:
    """A subscription on one link; ``cover`` names the place it receives from, None: the retry queue."""

    __slots__ = ("acks", "cover", "link")

    def __init__(self, link: Link, cover: str | None) -> None:
        self.link = link
        self.cover = cover
        self.acks: list[str] = []


_Tag = tuple[_Source, str, int, str]  # where from; value of the ack header; order of coming; life of a retry


class ActivemqReceiver(Receiver):
    """Made by `join`; see there."""

    def __init__(
        self, home: Home, subscription: Subscription, window: int, forget: Callable[[ActivemqReceiver], None]
    ) -> None:
        self.subscription = subscription
        self._home = home
        self._window = window
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._links: list[Link] = []
        self._sources: dict[str, _Source] = {}
        self._notices = ""  # the id of the subscription to notices
        self._record: Record | None = None
        self._ready: deque[Delivery] = deque()
        self._returned: list[Delivery] = []
        self._doubtful: list[Delivery] = []  # turned down by a record that may be old
        self._early: dict[Delivery, asyncio.TimerHandle] = {}
        self._out = 0
        self._sequence = itertools.count(1)
        self._flushing = False
        self._waiter: asyncio.Future[None] | None = None
        self._standing_by: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._noticed = False  # since the last record was asked for, somebody changed it
        self._outdated = False  # the record in hand is known to be old: nothing is judged by it
        self._adding = asyncio.Lock()
        self._owner = ""  # of the lease of an ephemeral subscription
        self._lease: asyncio.TimerHandle | None = None
        self._mending: set[asyncio.Task[None]] = set()
        self._lost: ConnectionLost | None = None
        self._closed = False

    # -- joining ----------------------------------------------------------------------------------

    async def join(self) -> None:
        """Begin to receive, or to stand by where another member is active. Raises as `Backend.consume`."""
        try:
            await (self._attach_ephemeral() if self.subscription.name is None else self._attach())
        except ClientBusy:
            await self._detach()
            self._standing_by = self._loop.create_task(self._stand_by(), name="pubsub-stand-by")
        except BaseException:
            await self._detach()
            raise

    async def _stand_by(self) -> None:
        pause, longest = STAND_BY
        while not self._closed:
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
            try:
                await self._attach()
                return
            except ClientBusy:
                await self._detach()
            except Exception as error:
                self._cut(error if isinstance(error, ConnectionLost) else ConnectionLost(str(error)))
                return

    async def _attach(self) -> None:
        # A notice may come while we join: without the lock one would wait for the other's links for ever.
        async with self._adding:
            await self._attach_alone()
        for key, since in list(self._home.unmended.items()):
            if key[0] == self.subscription.name:
                del self._home.unmended[key]
                if since > time.monotonic() - FRESH:
                    self.removed(key[1])

    async def _attach_alone(self) -> None:
        name = self.subscription.label
        record = await self._read_record()
        first = record.places[0]
        lead = await self._link(self._home.form.client_id(name, first))
        self._notices = str(next(self._sequence))
        await lead.ask("SUBSCRIBE", {**self._home.form.from_notices(), "id": self._notices})
        self._record = record = await self._read_record()
        form, window = self._home.form, self._window if self._home.due_lines(1) else EARLY
        await self._receive_from(lead, None, form.from_queue(form.queue("retry", name), window))
        await self._receive_from(lead, first, self._from_place(first))
        await self._add_places(record)

    async def _add_places(self, record: Record) -> None:
        """Receive from places not received from yet; on Classic each needs a link with an identity of its own."""
        known = {source.cover for source in self._sources.values()}
        for cover in record.places:
            if cover not in known:
                client_id = self._home.form.client_id(self.subscription.label, cover)
                link = self._links[0] if client_id is None else await self._claim(client_id)
                await self._receive_from(link, cover, self._from_place(cover))

    async def _claim(self, client_id: str) -> Link:
        """A link for a further place. Who is active has the first one: another holds this only while it declares."""
        pause, longest = STAND_BY
        while True:
            try:
                return await self._link(client_id)
            except ClientBusy:
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)

    def _from_place(self, cover: str) -> dict[str, str]:
        name, ordered = self.subscription.label, self.subscription.ordered
        return self._home.form.from_place(name, cover, self._window, ordered=ordered)

    async def _attach_ephemeral(self) -> None:
        subscription, form = self.subscription, self._home.form
        places = places_for(subscription.patterns, ordered=subscription.ordered)
        self._record = Record(Definition.first(subscription, 0), tuple(places), ())
        selector = "" if subscription.filter is None else Filter.parse(subscription.filter).to_jms(_rename)
        link = await self._link(None)
        for cover in places:
            await self._receive_from(link, cover, form.from_topics(cover, self._window, selector))
        await self._home.demand.prepare()
        self._owner = EPHEMERAL + uuid.uuid4().hex
        await store(link, [self._home.demand.lease(self._owner, self._record)])
        self._lease = self._loop.call_later(RENEWAL, self._renew_lease)

    def _renew_lease(self) -> None:
        """Say on our own link that we are still here; where that is refused the link ends, and we with it."""
        if self._lost is not None:
            return
        self._links[0].write(self._home.demand.lease(self._owner, self._record).frame(""))
        self._lease = self._loop.call_later(RENEWAL, self._renew_lease)

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._links[0].write(self._home.demand.lease(self._owner, None).frame(""))

    async def _link(self, client_id: str | None) -> Link:
        link = await self._home.session.connect(client_id)
        if self._closed:
            # Meanwhile: nobody else would close it, and its client-id would keep all members away.
            await link.close()
            raise ConnectionLost("activemq: this member has left")
        link.on_messages = self._take
        link.on_lost = self._cut
        self._links.append(link)
        return link

    async def _receive_from(self, link: Link, cover: str | None, headers: dict[str, str]) -> None:
        id = str(next(self._sequence))
        self._sources[id] = _Source(link, cover)
        await self._home.session.subscribe(link, {**headers, "id": id})

    async def _read_record(self) -> Record:
        name = self.subscription.label
        record = await self._home.record(name)
        if record is None:
            raise ConnectionLost(f"activemq: subscription {name!r} is not there any more")
        return record

    async def _detach(self) -> None:
        links, self._links = self._links, []
        for link in links:
            link.on_lost = link.on_messages = _ignore
        self._sources.clear()
        await asyncio.gather(*(link.close() for link in links))

    # -- frames in --------------------------------------------------------------------------------

    def _take(self, frames: list[Frame]) -> None:
        form, decode, record = self._home.form, self._home.codec.delivery, self._record
        label = self.subscription.label
        for headers, body in frames:
            id = headers.get("subscription", "")
            source = self._sources.get(id)
            if source is None:
                if id == self._notices and body.decode("utf-8", "replace") == label:
                    self._noticed = self._outdated = True
                continue
            ack = headers.get("ack", "")
            if is_internal(headers):
                self._drop(source, ack)
                continue
            tag = (source, ack, next(self._sequence), headers.get(LIFE, ""))
            if source.cover is None:
                delivery, due = decode(self, tag, label, None, headers, body)
                if record is not None and _belongs(delivery, record):
                    self._accept(delivery, due)
                else:
                    self._doubtful.append(delivery)
                continue
            delivery, _ = decode(self, tag, label, form.topic_of(headers), headers, body)
            if record is None:
                self._doubtful.append(delivery)
            elif record.owner(delivery.topic) == form.cover_of(headers, source.cover):
                self._judge(delivery, record)
            else:
                self._drop(source, ack)  # a twin: the place that owns the topic has it too
        if self._doubtful or self._noticed:
            self._renew()
        self._wake()

    def _judge(self, delivery: Delivery, record: Record) -> None:
        waits = self._outdated or (self.subscription.ordered and bool(self._doubtful or self._renewing))
        if not waits and _belongs(delivery, record):
            self._ready.append(delivery)
        elif self.subscription.name is None:
            self._drop(delivery.tag[0], delivery.tag[1])
        else:
            self._doubtful.append(delivery)

    def _accept(self, delivery: Delivery, due: float) -> None:
        wait = due - time.time() if due else 0.0
        if wait > 0:
            self._early[delivery] = self._loop.call_later(wait, self._ripen, delivery)
        else:
            self._ready.append(delivery)

    def _ripen(self, delivery: Delivery) -> None:
        del self._early[delivery]
        self._ready.append(delivery)
        self._wake()

    # -- another record ---------------------------------------------------------------------------

    def _renew(self) -> None:
        if self._renewing is None and not self._closed:
            self._renewing = self._loop.create_task(self._renewal(), name="pubsub-renewal")

    async def _renewal(self) -> None:
        """Read the record again until no message is in doubt; lives only while there is one."""
        try:
            while self._doubtful or self._noticed:
                doubtful, self._doubtful = self._doubtful, []
                self._noticed = False
                try:
                    record = await self._read_record()
                except BaseException:
                    self._doubtful[:0] = doubtful
                    raise
                self._record = record
                self._outdated = self._noticed
                for delivery in doubtful:
                    if _belongs(delivery, record):
                        self._ready.append(delivery)
                    else:
                        self._drop(delivery.tag[0], delivery.tag[1])
                async with self._adding:
                    await self._add_places(record)
                self._wake()
        except PubSubError as error:
            self._cut(error if isinstance(error, ConnectionLost) else ConnectionLost(str(error)))
        finally:
            self._renewing = None

    # -- what is removed under us -----------------------------------------------------------------

    def unwatched(self, error: ConnectionLost) -> None:
        """Nobody tells us any more what is removed: join again, by which all that we need is declared."""
        if self.subscription.name is not None:
            self._cut(error)

    def removed(self, gone: Place) -> None:
        """The broker was told to remove a topic or queue of anybody's, and has dropped its subscriptions."""
        record, form, name = self._record, self._home.form, self.subscription.name
        if record is None or not self._links or self._lost is not None or self._closed:
            return
        if gone == Place("queue", form.demand):
            self._mend(self._tell_demand(record))
        elif name is not None:
            if hit := form.hit(gone, name, record):
                self._mend(self._restore(gone, hit))
            elif gone.kind == "queue" and gone.name in (
                form.queue("retry", name),
                form.queue("record", name),
            ):
                self._cut(_taken(gone))

    def _mend(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(self._mended(work), name="pubsub-mend")
        self._mending.add(task)
        task.add_done_callback(self._mending.discard)

    async def _mended(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except PubSubError as error:
            self._cut(error if isinstance(error, ConnectionLost) else ConnectionLost(str(error)))

    async def _tell_demand(self, record: Record) -> None:
        """The entries of all subscriptions are gone: until ours is back, publishers refuse what is for us."""
        if self.subscription.name is not None:
            await self._home.demand.confirm(self.subscription.name, record)
        elif self._lease is not None:
            await store(self._links[0], [self._home.demand.lease(self._owner, record)])

    async def _restore(self, gone: Place, hit: Sequence[str]) -> None:
        home, name, topic = self._home, self.subscription.label, gone.name.partition(".")[2]
        home.unmended[name, gone] = time.monotonic()
        async with self._adding:
            revived = [await home.form.revive(home.session, name, cover) for cover in hit]
            if all(revived) or "~" in topic:
                self._cut(_taken(gone))
            else:
                await self._restore_topic(gone, topic)
        home.unmended.pop((name, gone), None)

    async def _restore_topic(self, gone: Place, topic: str) -> None:
        """Receive by a durable subscription to this very topic, made anew: those that there are stay without it."""
        name = self.subscription.label
        self._record = record = await self._home.set_apart(name, topic)
        price = "; its order beside other topics is not kept" if self.subscription.ordered else ""
        log.warning("%s: %s; receiving again what is published there%s", name, _taken(gone), price)
        for id, source in list(self._sources.items()):
            if source.cover == topic:
                del self._sources[id]
                await source.link.ask("UNSUBSCRIBE", {"id": id})
                await self._home.form.renew(source.link, name, topic)
                await self._receive_from(source.link, topic, self._from_place(topic))
        await self._add_places(record)

    # -- handing out ------------------------------------------------------------------------------

    async def receive(self) -> Sequence[Delivery]:
        while True:
            if self._lost is not None or self._closed:
                raise ConnectionLost(str(self._lost or "activemq: this member has left")) from self._lost
            if self._returned:
                self._put_back()
            room = self._window - self._out
            if self._ready and room > 0:
                count = min(room, len(self._ready))
                self._out += count
                return [self._ready.popleft() for _ in range(count)]
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _put_back(self) -> None:
        """What was given back goes to the front again, in the old order."""
        self._returned.sort(key=lambda delivery: delivery.tag[2], reverse=True)
        self._ready.extendleft(self._returned)
        self._returned.clear()

    def _wake(self) -> None:
        waiter = self._waiter
        if (
            waiter is not None
            and not waiter.done()
            and (
                self._lost is not None
                or self._closed
                or ((self._ready or self._returned) and self._out < self._window)
            )
        ):
            waiter.set_result(None)

    def _cut(self, error: ConnectionLost) -> None:
        if self._lost is None and not self._closed:
            self._lost = error
            self._wake()

    # -- settling ---------------------------------------------------------------------------------

    def ack(self, delivery: Delivery) -> None:
        tag: _Tag | None = delivery.tag
        if tag is None:
            return
        delivery.tag = None
        self._out -= 1
        self._drop(tag[0], tag[1])
        self._wake()

    def _drop(self, source: _Source, ack: str) -> None:
        source.acks.append(ack)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        for source in self._sources.values():
            if source.acks:
                source.link.write(ack_frames(source.acks))
                source.acks.clear()

    def release(self, delivery: Delivery) -> None:
        """ActiveMQ has no way to give one back: it waits here again, and goes to others when this member leaves."""
        tag: _Tag | None = delivery.tag
        if tag is None:
            return
        again = Delivery(
            self,
            tag,
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
        delivery.tag = None
        self._out -= 1
        self._returned.append(again)
        self._wake()

    async def park(self, deliveries: Sequence[Delivery]) -> None:
        home = self._home
        lines = home.form.queue_lines(home.form.queue("retry", self.subscription.label))
        life = {LIFE: self._record.lives[0]} if self._record is not None else {}
        letters = [
            home.codec.copy(
                each,
                lines + home.due_lines(each.delay),
                each.attempt + 1,
                {**life, **home.due_headers(each.delay)},
            )
            for each in deliveries
        ]
        await self._replace(deliveries, letters)

    async def bury(self, deliveries: Sequence[Delivery]) -> None:
        form = self._home.form
        lines = form.queue_lines(form.queue("dead", self.subscription.label))
        await self._replace(deliveries, [self._home.codec.copy(each, lines, 1) for each in deliveries])

    async def _replace(self, deliveries: Sequence[Delivery], letters: Sequence[Letter]) -> None:
        """Store the copies, then settle the originals."""
        chosen = [
            letter for delivery, letter in zip(deliveries, letters, strict=True) if delivery.tag is not None
        ]
        if not chosen:
            return
        if self._lost is not None or self._closed or not self._links:
            raise ConnectionLost(str(self._lost or "activemq: this member has left"))
        await store(self._links[0], chosen)
        for delivery in deliveries:
            self.ack(delivery)

    async def flush(self) -> None:
        self._flush()
        for link in self._links:
            if link.lost is None:
                await link.drain()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._forget(self)
        self._flush()
        self._wake()
        self._end_lease()
        for timer in self._early.values():
            timer.cancel()
        tasks = [task for task in (self._standing_by, self._renewing, *self._mending) if task is not None]
        await cancel(*tasks)
        self._flush()
        await self._detach()


def _taken(gone: Place) -> ConnectionLost:
    return ConnectionLost(f"activemq: {gone} was removed under its members, with all that waited in it")


def _belongs(delivery: Delivery, record: Record) -> bool:
    """Whether the subscription's rules, or for a retry its life, say that a delivery is its own."""
    source, _, _, life = delivery.tag
    if source.cover is None:
        return not life or life in record.lives
    return record.definition.accepts(delivery.topic, delivery.headers, delivery.timestamp)


def _rename(name: str) -> str | None:
    """User headers keep their names on the wire, unless they are reserved."""
    return None if reserved(name) else name


def _ignore(_: object) -> None:
    return
