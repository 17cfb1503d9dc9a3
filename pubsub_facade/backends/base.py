"""The driver interface: read this first.

A driver moves bytes and settles them. It neither retries nor reconnects nor batches by time: it raises,
and the portable layer decides (`supervisor` reconnects, `publisher` resends, `consumer` hands out,
retries and buries). Everything is called on one event loop; nothing here may block it or create a task,
a thread hop or a round trip per message.

Errors a driver raises: ConnectionFailed (no link could be made; AuthenticationFailed where waiting does
not mend it), ConnectionLost (the link was there and is gone), SendFailed (the fate of each message),
TopologyConflict, UnsupportedFeature. The driver's own error is the ``__cause__``; no text holds a password.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, Literal, Protocol

from pubsub_facade.message import Delivery, Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscription import Definition, Subscription

Position = datetime | Literal["beginning", "end"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do beyond the contract's core. False is refused at start, never ignored.

    Arguments:
        durable: messages and subscriptions survive a restart of the broker.
        shared: several processes can use it at once.
        competing: members of one subscription share its work; False: one is active, the others stand by.
        stored_attempts: ``delivery.attempt`` survives a crash of the process.
        delay: ``publish(..., delay=seconds)``.
        replay: ``seek`` to a time or to the beginning.
        require_subscribers: publish can be refused when no subscription would get the message.
        backlog: ``backlog`` knows how many messages wait (else None).
        max_payload: bytes of one encoded payload at most, by this configuration.
    """

    durable: bool
    shared: bool
    competing: bool
    stored_attempts: bool
    delay: bool
    replay: bool
    require_subscribers: bool
    backlog: bool
    max_payload: int

    def as_dict(self) -> dict[str, Any]:
        """Name -> value, in the order above."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much a subscription has before it; None where the backend cannot know.

    Arguments:
        waiting: messages not handed out, those waiting for a retry included.
        in_flight: messages handed out and not settled.
        dead: dead letters.
        oldest: age in seconds of the oldest waiting message.
        declared: False: there is no subscription of this name.
    """

    waiting: int | None
    in_flight: int | None
    dead: int | None
    oldest: float | None
    declared: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `Backend.diagnose` looked at.

    Arguments:
        level: ``problem``: a promise of the contract does not hold as things are; ``warning``: it may not,
            or only at a price; ``ok``: it does.
        what: what was found.
        mend: what to do about it; "" where it is ok.
    """

    level: Literal["ok", "warning", "problem"]
    what: str
    mend: str = ""


class Timer(Protocol):
    """What can be called off until it has rung."""

    def cancel(self) -> None: ...


class Receiver(ABC):
    """One member's link to one subscription, from `Backend.consume` until `close` or ConnectionLost.

    Its deliveries die with it: settling one after `close` or after the link is gone does nothing, because
    the broker hands the message out again.

    ``definition`` is what the facade filters by before handing out (patterns the broker matched too
    widely, filters it cannot evaluate); None where the broker's choice is exact already. The consumer acks
    what the definition does not accept.
    """

    definition: Definition | None = None

    @abstractmethod
    async def receive(self) -> Sequence[Delivery]:
        """Wait for at least one delivery and return all that are there.

        At most ``window`` deliveries are out unsettled at any time; a call waits while the window is full.
        One caller at a time. Cancelling it loses nothing: the next call, or the next member, gets them.
        Raises ConnectionLost when the link is gone, or when what is consumed from no longer exists;
        standing by (another member is active) is waiting.
        """

    def hand_out(self, delivery: Delivery) -> bool:
        """Asked just before a handler gets it; False: it went to another member meanwhile, and is dropped.

        For brokers that take back what waits in a member (Kafka's rebalance). Settling it does nothing.
        """
        return True

    @abstractmethod
    def ack(self, delivery: Delivery) -> None:
        """Settle: handled. Returns at once; merged, and flushed once per turn of the loop. Never raises."""

    @abstractmethod
    def release(self, delivery: Delivery) -> None:
        """Give back unhandled, at once: the subscription's next free member gets it. Never raises."""

    @abstractmethod
    async def park(self, deliveries: Sequence[Delivery]) -> None:
        """Take them out of the line; each comes back after its own ``delivery.delay`` seconds or later.

        The consumer has set ``delay`` and ``failure``. The copy keeps topic, body, id, key, headers, times
        and has ``attempt = delivery.attempt + 1`` and the failure. Store the copy and have it confirmed,
        then settle the original: a crash between the two makes a twin, never a loss. Other messages are
        not held up. If it raises, originals are unsettled and come again.
        """

    @abstractmethod
    async def bury(self, deliveries: Sequence[Delivery]) -> None:
        """To the dead letters of the subscription, then settled: confirm first, as in `park`.

        The consumer has set ``failure``; the dead letter is the original message plus it.
        """

    def hold(self, delivery: Delivery, wake: Callable[[Delivery], None]) -> Timer:
        """Call ``wake(delivery)`` after ``delivery.delay`` seconds, on the loop: retries that wait in the member.

        Only a backend whose clock tests can move does it otherwise.
        """
        return asyncio.get_running_loop().call_later(delivery.delay, wake, delivery)

    @abstractmethod
    async def flush(self) -> None:
        """Return when every ack and release so far has been handed to the broker (written to the link)."""

    @abstractmethod
    async def close(self) -> None:
        """Flush, then leave: everything unsettled goes back to the subscription at once. Idempotent."""


class Backend(ABC):
    """A broker. Built from settings without I/O; opened, used, closed; opened again after a lost link.

    Third-party drivers are classes of this type under the entry point group ``pubsub_facade.backends``.
    """

    name: ClassVar[str]
    """As in ``backend = "..."``."""

    pipeline: int = 1
    """How many `send` calls may be under way at once; their order must then be kept by the driver."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """The truth, known without a connection; the conformance suite tests it."""

    @property
    def place(self) -> str:
        """What it is connected to, where the log should say so: a file's absolute path; "": nothing to add."""
        return ""

    @abstractmethod
    async def open(self) -> None:
        """Connect. Raises ConnectionFailed or AuthenticationFailed, naming the address (no password)."""

    @abstractmethod
    async def close(self) -> None:
        """Leave, bounded in time; receivers still open are closed too. Idempotent; never raises."""

    @abstractmethod
    async def ping(self) -> None:
        """One real round trip to the broker; raises ConnectionLost where there is none."""

    @abstractmethod
    async def send(self, messages: Sequence[Message]) -> None:
        """Publish; returns when all are durable on the broker. At least one message, bodies encoded.

        Raises SendFailed with the fate of each message that was refused; ConnectionLost when the link
        went (then all that are not confirmed are sent again by the caller, with the same ids, in order).
        Messages of one call, and of calls in order, keep their order per topic and key.
        ``message.delay`` is 0 unless the capability is there.
        """

    def begin(self, messages: Sequence[Message]) -> asyncio.Future[Any] | None:
        """As `send`, without waiting: a future that is done when the broker has confirmed, or has `send`'s error.

        None: something has to be waited for first, so it must be `send`. Only asked of who has a `pipeline`.
        """
        return None

    @abstractmethod
    async def resend(self, subscription: str, messages: Sequence[Message]) -> None:
        """Store messages for this one subscription only (a replay of dead letters). Errors as in `send`."""

    @abstractmethod
    async def declare(self, subscription: Subscription) -> None:
        """From its return on, nothing published on a matching topic is missed (contract 3).

        Idempotent, and safe while members are running. Other patterns or another filter change it: added
        ones count from now on, removed ones stop, what waits stays. Raises TopologyConflict where that
        cannot be done without losing what waits. ``subscription.name`` is not None.
        """

    @abstractmethod
    async def delete(self, subscription: str) -> None:
        """Remove it and all it holds on the broker: what waits, retries, dead letters. Unknown: no error."""

    @abstractmethod
    async def consume(self, subscription: Subscription, window: int) -> Receiver:
        """Join as a member. A named subscription was declared just before; an ephemeral one begins here.

        Arguments:
            window: how many deliveries may be unsettled at once.
        """

    @abstractmethod
    async def inspect(self, subscription: str) -> Backlog:
        """How much waits; what cannot be known cheaply is None. ``declared`` is False where there is none such."""

    @abstractmethod
    def dead(self, subscription: str) -> AsyncIterator[Message]:
        """Browse the dead letters, oldest first, leaving them there; ``failure`` is set on each.

        An async generator. Finishes at what was there when it began.
        """

    @abstractmethod
    async def discard(self, subscription: str, ids: Collection[str] | None) -> int:
        """Remove dead letters by message id (None: all); returns how many were removed."""

    async def diagnose(self) -> list[Finding]:
        """Look at what reliability needs of the broker, which is open; leaves nothing behind.

        Raises as `inspect`; what the broker does not let us see is a finding, too.
        """
        return []

    async def seek(self, subscription: str, to: Position) -> None:
        """Move a subscription in its history. Only called where ``capabilities.replay``."""
        raise NotImplementedError
