"""The three forms of the ActiveMQ driver: what differs between them, and nothing else.

`Durable` and `Virtual` are ActiveMQ Classic with durable topic subscriptions or with virtual topics, `Artemis`
is Artemis. A form names destinations, says how to subscribe to them, and makes, sweeps and removes what is on
the broker. Each fact it relies on was tried on a real broker and stands in ``docs/backends/activemq.md``.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final

from pubsub_facade.backends._activemq_jolokia import Jolokia
from pubsub_facade.backends._activemq_record import Record
from pubsub_facade.backends._activemq_session import ANSWER, Box, Session, next_of, store
from pubsub_facade.backends._activemq_watch import Place
from pubsub_facade.backends._activemq_wire import FENCE, RECORD, SEED, Letter, foreign_id, one_word
from pubsub_facade.backends._stomp import BrokerRefused, ClientBusy, Frame, Link, ack_frames
from pubsub_facade.backends.base import Backlog
from pubsub_facade.errors import ConnectionLost, PubSubError, TopologyConflict, UnsupportedFeature
from pubsub_facade.settings import Settings
from pubsub_facade.topics import matches

EVERYTHING: Final = 1_000_000  # prefetch of a sweep
STALE: Final = 60.0  # s after which another sweep's fence was left behind by a crash
PAUSE: Final = 0.5  # s without a message after which a sweep looks what is the matter
BUSY: Final = 3.0  # s to wait for a client-id that another process holds while it declares
KEPT: Final = {"maxDeliveryAttempts": -1}  # Artemis' setting for what it must never put aside
FRAME: Final = 512  # bytes a message is taken for where a broker counts its window in bytes

Wanted = Callable[[Mapping[str, str]], bool]
"""Of a message's headers: whether a sweep removes it."""


def nothing(_: Mapping[str, str]) -> bool:
    """Leave all."""
    return False


def everything(_: Mapping[str, str]) -> bool:
    """Remove all."""
    return True


class Form(ABC):
    """What one form calls things and how it does them.

    A *place* is where a subscription's messages wait; it is named by its cover (`_activemq_record`).
    Queues beside it, of kinds ``retry``, ``dead`` and ``record``, are the subscription's own.
    """

    competing: ClassVar[bool]

    def __init__(self, settings: Settings) -> None:
        self.space = one_word(settings.namespace)
        self.settings = settings.activemq
        self.notices = f"{self.space}$notice"  # a topic: names of subscriptions that were changed
        self.demand = f"{self.space}$demand"  # a queue: the entries of all subscriptions (`_activemq_demand`)

    def queue(self, kind: str, name: str) -> str:
        """The name of a queue beside a subscription."""
        return f"{self.space}${kind}.{name}"

    @abstractmethod
    def topic_lines(self, topic: str) -> str:
        """Encoded header lines of a SEND to a topic."""

    @abstractmethod
    def queue_lines(self, queue: str) -> str:
        """Encoded header lines of a SEND to a queue."""

    def passing_lines(self, queue: str, seconds: float) -> str:
        """As `queue_lines`, of a message that neither outlives these seconds nor a restart of the broker.

        Classic lets go of such a message in silence; it would move a persistent one to its own dead letters.
        """
        lines = _not_persistent(self.queue_lines(queue))
        return f"{lines}expires:{int((time.time() + seconds) * 1000)}\n"

    @abstractmethod
    def notice_lines(self) -> str:
        """Encoded header lines of a SEND to `notices`."""

    @abstractmethod
    def topic_of(self, headers: Mapping[str, str]) -> str | None:
        """The topic a frame was published on; None where only its own header tells."""

    def cover_of(self, headers: Mapping[str, str], cover: str) -> str:
        """The cover of the place a frame came from, which was received by the subscription to ``cover``."""
        return cover

    def client_id(self, name: str, cover: str) -> str | None:
        """The identity a link must have to receive from a place; one link at a time can have it."""
        return None

    @abstractmethod
    def from_place(self, name: str, cover: str, window: int, *, ordered: bool) -> dict[str, str]:
        """Headers of the SUBSCRIBE to a place."""

    @abstractmethod
    def from_topics(self, cover: str, window: int, selector: str) -> dict[str, str]:
        """Headers of an ephemeral SUBSCRIBE to topics."""

    @abstractmethod
    def from_notices(self) -> dict[str, str]:
        """Headers of the SUBSCRIBE to `notices`."""

    @abstractmethod
    def from_queue(self, queue: str, window: int, *, exclusive: bool = False) -> dict[str, str]:
        """Headers of the SUBSCRIBE to a queue."""

    @abstractmethod
    async def create(
        self, session: Session, name: str, covers: Sequence[str], new: Sequence[str], *, ordered: bool
    ) -> None:
        """Make the subscription's places and queues exist so that a crash of the broker keeps them.

        Arguments:
            covers: all places.
            new: those of them that no record knows yet.
        """

    @abstractmethod
    async def remove(self, session: Session, name: str, covers: Sequence[str]) -> None:
        """Remove places and queues with all they hold. Raises TopologyConflict while a member elsewhere holds one."""

    @abstractmethod
    async def sweep(self, session: Session, queue: str, wanted: Wanted) -> list[Frame]:
        """All that a queue holds now, oldest first; what is ``wanted`` is removed, the rest stays as it is."""

    async def browse(self, session: Session, queue: str) -> list[Frame]:
        """What a queue holds, as `sweep` tells, where the broker has no cheaper way that shows most of it."""
        return await self.sweep(session, queue, nothing)

    async def make_demand(self, session: Session) -> None:
        """Make the queue `demand` exist, where sending to it does not."""
        return

    async def records(self, session: Session, name: str) -> list[Frame]:
        """The stored records of a subscription: few, and members ask for them often."""
        return [
            frame for frame in await self.browse(session, self.queue("record", name)) if RECORD in frame[0]
        ]

    def hit(self, gone: Place, name: str, record: Record) -> list[str]:
        """The covers of a subscription's places that get nothing, or less, once ``gone`` was removed."""
        return []

    async def revive(self, session: Session, name: str, cover: str) -> bool:
        """Make a place that was removed exist again; False where the member that has it must `renew` it."""
        return False

    async def renew(self, link: Link, name: str, cover: str) -> None:
        """Let go of a place on the link that has received from it, so that the next SUBSCRIBE makes it anew."""
        return

    @abstractmethod
    async def count(self, session: Session, name: str, covers: Sequence[str]) -> Backlog:
        """How much a subscription has before it."""


class Classic(Form):
    """What both forms on ActiveMQ Classic share."""

    root: ClassVar[str]

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.jolokia = Jolokia.of(self.settings)

    def destination(self, cover: str) -> str:
        """The topic, or wildcard over topics, that a cover means."""
        return f"{self.root}{self.space}.{cover.replace('#', '>')}"

    def topic_lines(self, topic: str) -> str:
        return f"destination:/topic/{self.root}{self.space}.{topic}\npersistent:true\n"

    def queue_lines(self, queue: str) -> str:
        return f"destination:/queue/{queue}\npersistent:true\n"

    def notice_lines(self) -> str:
        return f"destination:/topic/{self.notices}\n"

    def from_topics(self, cover: str, window: int, selector: str) -> dict[str, str]:
        headers = {
            "destination": f"/topic/{self.destination(cover)}",
            "ack": "client-individual",
            "activemq.prefetchSize": str(window),
        }
        return {**headers, "selector": selector} if selector else headers

    def from_notices(self) -> dict[str, str]:
        return {"destination": f"/topic/{self.notices}", "ack": "auto"}

    def from_queue(self, queue: str, window: int, *, exclusive: bool = False) -> dict[str, str]:
        return {
            "destination": f"/queue/{queue}",
            "ack": "client-individual",
            "activemq.prefetchSize": str(window),
            "activemq.exclusive": "true" if exclusive else "false",
        }

    async def sweep(self, session: Session, queue: str, wanted: Wanted) -> list[Frame]:
        """A browser stops at 400 messages (``maxBrowsePageSize``), an exclusive consumer does not.

        Everything before two fences of our own was there when we began: Classic has one line for persistent
        messages and one for others, and either may be ahead. Sweeps wait for each other.
        """
        lines = self.queue_lines(queue)
        fences = {uuid.uuid4().hex: lines, uuid.uuid4().hex: _not_persistent(lines)}
        link = session.main
        frames: list[Frame] = []
        acks: list[str] = []
        try:
            async with (
                session.subscribed(self.from_queue(queue, EVERYTHING, exclusive=True)) as box,
                asyncio.timeout(ANSWER),
            ):
                await store(link, [Letter(lines, {FENCE: fence}, b"") for fence, lines in fences.items()])
                while fences:
                    frame = await _next(box, partial(self._nudge, session, queue))
                    headers = frame[0]
                    fence = headers.get(FENCE)
                    if fence is None:
                        frames.append(frame)
                    if wanted(headers) if fence is None else fences.pop(fence, "") or _stale(headers):
                        acks.append(headers["ack"])
                link.write(ack_frames(acks))
        except TimeoutError as error:
            raise PubSubError(f"activemq: queue {queue} could not be read within {ANSWER:g} s") from error
        return frames

    async def _nudge(self, session: Session, queue: str) -> None:
        """Classic now and then stops in the middle of a long queue, until something happens to it or 30 s are over."""
        async with session.subscribed(self.from_queue(queue, 0)):
            pass

    async def browse(self, session: Session, queue: str) -> list[Frame]:
        """400 messages at most (``maxBrowsePageSize``); expired ones may be among them. Waits for no sweep."""
        headers = {"destination": f"/queue/{queue}", "browser": "true", "ack": "auto"}
        frames: list[Frame] = []
        try:
            async with session.subscribed(headers) as box, asyncio.timeout(ANSWER):
                while "browser" not in (frame := await next_of(box))[0]:
                    frames.append(frame)
        except TimeoutError as error:
            raise PubSubError(f"activemq: queue {queue} could not be read within {ANSWER:g} s") from error
        return [frame for frame in frames if FENCE not in frame[0]]

    async def _empty(self, session: Session, name: str) -> None:
        for kind in ("retry", "dead", "record"):
            queue = self.queue(kind, name)
            await self.sweep(session, queue, everything)
            if self.jolokia is not None:
                await self.jolokia.remove_queue(queue)

    async def _dead(self, name: str) -> int | None:
        assert self.jolokia is not None
        return (await self.jolokia.queues([self.queue("dead", name)]))[0]


async def _next(box: Box, silent: Callable[[], Awaitable[None]]) -> Frame:
    """The next frame of a sweep; ``silent`` is called where none came for a while."""
    while box.empty():
        with suppress(TimeoutError):
            async with asyncio.timeout(PAUSE):
                return await next_of(box)
        await silent()
    return await next_of(box)


def _not_persistent(lines: str) -> str:
    return lines.replace("persistent:true", "persistent:false")


def _stale(headers: Mapping[str, str]) -> bool:
    return float(headers.get("timestamp", "0")) / 1000 < time.time() - STALE


def _is_wild(cover: str) -> bool:
    return "*" in cover or "#" in cover


class Durable(Classic):
    """Classic, durable topic subscriptions: the client-id makes one member active, the others stand by."""

    competing = False
    root = ""

    def topic_of(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("destination", "").removeprefix(f"/topic/{self.space}.")

    def client_id(self, name: str, cover: str) -> str | None:
        return f"{self.space}${name}${cover}"

    def from_place(self, name: str, cover: str, window: int, *, ordered: bool) -> dict[str, str]:
        return {
            "destination": f"/topic/{self.destination(cover)}",
            "ack": "client-individual",
            "activemq.prefetchSize": str(window),
            "activemq.subscriptionName": self._subscription(name, cover),
        }

    def _subscription(self, name: str, cover: str) -> str:
        return f"{name}${cover}"

    async def create(
        self, session: Session, name: str, covers: Sequence[str], new: Sequence[str], *, ordered: bool
    ) -> None:
        for cover in covers:
            try:
                link = await self._claim(session, name, cover, BUSY if cover in new else 0)
            except ClientBusy:
                continue  # a member is active there, so it exists
            try:
                await link.ask("SUBSCRIBE", {"id": "1", **self.from_place(name, cover, 0, ordered=ordered)})
                if _is_wild(cover):
                    anchor = {
                        "destination": f"/topic/{self._anchor(name, cover)}",
                        "activemq.prefetchSize": "0",
                    }
                    await link.ask("SUBSCRIBE", {"id": "2", **anchor})
            finally:
                await link.close()

    def _anchor(self, name: str, cover: str) -> str:
        """A topic below the wildcard: a restarted broker forgets a subscription of which it knows no topic."""
        word = f"~{one_word(name)}"
        return self.destination(cover.replace("*", word).replace("#", word))

    async def _claim(self, session: Session, name: str, cover: str, patience: float) -> Link:
        end = time.monotonic() + patience
        while True:
            try:
                return await session.connect(self.client_id(name, cover))
            except ClientBusy:
                if time.monotonic() >= end:
                    raise
                await asyncio.sleep(0.05)

    async def remove(self, session: Session, name: str, covers: Sequence[str]) -> None:
        for cover in covers:
            try:
                link = await self._claim(session, name, cover, BUSY)
            except ClientBusy as error:
                raise TopologyConflict(
                    f"activemq: subscription {name!r} cannot be deleted while a member of it is active: "
                    f"stop it first ({error})"
                ) from error
            try:
                await self.renew(link, name, cover)
            except BrokerRefused as error:
                if "No durable subscription exists" not in str(error):
                    raise
            finally:
                await link.close()
            if self.jolokia is not None and _is_wild(cover):
                await self.jolokia.remove_topic(self._anchor(name, cover))
        await self._empty(session, name)

    def hit(self, gone: Place, name: str, record: Record) -> list[str]:
        """Of a topic that is removed and comes back the broker never again gives a durable subscription anything.

        It keeps the old topic in mind for as long as it has the subscription in memory, members that come back
        included (tried on 6.1.7). The topics that others keep their wildcards by get no messages anyway.
        """
        topic = gone.name.removeprefix(f"{self.space}.")
        if gone.kind != "topic" or topic == gone.name:
            return []
        if "~" in topic:
            return [
                cover for cover in record.places if _is_wild(cover) and gone.name == self._anchor(name, cover)
            ]
        return [cover for cover in record.places if matches(cover, topic)]

    async def renew(self, link: Link, name: str, cover: str) -> None:
        header = {"activemq.subscriptionName": self._subscription(name, cover)}
        await link.ask("UNSUBSCRIBE", {"id": "1", **header})

    async def count(self, session: Session, name: str, covers: Sequence[str]) -> Backlog:
        if self.jolokia is None:
            return Backlog(None, None, None, None)
        clients = [f"{self.space}${name}${cover}" for cover in covers]
        pending, active = await self.jolokia.durable(clients)
        retries, handed_out = await self.jolokia.queues([self.queue("retry", name)])
        waiting = pending + retries - handed_out
        return Backlog(max(0, waiting), active + handed_out, await self._dead(name), None)


class Virtual(Classic):
    """Classic, virtual topics: members compete for a queue that the broker feeds from the topics."""

    competing = True
    root = "VirtualTopic."

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.demand += ".virtual"  # what is published for one of Classic's forms does not reach the other

    def topic_of(self, headers: Mapping[str, str]) -> str | None:
        shown = headers.get("original-destination") or headers.get("destination", "")
        _, found, topic = shown.partition(f"/topic/{self.root}{self.space}.")
        return topic if found else None

    def cover_of(self, headers: Mapping[str, str], cover: str) -> str:
        """A consumer of a wide queue is fed from the narrower ones, too: their names are its wildcard's."""
        tail = headers.get("destination", "").partition(f".{self.root}{self.space}.")[2]
        return tail.replace(">", "#") or cover

    def _line(self, name: str, cover: str) -> str:
        return f"Consumer.{one_word(name)}.{self.destination(cover)}"

    def from_place(self, name: str, cover: str, window: int, *, ordered: bool) -> dict[str, str]:
        return self.from_queue(self._line(name, cover), window, exclusive=ordered)

    async def create(
        self, session: Session, name: str, covers: Sequence[str], new: Sequence[str], *, ordered: bool
    ) -> None:
        for cover in covers:
            queue = self._line(name, cover)
            if cover not in new:
                async with session.subscribed(self.from_queue(queue, 0)):
                    continue
            # A queue that never held a message is forgotten when the broker restarts.
            seed = uuid.uuid4().hex
            headers = {**self.from_queue(queue, 1), "selector": f"seed = '{seed}'"}
            async with session.subscribed(headers) as box, asyncio.timeout(ANSWER):
                await store(session.main, [Letter(self.queue_lines(queue), {SEED: seed, "seed": seed}, b"")])
                frame = await next_of(box)
                session.main.write(ack_frames([frame[0]["ack"]]))

    async def remove(self, session: Session, name: str, covers: Sequence[str]) -> None:
        if self.jolokia is None:
            raise UnsupportedFeature(
                "activemq",
                "deleting a subscription over STOMP with virtual topics: its queues would go on collecting",
                "set admin_url in [activemq] to the broker's Jolokia, or remove in its console "
                + ", ".join(self._line(name, cover) for cover in covers),
            )
        for cover in covers:
            await self.jolokia.remove_queue(self._line(name, cover))
        await self._empty(session, name)

    def hit(self, gone: Place, name: str, record: Record) -> list[str]:
        """A virtual topic feeds the queues that are there; who publishes to it makes none."""
        if gone.kind != "queue":
            return []
        return [cover for cover in record.places if gone.name == self._line(name, cover)]

    async def revive(self, session: Session, name: str, cover: str) -> bool:
        """By a message, so that a restarted broker remembers it; members drop it."""
        await store(
            session.main, [Letter(self.queue_lines(self._line(name, cover)), {SEED: uuid.uuid4().hex}, b"")]
        )
        return True

    async def count(self, session: Session, name: str, covers: Sequence[str]) -> Backlog:
        if self.jolokia is None:
            return Backlog(None, None, None, None)
        queues = [*(self._line(name, cover) for cover in covers), self.queue("retry", name)]
        size, handed_out = await self.jolokia.queues(queues)
        return Backlog(max(0, size - handed_out), handed_out, await self._dead(name), None)


class Artemis(Form):
    """Artemis: a durable multicast queue for each place, made by management messages; its wildcards are ours."""

    competing = True

    def topic_lines(self, topic: str) -> str:
        return f"destination:{self.space}.{topic}\ndestination-type:MULTICAST\npersistent:true\n"

    def queue_lines(self, queue: str) -> str:
        return f"destination:{queue}\ndestination-type:ANYCAST\npersistent:true\n"

    def notice_lines(self) -> str:
        return f"destination:{self.notices}\ndestination-type:MULTICAST\n"

    def topic_of(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("destination", "").removeprefix(f"{self.space}.")

    def _line(self, name: str, cover: str) -> str:
        return f"{self.space}$sub.{name}${cover}"

    def from_place(self, name: str, cover: str, window: int, *, ordered: bool) -> dict[str, str]:
        return self._subscribe(f"{self.space}.{cover}::{self._line(name, cover)}", window)

    def from_topics(self, cover: str, window: int, selector: str) -> dict[str, str]:
        headers = self._subscribe(f"{self.space}.{cover}", window)
        headers["subscription-type"] = "MULTICAST"
        # Header values are text over STOMP: only with this prefix does Artemis compare them as numbers, too.
        return {**headers, "selector": f"convert_string_expressions:{selector}"} if selector else headers

    def from_notices(self) -> dict[str, str]:
        return {"destination": self.notices, "subscription-type": "MULTICAST", "ack": "auto"}

    def from_queue(self, queue: str, window: int, *, exclusive: bool = False) -> dict[str, str]:
        return self._subscribe(queue, window)

    def _subscribe(self, destination: str, window: int) -> dict[str, str]:
        """The broker hands out while it has credit, in bytes: one byte is credit for one message."""
        credit = 1 if window == 1 else window * FRAME
        return {
            "destination": destination,
            "ack": "client-individual",
            "consumer-window-size": str(credit),
        }

    async def create(
        self, session: Session, name: str, covers: Sequence[str], new: Sequence[str], *, ordered: bool
    ) -> None:
        await self._keep_trying(session)
        for kind in ("retry", "dead", "record"):
            await self._create_queue(
                session, self.queue(kind, name), None, **{"non-destructive": kind != "retry"}
            )
        for cover in covers:
            made = await self._create_queue(
                session, self._line(name, cover), f"{self.space}.{cover}", exclusive=ordered
            )
            if made.get("exclusive", ordered) != ordered:
                change = {"name": self._line(name, cover), "exclusive": ordered}
                await self._manage(session, "broker", "updateQueue", json.dumps(change))

    async def make_demand(self, session: Session) -> None:
        """By default Artemis keeps what has expired, in another queue."""
        await self._set(session, self.demand, {"expiryAddress": "", **KEPT})
        await self._create_queue(session, self.demand, None, **{"non-destructive": True})

    async def _create_queue(
        self, session: Session, queue: str, address: str | None, **options: bool
    ) -> dict[str, object]:
        configuration: dict[str, object] = {
            "name": queue,
            "address": address or queue,
            "routing-type": "ANYCAST" if address is None else "MULTICAST",
            "durable": True,
            "auto-create-address": True,
            "auto-delete": False,
            **options,
        }
        made = json.loads(
            await self._manage(session, "broker", "createQueue", json.dumps(configuration), True)
        )
        return made if isinstance(made, dict) else {}

    async def _keep_trying(self, session: Session) -> None:
        """By default Artemis puts aside what was handed out ten times and not settled: to members that crashed,
        and of the queues that are only read, to each that reads them (`docs`)."""
        for match in (".#", "$retry.#", "$dead.#", "$record.#"):
            await self._set(session, self.space + match, KEPT)

    async def _set(self, session: Session, match: str, settings: Mapping[str, object]) -> None:
        """Address settings of our own, where they are not so already."""
        an_address = match.replace("#", "x")
        known = json.loads(await self._manage(session, "broker", "getAddressSettingsAsJSON", an_address))
        if not settings.items() <= known.items():
            await self._manage(session, "broker", "addAddressSettings", match, json.dumps(settings))

    async def remove(self, session: Session, name: str, covers: Sequence[str]) -> None:
        queues = [self._line(name, cover) for cover in covers]
        queues += [self.queue(kind, name) for kind in ("retry", "dead", "record")]
        for queue in queues:
            if await self._exists(session, queue):
                await self._manage(session, "broker", "destroyQueue", queue, True, True)

    async def _exists(self, session: Session, queue: str) -> bool:
        found = await self._manage(session, "broker", "getQueueNames")
        return queue in found

    async def sweep(self, session: Session, queue: str, wanted: Wanted) -> list[Frame]:
        """Dead letters and records are queues that reading leaves as they are; removing is management's."""
        fence = uuid.uuid4().hex
        frames: list[Frame] = []
        if not await self._exists(session, queue):
            return frames
        headers = {**self._subscribe(queue, 1), "consumer-window-size": "-1"}
        alone = partial(self._check_consumed, session, queue)
        try:
            async with session.subscribed(headers) as box, asyncio.timeout(ANSWER):
                await store(session.main, [Letter(self.queue_lines(queue), {FENCE: fence}, b"")])
                while (frame := await _next(box, alone))[0].get(FENCE) != fence:
                    frames.append(frame)
        except TimeoutError as error:
            raise ConnectionLost(f"activemq: queue {queue} could not be read within {ANSWER:g} s") from error
        gone = [frame[0] for frame in frames if wanted(frame[0]) or (FENCE in frame[0] and _stale(frame[0]))]
        for each in (*gone, frame[0]):
            await self._manage(session, f"queue.{queue}", "removeMessage", int(foreign_id(each)))
        return [frame for frame in frames if FENCE not in frame[0]]

    async def _check_consumed(self, session: Session, queue: str) -> None:
        """Who subscribes to a queue that is just being deleted is not told; what is sent to it makes another."""
        if not await self._manage(session, f"queue.{queue}", "getConsumerCount"):
            raise ConnectionLost(f"activemq: queue {queue} was deleted while it was read")

    async def count(self, session: Session, name: str, covers: Sequence[str]) -> Backlog:
        """What is in flight is not told: the window is in bytes, so members hold more than they handed out."""
        held = 0
        for queue in (*(self._line(name, cover) for cover in covers), self.queue("retry", name)):
            held += await self._manage(session, f"queue.{queue}", "getMessageCount")
        dead = await self._manage(session, f"queue.{self.queue('dead', name)}", "countMessages")
        return Backlog(held, None, dead, None)

    async def _manage(self, session: Session, resource: str, operation: str, *arguments: object) -> Any:
        return await session.manage(resource, operation, *arguments, reply_to=f"{self.space}$reply")
