"""The transactional outbox, apart from any framework: what a row is, and the relay that publishes rows.

An application writes the message as a row, in the transaction of its own data; a relay publishes what was
committed, with confirms, and then settles the rows. Nothing committed is lost, nothing rolled back is ever
published, and a crash between confirm and settlement makes a twin with the same id.

Order by key: a key's rows lie in one of `SHARDS` shards, one relay holds a shard at a time, and within it rows
go by id. Ids are given when a row is written, not when it is committed: a key whose writers must be in order has
to serialise them on a row of their own (lock it, or update it, before writing to the outbox), as they do anyway.
A refused row holds its key until it is sent or set aside; only what the broker took in the same batch is past it.
Must never settle a row that the broker has not confirmed, nor hold it against a row that the broker is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pubsub_facade.client import AsyncPubSub
from pubsub_facade.codec import encode
from pubsub_facade.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    PayloadTooLarge,
    PublishTimeout,
    PubSubError,
    SendFailed,
)
from pubsub_facade.message import HeaderValue, Message, new_id
from pubsub_facade.subscription import Backoff

log = logging.getLogger("pubsub_facade.outbox")

SHARDS: Final = 32
SHARDS_AT_ONCE: Final = 8  # held by one lane, so that several relays share the work

PENDING: Final = 0
RETRY: Final = 1  # was refused; waits until due
DELAYED: Final = 2  # not to be published before due
SENT: Final = 3
FAILED: Final = 4  # set aside, with its error

COLUMNS: Final = ("id", "attempts", "message_id", "topic", "message_key", "headers", "content_type", "body")
MAX_ERROR: Final = 2000  # characters kept of an error's text

RETRY_BACKOFF: Final = Backoff(initial=1.0, maximum=300.0)


def prepare(message: Message, *, max_payload: int | None = None) -> Message:
    """A checked, encoded copy of ``message`` with an id, ready to be stored as a row.

    Raises TopicError, MessageError, PayloadTooLarge.
    """
    message.check()
    prepared = Message(
        message.topic,
        message.payload,
        key=message.key,
        headers=dict(message.headers),
        delay=message.delay,
    )
    prepared.body, prepared.content_type = encode(message.payload)
    if max_payload is not None and len(prepared.body) > max_payload:
        raise PayloadTooLarge(
            f"payload of {len(prepared.body)} bytes on {message.topic!r} is over the limit of {max_payload} bytes: "
            "send a reference to it, or raise max_payload"
        )
    prepared.id = message.id or new_id()
    return prepared


def columns_of(message: Message, now: float) -> dict[str, Any]:
    """The row of a prepared message, column by column.

    Arguments:
        now: seconds since the epoch.
    """
    return {
        "shard": shard_of(message.key if message.key is not None else message.id),
        "state": DELAYED if message.delay else PENDING,
        "attempts": 0,
        "created": now,
        "due": now + message.delay,
        "message_id": message.id,
        "topic": message.topic,
        "message_key": message.key,
        "headers": json.dumps(dict(message.headers)) if message.headers else "",
        "content_type": message.content_type,
        "body": message.body,
        "error": "",
    }


def shard_of(text: str) -> int:
    """Which shard a key lies in."""
    return zlib.crc32(text.encode()) % SHARDS


@dataclass(frozen=True, slots=True)
class Row:
    """A claimed row.

    Arguments:
        id: of the row.
        attempts: how often its message was refused so far.
        message: encoded, ready for a driver.
    """

    id: int
    attempts: int
    message: Message


def row_of(values: Sequence[Any]) -> Row:
    """A row from its `COLUMNS`; published now, so that time is its ``published_at``."""
    id, attempts, message_id, topic, key, headers, content_type, body = values
    message = Message(topic, None, key=key, headers=_headers(headers), id=message_id)
    message.body = bytes(body)
    message.content_type = content_type
    message.timestamp = time.time()
    return Row(int(id), int(attempts), message)


def _headers(text: str) -> Mapping[str, HeaderValue] | None:
    return json.loads(text) if text else None


@dataclass(slots=True)
class Outcome:
    """What became of a claim's rows; those not named stay as they are.

    Arguments:
        sent: row ids that the broker has confirmed.
        retry: (row id, due time in seconds since the epoch, error).
        failed: (row id, error): set aside.
    """

    sent: list[int] = field(default_factory=list)
    retry: list[tuple[int, float, str]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lag:
    """How far the relay is behind.

    Arguments:
        waiting: rows not yet published, those that wait for a time included.
        failed: rows set aside.
        oldest: age in seconds of the oldest row that is due; None: there is none.
    """

    waiting: int
    failed: int
    oldest: float | None

    def __str__(self) -> str:
        oldest = "" if self.oldest is None else f", the oldest for {self.oldest:.1f} s"
        return f"{self.waiting} wait{oldest}; {self.failed} set aside"


class Lane(ABC):
    """One link to the table, claiming and settling batches by turns."""

    @abstractmethod
    async def claim(self, limit: int) -> list[Row]:
        """Up to ``limit`` due rows of shards that nobody else holds, by id; none: nothing is held."""

    @abstractmethod
    async def settle(self, outcome: Outcome) -> None:
        """Write what became of the claim, in one transaction, and let go of its shards."""

    @abstractmethod
    async def abandon(self) -> None:
        """Let go of the claim with nothing written. Never raises."""

    @abstractmethod
    async def close(self) -> None:
        """Abandon, and give up the link. Never raises."""


class Store(ABC):
    """The table. Every error of a database is for the relay: it says so once and tries again."""

    poll: float
    """Seconds between looks at the table when nothing wakes the relay."""

    @abstractmethod
    async def open(self) -> None:
        """Check the table and make the shards that are missing."""

    @abstractmethod
    def lane(self) -> Lane:
        """A new link; `open` has returned before."""

    @abstractmethod
    def wakes(self) -> AsyncIterator[None]:
        """Yields when rows were committed; ends at once where the database cannot tell."""

    @abstractmethod
    async def next_due(self) -> float | None:
        """When the next waiting row is due (seconds since the epoch)."""

    @abstractmethod
    async def lag(self) -> Lag:
        """How far behind."""

    @abstractmethod
    async def prune(self, before: float, limit: int) -> int:
        """Delete up to ``limit`` rows sent before ``before``; returns how many."""

    @abstractmethod
    async def close(self) -> None:
        """Give up what `open` and `wakes` took."""


class Relay:
    """Publishes the rows of an outbox. Any number may run at once, in any number of processes.

    Arguments:
        pubsub: where to; closed by its owner.
        store: the table.
        lanes: batches under way at once, so that the database and the broker work at the same time.
        batch: rows in one claim.
        publish_timeout: seconds for one batch to be confirmed.
        max_attempts: refusals until a row is set aside. An absent broker does not count.
        backoff: how long a refused row waits.
        keep: seconds that sent rows are kept.
    """

    def __init__(
        self,
        pubsub: AsyncPubSub,
        store: Store,
        *,
        lanes: int = 2,
        batch: int = 500,
        publish_timeout: float = 10.0,
        max_attempts: int = 10,
        backoff: Backoff = RETRY_BACKOFF,
        keep: float = 0.0,
    ) -> None:
        self._pubsub = pubsub
        self._store = store
        self._lanes = lanes
        self._batch = batch
        self._timeout = publish_timeout
        self._max_attempts = max_attempts
        self._backoff = backoff
        self._keep = keep
        self._work = asyncio.Event()
        self._stop = asyncio.Event()
        self._told: str | None = None
        self._in_hand = 0  # claims that lanes are publishing now
        self._last: PubSubError | None = None
        self.published = 0
        self.set_aside = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until ``stop`` is set; what is under way is finished first."""
        self._stop = stop
        tasks = [asyncio.create_task(self._listen(), name="pubsub-outbox-wakes")]
        if self._keep:
            tasks.append(asyncio.create_task(self._prune(), name="pubsub-outbox-prune"))
        lanes = [
            asyncio.create_task(self._lane(), name=f"pubsub-outbox-{number}") for number in range(self._lanes)
        ]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, *lanes], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            self._work.set()
            for done in await asyncio.gather(*lanes, return_exceptions=True):
                if isinstance(done, BaseException):
                    raise done
        finally:
            for task in (*tasks, *lanes, stopped):
                task.cancel()
            await asyncio.gather(*tasks, *lanes, stopped, return_exceptions=True)
            await self._store.close()

    async def drain(self, stop: asyncio.Event | None = None) -> int:
        """Publish all that is due now and return; how many rows were published. For scripts and tests.

        Arguments:
            stop: return after the batch in hand once it is set.
        """
        self._stop = stop or self._stop
        await self._store.open()
        lane = self._store.lane()
        before = self.published
        try:
            while not self._stop.is_set() and (rows := await lane.claim(self._batch)):
                if not await self._publish(lane, rows):
                    raise self._last or PubSubError("the outbox is not drained: the broker is away")
        finally:
            await lane.close()
            await self._store.close()
        return self.published - before

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether it can publish now, as far as its last try told, and the facts."""
        facts = {"trouble": self._told, "published": self.published, "set_aside": self.set_aside}
        return self._told is None, facts

    # -- one lane ---------------------------------------------------------------------------------

    async def _lane(self) -> None:
        pause = 0.1
        if not await self._opened():
            return
        lane = self._store.lane()
        try:
            while not self._stop.is_set():
                self._work.clear()
                try:
                    rows = await lane.claim(self._batch)
                    if not rows:
                        if self._told is not None and not self._in_hand:
                            await self._look()
                        await self._idle()
                        continue
                    self._work.set()  # there may be more, for another lane
                    self._in_hand += 1
                    try:
                        reached = await self._publish(lane, rows)
                    finally:
                        self._in_hand -= 1
                except PubSubError:
                    raise
                except Exception as error:  # the database is away, or refused: nothing was settled by that
                    self._tell(f"the outbox's database: {type(error).__name__}: {error}")
                    await lane.abandon()
                    reached = False
                if reached:
                    pause = 0.1
                    self._tell(None)
                else:
                    await self._nap(pause)
                    pause = min(pause * 2, 5.0)
        finally:
            await lane.close()

    async def _opened(self) -> bool:
        """Open the store, waiting for a database that is absent; False once stopped."""
        pause = 0.1
        while not self._stop.is_set():
            try:
                await self._store.open()
                return True
            except PubSubError:
                raise
            except Exception as error:  # as in `_lane`
                self._tell(f"the outbox's database: {type(error).__name__}: {error}")
                await self._nap(pause)
                pause = min(pause * 2, 5.0)
        return False

    async def _look(self) -> None:
        """No row will tell that the trouble is over, as another relay had them: it is, if the broker answers."""
        try:
            await self._pubsub.ping()
        except AuthenticationFailed:
            raise
        except (ConnectionFailed, ConnectionLost, TimeoutError) as error:
            self._tell(f"the broker: {error or 'no answer in time'}")
        else:
            self._tell(None)

    async def _idle(self) -> None:
        """Nothing to claim: wait for a wake, for the next look, or for the next waiting row."""
        timeout = self._store.poll
        due = await self._store.next_due()
        if due is not None:
            timeout = min(timeout, max(0.01, due - time.time()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._work.wait()

    async def _nap(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    def _tell(self, trouble: str | None) -> None:
        """One line a change of state."""
        if trouble == self._told:
            return
        if trouble is not None:
            log.warning("%s", trouble)
        elif self._told is not None:
            log.info("publishing again")
        self._told = trouble

    async def _publish(self, lane: Lane, rows: list[Row]) -> bool:
        """Publish a claim and settle it; False where the broker could not be reached."""
        outcome = Outcome()
        reached = await self._attempt(rows, outcome, set())
        await lane.settle(outcome)
        self.published += len(outcome.sent)
        self.set_aside += len(outcome.failed)
        return reached

    async def _attempt(self, rows: Sequence[Row], outcome: Outcome, held: set[str]) -> bool:
        """Publish rows in order; a batch that is refused as a whole is halved until the refused row is alone.

        ``held`` are keys that had a row refused: their later rows wait, so that none overtakes it.
        """
        rows = [row for row in self._fitting(rows, outcome) if row.message.key not in held]
        if not rows:
            return True
        messages = [row.message for row in rows]
        fates: Mapping[str, str] = {}
        reached = True
        try:
            await self._pubsub.publisher().publish(messages, self._timeout)
        except AuthenticationFailed:
            raise
        except (PublishTimeout, ConnectionFailed, ConnectionLost) as error:
            self._tell(f"the broker: {error}")
            self._last = error
            if not isinstance(error, PublishTimeout):
                return False
            fates, reached = error.fates, False
        except SendFailed as error:
            fates = error.fates
            if len(fates) == len(rows) > 1:
                half = len(rows) // 2
                first = await self._attempt(rows[:half], outcome, held)
                return first and await self._attempt(rows[half:], outcome, held)
            for row in rows:
                if row.message.id in fates:
                    self._refused(row, str(error), outcome)
                    if row.message.key is not None:
                        held.add(row.message.key)
        outcome.sent.extend(row.id for row in rows if row.message.id not in fates)
        return reached

    def _fitting(self, rows: Sequence[Row], outcome: Outcome) -> list[Row]:
        limit = self._pubsub.capabilities.max_payload
        fitting = []
        for row in rows:
            if len(row.message.body) > limit:
                text = (
                    f"payload of {len(row.message.body)} bytes is over the backend's limit of {limit} bytes"
                )
                self._set_aside(row, text, outcome)
            else:
                fitting.append(row)
        return fitting

    def _refused(self, row: Row, error: str, outcome: Outcome) -> None:
        attempts = row.attempts + 1
        if attempts >= self._max_attempts:
            self._set_aside(row, error, outcome)
            return
        delay = self._backoff.delay(attempts)
        log.warning(
            "row %d (message %s on %s) was refused, attempt %d, again in %.3g s: %s",
            row.id,
            row.message.id,
            row.message.topic,
            attempts,
            delay,
            error,
        )
        outcome.retry.append((row.id, time.time() + delay, error[:MAX_ERROR]))

    def _set_aside(self, row: Row, error: str, outcome: Outcome) -> None:
        log.error(
            "row %d (message %s on %s) is set aside: %s", row.id, row.message.id, row.message.topic, error
        )
        outcome.failed.append((row.id, error[:MAX_ERROR]))

    # -- beside the lanes -------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Wake the lanes when rows were committed; without that they poll."""
        while True:
            try:
                async for _ in self._store.wakes():
                    self._work.set()
                return
            except Exception as error:  # the lanes poll meanwhile, and tell if the database is away
                log.info("not told of new rows, polling: %s: %s", type(error).__name__, error)
                await asyncio.sleep(1)

    async def _prune(self) -> None:
        """Delete sent rows that are old enough, a few at a time, so that nobody waits for it."""
        while True:
            try:
                pruned = 1
                while pruned:
                    pruned = await self._store.prune(time.time() - self._keep, 1000)
                    await asyncio.sleep(0.01)
            except Exception as error:  # tried again: what is not pruned only takes room
                log.warning("sent rows were not pruned: %s: %s", type(error).__name__, error)
            await asyncio.sleep(min(60.0, max(1.0, self._keep / 10)))
