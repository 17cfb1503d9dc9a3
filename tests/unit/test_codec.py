"""Payload to bytes and back: by content type on the wire, by type hint in the handler."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from typing_extensions import TypedDict  # what pydantic takes before 3.12

from pubsub_facade.codec import BYTES, JSON, TEXT, decode, decoder, encode
from pubsub_facade.errors import ConfigError, DecodeError, MessageError


class Post(BaseModel):
    author: int
    text: str = ""


@dataclasses.dataclass
class Like:
    author: int


class Follow(TypedDict):
    who: str


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary())
def test_bytes_stay_bytes(payload: bytes) -> None:
    for given_as in (payload, bytearray(payload), memoryview(payload)):
        body, content_type = encode(given_as)
        assert (body, content_type) == (payload, BYTES)
        assert decode(body, content_type) == payload
        assert type(decode(body, content_type)) is bytes


@given(st.text())
def test_text_stays_text(payload: str) -> None:
    body, content_type = encode(payload)
    assert content_type == TEXT
    assert decode(body, content_type) == payload


@given(json_values.filter(lambda value: not isinstance(value, str)))
def test_everything_else_is_json(payload: Any) -> None:
    body, content_type = encode(payload)
    assert content_type == JSON
    assert decode(body, content_type) == payload


def test_models_dataclasses_and_dates_become_json() -> None:
    assert encode(Post(author=1)) == (b'{"author":1,"text":""}', JSON)
    assert encode(Like(2)) == (b'{"author":2}', JSON)
    assert encode({"at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC)})[0] == b'{"at":"2026-01-02T00:00:00Z"}'
    body, content_type = encode([math.nan, math.inf])
    back = decode(body, content_type)
    assert math.isnan(back[0])
    assert back[1] == math.inf


@pytest.mark.parametrize("payload", [object(), {"f": print}, "\ud800", lambda: 0])
def test_what_has_no_form_is_refused_with_what_to_give(payload: Any) -> None:
    with pytest.raises(MessageError):
        encode(payload)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(MessageError, match="JSON"):
        encode(deep)
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize(
    ("body", "content_type", "payload"),
    [
        (b"\xff", None, b"\xff"),
        (b"1", None, b"1"),
        (b"1", "application/json", 1),
        (b"1", "Application/JSON; charset=utf-8", 1),
        (b'{"a": 1}', "application/cloudevents+json", {"a": 1}),
        (b"x", "text/html", "x"),
        (b"x", "application/xml", b"x"),
        (b"x", "", b"x"),
    ],
)
def test_content_type_tells(body: bytes, content_type: str | None, payload: Any) -> None:
    assert decode(body, content_type) == payload


@pytest.mark.parametrize(
    ("body", "content_type"), [(b"{", JSON), (b"", JSON), (b"\xff", JSON), (b"\xff", TEXT)]
)
def test_a_body_that_is_not_what_it_says_is_a_decode_error(body: bytes, content_type: str) -> None:
    with pytest.raises(DecodeError, match=str(len(body))):
        decode(body, content_type)


@pytest.mark.parametrize(
    ("hint", "body", "content_type", "payload"),
    [
        (None, b"1", JSON, 1),
        (Any, b"x", TEXT, "x"),
        (bytes, b"1", JSON, b"1"),
        (str, b'"x"', JSON, "x"),
        (str, b"x", TEXT, "x"),
        (str, b"x", None, "x"),
        (int, b"7", JSON, 7),
        (int, b"7", TEXT, 7),
        (int, b"7", None, 7),
        (Post, b'{"author": 7}', JSON, Post(author=7)),
        (Post, b'{"author": 7}', None, Post(author=7)),
        (Like, b'{"author": 7}', JSON, Like(7)),
        (Follow, b'{"who": "x"}', JSON, {"who": "x"}),
        (dict, b"{}", JSON, {}),
        (dict[str, int], b'{"a": 1}', JSON, {"a": 1}),
        (list[Post], b'[{"author": 7}]', JSON, [Post(author=7)]),
        (Post | None, b"null", JSON, None),
        (dt.date, b'"2026-01-02"', JSON, dt.date(2026, 1, 2)),
    ],
)
def test_a_handlers_annotation_says_what_the_payload_becomes(
    hint: Any, body: bytes, content_type: str | None, payload: Any
) -> None:
    assert decoder(hint)(body, content_type) == payload


@pytest.mark.parametrize(
    ("hint", "body", "content_type"),
    [
        (int, b"x", JSON),
        (int, b'"x"', JSON),
        (Post, b"{}", JSON),
        (Post, b"\xff", None),
        (Post, b"x", TEXT),
        (str, b"7", JSON),
        (str, b"\xff", None),
        (dict, b"[]", JSON),
    ],
)
def test_a_payload_that_does_not_validate_is_a_decode_error(
    hint: Any, body: bytes, content_type: str
) -> None:
    with pytest.raises(DecodeError):
        decoder(hint)(body, content_type)


def test_an_annotation_that_cannot_be_validated_is_refused_at_registration() -> None:
    class Opaque:
        pass

    with pytest.raises(ConfigError, match="Opaque"):
        decoder(Opaque)
