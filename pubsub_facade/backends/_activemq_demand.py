"""Who would get a message: what a publisher with ``require_subscribers`` asks of ActiveMQ.

No broker tells it over STOMP, so each subscription leaves an entry in one queue of its namespace: a durable one
when it is declared, removed when it is deleted; an ephemeral one a lease, which the broker lets lapse unless it is
renewed. Only such publishers read them. What they have in hand may be a little old, and is good enough to send by;
nothing is ever refused by it: before that, all is read anew.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from pubsub_facade import wire
from pubsub_facade.backends._activemq_forms import Form, nothing
from pubsub_facade.backends._activemq_record import Record
from pubsub_facade.backends._activemq_session import Session, store
from pubsub_facade.backends._activemq_wire import ENTRY, GONE, OWNER, Letter
from pubsub_facade.backends._stomp import Frame
from pubsub_facade.errors import PubSubError
from pubsub_facade.message import Message
from pubsub_facade.subscription import Era
from pubsub_facade.topics import TopicRouter

MAX_AGE: Final = 5.0  # s that a view is sent by
LEASE: Final = 90.0  # s that an ephemeral subscription counts after its last word
RENEWAL: Final = 30.0  # s between its words
EPHEMERAL: Final = "~"  # begins the owner of a lease; no subscription's name does


class View:
    """The subscriptions of a namespace as of one reading of their entries. Pure.

    Arguments:
        frames: the entries, oldest first; what is none is passed over.
        now: seconds since the epoch, where the frames may hold leases that have lapsed; 0: the broker left them out.

    Raises PubSubError where an entry cannot be read: who wants what is then not known.
    """

    def __init__(self, frames: Iterable[Frame], now: float = 0.0) -> None:
        records: dict[str, list[Record]] = {}
        gone: set[str] = set()
        for headers, body in frames:
            owner = headers.get(OWNER)
            if owner is None:
                continue
            if GONE in headers:
                gone.add(owner)
            elif not 0 < (wire.number(headers.get("expires"), 0) or 0) / 1000 < now:
                records.setdefault(owner, []).append(_record(owner, body))
        self._eras: list[Era] = []
        self._router: TopicRouter[int] = TopicRouter()
        for owner, known in records.items():
            merged = Record.merged(known)
            if owner in gone or merged is None:
                continue
            era = merged.definition.current
            for pattern in era.patterns:
                self._router.add(pattern, len(self._eras))
            self._eras.append(era)

    def wants(self, message: Message) -> bool:
        """Whether a subscription would get it, by the patterns and the filter now in force."""
        topic, headers, eras = message.topic, message.headers, self._eras
        return any(
            (era := eras[at]).filter is None or era.accepts(topic, headers)
            for at in self._router.match(topic)
        )


@lru_cache(maxsize=1024)
def _parsed(body: bytes) -> Record:
    """The same entries are read again and again, and a parsed filter is kept in its era."""
    return Record.from_json(body)


def _record(owner: str, body: bytes) -> Record:
    try:
        return _parsed(body)
    except ValueError as error:
        raise PubSubError(f"activemq: the entry of {owner!r} among the subscriptions: {error}") from error


class Demand:
    """The entries of one namespace: left by its subscriptions, read by its publishers."""

    def __init__(self, session: Session, form: Form) -> None:
        self._session = session
        self._form = form
        self._read_at = 0.0
        self.reset()

    def reset(self) -> None:
        """The link is a new one: nothing is known of the broker."""
        self._view: View | None = None
        self._made = False
        self._deciding = asyncio.Lock()  # who publishes first decides and sends first

    # -- what subscriptions leave -----------------------------------------------------------------

    async def prepare(self) -> None:
        """Make the queue of entries exist, where sending to it would make another kind of queue."""
        if not self._made:
            await self._form.make_demand(self._session)
            self._made = True

    def entry(self, name: str, record: Record) -> Letter:
        """The entry of a durable subscription."""
        headers = {OWNER: name, ENTRY: uuid.uuid4().hex}
        return Letter(self._form.queue_lines(self._form.demand), headers, record.to_json())

    def lease(self, owner: str, record: Record | None) -> Letter:
        """The entry of an ephemeral subscription for the time to come; None: that it is gone."""
        lines = self._form.passing_lines(self._form.demand, LEASE)
        if record is None:
            return Letter(lines, {OWNER: owner, ENTRY: uuid.uuid4().hex, GONE: "1"}, b"")
        return Letter(lines, {OWNER: owner, ENTRY: uuid.uuid4().hex}, record.to_json())

    async def entries(self, name: str) -> list[Frame]:
        """The entries of a durable subscription that is declared again: one, where all is well."""
        queue = self._form.demand
        found = _of(name, await self._form.browse(self._session, queue))
        # A browser does not show all of a long queue.
        return found or _of(name, await self._form.sweep(self._session, queue, nothing))

    async def confirm(self, name: str, record: Record) -> None:
        """A subscription was declared as it is already: see that its entry says so."""
        found = await self.entries(name)
        if len(found) == 1 and _says(found[0][1], record):
            return
        await self.prepare()
        await store(self._session.main, [self.entry(name, record)])
        await self.remove(found)

    async def remove(self, entries: Sequence[Frame]) -> None:
        """Remove entries that others have replaced, or that are of a subscription that was deleted."""
        if entries:
            ids = {headers[ENTRY] for headers, _ in entries}
            await self._form.sweep(
                self._session, self._form.demand, lambda headers: headers.get(ENTRY) in ids
            )

    async def all_entries(self, name: str) -> list[Frame]:
        """All entries of a subscription that is to be deleted."""
        return _of(name, await self._form.sweep(self._session, self._form.demand, nothing))

    # -- what publishers ask ----------------------------------------------------------------------

    async def unwanted(self, messages: Sequence[Message]) -> list[Message]:
        """Those that no subscription would get.

        Calls in order return in order, and the next begins only when this one's caller waits for something else.
        Raises ConnectionLost, or another PubSubError where it cannot be known.
        """
        async with self._deciding:
            view = self._view
            if view is None or time.monotonic() - self._read_at > MAX_AGE:
                view = self._keep(
                    View(await self._form.browse(self._session, self._form.demand), time.time())
                )
            alone = [message for message in messages if not view.wants(message)]
            if alone:
                view = self._keep(View(await self._form.sweep(self._session, self._form.demand, nothing)))
                alone = [message for message in alone if not view.wants(message)]
            return alone

    def _keep(self, view: View) -> View:
        self._view = view
        self._read_at = time.monotonic()
        return view


def _of(name: str, frames: Sequence[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame[0].get(OWNER) == name and ENTRY in frame[0]]


def _says(body: bytes, record: Record) -> bool:
    """Whether an entry has the rules now in force."""
    try:
        told = Record.from_json(body).definition.current
    except ValueError:
        return False
    current = record.definition.current
    return (set(told.patterns), told.filter) == (set(current.patterns), current.filter)
