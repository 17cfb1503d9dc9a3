"""Hostile input: whatever a broker hands over, reading it neither raises nor hangs, and a member goes on (contract 17).

``FUZZ=100000`` sets the number of inputs of each test; without it a few hundred. Real members meeting hostile
messages on real brokers are in ``tests/integration``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from pubsub_facade import AsyncPubSub, DecodeError, Settings, wire
from pubsub_facade.backends import (
    _activemq_wire,
    _kafka_records,
    _rabbitmq_frames,
    _rabbitmq_wire,
    _sqlite_upkeep,
    _stomp,
)
from pubsub_facade.codec import decode, decoder
from pubsub_facade.message import Delivery, Message
from pubsub_facade.subscription import Definition

T = TypeVar("T")

FUZZ = int(os.environ.get("FUZZ", "300"))

pytestmark = pytest.mark.timeout(120 + FUZZ // 5)

fuzz = settings(
    max_examples=FUZZ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# A member that has come to a stop is no better after the next input.
fuzz_member = settings(fuzz, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)

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


METHODS = (
    _rabbitmq_frames.DELIVER,
    _rabbitmq_frames.GET_OK,
    _rabbitmq_frames.RETURN,
)


def short(raw: bytes) -> bytes:
    return bytes((len(raw),)) + raw


@fuzz
@given(
    st.sampled_from(METHODS),
    st.binary(max_size=255),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 255),
    st.binary(max_size=255),
    st.binary(max_size=255),
)
def test_amqp_methods_around_any_names_are_read(
    method: int, consumer: bytes, tag: int, redelivered: int, exchange: bytes, key: bytes
) -> None:
    """Routing keys and exchanges are a publisher's bytes."""
    named = {
        _rabbitmq_frames.DELIVER: short(consumer) + tag.to_bytes(8, "big") + bytes((redelivered,)),
        _rabbitmq_frames.GET_OK: tag.to_bytes(8, "big") + bytes((redelivered,)),
        _rabbitmq_frames.RETURN: b"\1\x38" + short(b"NO_ROUTE"),
    }
    frame = method.to_bytes(4, "big") + named[method] + short(exchange) + short(key) + b"\0\0\0\7"
    read = _rabbitmq_frames.read_method(frame)
    returned, delivered = method == _rabbitmq_frames.RETURN, method == _rabbitmq_frames.DELIVER
    assert read == (
        method,
        consumer.decode("utf-8", "replace") if delivered else "",
        0 if returned else tag,
        bool(redelivered) and not returned,
        key.decode("utf-8", "replace"),
    )


@fuzz
@given(st.sampled_from(METHODS), st.binary(max_size=80))
def test_amqp_methods_of_any_bytes_are_read_or_refused(method: int, rest: bytes) -> None:
    """A frame that says one thing and holds another ends the link as what it is: never with a made-up message."""
    try:
        read = _rabbitmq_frames.read_method(method.to_bytes(4, "big") + rest)
    except ValueError:
        return
    _, consumer, tag, redelivered, key = read
    assert isinstance(redelivered, bool)
    assert 0 <= tag < 1 << 64
    assert len(consumer) + len(key) <= len(rest)


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


# -- a member, and rows of its file that another process wrote ----------------------------------------

Cell = tuple[str, Any]
"""How SQLite is to store a value, and the value."""

cells: st.SearchStrategy[Cell] = (
    st.tuples(st.just("?"), texts | st.binary(max_size=20) | st.integers(-(1 << 63), (1 << 63) - 1))
    | st.tuples(st.just("?"), st.floats(allow_nan=False))
    | st.tuples(st.just("CAST(? AS TEXT)"), st.binary(max_size=20))  # text that need not be UTF-8
)
cells_or_none = cells | st.just(("?", None))
content = {
    "id": cells,
    "topic": cells,
    "key": cells_or_none,
    "headers": cells_or_none,
    "content_type": cells_or_none | st.just(("?", "application/json")),
    "body": cells,
}
message_rows = st.fixed_dictionaries({**content, "published": cells_or_none})
delivery_rows = st.fixed_dictionaries(
    {"attempt": cells, "redelivered": cells, "failure": cells_or_none, "key": cells_or_none}
)


NO_UTF8: Cell = ("CAST(? AS TEXT)", b"\xff")
GOOD: dict[str, Cell] = {
    "id": ("?", "good"),
    "topic": ("?", "fuzz"),
    "failure": ("?", "{}"),
    "body": ("?", b"good"),
}


class Member:
    """Handlers of a file: of one subscription any delivery, of the other, ordered one what its annotation says."""

    def __init__(self, path: Path) -> None:
        self.pubsub = AsyncPubSub(Settings(backend="sqlite", namespace="fuzz", sqlite={"path": path}))
        self._loop = asyncio.new_event_loop()
        self._seen: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        async def any_delivery(delivery: Delivery) -> None:
            sound(delivery)
            self._seen.put_nowait((delivery.id, delivery.body))

        async def mapping(payload: dict[str, int], delivery: Delivery) -> None:
            self._seen.put_nowait((delivery.id, payload))

        self.pubsub.subscriber("#", subscription="any", max_attempts=1)(any_delivery)
        self.pubsub.subscriber("#", subscription="dict", max_attempts=1, ordered=True)(mapping)
        self.run(self.pubsub.start())
        self.sql = sqlite3.connect(path, isolation_level=None)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, 20))

    def insert(self, table: str, row: dict[str, Cell]) -> int:
        values = ", ".join(how for how, _ in row.values())
        sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"
        number = self.sql.execute(sql, [value for _, value in row.values()]).lastrowid
        assert number is not None
        return number

    def goes_on(self) -> None:
        """What is published now is handled by both, as it was published."""
        sent = self.run(self.pubsub.publish("fuzz.end", {"n": 1}))
        wanted = [(sent.id, b'{"n":1}'), (sent.id, {"n": 1})]

        async def both() -> None:
            while wanted:
                seen = await self._seen.get()
                if seen in wanted:
                    wanted.remove(seen)

        self.run(both())

    def close(self) -> None:
        self.sql.close()
        self.run(self.pubsub.close())
        self._loop.close()


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    member = Member(tmp_path_factory.mktemp("fuzz") / "fuzz.db")
    yield member
    member.close()


@fuzz_member
@given(rows=st.lists(st.tuples(message_rows, delivery_rows), min_size=1, max_size=8))
def test_a_member_meets_rows_of_any_kind_and_goes_on(
    member: Member, rows: list[tuple[dict[str, Cell], dict[str, Cell]]]
) -> None:
    member.sql.execute("BEGIN IMMEDIATE")
    lines = member.sql.execute("SELECT line FROM subscriptions").fetchall()
    for message, delivery in rows:
        own = {"namespace": ("?", "fuzz"), "stored": ("?", 0.0)}
        position = member.insert("messages", {**own, **message})
        for (line,) in lines:
            where = {"position": ("?", position), "line": ("?", line)}
            member.insert("deliveries", {**where, **delivery})
    member.sql.execute("COMMIT")
    member.goes_on()
    assert member.run(member.pubsub.backlog("any")).oldest is None


@settings(fuzz_member, max_examples=10)  # each waits until somebody looks into the inbox
@given(rows=st.lists(st.fixed_dictionaries(content), min_size=1, max_size=20))
@example(rows=[{"topic": NO_UTF8, "id": NO_UTF8, "body": NO_UTF8}])
def test_a_member_meets_an_inbox_of_any_kind_and_goes_on(member: Member, rows: list[dict[str, Cell]]) -> None:
    for row in rows:
        member.insert("inbox", {**row, "namespace": ("?", "fuzz")})
    deadline = time.monotonic() + 10
    while member.sql.execute("SELECT 1 FROM inbox").fetchone():
        assert time.monotonic() < deadline, "nobody takes it in"
        member.run(asyncio.sleep(0.02))
    member.goes_on()


@fuzz
@given(st.tuples(*[texts | st.binary(max_size=20) | st.integers() | st.floats() | st.none()] * 6))
def test_rows_of_an_inbox_of_any_kind_are_messages(row: tuple[Any, ...]) -> None:
    message = _sqlite_upkeep._foreign((1, *row), 1.0)
    assert isinstance(message.topic, str)
    assert isinstance(message.body, bytes)
    assert message.id
    assert message.key is None or isinstance(message.key, str)
    assert all(isinstance(value, str | int | float) for value in message.headers.values())


@fuzz_member
@given(row=st.fixed_dictionaries({**content, "published": cells_or_none, "failure": cells}))
def test_dead_letters_of_any_kind_are_read(member: Member, row: dict[str, Cell]) -> None:
    (subscription,) = member.sql.execute("SELECT id FROM subscriptions WHERE name = 'any'").fetchone()
    member.sql.execute("DELETE FROM dead")
    member.insert("dead", {**row, "subscription": ("?", subscription)})
    member.insert("dead", {**GOOD, "subscription": ("?", subscription)})

    async def read() -> list[Message]:
        return [letter async for letter in member.pubsub.dead_letters("any")]

    letters = member.run(read())
    assert len(letters) == 2
    assert (letters[1].id, letters[1].body) == ("good", b"good")
    for letter in letters:
        assert isinstance(letter.topic, str)
        assert all(isinstance(value, str | int | float) for value in letter.headers.values())
        assert letter.failure is None or isinstance(letter.failure.attempts, int)
