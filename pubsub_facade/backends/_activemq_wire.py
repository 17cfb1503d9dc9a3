"""What a message looks like in STOMP headers on both ActiveMQ brokers, and what things are called there.

Pure: no I/O. The namespace and a subscription are one word each in every name (their dots become ``~``), so
that no wildcard of one namespace reaches into another; what is not a topic has a ``$``, which topics cannot
have. User headers keep their names unless STOMP, JMS or a broker gives the name a meaning (`wire`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from pubsub_facade import wire
from pubsub_facade.backends._stomp import escape, send_frame
from pubsub_facade.backends.base import Receiver
from pubsub_facade.errors import MessageError
from pubsub_facade.message import Delivery, Failure, Message

MAX_HEADER: Final = 10_000  # bytes of one header line: Classic ends the link above 10,240
MAX_HEADERS: Final = 900  # Classic ends the link above 1,000
MAX_HEAD: Final = 49_152  # bytes of all headers: Artemis wants them, and a failure beside them, in one buffer
_UNCHECKED: Final = 2_000  # characters of all headers, below which no limit can be touched

RECORD: Final = "pubsub-record"  # id of a stored definition
LIFE: Final = "pubsub-life"  # of a retry: which of the subscriptions of this name it belongs to
SEED: Final = "pubsub-seed"  # makes a broker remember a queue; means nothing to members
FENCE: Final = "pubsub-fence"  # the end of what was there when a sweep began
ENTRY: Final = "pubsub-entry"  # id of an entry among the subscriptions of a namespace
OWNER: Final = "pubsub-owner"  # whose entry it is
GONE: Final = "pubsub-gone"  # the owner has left

NO_EXTRA: Final[Mapping[str, str]] = {}
_RESERVED: Final = frozenset(
    [
        "accept-version",
        "ack",
        "browser",
        "client-id",
        "consumer-window-size",
        "content-length",
        "content-type",
        "correlation-id",
        "destination",
        "destination-type",
        "durable-subscriber-name",
        "durable-subscription-name",
        "expires",
        "heart-beat",
        "host",
        "id",
        "jms-map-json",
        "login",
        "message",
        "message-id",
        "no-local",
        "original-address",
        "original-destination",
        "passcode",
        "persistent",
        "priority",
        "receipt",
        "receipt-id",
        "redelivered",
        "reply-to",
        "scheduledJobId",
        "selector",
        "server",
        "session",
        "subscription",
        "subscription-type",
        "timestamp",
        "transaction",
        "transformation",
        "transformation-error",
        "type",
        "version",
        "NATIVE_MESSAGE_ID",
    ]
)
_RESERVED_PREFIXES: Final = ("JMS", "AMQ", "_AMQ", "__AMQ", "_HQ", "__HQ", "activemq.")


def reserved(name: str) -> bool:
    """Whether STOMP, JMS or one of the brokers gives a header of this name a meaning."""
    return name in _RESERVED or name.startswith(_RESERVED_PREFIXES)


def one_word(dotted: str) -> str:
    """A namespace or subscription name as one word of a destination."""
    return dotted.replace(".", "~")


def is_internal(headers: Mapping[str, str]) -> bool:
    """Whether a frame is the driver's own and no message."""
    return SEED in headers or FENCE in headers


@dataclass(frozen=True, slots=True)
class Letter:
    """A SEND to be: ``lines`` are the encoded lines that all to one destination share."""

    lines: str
    headers: Mapping[str, str]
    body: bytes

    def frame(self, extra: str) -> bytes:
        """The frame, with the encoded lines ``extra`` (transaction or receipt) added."""
        return send_frame(self.lines + extra, self.headers, self.body)


class MessageCodec:
    """Messages to and from STOMP headers."""

    def __init__(self) -> None:
        self._codec = wire.HeaderCodec(reserved, native=False)

    def letter(self, message: Message, lines: str) -> Letter:
        """A message as it is published. Raises MessageError where a broker would refuse its headers."""
        headers = self._encode(message)
        if sum(map(len, headers.values())) + 200 * len(headers) > _UNCHECKED:
            check_head(headers)
        return Letter(lines, headers, message.body)

    def copy(
        self, delivery: Message, lines: str, attempt: int, extra: Mapping[str, str] = NO_EXTRA
    ) -> Letter:
        """A copy for one subscription: a retry, a dead letter, a replay.

        It carries the topic, which its destination does not show, and of an error's text what fits.
        """
        headers = self._encode(_Copy(delivery, attempt))
        headers[wire.TOPIC] = delivery.topic
        return Letter(lines, {**headers, **extra}, delivery.body)

    def _encode(self, message: Message) -> dict[str, str]:
        headers: dict[str, str] = self._codec.encode(message)
        if message.key is not None:
            headers[wire.KEY] = message.key
        if message.content_type is not None:
            headers["content-type"] = message.content_type
        if not all(map(str.isascii, headers.values())):
            _spell_out(headers)
        return headers

    def message(self, topic: str, headers: Mapping[str, str], body: bytes) -> Message:
        """A frame as a Message (a dead letter); ``topic`` counts where the frame does not say its own."""
        envelope = self._codec.decode(headers)
        message = Message(envelope.topic or topic, None, key=envelope.key, headers=envelope.headers)
        message.id = envelope.id or foreign_id(headers)
        message.body = body
        message.content_type = headers.get("content-type")
        message.timestamp = envelope.timestamp if envelope.timestamp is not None else _sent_at(headers)
        message.failure = envelope.failure
        return message

    def delivery(
        self,
        receiver: Receiver,
        tag: object,
        subscription: str,
        topic: str | None,
        headers: Mapping[str, str],
        body: bytes,
    ) -> tuple[Delivery, float]:
        """A frame as a Delivery, and the time before which it must wait (seconds since the epoch, or 0).

        Arguments:
            topic: as the broker shows it; None: the frame's own ``pubsub-topic`` counts.
        """
        envelope = self._codec.decode(headers)
        delivery = Delivery(
            receiver,
            tag,
            subscription,
            topic if topic is not None else envelope.topic,
            body,
            key=envelope.key,
            headers=envelope.headers,
            id=envelope.id or foreign_id(headers),
            content_type=headers.get("content-type"),
            timestamp=envelope.timestamp if envelope.timestamp is not None else _sent_at(headers),
            attempt=envelope.attempt,
            redelivered=headers.get("redelivered") == "true",
            failure=envelope.failure,
        )
        return delivery, envelope.due


def _spell_out(headers: dict[str, str]) -> None:
    """Carry what is beyond the basic plane as JSON: Classic breaks it once it has read a message from its store."""
    far = [
        name for name, value in headers.items() if value and max(value) > "\uffff" and name != "content-type"
    ]
    if far:
        types = json.loads(headers.get(wire.TYPES, "{}"))
        types.update((name.removeprefix(wire.ESCAPED), "j") for name in far)
        headers.update({name: json.dumps(headers[name]) for name in far})
        headers[wire.TYPES] = json.dumps(types)


class _Copy(Message):
    """What `MessageCodec.copy` encodes: the original's fields with another attempt and a failure that fits."""

    __slots__ = ()

    def __init__(self, original: Message, attempt: int) -> None:
        super().__init__(original.topic, None, key=original.key, headers=original.headers, id=original.id)
        self.body = original.body
        self.content_type = original.content_type
        self.timestamp = original.timestamp
        self.attempt = attempt
        self.failure = None if original.failure is None else fitting(original.failure)


def fitting(failure: Failure) -> Failure:
    """The failure with as much of its error text as one header can carry."""
    while (excess := line_length(wire.FAILURE, json.dumps(asdict(failure))) - MAX_HEADER) > 0:
        keep = max(0, min(len(failure.error) - 1, len(failure.error) - excess // 14 - 1))
        failure = replace(failure, error=failure.error[:keep])
    return failure


def line_length(name: str, value: str) -> int:
    """Bytes of a header line as it is sent."""
    return len(escape(name).encode()) + len(escape(value).encode()) + 2


def check_head(headers: Mapping[str, str]) -> None:
    """Raise MessageError where a broker would end the link over these headers."""
    if len(headers) > MAX_HEADERS:
        raise MessageError(f"message has {len(headers)} headers: ActiveMQ takes at most {MAX_HEADERS}")
    total = 0
    for name, value in headers.items():
        length = line_length(name, value)
        total += length
        if length > MAX_HEADER:
            shown = "the types of the headers" if name == wire.TYPES else f"header {name[:60]!r}"
            raise MessageError(
                f"{shown} takes {length} bytes on the wire: ActiveMQ takes at most {MAX_HEADER}; "
                "put it into the payload"
            )
    if total > MAX_HEAD:
        raise MessageError(f"headers take {total} bytes on the wire: ActiveMQ takes at most {MAX_HEAD}")


def foreign_id(headers: Mapping[str, str]) -> str:
    """An id for what another client put on the broker: the broker's own, without the consumer's part."""
    return headers.get("message-id", "").rpartition(",")[2]


def _sent_at(headers: Mapping[str, str]) -> float | None:
    """The JMS timestamp (ms) of a foreign message in seconds."""
    ms = wire.number(headers.get("timestamp"), None)
    return None if not ms else ms / 1000
