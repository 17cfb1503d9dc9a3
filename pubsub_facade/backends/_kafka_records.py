"""A message as a Kafka record and back: value, key, headers, time.

The value is the body, the key is the key in UTF-8, a header is its value as UTF-8 text; so a raw client
reads and writes what it expects. Copies of our own (retries, dead letters) name their topic in a header,
which is believed on topics of our own only. Decoding never raises.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from pubsub_facade.message import Delivery, Failure, Message
from pubsub_facade.wire import (
    ATTEMPT,
    CONTENT_TYPE,
    DUE,
    FAILURE,
    ID,
    KEY,
    PUBLISHED,
    TOPIC,
    Envelope,
    HeaderCodec,
    number,
)

TP = tuple[str, int]
"""A Kafka topic and the number of one of its partitions."""

FOREIGN_CONTENT_TYPE: Final = "content-type"  # what other clients write

_codec: Final = HeaderCodec(lambda name: False, native=False)
_OF_COPIES: Final = frozenset((ATTEMPT, DUE, FAILURE, KEY, TOPIC))


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
    timestamp = message.timestamp
    key = message.key
    if message.headers or message.failure is not None or message.attempt != 1 or timestamp is None:
        headers = [(name, value.encode()) for name, value in _codec.encode(message).items()]
        timestamp = time.time() if timestamp is None else timestamp
    else:
        headers = [(ID, message.id.encode()), (PUBLISHED, repr(timestamp).encode())]
    if message.content_type is not None:
        headers.append((CONTENT_TYPE, message.content_type.encode()))
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


def decode(record: Any, tp: TP, *, own: bool) -> Envelope:
    """What the headers say, with every field set.

    Arguments:
        tp: where it was read.
        own: from a topic of our own, where the fields of copies are believed.
    """
    envelope = _decode_plain(record.headers) or _decode_all(record.headers, own=own)
    if not own and record.key is not None:
        envelope.key = record.key.decode("utf-8", "replace")
    if not envelope.id:
        envelope.id = f"{tp[0]}:{tp[1]}:{record.offset}"
    if envelope.timestamp is None and record.timestamp >= 0:
        envelope.timestamp = record.timestamp / 1000
    return envelope


def _decode_plain(headers: Sequence[tuple[str, bytes | None]]) -> Envelope | None:
    """The headers of a message of ours without user headers, at a fraction of the cost; None for any other."""
    if len(headers) != 3:
        return None
    (id_name, id), (published_name, published), (content_name, content) = headers
    if id_name != ID or published_name != PUBLISHED or content_name != CONTENT_TYPE:
        return None
    if id is None or published is None or content is None:
        return None
    envelope = Envelope()
    envelope.id = id.decode("utf-8", "replace")
    envelope.timestamp = number(published, None)
    envelope.content_type = content.decode("utf-8", "replace")
    return envelope


def _decode_all(headers: Sequence[tuple[str, bytes | None]], *, own: bool) -> Envelope:
    raw = {name: "" if value is None else value.decode("utf-8", "replace") for name, value in headers}
    if not own:
        for name in _OF_COPIES & raw.keys():
            del raw[name]
    envelope = _codec.decode(raw)
    if envelope.content_type is None:
        envelope.content_type = raw.get(FOREIGN_CONTENT_TYPE)
    return envelope


def dead_letter(record: Any, tp: TP, subscription: str) -> Message:
    """A dead letter as a message with its failure."""
    envelope = decode(record, tp, own=True)
    message = Message(envelope.topic, None, key=envelope.key, headers=envelope.headers, id=envelope.id)
    message.body = record.value
    message.content_type = envelope.content_type
    message.timestamp = envelope.timestamp
    message.attempt = envelope.attempt
    message.failure = envelope.failure or Failure(subscription, "", "", envelope.attempt, 0.0, 0.0)
    return message


def afresh(delivery: Delivery) -> Delivery:
    """The same message, to be handed out again as the same attempt."""
    return Delivery(
        delivery.receiver,
        delivery.tag,
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
