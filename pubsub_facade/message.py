"""Messages on their way in and deliveries on their way out.

`Message` is what is published and what the drivers move; `Delivery` is a message in the hands of one
member of one subscription, which settles it once. Both are made per message: slots, no validation
twice, nothing computed before somebody asks.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from pubsub_facade.errors import MessageError
from pubsub_facade.topics import check_topic

if TYPE_CHECKING:
    from pubsub_facade.backends.base import Receiver

HeaderValue = str | int | float | bool

RESERVED_PREFIX: Final = "pubsub-"
"""The facade's own header namespace: user headers cannot enter it."""

MAX_HEADER_NAME: Final = 200
MAX_ID: Final = 200
MAX_KEY: Final = 1000
NO_HEADERS: Final[dict[str, HeaderValue]] = {}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a delivery failed: what a parked copy and a dead letter carry beside the original message.

    Arguments:
        subscription: the subscription whose member failed.
        error_type: class name of the error, as ``ValueError``.
        error: its text and where it was raised, as ``'nobody' (social/subscribers.py:14 in notify)``: at most 2,000
            characters. What `Reject` was given is the whole text.
        attempts: how many times the message was handed to a handler (or lost with its process).
        first_at: time of the first failure, seconds since the epoch.
        last_at: time of the last failure, seconds since the epoch.
    """

    subscription: str
    error_type: str
    error: str
    attempts: int
    first_at: float
    last_at: float


class Message:
    """One message: a topic, a payload and what travels with them.

    Arguments:
        topic: dotted words (contract 1).
        payload: bytes stay bytes, str is text, anything else becomes JSON.
        key: what order is kept by (contract 10), at most 1,000 characters.
        headers: name -> str, int, float or bool (contract 12).
        id: text, at most 200 characters; a UUIDv7 is made where none is given.
        delay: seconds until it is delivered at the earliest (contract 14).

    Set by the facade: ``body`` (the encoded payload), ``content_type``, ``published_at``. ``attempt``
    and ``failure`` differ from ``1`` and ``None`` only on copies made by retries and dead letters.
    """

    __slots__ = (
        "attempt",
        "body",
        "content_type",
        "delay",
        "failure",
        "headers",
        "id",
        "key",
        "payload",
        "timestamp",
        "topic",
    )

    topic: str
    payload: Any
    key: str | None
    headers: Mapping[str, HeaderValue]
    id: str
    delay: float
    body: bytes
    content_type: str | None
    timestamp: float | None
    attempt: int
    failure: Failure | None

    def __init__(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        id: str | None = None,
        delay: float = 0,
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.key = key
        self.headers = NO_HEADERS if headers is None else headers
        self.id = "" if id is None else id
        self.delay = delay
        self.body = b""
        self.content_type = None
        self.timestamp = None
        self.attempt = 1
        self.failure = None

    @property
    def published_at(self) -> datetime | None:
        """When it was published, by the publisher's clock, in UTC; None where a foreign message does not say."""
        return None if self.timestamp is None else datetime.fromtimestamp(self.timestamp, UTC)

    def check(self) -> None:
        """Raise TopicError or MessageError if anything but the payload is outside the contract."""
        check_topic(self.topic)
        if self.key is not None:
            check_text("key", self.key, MAX_KEY)
        if self.id:
            check_text("id", self.id, MAX_ID)
        elif self.id != "":
            raise MessageError(f"message id {self.id!r} is not text: give a str, or none to get a UUIDv7")
        if self.headers:
            check_headers(self.headers)
        if type(self.delay) not in (int, float) or not 0 <= self.delay < 1e9:
            raise MessageError(f"delay {self.delay!r} is not a number of seconds from 0 up to 1e9")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id or 'new'} on {self.topic}, {len(self.body)} bytes>"


class Settler(Protocol):
    """Who carries out what a delivery's owner decides: the consumer that handed it out."""

    async def ack(self, delivery: Delivery) -> None: ...
    async def retry(self, delivery: Delivery, after: float | None) -> None: ...
    async def reject(self, delivery: Delivery, reason: str) -> None: ...
    async def release(self, delivery: Delivery) -> None: ...


class Delivery(Message):
    """A message in the hands of one member; reads like its `Message`.

    ``payload`` is decoded by content type when first read (DecodeError where it does not decode);
    ``subscription`` is the subscription's name ("" for an ephemeral one); ``attempt`` counts from 1;
    ``redelivered`` is True where it may have been handed out before.

    Settle it once: `ack`, `retry`, `reject` or `release`. A second settlement does nothing.
    """

    __slots__ = ("_decoded", "receiver", "redelivered", "settled", "settler", "subscription", "tag")

    subscription: str
    redelivered: bool
    settled: bool
    receiver: Receiver
    settler: Settler | None
    tag: Any
    _decoded: Any

    def __init__(
        self,
        receiver: Receiver,
        tag: Any,
        subscription: str,
        topic: str,
        body: bytes,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] = NO_HEADERS,
        id: str = "",
        content_type: str | None = None,
        timestamp: float | None = None,
        attempt: int = 1,
        redelivered: bool = False,
        failure: Failure | None = None,
    ) -> None:
        self.receiver = receiver
        self.tag = tag
        self.subscription = subscription
        self.topic = topic
        self.body = body
        self.key = key
        self.headers = headers
        self.id = id
        self.content_type = content_type
        self.timestamp = timestamp
        self.attempt = attempt
        self.redelivered = redelivered or attempt > 1
        self.failure = failure
        self.delay = 0
        self.settled = False
        self.settler = None

    @property
    def payload(self) -> Any:
        try:
            return self._decoded
        except AttributeError:
            from pubsub_facade.codec import decode

            self._decoded = decode(self.body, self.content_type)
            return self._decoded

    async def ack(self) -> None:
        """Done: settle it. Returns at once; the broker is told within the same turn of the loop."""
        if self.settler is not None:
            await self.settler.ack(self)

    async def retry(self, after: float | None = None) -> None:
        """Hand it out again, as the next attempt.

        Arguments:
            after: seconds to wait; None: by the subscription's backoff.
        """
        if self.settler is not None:
            await self.settler.retry(self, after)

    async def reject(self, reason: str) -> None:
        """To the dead letters now, with this reason as the error text."""
        if self.settler is not None:
            await self.settler.reject(self, reason)

    async def release(self) -> None:
        """Give it back at once, unhandled: the next member gets it."""
        if self.settler is not None:
            await self.settler.release(self)


class Retry(Exception):
    """Raised by a handler: hand the message out again.

    Arguments:
        after: seconds to wait; None: by the subscription's backoff.
    """

    def __init__(self, after: float | None = None) -> None:
        super().__init__(f"retry after {after} s" if after is not None else "retry")
        self.after = after


class Reject(Exception):
    """Raised by a handler: to the dead letters now, with this reason."""

    def __init__(self, reason: str = "rejected") -> None:
        super().__init__(reason)
        self.reason = reason


def check_text(what: str, value: object, limit: int) -> None:
    """Raise MessageError unless ``value`` is non-empty text that UTF-8 can carry, at most ``limit`` characters."""
    if not isinstance(value, str):
        raise MessageError(f"{what} {value!r} is not text: give a str")
    if not value or len(value) > limit:
        raise MessageError(f"{what} {value[:40]!r} has {len(value)} characters: give 1 to {limit}")
    if not value.isascii() or not value.isprintable():
        check_encodable(what, value)
        if "\0" in value:
            raise MessageError(f"{what} {value!r} contains NUL: leave it out")


def check_encodable(what: str, value: str) -> None:
    """Raise MessageError where ``value`` holds lone surrogates, which no broker can carry."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"{what} {value[:40]!r} is not valid Unicode text: {error.reason}") from error


def check_headers(headers: Mapping[str, HeaderValue]) -> None:
    """Raise MessageError for a header name or value outside contract 12."""
    for name, value in headers.items():
        check_text("header name", name, MAX_HEADER_NAME)
        if name.lower().startswith(RESERVED_PREFIX):
            raise MessageError(
                f"header {name!r} is in the facade's own namespace {RESERVED_PREFIX!r}: rename it"
            )
        if isinstance(value, str):
            if not value.isascii():
                check_encodable(f"header {name!r}", value)
        elif not isinstance(value, bool | int | float):
            raise MessageError(
                f"header {name!r} has a value of type {type(value).__name__}: give str, int, float or bool"
            )


_last_ms = 0
_sequence = 0
_random = (
    random.Random()
)  # ours: nobody else seeds it; and no system call a message, where threads change places
os.register_at_fork(after_in_child=_random.seed)


def new_id(now: float | None = None) -> str:
    """A UUIDv7 as text (RFC 9562, section 5.7): ordered by time, and within one millisecond by a counter.

    Arguments:
        now: seconds since the epoch; None: the clock's.
    """
    global _last_ms, _sequence
    ms = int((time.time() if now is None else now) * 1000)
    chance = _random.getrandbits(62)
    if ms > _last_ms:
        _last_ms = ms
        _sequence = chance & 0x7FF
    else:
        ms = _last_ms
        _sequence += 1
        if _sequence > 0xFFF:
            _sequence = 0
            _last_ms = ms = ms + 1
    sequence = _sequence & 0xFFF
    text = f"{ms:012x}7{sequence:03x}{0x8000000000000000 | chance:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
