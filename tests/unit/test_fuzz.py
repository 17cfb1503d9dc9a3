"""Hostile input: whatever a broker hands over, reading it neither raises nor hangs (contract 17).

``FUZZ=100000`` sets the number of inputs of each test; without it a few hundred. Real members meeting hostile
messages on real brokers are in ``tests/integration``.
"""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pubsub_facade import DecodeError, wire
from pubsub_facade.backends import _activemq_wire, _kafka_records, _rabbitmq_frames, _rabbitmq_wire, _stomp
from pubsub_facade.codec import decode, decoder
from pubsub_facade.message import Delivery
from pubsub_facade.subscription import Definition

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ", "300")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

OURS = (
    wire.ID,
    wire.TOPIC,
    wire.KEY,
    wire.CONTENT_TYPE,
    wire.PUBLISHED,
    wire.ATTEMPT,
    wire.FAILURE,
    wire.DUE,
    wire.TYPES,
    wire.ESCAPED + "destination",
    "pubsub-unknown",
)
BROKERS_OWN = (
    "x-death",
    "x-delivery-count",
    "destination",
    "content-length",
    "redelivered",
    "timestamp",
    "type",
)
json_texts = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
texts = (
    st.text(max_size=30)
    | json_texts
    | st.sampled_from(("1e999", "-1", "nan", "9" * 400, "[" * 5000, "\0", ""))
)
names = st.sampled_from(OURS) | st.sampled_from(BROKERS_OWN) | st.text(min_size=1, max_size=12)
values: st.SearchStrategy[Any] = (
    texts
    | st.binary(max_size=20)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.just([1, {}])
)


def sound(delivery: Any) -> None:
    """What the engine relies on, whatever came in."""
    assert isinstance(delivery.id, str)
    assert isinstance(delivery.topic, str)
    assert delivery.key is None or isinstance(delivery.key, str)
    assert type(delivery.attempt) is int
    assert delivery.attempt >= 1
    assert delivery.timestamp is None or -1e15 < delivery.timestamp < 1e15
    for name, value in delivery.headers.items():
        assert isinstance(name, str)
        assert isinstance(value, str | int | float | bool)


@fuzz
@given(st.dictionaries(names, values, max_size=8), st.booleans())
def test_headers_of_any_kind_are_read(raw: dict[str, Any], native: bool) -> None:
    envelope = wire.HeaderCodec(lambda name: name in BROKERS_OWN, native=native).decode(raw)
    assert not any(name in BROKERS_OWN for name in envelope.headers if wire.ESCAPED + name not in raw)
    sound(envelope)


@fuzz
@given(st.binary(max_size=300))
@example(b"\x20\x00\xff\xff\xff\xff")
@example(b"\x20\x00" + (b"\x00\x00\x00\x07\x01aF" * 60))
def test_amqp_properties_of_any_bytes_are_read(data: bytes) -> None:
    content = _rabbitmq_frames.Content(_rabbitmq_frames.DELIVER, "c", 1, True, "a.b", data, b"body")
    delivery, due = _rabbitmq_wire.read_delivery(None, "s", content)
    sound(delivery)
    assert isinstance(due, float | int)
    assert _rabbitmq_wire.returns_of(content) >= 0


@fuzz
@given(st.dictionaries(st.sampled_from(OURS) | st.just("x-death"), texts, max_size=6))
def test_amqp_headers_that_pose_as_ours_are_read(raw: dict[str, str]) -> None:
    encoded = _rabbitmq_frames.properties(raw, content_type=None, message_id=None, timestamp=None)
    content = _rabbitmq_frames.Content(_rabbitmq_frames.DELIVER, "c", 1, False, "a.b", encoded, b"")
    sound(_rabbitmq_wire.read_delivery(None, "s", content)[0])


@fuzz
@given(
    st.lists(
        st.tuples(
            names, st.none() | st.binary(max_size=30) | texts.map(lambda t: t.encode("utf-8", "replace"))
        ),
        max_size=8,
    ),
    st.none() | st.binary(max_size=10),
    st.integers(-1, 1 << 62),
    st.booleans(),
)
def test_kafka_records_of_any_kind_are_read(
    headers: list[tuple[str, bytes | None]], key: bytes | None, timestamp: int, own: bool
) -> None:
    record = SimpleNamespace(
        headers=headers,
        key=key,
        value=b"x",
        offset=7,
        timestamp=timestamp % (1 << 50),
    )
    envelope = _kafka_records.decode(record, ("t", 0), own=own)
    envelope.topic = envelope.topic or "a"
    sound(envelope)
    if not own:
        assert envelope.attempt == 1, "a copy's fields are believed only from a topic of our own"


@fuzz
@given(st.dictionaries(names.filter(str.isprintable), texts, max_size=8))
def test_stomp_headers_of_any_kind_are_read(headers: dict[str, str]) -> None:
    delivery, due = _activemq_wire.MessageCodec().delivery(None, 1, "s", "a.b", headers, b"")  # type: ignore[arg-type]
    assert isinstance(delivery, Delivery)
    sound(delivery)
    assert -1e15 < due < 1e15


@fuzz
@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from((b"MESSAGE\n", b"content-length:3\n", b"\n\n", b"\0")),
        max_size=12,
    )
)
def test_stomp_bytes_of_any_kind_are_frames_or_wait_for_more(pieces: list[bytes]) -> None:
    parser = _stomp.Parser()
    apart = [frame for piece in pieces for frame in parser.feed(piece)]
    assert apart == _stomp.Parser().feed(b"".join(pieces)), "where the bytes are cut must not matter"


@fuzz
@given(st.binary(max_size=200) | json_texts.map(str.encode))
def test_definitions_of_any_kind_are_read_or_refused(data: bytes) -> None:
    try:
        definition = Definition.from_json(data)
    except ValueError:
        return
    definition.to_json()


@fuzz
@given(
    st.binary(max_size=200) | json_texts.map(str.encode),
    st.none() | st.text(max_size=20) | st.just("application/json"),
)
def test_bodies_decode_or_are_decode_errors(body: bytes, content_type: str | None) -> None:
    for hint in (None, str, dict, int):
        try:
            (decode if hint is None else decoder(hint))(body, content_type)
        except DecodeError:
            continue


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_a_deeply_nested_body_is_a_decode_error_and_not_a_crash(size: int) -> None:
    begin = time.monotonic()
    with pytest.raises(DecodeError):
        decode(b"[" * size, "application/json")
    assert time.monotonic() - begin < 2
