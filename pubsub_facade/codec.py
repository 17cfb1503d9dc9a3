"""Payload to bytes and back, by content type on the wire and by type hint in the handler.

bytes stay bytes, str is UTF-8 text, everything else is JSON by pydantic. Nothing here imports a name
that came in a message: the only types built are those the handler's own annotation names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError, from_json, to_json

from pubsub_facade.errors import ConfigError, DecodeError, MessageError

BYTES: Final = "application/octet-stream"
TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"

Decoder = Callable[[bytes, str | None], Any]


def encode(payload: Any) -> tuple[bytes, str]:
    """The payload's bytes and their content type.

    Raises MessageError for what has no JSON form. NaN and infinity become the tokens ``NaN`` and
    ``Infinity``, as in Python's own json: they come back as they were, other languages may refuse them.
    """
    if isinstance(payload, bytes):
        return payload, BYTES
    if isinstance(payload, str):
        try:
            return payload.encode(), TEXT
        except UnicodeEncodeError as error:
            raise MessageError(
                f"payload text {payload[:40]!r} is not valid Unicode: {error.reason}"
            ) from error
    if isinstance(payload, bytearray | memoryview):
        return bytes(payload), BYTES
    try:
        return to_json(payload), JSON
    except (PydanticSerializationError, RecursionError, ValueError, TypeError) as error:
        raise MessageError(
            f"payload of type {type(payload).__name__} cannot become JSON: {error}; "
            "give bytes, str, a pydantic model, a dataclass, or plain dicts, lists, numbers and text"
        ) from error


def decode(body: bytes, content_type: str | None) -> Any:
    """The body as its content type says: JSON, text, or else bytes. Raises DecodeError."""
    kind = content_type.partition(";")[0].strip().lower() if content_type else ""
    if kind == JSON or kind.endswith("+json"):
        try:
            return from_json(body)
        except ValueError as error:
            raise DecodeError(
                f"body of {len(body)} bytes is not JSON, as {content_type!r} says: {error}"
            ) from error
    if kind.startswith("text/"):
        return _text(body)
    return body


def _text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(
            f"body of {len(body)} bytes is not UTF-8 text: {error.reason} at {error.start}"
        ) from error


def _as_bytes(body: bytes, content_type: str | None) -> bytes:
    return body


def _as_text(body: bytes, content_type: str | None) -> str:
    value = decode(body, content_type)
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return _text(value)
    raise DecodeError(f"the handler wants str, the body is JSON of type {type(value).__name__}")


def decoder(hint: Any) -> Decoder:
    """The decoder for a handler's annotation; None, ``Any`` and no annotation decode by content type.

    Raises ConfigError for an annotation that pydantic cannot validate.
    """
    if hint is None or hint is Any or hint is object:
        return decode
    if hint is bytes:
        return _as_bytes
    if hint is str:
        return _as_text
    try:
        return _cached_decoder(hint)
    except TypeError:  # an unhashable annotation
        return _build_decoder(hint)


@lru_cache(maxsize=512)
def _cached_decoder(hint: Any) -> Decoder:
    return _build_decoder(hint)


def _build_decoder(hint: Any) -> Decoder:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except Exception as error:  # pydantic raises several kinds for a type it has no schema for
        raise ConfigError(
            f"the handler's payload annotation {hint!r} cannot be validated: {error}"
        ) from error
    validate = adapter.validate_json

    def run(body: bytes, content_type: str | None) -> Any:
        try:
            if content_type is not None and content_type.startswith("text/"):
                return adapter.validate_python(_text(body))
            return validate(body)
        except DecodeError:
            raise
        except ValueError as error:
            raise DecodeError(f"body does not validate as {_name(hint)}: {error}") from error

    return run


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
