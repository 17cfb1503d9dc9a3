"""How a message's facts travel in a broker's headers: the one mapping all header-carrying drivers share.

A user's header keeps its own name and, where the broker has the type, its own value, so that raw clients
read it as they would expect; a name the broker gives a meaning to travels as ``pubsub-h-NAME``, a value
the broker has no type for as text, with its type noted in ``pubsub-types``. The facade's own fields are
``pubsub-*``, which user headers cannot enter. Decoding never raises: what does not parse is foreign.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from pubsub_facade.message import NO_HEADERS, RESERVED_PREFIX, Failure, HeaderValue, Message

ID: Final = "pubsub-id"
TOPIC: Final = "pubsub-topic"
KEY: Final = "pubsub-key"
CONTENT_TYPE: Final = "pubsub-content-type"
PUBLISHED: Final = "pubsub-published"  # seconds since the epoch, as text
ATTEMPT: Final = "pubsub-attempt"
FAILURE: Final = "pubsub-failure"  # JSON, see Failure
DUE: Final = "pubsub-due"  # seconds since the epoch, as text: not before
TYPES: Final = "pubsub-types"  # JSON: header name -> i, f, b or j
ESCAPED: Final = "pubsub-h-"

INT64: Final = 1 << 63


class Envelope:
    """What `HeaderCodec.decode` found; fields not in the headers have their defaults."""

    __slots__ = ("attempt", "content_type", "due", "failure", "headers", "id", "key", "timestamp", "topic")

    def __init__(self) -> None:
        self.id = ""
        self.topic = ""
        self.key: str | None = None
        self.content_type: str | None = None
        self.timestamp: float | None = None
        self.attempt = 1
        self.failure: Failure | None = None
        self.due = 0.0
        self.headers: Mapping[str, HeaderValue] = NO_HEADERS


class HeaderCodec:
    """Encode and decode headers for one kind of broker.

    Arguments:
        reserved: whether the broker, or the driver, gives this header name a meaning of its own.
        native: True where the broker carries bool and 64-bit int beside str (AMQP); False: text only.
    """

    def __init__(self, reserved: Callable[[str], bool], *, native: bool) -> None:
        self._reserved = reserved
        self._native = native

    def encode_user(self, headers: Mapping[str, HeaderValue]) -> dict[str, Any]:
        """User headers as the broker carries them, with ``pubsub-types`` where a type would be lost."""
        out: dict[str, Any] = {}
        types: dict[str, str] = {}
        for name, value in headers.items():
            kind = ""
            carried: Any = value
            if type(value) is str:
                if "\0" in value:
                    kind, carried = "j", json.dumps(value)
            elif isinstance(value, bool):
                if not self._native:
                    kind, carried = "b", "true" if value else "false"
            elif isinstance(value, int):
                if not self._native or not -INT64 <= value < INT64:
                    kind, carried = "i", str(int(value))
            elif isinstance(value, float):
                kind, carried = "f", repr(float(value))
            if kind:
                types[name] = kind
            out[ESCAPED + name if self._reserved(name) else name] = carried
        if types:
            out[TYPES] = json.dumps(types)
        return out

    def encode(self, message: Message) -> dict[str, Any]:
        """All of a message but its topic, key, content type and body, which each driver places itself."""
        out = self.encode_user(message.headers) if message.headers else {}
        if message.id:
            out[ID] = message.id
        if message.timestamp is not None:
            out[PUBLISHED] = repr(message.timestamp)
        if message.failure is not None:
            out[FAILURE] = json.dumps(asdict(message.failure))
        if message.attempt != 1:
            out[ATTEMPT] = str(message.attempt)
        return out

    def decode(self, raw: Mapping[str, Any]) -> Envelope:
        """Read headers, ours or foreign; broker-reserved names are left out of ``headers``."""
        envelope = Envelope()
        headers: dict[str, HeaderValue] = {}
        types: Mapping[str, str] = NO_TYPES
        if TYPES in raw:
            types = _types(raw[TYPES])
        for name, value in raw.items():
            if name.startswith(RESERVED_PREFIX):
                if name.startswith(ESCAPED):
                    name = name[len(ESCAPED) :]
                    headers[name] = _typed(value, types.get(name, ""))
                else:
                    reader = _READERS.get(name)
                    if reader is not None:
                        kind = types.get(name, "")
                        reader(envelope, _typed(value, kind) if kind else value)
            elif not self._reserved(name):
                headers[name] = _typed(value, types.get(name, ""))
        if headers:
            envelope.headers = headers
        return envelope


NO_TYPES: Final[dict[str, str]] = {}


def _types(text: object) -> Mapping[str, str]:
    try:
        types = json.loads(text)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError):
        return NO_TYPES
    return types if isinstance(types, dict) else NO_TYPES


def _typed(value: Any, kind: str) -> HeaderValue:
    """A carried value as the user gave it; a foreign value of another type as text."""
    if kind and isinstance(value, str):
        try:
            if kind == "i":
                return int(value)
            if kind == "f":
                return float(value)
            if kind == "b":
                return value == "true"
            if kind == "j":
                return str(json.loads(value))
        except (ValueError, RecursionError):
            return value
    if isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    return "" if value is None else str(value)


def number(value: Any, default: float | None) -> float | None:
    """``value`` as a finite float, or the default: what a hostile header says is not worth a crash."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return default
    return result if -1e15 < result < 1e15 else default


def failure_from(text: Any) -> Failure | None:
    """A failure from its JSON; None where it is none."""
    try:
        data = json.loads(text)
        return Failure(
            subscription=str(data["subscription"]),
            error_type=str(data["error_type"]),
            error=str(data["error"]),
            attempts=int(data["attempts"]),
            first_at=float(data["first_at"]),
            last_at=float(data["last_at"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _read_failure(envelope: Envelope, value: Any) -> None:
    envelope.failure = failure_from(value)


def _read_attempt(envelope: Envelope, value: Any) -> None:
    envelope.attempt = max(1, int(number(value, 1) or 1))


def _text(attribute: str) -> Callable[[Envelope, Any], None]:
    def read(envelope: Envelope, value: Any) -> None:
        if isinstance(value, str):
            setattr(envelope, attribute, value)

    return read


def _read_published(envelope: Envelope, value: Any) -> None:
    envelope.timestamp = number(value, None)


def _read_due(envelope: Envelope, value: Any) -> None:
    envelope.due = number(value, 0.0) or 0.0


_READERS: Final[dict[str, Callable[[Envelope, Any], None]]] = {
    ID: _text("id"),
    TOPIC: _text("topic"),
    KEY: _text("key"),
    CONTENT_TYPE: _text("content_type"),
    PUBLISHED: _read_published,
    ATTEMPT: _read_attempt,
    FAILURE: _read_failure,
    DUE: _read_due,
}
