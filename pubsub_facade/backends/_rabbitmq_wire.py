"""Messages as RabbitMQ carries them, and back: the mapping that raw clients see (docs/backends/rabbitmq.md).

id, content type and time are AMQP's own properties; key, exact time and what the facade needs are headers
(`wire`). The topic is the routing key, and a header too on copies, which travel by the name of a queue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from pubsub_facade import wire
from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.message import Delivery, Failure, Message

LONG: Final = "pubsub-long"  # JSON: headers whose names AMQP cannot carry (over 255 bytes)
STRUCK: Final = "pubsub-struck"  # was out once when a process or link was lost
RETURNS: Final = "x-delivery-count"  # how often a quorum queue got it back


def reserved(name: str) -> bool:
    """Whether RabbitMQ gives this header a meaning of its own: ``CC`` and ``BCC`` would route copies elsewhere."""
    return name[:2] in ("x-", "X-") or name in ("CC", "BCC")


CODEC: Final = wire.HeaderCodec(reserved, native=True)


def encode(
    message: Message,
    *,
    with_topic: bool = False,
    expiration: int | None = None,
    due: float | None = None,
) -> bytes:
    """The properties of a message.

    Arguments:
        with_topic: put the topic into a header: the routing key will be something else.
        expiration: ms until the queue it is in lets it go.
        due: seconds since the epoch before which it is not to be handed out, where ``expiration`` is sooner.
    """
    headers: dict[str, Any] = CODEC.encode_user(message.headers) if message.headers else {}
    if message.timestamp is not None:
        headers[wire.PUBLISHED] = repr(message.timestamp)
    if message.key is not None:
        headers[wire.KEY] = message.key
    if with_topic:
        headers[wire.TOPIC] = message.topic
    if message.attempt != 1:
        headers[wire.ATTEMPT] = str(message.attempt)
    if message.failure is not None:
        headers[wire.FAILURE] = json.dumps(asdict(message.failure))
    if due is not None:
        headers[wire.DUE] = repr(due)
    return _properties(message, headers, expiration)


def encode_copy(
    delivery: Message,
    id: str,
    *,
    attempt: int,
    failure: Failure | None,
    due: float | None = None,
    struck: bool = False,
) -> bytes:
    """The properties of a copy that a member makes: parked, set aside or dead.

    Arguments:
        id: the delivery's, or a new one where a foreign message had none.
        struck: it was out when a process or link was lost.
        due: seconds since the epoch before which it is not to be handed out.
    """
    headers: dict[str, Any] = CODEC.encode_user(delivery.headers) if delivery.headers else {}
    if delivery.timestamp is not None:
        headers[wire.PUBLISHED] = repr(delivery.timestamp)
    if delivery.key is not None:
        headers[wire.KEY] = delivery.key
    headers[wire.TOPIC] = delivery.topic
    if attempt != 1:
        headers[wire.ATTEMPT] = str(attempt)
    if failure is not None:
        headers[wire.FAILURE] = json.dumps(asdict(failure))
    if due is not None:
        headers[wire.DUE] = repr(due)
    if struck:
        headers[STRUCK] = "1"
    return _properties(delivery, headers, None, id)


def _properties(
    message: Message, headers: dict[str, Any], expiration: int | None, id: str | None = None
) -> bytes:
    message_id = message.id if id is None else id
    content_type = message.content_type
    if len(message_id) > 63 and not frames.fits_short(message_id):
        headers[wire.ID] = message_id
        message_id = ""
    if content_type and len(content_type) > 63 and not frames.fits_short(content_type):
        headers[wire.CONTENT_TYPE] = content_type
        content_type = None
    if message.headers and any(len(name) > 63 for name in headers):
        _put_long(headers)
    return frames.properties(
        headers,
        content_type=content_type,
        message_id=message_id,
        timestamp=message.timestamp,
        expiration=expiration,
    )


def _put_long(headers: dict[str, Any]) -> None:
    long = {name: value for name, value in headers.items() if not frames.fits_short(name)}
    if long:
        for name in long:
            del headers[name]
        headers[LONG] = json.dumps(long)


def envelope_of(content: frames.Content) -> wire.Envelope:
    """All that is known of a message but its body; reads foreign ones too, and never raises."""
    found = frames.read_properties(content.properties)
    raw = found.headers
    if LONG in raw:
        raw = _with_long(raw)
    envelope = CODEC.decode(raw)
    if found.message_id:
        envelope.id = found.message_id
    if found.content_type:
        envelope.content_type = found.content_type
    if envelope.timestamp is None and found.timestamp is not None:
        envelope.timestamp = wire.number(found.timestamp, None)
    if not envelope.topic:
        envelope.topic = content.routing_key
    return envelope


def _with_long(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        long = json.loads(raw[LONG])
    except (ValueError, TypeError, RecursionError):
        return raw
    return {**raw, **long} if isinstance(long, dict) else raw


def returns_of(content: frames.Content) -> int:
    """How often the queue got this message back because the link it was out on had ended."""
    if not content.redelivered:
        return 0
    count = frames.read_properties(content.properties).headers.get(RETURNS)
    return count if isinstance(count, int) and 0 <= count < 1 << 31 else 0


def is_struck(content: frames.Content) -> bool:
    """Whether it was out when a process or link was lost, before this copy was made."""
    return STRUCK in frames.read_properties(content.properties).headers


def due_of(content: frames.Content) -> float:
    """The time before which it is not to be handed out (0: none)."""
    return envelope_of(content).due


def read_message(content: frames.Content) -> Message:
    """A dead letter as a `Message`."""
    envelope = envelope_of(content)
    message = Message(
        envelope.topic, None, key=envelope.key, headers=envelope.headers or None, id=envelope.id
    )
    message.body = content.body
    message.content_type = envelope.content_type
    message.timestamp = envelope.timestamp
    message.failure = envelope.failure
    return message


def read_delivery(receiver: Any, label: str, content: frames.Content) -> tuple[Delivery, float]:
    """A delivery, and the time before which it is not to be handed out (0: none)."""
    _, _, tag, redelivered, routing_key, properties, body = content
    found = frames.read_properties(properties)
    raw = found.headers
    timestamp: float | None = None
    key: str | None = None
    for name in raw:
        if name == wire.PUBLISHED:
            timestamp = wire.number(raw[name], None)
        elif name == wire.KEY and type(raw[name]) is str:
            key = raw[name]
        else:
            break
    else:  # a message of ours without headers of its own: nearly all there are
        if timestamp is None and found.timestamp is not None:
            timestamp = wire.number(found.timestamp, None)
        delivery = Delivery(
            receiver,
            tag,
            label,
            routing_key,
            body,
            key=key,
            id=found.message_id or "",
            content_type=found.content_type,
            timestamp=timestamp,
            redelivered=redelivered,
        )
        return delivery, 0.0
    envelope = envelope_of(content)
    delivery = Delivery(
        receiver,
        tag,
        label,
        envelope.topic,
        body,
        key=envelope.key,
        headers=envelope.headers,
        id=envelope.id,
        content_type=envelope.content_type,
        timestamp=envelope.timestamp,
        attempt=envelope.attempt,
        redelivered=redelivered or envelope.attempt > 1,
        failure=envelope.failure,
    )
    return delivery, envelope.due
