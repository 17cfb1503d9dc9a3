"""AMQP 0-9-1 content frames as bytes: what the RabbitMQ driver sends and receives per message.

pika drives the link and everything that happens seldom; the few frames that happen per message are made
and read here, because pika writes each frame by itself, cannot encode a float, truncates the floats it
reads, and drops the whole connection over one header that it cannot read (a timestamp in milliseconds).
Reading never raises on what is inside a message. Pure: no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

FRAME_METHOD: Final = 1
FRAME_HEADER: Final = 2
FRAME_BODY: Final = 3
FRAME_END: Final = 0xCE
OVERHEAD: Final = 8  # bytes a frame has beside its payload

ACK: Final = 60 << 16 | 80
NACK: Final = 60 << 16 | 120
DELIVER: Final = 60 << 16 | 60
GET_OK: Final = 60 << 16 | 71
GET_EMPTY: Final = 60 << 16 | 72
RETURN: Final = 60 << 16 | 50
_GET: Final = 60 << 16 | 70
_PUBLISH: Final = 60 << 16 | 40

MAX_SHORT: Final = 255  # bytes of a short string: routing keys, header names, message ids
MAX_DEPTH: Final = 16  # of tables in tables

_CONTENT_TYPE: Final = 0x8000
_CONTENT_ENCODING: Final = 0x4000
_HEADERS: Final = 0x2000
_DELIVERY_MODE: Final = 0x1000
_PRIORITY: Final = 0x0800
_CORRELATION_ID: Final = 0x0400
_REPLY_TO: Final = 0x0200
_EXPIRATION: Final = 0x0100
_MESSAGE_ID: Final = 0x0080
_TIMESTAMP: Final = 0x0040

_frame_start: Final = struct.Struct(">BHL").pack
_unpack_u16: Final = struct.Struct(">H").unpack_from
_unpack_u32: Final = struct.Struct(">L").unpack_from
_unpack_u64: Final = struct.Struct(">Q").unpack_from
_content_header: Final = struct.Struct(">BHLHHQ").pack
_tag_frame: Final = struct.Struct(">BHLLQBB").pack
_END: Final = bytes([FRAME_END])


# -- what we send ----------------------------------------------------------------------------------


def ack(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Basic.Ack: this delivery, or all up to it."""
    return _tag_frame(FRAME_METHOD, channel, 13, ACK, tag, multiple, FRAME_END)


def nack(channel: int, tag: int, *, requeue: bool) -> bytes:
    """Basic.Nack of one delivery: back to its queue, or to its queue's dead-letter exchange."""
    return _tag_frame(FRAME_METHOD, channel, 13, NACK, tag, requeue << 1, FRAME_END)


def get(channel: int, queue: str) -> bytes:
    """Basic.Get, to be acknowledged."""
    return _method(channel, _GET, b"\0\0" + _short(queue) + b"\0")


def publish_method(channel: int, exchange: str, routing_key: str, *, mandatory: bool) -> bytes:
    """Basic.Publish; a content header and body frames must follow."""
    arguments = b"\0\0" + _short(exchange) + _short(routing_key) + (b"\1" if mandatory else b"\0")
    return _method(channel, _PUBLISH, arguments)


def publish_content(channel: int, properties: bytes, body: bytes, frame_max: int) -> list[bytes]:
    """The content header and the body frames.

    Arguments:
        properties: as `properties` made them.
        frame_max: bytes of a frame at most, as negotiated.
    """
    size = len(body)
    frames = [
        _content_header(FRAME_HEADER, channel, 12 + len(properties), 60, 0, size),
        properties,
        _END,
    ]
    chunk = frame_max - OVERHEAD
    for start in range(0, size, chunk):
        part = body if size <= chunk else body[start : start + chunk]
        frames += (_frame_start(FRAME_BODY, channel, len(part)), part, _END)
    return frames


def properties(
    headers: Mapping[str, Any],
    *,
    content_type: str | None,
    message_id: str | None,
    timestamp: float | None,
    expiration: int | None = None,
) -> bytes:
    """Basic properties of a persistent message.

    Arguments:
        headers: names of at most `MAX_SHORT` bytes; values str, bytes, bool, 64-bit int or float.
        content_type, message_id: at most `MAX_SHORT` bytes; None or "": left out.
        timestamp: seconds since the epoch; carried whole.
        expiration: ms after which the queue it is in lets it go.
    """
    flags = _DELIVERY_MODE
    parts = [b"", b"\2"]
    if headers:
        flags |= _HEADERS
        parts.insert(1, _table(headers))
    if content_type:
        flags |= _CONTENT_TYPE
        parts.insert(1, _short(content_type))
    if expiration is not None:
        flags |= _EXPIRATION
        parts.append(_short(str(expiration)))
    if message_id:
        flags |= _MESSAGE_ID
        parts.append(_short(message_id))
    if timestamp is not None and 0 <= timestamp < 1 << 62:
        flags |= _TIMESTAMP
        parts.append(struct.pack(">Q", int(timestamp)))
    parts[0] = struct.pack(">H", flags)
    return b"".join(parts)


def fits_short(text: str) -> bool:
    """Whether AMQP can carry ``text`` as a short string."""
    return len(text) * 4 <= MAX_SHORT or len(text.encode()) <= MAX_SHORT


def _method(channel: int, method: int, arguments: bytes) -> bytes:
    start = _frame_start(FRAME_METHOD, channel, 4 + len(arguments))
    return start + struct.pack(">L", method) + arguments + _END


def _short(text: str) -> bytes:
    raw = text.encode()
    return bytes((len(raw),)) + raw


def _table(headers: Mapping[str, Any]) -> bytes:
    parts = [b""]
    for name, value in headers.items():
        parts.append(_short(name))
        if type(value) is str:
            raw = value.encode()
            parts.append(struct.pack(">cL", b"S", len(raw)))
            parts.append(raw)
        else:
            parts.append(_value(value))
    raw = b"".join(parts)
    return struct.pack(">L", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"t\1" if value else b"t\0"
    if isinstance(value, int):
        return struct.pack(">cq", b"l", value)
    if isinstance(value, float):
        return struct.pack(">cd", b"d", value)
    raw = value if isinstance(value, bytes) else str(value).encode()
    return struct.pack(">cL", b"x" if isinstance(value, bytes) else b"S", len(raw)) + raw


# -- what we receive -------------------------------------------------------------------------------


class Content(NamedTuple):
    """A message that has arrived whole: one Basic.Deliver, Basic.GetOk or Basic.Return.

    ``consumer`` is the consumer tag (Deliver only); ``tag`` the delivery tag (0 for a Return).
    ``properties`` are still encoded: see `read_properties`.
    """

    method: int
    consumer: str
    tag: int
    redelivered: bool
    routing_key: str
    properties: bytes
    body: bytes


def read_method(payload: bytes) -> tuple[int, str, int, bool, str]:
    """Method, consumer tag, delivery tag, redelivered and routing key of a content-bearing method frame.

    Raises ValueError where the frame is shorter than it says.
    """
    (method,) = _unpack_u32(payload)
    at = 4
    consumer = ""
    tag = 0
    redelivered = False
    try:
        if method == RETURN:
            at = _skip_short(payload, _skip_short(payload, at + 2))
        else:
            if method == DELIVER:
                end = at + 1 + payload[at]
                consumer = payload[at + 1 : end].decode("utf-8", "replace")
                at = end
            (tag,) = _unpack_u64(payload, at)
            redelivered = payload[at + 8] != 0
            at = _skip_short(payload, at + 9)
        short = at + payload[at] >= len(payload)
    except (IndexError, struct.error):
        short = True
    if short:
        raise ValueError(f"AMQP method {method} ends before its fields do: {payload[:80]!r}")
    return method, consumer, tag, redelivered, _text(payload, at)


def _skip_short(data: bytes, at: int) -> int:
    return at + 1 + data[at]


def _text(data: bytes, at: int) -> str:
    return data[at + 1 : at + 1 + data[at]].decode("utf-8", "replace")


class Properties(NamedTuple):
    """The basic properties that the driver reads; the others are skipped."""

    content_type: str | None = None
    headers: Mapping[str, Any] = {}
    message_id: str | None = None
    timestamp: int | None = None


_NO_PROPERTIES: Final = Properties()


def read_properties(data: bytes) -> Properties:
    """Decode basic properties; what cannot be read is left out."""
    try:
        return _read_properties(data)
    except (IndexError, struct.error):
        return _NO_PROPERTIES


def _read_properties(data: bytes) -> Properties:
    (flags,) = _unpack_u16(data)
    at = 2
    more = flags
    while more & 1:
        (more,) = _unpack_u16(data, at)
        at += 2
    content_type = message_id = timestamp = None
    headers: Mapping[str, Any] = _NO_PROPERTIES.headers
    if flags & _CONTENT_TYPE:
        content_type = _text(data, at)
        at += 1 + data[at]
    if flags & _CONTENT_ENCODING:
        at += 1 + data[at]
    if flags & _HEADERS:
        (size,) = _unpack_u32(data, at)
        headers = _read_table(data, at + 4, at + 4 + size, 0)
        at += 4 + size
    if flags & _DELIVERY_MODE:
        at += 1
    if flags & _PRIORITY:
        at += 1
    if flags & (_CORRELATION_ID | _REPLY_TO | _EXPIRATION):
        for flag in (_CORRELATION_ID, _REPLY_TO, _EXPIRATION):
            if flags & flag:
                at += 1 + data[at]
    if flags & _MESSAGE_ID:
        message_id = _text(data, at)
        at += 1 + data[at]
    if flags & _TIMESTAMP:
        (timestamp,) = _unpack_u64(data, at)
    return Properties(content_type, headers, message_id, timestamp)


def _read_table(data: bytes, at: int, end: int, depth: int) -> dict[str, Any]:
    """The fields up to ``end``, or up to the first one of a type that is not known."""
    table: dict[str, Any] = {}
    while at < end:
        stop = at + 1 + data[at]
        name = data[at + 1 : stop].decode("utf-8", "replace")
        kind = data[stop]
        at = stop + 1
        if kind == 0x53:  # S, a long string: nearly all there are
            (size,) = _unpack_u32(data, at)
            at += 4 + size
            raw = data[at - size : at]
            try:
                table[name] = raw.decode()
            except UnicodeDecodeError:
                table[name] = raw
        elif kind in _FIXED:
            read, size = _FIXED[kind]
            table[name] = read(data, at)
            at += size
        elif kind in _SIZED:
            (size,) = _unpack_u32(data, at)
            at += 4 + size
            table[name] = _read_sized(kind, data, at - size, at, depth)
        else:
            break
    return table


def _read_array(data: bytes, at: int, end: int, depth: int) -> list[Any]:
    values: list[Any] = []
    while at < end:
        kind = data[at]
        at += 1
        if kind in _FIXED:
            read, size = _FIXED[kind]
            values.append(read(data, at))
            at += size
        elif kind in _SIZED:
            (size,) = _unpack_u32(data, at)
            at += 4 + size
            values.append(_read_sized(kind, data, at - size, at, depth))
        else:
            break
    return values


def _read_sized(kind: int, data: bytes, at: int, end: int, depth: int) -> Any:
    if kind == 0x46 and depth < MAX_DEPTH:  # F
        return _read_table(data, at, end, depth + 1)
    if kind == 0x41 and depth < MAX_DEPTH:  # A
        return _read_array(data, at, end, depth + 1)
    raw = data[at:end]
    if kind == 0x53:  # S
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw
    return raw


def _number(code: str) -> tuple[Callable[[bytes, int], Any], int]:
    layout = struct.Struct(code)
    return lambda data, at: layout.unpack_from(data, at)[0], layout.size


def _decimal(data: bytes, at: int) -> Decimal:
    scale, value = struct.unpack_from(">Bl", data, at)
    return Decimal(value).scaleb(-scale)


def _time(data: bytes, at: int) -> str:
    (seconds,) = _unpack_u64(data, at)
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return str(seconds)


_FIXED: Final[dict[int, tuple[Callable[[bytes, int], Any], int]]] = {
    ord("t"): (lambda data, at: data[at] != 0, 1),
    ord("b"): _number(">b"),
    ord("B"): _number(">B"),
    ord("s"): _number(">h"),
    ord("U"): _number(">h"),
    ord("u"): _number(">H"),
    ord("I"): _number(">l"),
    ord("i"): _number(">L"),
    ord("l"): _number(">q"),
    ord("L"): _number(">q"),
    ord("f"): _number(">f"),
    ord("d"): _number(">d"),
    ord("D"): (_decimal, 5),
    ord("T"): (_time, 8),
    ord("V"): (lambda data, at: None, 0),
}
"""Field types of a known size; RabbitMQ's reading of the letters, which differs from the specification's."""

_SIZED: Final = frozenset(b"SxFA")
