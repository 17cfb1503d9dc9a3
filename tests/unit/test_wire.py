"""Headers on the wire: typed values survive every kind of broker, and what is foreign is never a crash."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pubsub_facade.message import Failure, HeaderValue, Message
from pubsub_facade.wire import ESCAPED, TYPES, HeaderCodec, number


def reserved(name: str) -> bool:
    return name.lower() in {"destination", "content-length", "priority"} or name.startswith("JMS")


TEXT_ONLY = HeaderCodec(reserved, native=False)
NATIVE = HeaderCodec(reserved, native=True)
CODECS = pytest.mark.parametrize("codec", [TEXT_ONLY, NATIVE], ids=["text", "native"])

names = st.text(min_size=1, max_size=30).filter(
    lambda name: "\0" not in name and not name.lower().startswith("pubsub-")
) | st.sampled_from(["destination", "JMSType", "priority", "h-destination"])
values = st.text() | st.integers() | st.booleans() | st.floats(allow_nan=False)


@CODECS
@given(headers=st.dictionaries(names, values, max_size=8))
@example(
    headers={"a": 2**63 - 1, "b": -(2**63), "c": 2**63, "d": True, "e": 1, "f": 1.0, "g": "1", "h": "\0"}
)
@example(headers={"a": math.inf, "b": -0.0, "c": 5e-324, "d": "", "destination": 7, "JMSType": False})
def test_headers_come_back_with_value_and_type(codec: HeaderCodec, headers: dict[str, HeaderValue]) -> None:
    encoded = codec.encode_user(headers)
    decoded = codec.decode(encoded).headers
    assert dict(decoded) == headers
    assert {name: type(value) for name, value in decoded.items()} == {
        name: type(value) for name, value in headers.items()
    }
    for name, carried in encoded.items():
        assert not reserved(name), f"{name} has a meaning of its own to the broker"
        assert isinstance(carried, str) or (codec is NATIVE and isinstance(carried, bool | int))
        if isinstance(carried, str):
            assert "\0" not in carried
        elif not isinstance(carried, bool):
            assert -(2**63) <= carried < 2**63


def test_nan_stays_nan() -> None:
    for codec in (TEXT_ONLY, NATIVE):
        value = codec.decode(codec.encode_user({"nan": math.nan})).headers["nan"]
        assert isinstance(value, float)
        assert math.isnan(value)


def test_a_raw_client_reads_plain_names_and_values() -> None:
    encoded = TEXT_ONLY.encode_user({"lang": "en", "level": 3, "destination": "x"})
    assert encoded["lang"] == "en"
    assert encoded["level"] == "3"
    assert encoded[ESCAPED + "destination"] == "x"
    assert "destination" not in encoded
    assert NATIVE.encode_user({"level": 3, "ok": True}) == {"level": 3, "ok": True}


def test_what_a_message_carries_beside_its_headers_comes_back() -> None:
    message = Message("t", b"", id="my-id", headers={"a": 1})
    message.timestamp = 1700000000.123456
    message.attempt = 3
    message.failure = Failure("s", "ValueError", "größe\n", 2, 1.5, 2.5)
    for codec in (TEXT_ONLY, NATIVE):
        envelope = codec.decode(codec.encode(message))
        assert (envelope.id, envelope.timestamp, envelope.attempt) == ("my-id", 1700000000.123456, 3)
        assert envelope.failure == message.failure
        assert dict(envelope.headers) == {"a": 1}
    plain = Message("t", b"")
    assert TEXT_ONLY.encode(plain) == {}
    envelope = TEXT_ONLY.decode({})
    assert (envelope.id, envelope.timestamp, envelope.attempt, envelope.failure) == ("", None, 1, None)


HOSTILE: list[Any] = [
    None, "", "x", "{", "[]", "[1]", "null", "1e999", "nan", "-1", "99999999999999999999", "\ud800",
    b"\xff", 7, -7, 1.5, True, [], {}, {"subscription": 1}, "[" * 5000,
    '{"subscription": "s"}',
    '{"subscription":"s","error_type":"e","error":"x","attempts":"x","first_at":0,"last_at":0}',
    '{"subscription":"s","error_type":"e","error":"x","attempts":1e400,"first_at":0,"last_at":0}',
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "id",
        "topic",
        "key",
        "content-type",
        "published",
        "attempt",
        "failure",
        "due",
        "types",
        "unknown",
        "h-x",
    ],
)
def test_what_does_not_parse_is_foreign_and_no_crash(name: str) -> None:
    for codec in (TEXT_ONLY, NATIVE):
        for value in HOSTILE:
            envelope = codec.decode({f"pubsub-{name}": value, "mine": "5"})
            assert envelope.headers["mine"] == "5"
            assert envelope.attempt >= 1
            assert isinstance(envelope.id, str)
            assert isinstance(envelope.topic, str)
            assert envelope.failure is None
            assert envelope.timestamp is None or math.isfinite(envelope.timestamp)
            assert math.isfinite(envelope.due)


def test_wrong_types_are_read_as_text() -> None:
    deep = "[" * 100_000
    assert TEXT_ONLY.decode({"a": deep, TYPES: '{"a": "j"}'}).headers["a"] == deep
    for types in ('{"a": "i"}', '{"a": "f"}', '{"a": "j"}', '{"a": 7}', '{"a": "unknown"}'):
        assert TEXT_ONLY.decode({"a": "no number", TYPES: types}).headers["a"] == "no number"
    foreign = NATIVE.decode({"bytes": b"gr\xc3\xb6\xff", "none": None, "list": [1], "int": 3, "yes": True})
    assert dict(foreign.headers) == {"bytes": "grö\ufffd", "none": "", "list": "[1]", "int": 3, "yes": True}


def test_a_brokers_own_headers_are_left_out() -> None:
    assert dict(TEXT_ONLY.decode({"destination": "/queue/x", "JMSType": "x", "mine": "1"}).headers) == {
        "mine": "1"
    }


def test_number_takes_only_what_is_finite_and_of_this_age() -> None:
    assert number("1.5", None) == 1.5
    hostile: list[Any] = ["x", None, "nan", "inf", "-inf", 1e16, [], "1e300"]
    for bad in hostile:
        assert number(bad, 7.0) == 7.0
