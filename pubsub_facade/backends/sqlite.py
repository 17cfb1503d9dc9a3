"""The embedded backend: one SQLite file, any number of processes of one machine, the whole contract.

Here is what the loop does; the file belongs to one thread (`_sqlite_writer`), which gets operations and
gives back outcomes in batches. A member acks, releases and asks for more in one operation, its turn, and
the next turn begins when the last has ended. Nothing here waits for the disk or touches SQL.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final

from pubsub_facade.backends._required import unheard
from pubsub_facade.backends._sqlite_doctor import examine
from pubsub_facade.backends._sqlite_letters import discard, last_letter, letters
from pubsub_facade.backends._sqlite_operations import Copy, Send, Turn, resolver
from pubsub_facade.backends._sqlite_schema import SUSPECT
from pubsub_facade.backends._sqlite_store import Claimed, Store, failure_of, headers_of, unpack
from pubsub_facade.backends._sqlite_writer import Writer
from pubsub_facade.backends.base import Backend, Backlog, Capabilities, Finding, Position, Receiver
from pubsub_facade.errors import ConnectionLost, PubSubError, SendFailed
from pubsub_facade.message import NO_HEADERS, Delivery, Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscription import Subscription
from pubsub_facade.wire import number

log = logging.getLogger("pubsub_facade")

GATHER: Final = 0.001  # s that acks, and the wish for a few more, wait for others
RETRY: Final = 0.5  # s until a turn that found no room in the file is tried again
HELD_BYTES: Final = 64 << 20  # bodies in one member's hands from which on it asks for no more
MICROSECOND: Final = 1e-6
PATIENCE: Final = 5.0  # s that leaving may take


class SqliteBackend(Backend):
    """The embedded backend; ``[sqlite]`` in the settings says where its file is."""

    name = "sqlite"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._writer: Writer | None = None
        self._receivers: list[SqliteReceiver] = []
        self._hopeless: PubSubError | None = None  # the file is damaged: opening it again does not mend it

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            durable=True,
            shared=True,
            competing=True,
            stored_attempts=True,
            delay=True,
            replay=True,
            require_subscribers=True,
            backlog=True,
            max_payload=self.settings.sqlite.max_payload,
        )

    # -- life -------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        return "" if self._writer is None else str(self._writer.path)

    async def open(self) -> None:
        if self._hopeless is not None:
            raise self._hopeless
        await self.close()
        writer = Writer(self.settings, self._wake, self._lost)
        await writer.open()
        self._writer = writer
        if writer.pipes.reading is not None:
            asyncio.get_running_loop().add_reader(writer.pipes.reading, self._woken, writer)

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        left = False
        try:
            async with asyncio.timeout(PATIENCE):
                for receiver in list(self._receivers):
                    await receiver.close()
                await writer.leave()
                left = True
        except (PubSubError, TimeoutError) as error:
            log.debug("sqlite: while leaving: %s", error)
        self._receivers.clear()
        if writer.pipes.reading is not None:
            asyncio.get_running_loop().remove_reader(writer.pipes.reading)
        await writer.stop(left=left)

    async def ping(self) -> None:
        await self._ask(Store.look)

    def _use(self) -> Writer:
        if self._writer is None:
            raise ConnectionLost("sqlite: not open")
        return self._writer

    async def _ask(self, function: Callable[[Store], Any]) -> Any:
        return await self._use().call(function, transaction=False)

    async def _do(self, function: Callable[[Store], Any]) -> Any:
        return await self._use().call(function, transaction=True)

    def _lost(self, error: PubSubError) -> None:
        """The file cannot be used any more: members are cut off."""
        if not isinstance(error, ConnectionLost):
            self._hopeless = error
        for receiver in list(self._receivers):
            receiver.cut(error)

    def _woken(self, writer: Writer) -> None:
        lines = writer.pipes.drain()
        self._wake(None if lines is None else set(lines))

    def _wake(self, lines: set[int] | None) -> None:
        for receiver in self._receivers:
            if lines is None or receiver.line in lines:
                receiver.wake()

    def forget(self, receiver: SqliteReceiver) -> None:
        """A member has left."""
        if receiver in self._receivers:
            self._receivers.remove(receiver)

    # -- publish ----------------------------------------------------------------------------------

    async def send(self, messages: Sequence[Message]) -> None:
        refused = await self._send(messages, None)
        if refused:
            raise SendFailed(
                unheard("sqlite", (message.topic for message in refused), len(messages)),
                {message.id: "not stored" for message in refused},
            )

    async def resend(self, subscription: str, messages: Sequence[Message]) -> None:
        if await self._send(messages, subscription):
            raise SendFailed(
                f"sqlite: no subscription {subscription!r}: declare it first",
                {message.id: "not stored" for message in messages},
            )

    async def _send(self, messages: Sequence[Message], only: str | None) -> list[Message]:
        writer = self._use()
        future: asyncio.Future[list[Message]] = asyncio.get_running_loop().create_future()
        required = self.settings.require_subscribers
        writer.submit(Send(messages, only, required=required, done=resolver(future)))
        return await future

    # -- subscriptions ----------------------------------------------------------------------------

    async def declare(self, subscription: Subscription) -> None:
        if await self._ask(lambda store: store.declared(subscription)):
            return
        now = time.time()
        await self._do(lambda store: store.declare(subscription, None, now))

    async def delete(self, subscription: str) -> None:
        await self._do(lambda store: store.delete(subscription))

    async def consume(self, subscription: Subscription, window: int) -> Receiver:
        writer = self._use()
        now = time.time()
        member, route = await self._do(lambda store: store.join(subscription, writer.process, now))
        if self._writer is not writer:  # left meanwhile, with this member: what it claimed would be nobody's
            raise ConnectionLost("sqlite: the file was left while this member joined")
        receiver = SqliteReceiver(self, writer, subscription.label, window, member, route.id, route.line)
        self._receivers.append(receiver)
        return receiver

    async def inspect(self, subscription: str) -> Backlog:
        for receiver in self._receivers:
            if receiver.label == subscription:
                await receiver.flush()
        counts = await self._ask(lambda store: store.inspect(subscription))
        if counts is None:
            return Backlog(0, 0, 0, None, declared=False)
        waiting, in_flight, dead, oldest = counts
        return Backlog(waiting, in_flight, dead, None if oldest is None else max(0.0, time.time() - oldest))

    async def dead(self, subscription: str) -> AsyncIterator[Message]:
        last = await self._ask(lambda store: last_letter(store, subscription))
        number = 0
        while number < last:
            number, page = await self._ask(partial(letters, name=subscription, after=number, last=last))
            for letter in page:
                yield letter

    async def discard(self, subscription: str, ids: Collection[str] | None) -> int:
        chosen = None if ids is None else list(ids)
        count: int = await self._do(lambda store: discard(store, subscription, chosen))
        return count

    async def diagnose(self) -> list[Finding]:
        self._use()
        return await asyncio.to_thread(examine, self.settings.sqlite)

    async def seek(self, subscription: str, to: Position) -> None:
        since: float | None = None  # "end": nothing that is there
        if to == "beginning":
            since = 0.0
        elif isinstance(to, datetime):
            since = to.timestamp() - MICROSECOND  # a datetime is rounded, a stored time is not
        positions: list[int] = []
        last = 0
        if since is not None:  # looked for before the transaction, which others wait for
            positions, last = await self._ask(partial(Store.history, name=subscription, since=since))

        def seek(store: Store) -> None:
            meanwhile = [] if since is None else store.history(subscription, since, last)[0]
            store.seek(subscription, positions + meanwhile, time.time())

        await self._do(seek)


class SqliteReceiver(Receiver):
    """One member: what it holds, and its turns at the file."""

    def __init__(
        self,
        backend: SqliteBackend,
        writer: Writer,
        label: str,
        window: int,
        member: int,
        subscription: int,
        line: int,
    ) -> None:
        self.line = line
        self._backend = backend
        self._writer = writer
        self.label = label
        self._window = window
        self._member = member
        self._subscription = subscription
        self._loop = asyncio.get_running_loop()
        self._out: dict[int, Delivery] = {}
        self._bytes = 0
        self._suspect: int | None = None  # the one we hold
        self._ready: list[Delivery] = []  # claimed and not yet asked for
        self._acks: list[int] = []
        self._releases: list[int] = []
        self._turning = False  # a turn is under way
        self._empty = False  # the last turn found nothing, and nobody has called since
        self._calls = 0
        self._waiter: asyncio.Future[None] | None = None
        self._gather: asyncio.TimerHandle | None = None
        self._due: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._refused = False  # the last turn was, and the log has told
        self._error: PubSubError | None = None
        self._closed = False

    # -- receiving --------------------------------------------------------------------------------

    async def receive(self) -> Sequence[Delivery]:
        while not self._ready:
            if self._closed:
                raise ConnectionLost("sqlite: this member has left")
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            self._plan()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        return ready

    def wake(self) -> None:
        """There may be something."""
        self._call()
        self._plan()

    def _call(self) -> None:
        """The next turn may find something, also if one under way finds nothing."""
        self._calls += 1
        self._empty = False

    def cut(self, error: PubSubError) -> None:
        """There is nothing more to come."""
        self._error = error
        self._out.clear()
        self._ready.clear()
        self._answer()

    def _answer(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def _room(self) -> int:
        """How many more it could be given now."""
        if self._empty or self._waiter is None or self._ready or self._bytes > HELD_BYTES:
            return 0
        return self._window - len(self._out)

    # -- turns ------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Take a turn now if it is worth one, or in a moment, with what gathers until then."""
        if self._turning:
            return
        room, settled = self._room, len(self._acks) + len(self._releases)
        worth = (self._window + 1) // 2
        if room >= worth or settled >= worth or (room and not self._out) or self._releases:
            self.turn()
        elif (room or settled) and self._gather is None:
            self._gather = self._loop.call_later(GATHER, self.turn)

    def turn(self) -> None:
        """Hand what is settled to the writer, and ask for what there is room for."""
        if self._gather is not None:
            self._gather.cancel()
            self._gather = None
        room = self._room
        if self._turning or self._error is not None or not (room or self._acks or self._releases):
            return
        self._turning = True
        acks, self._acks = self._acks, []
        releases, self._releases = self._releases, []
        if self._due is not None and room:
            self._due.cancel()
            self._due = None
        calls = self._calls

        def done(result: Any) -> None:
            self._turned(result, acks, releases)
            if room and not self._ready and calls == self._calls:
                self._empty = True
            if self._waiter is not None or self._acks or self._releases:
                self._plan()

        self._writer.submit(
            Turn(
                self._member,
                self._subscription,
                self.line,
                acks=acks,
                releases=releases,
                room=room,
                suspect=self._suspect is None,
                done=done,
            )
        )

    def _turned(self, result: Any, acks: list[int], releases: list[int]) -> None:
        self._turning = False
        if self._error is not None or self._closed:
            return
        if isinstance(result, ConnectionLost):  # the client left the file while this member joined
            self.cut(result)
            return
        if isinstance(result, PubSubError):
            log.log(logging.DEBUG if self._refused else logging.ERROR, "%s", result)
            self._refused = True
            self._acks[:0], self._releases[:0] = acks, releases
            self._turning = True
            self._retry = self._loop.call_later(RETRY, self._again)
            return
        self._refused = False
        self._take(result)

    def _again(self) -> None:
        self._retry = None
        self._turning = False
        self._plan()

    def _take(self, claimed: Claimed) -> None:
        if claimed.line is None:
            self.cut(ConnectionLost(f"sqlite: subscription {self.label!r} was deleted"))
            return
        if claimed.line != self.line:  # it was moved in its history: what is in hand comes again
            self.line = claimed.line
            self._out.clear()
            self._acks.clear()
            self._releases.clear()
            self._bytes = 0
            self._suspect = None
        if claimed.claim is not None:
            self._ready = [self._delivery(row, body) for row, body in unpack(claimed.claim)]
            self._answer()
        elif claimed.due is not None:
            self._due = self._loop.call_later(max(0.0, claimed.due - time.time()), self.wake)

    def _delivery(self, row: list[Any], body: bytes) -> Delivery:
        (
            position,
            size,
            id,
            topic,
            key,
            headers,
            content_type,
            published,
            attempt,
            redelivered,
            failure,
            state,
        ) = row
        delivery = Delivery(
            self,
            position,
            self.label,
            topic,
            body,
            key=key,
            headers=NO_HEADERS if headers is None else headers_of(headers),
            id=id,
            content_type=content_type,
            timestamp=None if published is None else number(published, None),
            attempt=attempt,
            redelivered=bool(redelivered),
            failure=failure_of(failure),
        )
        self._out[position] = delivery
        self._bytes += size
        if state == SUSPECT:
            self._suspect = position
        return delivery

    # -- settling ---------------------------------------------------------------------------------

    def _settled(self, delivery: Delivery) -> bool:
        """Whether it was ours to settle; then it is out no more."""
        position = delivery.tag
        if self._out.get(position) is not delivery:
            return False
        del self._out[position]
        self._bytes -= len(delivery.body)
        if position == self._suspect:
            self._suspect = None
            self._call()
        return True

    def ack(self, delivery: Delivery) -> None:
        if self._settled(delivery):
            self._acks.append(delivery.tag)
            if self._gather is None:
                self._plan()

    def release(self, delivery: Delivery) -> None:
        if self._settled(delivery):
            self._releases.append(delivery.tag)
            self._plan()

    async def park(self, deliveries: Sequence[Delivery]) -> None:
        await self._copy(deliveries, park=True)

    async def bury(self, deliveries: Sequence[Delivery]) -> None:
        await self._copy(deliveries, park=False)

    async def _copy(self, deliveries: Sequence[Delivery], *, park: bool) -> None:
        mine = [delivery for delivery in deliveries if self._out.get(delivery.tag) is delivery]
        if not mine:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._writer.submit(Copy(self._member, self.line, mine, park=park, done=resolver(future)))
        await future
        for delivery in mine:
            self._settled(delivery)
        self._plan()

    async def flush(self) -> None:
        while (self._turning or self._acks or self._releases) and self._error is None:
            self.turn()
            await self._writer.call(_nothing, transaction=False)
            if self._retry is not None:
                await asyncio.sleep(RETRY)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._backend.forget(self)
        for timer in (self._gather, self._due, self._retry):
            if timer is not None:
                timer.cancel()
        self._answer()
        self._out.clear()
        self._ready.clear()
        if self._error is None:
            acks, releases = self._acks, self._releases
            await self._writer.call(lambda store: self._leave(store, acks, releases), transaction=True)

    def _leave(self, store: Store, acks: list[int], releases: list[int]) -> None:
        if acks:
            store.settle(self.line, self._member, acks)
        if releases:
            store.release(self.line, self._member, releases)
        store.leave(self._member, self._subscription)


def _nothing(store: Store) -> None:
    """A round trip to the writer: what was handed over before is done."""
