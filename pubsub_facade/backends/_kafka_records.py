"""A message as a Kafka record and back: value, key, headers, time.

The value is the body, the key is the key in UTF-8, a header is its value as UTF-8 text; so a raw client
reads and writes what it expects. Copies of our own (retries, dead letters) name their topic in a header,
which is believed on topics of our own only. Decoding never raises.
"""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from pubsub_facade.message import Failure, Message
from pubsub_facade.wire import ATTEMPT, CONTENT_TYPE, DUE, KEY, TOPIC, Envelope, HeaderCodec

TP = tuple[str, int]
"""A Kafka topic and the number of one of its partitions."""

FOREIGN_CONTENT_TYPE: Final = "content-type"  # what other clients write

_codec: Final = HeaderCodec(lambda name: False, native=False)
_foreign: Final = frozenset((ATTEMPT, TOPIC, KEY, DUE))


class Outgoing(NamedTuple):
    """One record to be stored.

    Arguments:
        id: whose fate is reported under.
        timestamp: milliseconds since the epoch.
    """

    id: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    timestamp: int


def encode(message: Message) -> Outgoing:
    """As it is published."""
    headers = [(name, value.encode()) for name, value in _codec.encode(message).items()]
    if message.content_type is not None:
        headers.append((CONTENT_TYPE, message.content_type.encode()))
    timestamp = time.time() if message.timestamp is None else message.timestamp
    key = message.key
    return Outgoing(
        message.id, None if key is None else key.encode(), message.body, headers, int(timestamp * 1000)
    )


def encode_retry(message: Message, attempt: int, due: float) -> Outgoing:
    """As a copy that waits until ``due`` (seconds since the epoch) for its attempt number ``attempt``."""
    record = encode(message)
    headers = [header for header in record.headers if header[0] != ATTEMPT]
    headers += [(DUE, repr(due).encode()), (ATTEMPT, str(attempt).encode()), *_origin(message)]
    return record._replace(headers=headers, timestamp=int(time.time() * 1000))


def encode_dead(message: Message) -> Outgoing:
    """As a dead letter: its Kafka key is the id, so that a record without a value takes it away."""
    record = encode(message)
    record.headers.extend(_origin(message))
    return record._replace(key=message.id.encode(), timestamp=int(time.time() * 1000))


def _origin(message: Message) -> list[tuple[str, bytes]]:
    """What a copy's own Kafka topic and key do not tell."""
    topic = (TOPIC, message.topic.encode())
    return [topic] if message.key is None else [topic, (KEY, message.key.encode())]


def again(record: Any) -> Outgoing:
    """A record that was read, to be stored once more as it is, from now."""
    headers = [(name, value or b"") for name, value in record.headers]
    return Outgoing("", record.key, record.value, headers, int(time.time() * 1000))


def decode(record: Any, *, own: bool) -> Envelope:
    """What the headers say, with every field set.

    Arguments:
        own: from a topic of our own, where the fields of copies are believed.
    """
    raw = {name: "" if value is None else value.decode("utf-8", "replace") for name, value in record.headers}
    if not own:
        for name in _foreign & raw.keys():
            del raw[name]
    envelope = _codec.decode(raw)
    if not own:
        envelope.failure = None
        envelope.key = None if record.key is None else record.key.decode("utf-8", "replace")
    if envelope.content_type is None:
        envelope.content_type = raw.get(FOREIGN_CONTENT_TYPE)
    if not envelope.id:
        envelope.id = f"{record.topic}:{record.partition}:{record.offset}"
    if envelope.timestamp is None and record.timestamp >= 0:
        envelope.timestamp = record.timestamp / 1000
    return envelope


def dead_letter(record: Any, subscription: str) -> Message:
    """A dead letter as a message with its failure."""
    envelope = decode(record, own=True)
    message = Message(envelope.topic, None, key=envelope.key, headers=envelope.headers, id=envelope.id)
    message.body = record.value
    message.content_type = envelope.content_type
    message.timestamp = envelope.timestamp
    message.attempt = envelope.attempt
    message.failure = envelope.failure or Failure(subscription, "", "", envelope.attempt, 0.0, 0.0)
    return message
