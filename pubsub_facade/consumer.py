"""The engine of one member: receive, hand out, retry, bury, settle, drain.

One task receives batches and puts them in line; workers (`workers`) or a `Stream` take from the line and
report each outcome back. Acks are merged by the driver; retries and dead letters go out in batches by one
task that lives only while there are any. When the link is lost, what was in line is forgotten (it comes
again), what is in a handler's hands finishes, and the member declares and joins again.

Invariant: a delivery is settled only after its handler returned, or after its copy was confirmed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from pubsub_facade._failure_text import text_of
from pubsub_facade._tasks import cancel
from pubsub_facade.backends.base import Backend, Receiver, Timer
from pubsub_facade.errors import (
    AuthenticationFailed,
    Closed,
    ConfigError,
    ConnectionLost,
    DecodeError,
    PubSubError,
    TopologyConflict,
    UnsupportedFeature,
)
from pubsub_facade.lanes import Lanes
from pubsub_facade.message import Delivery, Failure, Reject, Retry
from pubsub_facade.subscription import Subscription
from pubsub_facade.supervisor import Supervisor

log = logging.getLogger("pubsub_facade")

WINDOW: Final = 100  # deliveries unsettled at once, where nothing else is said
REJOIN_MAX: Final = 1.0  # s between two tries to join, at most
JOIN_PATIENCE: Final = 60.0  # s that a fault in the driver may keep a member from joining
CLOSE_TIMEOUT: Final = 10.0  # s for a driver to leave
HOPELESS: Final = (AuthenticationFailed, ConfigError, TopologyConflict, UnsupportedFeature, Closed)


class Consumer:
    """One member of one subscription.

    Arguments:
        supervisor: keeps the backend connected.
        subscription: what to declare and join.
        window: deliveries unsettled at once.
    """

    def __init__(self, supervisor: Supervisor, subscription: Subscription, window: int) -> None:
        self.subscription = subscription
        self.loop = asyncio.get_running_loop()
        self.error: BaseException | None = None
        self._supervisor = supervisor
        self._window = window
        self._lanes = Lanes(ordered=subscription.ordered)
        self._holds = subscription.ordered or subscription.name is None  # retries wait in this member
        self._receiver: Receiver | None = None
        self._feed: asyncio.Task[None] | None = None
        self._idle: deque[asyncio.Future[None]] = deque()
        self._held: dict[Delivery, Timer] = {}
        self._parking: list[Delivery] = []
        self._burying: list[Delivery] = []
        self._copier: asyncio.Task[None] | None = None
        self._copied: dict[Delivery, asyncio.Future[None]] = {}
        self._out = 0  # handed out and without an outcome
        self._quiet = asyncio.Event()  # nothing is in hand and no copy is being stored
        self._stopping = False
        self._reports: deque[tuple[Delivery, bool]] = deque()
        self._reported = False

    # -- life -------------------------------------------------------------------------------------

    async def start(self, *, patient: bool = False) -> None:
        """Declare and join; returns when receiving.

        Arguments:
            patient: wait for a broker that is absent; False: raise ConnectionFailed.
        """
        self._receiver = await self._supervisor.run(self._join, patient=patient)
        self._feed = self.loop.create_task(
            self._run(), name=f"pubsub-{self.subscription.label or 'ephemeral'}"
        )

    async def _join(self, backend: Backend) -> Receiver:
        if self.subscription.name is not None:
            await backend.declare(self.subscription)
        return await backend.consume(self.subscription, self._window)

    async def _run(self) -> None:
        pause = 0.0
        failing = math.inf  # since when joining has not worked
        while not self._stopping:
            receiver = self._receiver
            assert receiver is not None
            joined = time.monotonic()
            try:
                await self._receive(receiver)
            except ConnectionLost as error:
                log.warning("%s: link lost, joining again: %s", self._title, error)
            except PubSubError as error:
                log.error("%s: cannot receive, joining again: %s", self._title, error)
            except Exception:
                log.exception("%s: fault in the driver, joining again", self._title)
            pause = 0.0 if time.monotonic() - joined > 1 else min(max(pause * 2, 0.05), REJOIN_MAX)
            self._forget()
            await self._leave(receiver)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            if self._stopping:
                return
            failing = min(failing, time.monotonic())
            try:
                self._receiver = await self._supervisor.run(self._join, patient=True)
            except HOPELESS as error:
                self._fail(error)
                return
            except Exception as error:  # a fault in the driver: told, and tried again after a pause
                log.exception("%s: cannot join", self._title)
                if time.monotonic() - failing > JOIN_PATIENCE:
                    self._fail(error)
                    return
            else:
                failing = math.inf

    async def _receive(self, receiver: Receiver) -> None:
        lanes = self._lanes
        while True:
            for delivery in await receiver.receive():
                delivery.settler = self
                definition = receiver.definition
                if definition is not None and not definition.accepts(
                    delivery.topic, delivery.headers, delivery.timestamp
                ):
                    receiver.ack(delivery)
                else:
                    lanes.push(delivery)
            self._wake()

    def _forget(self) -> None:
        """The link is gone: what is in line and what waits in memory comes again."""
        self._lanes.clear()
        for delivery, timer in list(self._held.items()):
            timer.cancel()
            self._lanes.done(delivery)
        self._held.clear()

    async def _leave(self, receiver: Receiver) -> None:
        try:
            await asyncio.wait_for(receiver.close(), CLOSE_TIMEOUT)
        except TimeoutError:
            log.error("%s: the driver did not leave within %s s", self._title, CLOSE_TIMEOUT)
        except PubSubError as error:
            log.info("%s: while leaving: %s", self._title, error)
        except Exception:
            log.exception("%s: fault in the driver while leaving", self._title)

    def _fail(self, error: BaseException) -> None:
        log.error("%s: stopped: %s", self._title, error)
        self.error = error
        self._stopping = True
        self._wake_all()

    async def stop_receiving(self) -> None:
        """No more deliveries are handed out; those in hand go on."""
        self._stopping = True
        if self._feed is not None:
            await cancel(self._feed)
            if not self._feed.cancelled():
                self._feed.exception()
        self._forget()
        self._wake_all()

    async def settle(self, grace: float) -> None:
        """Wait up to ``grace`` seconds until what is in hand has its outcome and every copy is stored."""
        try:
            async with asyncio.timeout(grace):
                while self._out or self._copier is not None:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            log.debug("%s: %d handlers outlasted the grace time", self._title, self._out)

    async def leave(self) -> int:
        """Give back what is still unsettled and leave; returns how many were."""
        left = self._out + len(self._parking) + len(self._burying)
        self._forget()  # what failed since it stopped receiving waits no longer
        if self._copier is not None:
            await cancel(self._copier)
        for future in self._copied.values():
            if not future.done():
                future.set_exception(
                    Closed(f"{self._title} was left before the copy was stored: the message comes again")
                )
                future.exception()  # retrieved here: a handler's failure has nobody who waits
        if self._receiver is not None:
            await self._leave(self._receiver)
        return left

    @property
    def receiving(self) -> bool:
        """Whether the member is joined and neither failed nor about to end."""
        return self._feed is not None and not (self._stopping or self._feed.cancelling() or self._feed.done())

    @property
    def _title(self) -> str:
        return f"{self._supervisor.backend.name}: subscription {self.subscription.label or '(ephemeral)'}"

    # -- handing out ------------------------------------------------------------------------------

    def take(self) -> Delivery | None:
        """The next delivery, or None if there is none now; its outcome must be reported once."""
        while not self._stopping and (delivery := self._lanes.pop()) is not None:
            if not delivery.receiver.hand_out(delivery):
                delivery.settled = True
                self._next(delivery)
                continue
            if delivery.attempt > self.subscription.max_attempts and self.subscription.name is not None:
                delivery.settled = True
                self._bury(delivery, self._lost_with_its_process(delivery))
                continue
            self._out += 1
            return delivery
        return None

    async def wait(self) -> bool:
        """Wait until `take` may have something; False once the member has stopped."""
        if not self._stopping and not len(self._lanes):
            future = self.loop.create_future()
            self._idle.append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future in self._idle:
                    self._idle.remove(future)
                elif not future.cancelled():
                    self._wake()  # it was woken and leaves: what it was woken for is another's
                raise
        return not self._stopping

    def _wake(self) -> None:
        idle = self._idle
        wanted = len(self._lanes)
        while wanted and idle:
            future = idle.popleft()
            if not future.done():  # done: cancelled in this very turn of the loop
                future.set_result(None)
                wanted -= 1

    def _wake_all(self) -> None:
        while self._idle:
            future = self._idle.popleft()
            if not future.done():
                future.set_result(None)

    # -- outcomes, on the loop --------------------------------------------------------------------

    def succeeded(self, delivery: Delivery) -> None:
        """Its handler returned."""
        if self._close_account(delivery):
            delivery.receiver.ack(delivery)
            self._next(delivery)

    def given_back(self, delivery: Delivery) -> None:
        """Nobody will handle it here: another member gets it.

        In an ordered subscription the others of its key are here, so it goes back to its place before them.
        """
        if not self._close_account(delivery):
            return
        if self._lanes.holds(delivery) and not self._stopping and delivery.receiver is self._receiver:
            delivery.redelivered = True
            self._again(delivery)
            return
        delivery.receiver.release(delivery)
        self._next(delivery)

    def failed(self, delivery: Delivery, error: BaseException) -> asyncio.Future[None] | None:
        """Its handler raised; what that means is decided here, by contract 7 and 8.

        Returns a future that is done when the copy is confirmed; None where there is no copy.
        """
        if not self._close_account(delivery):
            return None
        failure = self._failure(delivery, error)
        foreseen = isinstance(error, Reject | DecodeError)
        debug = log.isEnabledFor(logging.DEBUG)
        traced = None if error.__traceback__ is None else error
        if foreseen or delivery.attempt >= self.subscription.max_attempts:
            log.error(
                "%s: message %s on %s to the dead letters after attempt %d: %s: %s",
                self._title,
                delivery.id,
                delivery.topic,
                delivery.attempt,
                failure.error_type,
                failure.error,
                exc_info=traced if debug or not foreseen else None,
            )
            return self._bury(delivery, failure)
        after = error.after if isinstance(error, Retry) else None
        delay = self.subscription.backoff.delay(delivery.attempt) if after is None else max(0.0, after)
        log.warning(
            "%s: message %s on %s failed attempt %d, again in %.3g s: %s: %s",
            self._title,
            delivery.id,
            delivery.topic,
            delivery.attempt,
            delay,
            failure.error_type,
            failure.error,
            exc_info=traced if debug else None,
        )
        delivery.failure = failure
        delivery.delay = delay
        if self._holds:
            self._hold(delivery)
            return None
        self._parking.append(delivery)
        return self._copy(delivery)

    def _close_account(self, delivery: Delivery) -> bool:
        if delivery.settled:
            return False
        delivery.settled = True
        self._out -= 1
        if not self._out:
            self._quiet.set()
        return True

    def _next(self, delivery: Delivery) -> None:
        if self._lanes.done(delivery):
            self._wake()

    def _failure(self, delivery: Delivery, error: BaseException) -> Failure:
        now = time.time()
        return Failure(
            subscription=self.subscription.label,
            error_type=type(error).__name__,
            error=text_of(error),
            attempts=delivery.attempt,
            first_at=delivery.failure.first_at if delivery.failure is not None else now,
            last_at=now,
        )

    def _lost_with_its_process(self, delivery: Delivery) -> Failure:
        now = time.time()
        before = delivery.failure
        return Failure(
            subscription=self.subscription.label,
            error_type=before.error_type if before else "ProcessLost",
            error=before.error if before else "the process or its link was lost while handling it, each time",
            attempts=delivery.attempt - 1,
            first_at=before.first_at if before else now,
            last_at=before.last_at if before else now,
        )

    # -- waiting in the member: ordered and ephemeral subscriptions -------------------------------

    def _hold(self, delivery: Delivery) -> None:
        self._held[delivery] = delivery.receiver.hold(delivery, self._unhold)

    def _unhold(self, delivery: Delivery) -> None:
        del self._held[delivery]
        delivery.attempt += 1
        delivery.delay = 0
        delivery.redelivered = True
        self._again(delivery)

    def _again(self, delivery: Delivery) -> None:
        delivery.settled = False
        self._lanes.again(delivery)
        self._wake()

    # -- copies: parked and dead ------------------------------------------------------------------

    def _bury(self, delivery: Delivery, failure: Failure) -> asyncio.Future[None] | None:
        delivery.failure = failure
        if self.subscription.name is None:
            delivery.receiver.ack(delivery)  # an ephemeral subscription has no dead letters: the log has told
            self._next(delivery)
            return None
        self._burying.append(delivery)
        return self._copy(delivery)

    def _copy(self, delivery: Delivery) -> asyncio.Future[None]:
        future = self._copied[delivery] = self.loop.create_future()
        if self._copier is None:
            self._copier = self.loop.create_task(self._make_copies(), name="pubsub-copies")
        return future

    async def _make_copies(self) -> None:
        pause = 0.1
        try:
            while self._parking or self._burying:
                parking, self._parking = self._parking, []
                burying, self._burying = self._burying, []
                kept = await self._store(parking, park=True), await self._store(burying, park=False)
                if kept[0] or kept[1]:
                    self._parking[:0], self._burying[:0] = kept
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 5.0)
        finally:
            self._copier = None
            self._quiet.set()

    async def _store(self, deliveries: Sequence[Delivery], *, park: bool) -> list[Delivery]:
        """Store the copies; returns those to try again: their originals are still unsettled on a live link."""
        kept: list[Delivery] = []
        for receiver in dict.fromkeys(delivery.receiver for delivery in deliveries):
            mine = [delivery for delivery in deliveries if delivery.receiver is receiver]
            try:
                await (receiver.park(mine) if park else receiver.bury(mine))
            except ConnectionLost as error:
                log.info("%s: link lost while storing %d copies: %s", self._title, len(mine), error)
            except Exception as error:
                where = "retry" if park else "dead letter"
                log.error("%s: %d messages not stored for %s, kept: %s", self._title, len(mine), where, error)
                if receiver is self._receiver and not self._stopping:
                    kept.extend(mine)
                    continue
            for delivery in mine:
                self._next(delivery)
                future = self._copied.pop(delivery, None)
                if future is not None and not future.done():
                    future.set_result(None)
        return kept

    # -- from other threads ------------------------------------------------------------------------

    def report(self, delivery: Delivery, *, done: bool) -> None:
        """`succeeded` or `given_back` from another thread: what waits together wakes the loop once."""
        self._reports.append((delivery, done))
        if not self._reported:
            self._reported = True
            try:
                self.loop.call_soon_threadsafe(self._take_reports)
            except RuntimeError as error:
                raise Closed(
                    "the loop of this client has ended: the delivery was not settled and comes again"
                ) from error

    def _take_reports(self) -> None:
        self._reported = False
        while self._reports:
            delivery, done = self._reports.popleft()
            (self.succeeded if done else self.given_back)(delivery)

    # -- Settler: what the owner of a delivery asks for -------------------------------------------

    async def ack(self, delivery: Delivery) -> None:
        self.succeeded(delivery)

    async def release(self, delivery: Delivery) -> None:
        self.given_back(delivery)

    async def retry(self, delivery: Delivery, after: float | None) -> None:
        stored = self.failed(delivery, Retry(after))
        if stored is not None:
            await stored

    async def reject(self, delivery: Delivery, reason: str) -> None:
        stored = self.failed(delivery, Reject(reason))
        if stored is not None:
            await stored
