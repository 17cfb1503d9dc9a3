"""The pure parts of the ActiveMQ driver: frames, places, records, headers."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from stomp import utils

from pubsub_facade import Settings, wire
from pubsub_facade.backends import _activemq_forms
from pubsub_facade.backends._activemq_record import Record, cover_of, places_for
from pubsub_facade.backends._activemq_session import Box, Session
from pubsub_facade.backends._activemq_wire import (
    MAX_HEADER,
    MessageCodec,
    check_head,
    fitting,
    line_length,
    one_word,
    reserved,
)
from pubsub_facade.backends._stomp import (
    ClientBusy,
    Link,
    Parser,
    _short,
    control,
    escape,
    send_frame,
    unescape,
)
from pubsub_facade.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    MessageError,
    PubSubError,
    TopologyConflict,
)
from pubsub_facade.message import Failure, Message
from pubsub_facade.subscription import Definition, Era, Subscription
from pubsub_facade.topics import covers, matches

TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
HEADERS = st.dictionaries(TEXT.filter(bool), TEXT, max_size=5)
PATTERNS = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=5).map(".".join)
TOPICS = [".".join(words) for size in range(1, 5) for words in itertools.product("ab", repeat=size)]


@given(TEXT)
def test_what_is_escaped_comes_back(text: str) -> None:
    assert unescape(escape(text)) == text
    assert not set(escape(text)) & set("\r\n:")


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=40)), min_size=1, max_size=5), st.randoms())
def test_frames_survive_any_cut(frames: list[tuple[dict[str, str], bytes]], chance: random.Random) -> None:
    sent = [
        ({key: value for key, value in headers.items() if key != "content-length"}, body)
        for headers, body in frames
    ]
    data = b"\n".join(send_frame("destination:/topic/x\n", headers, body) for headers, body in sent)
    parser, got, at = Parser(), [], 0
    while at < len(data):
        size = chance.randint(1, 30)
        got += parser.feed(data[at : at + size])
        at += size
    assert [body for _, _, body in got] == [body for _, body in sent]
    for (_, seen, _), (headers, _) in zip(got, sent, strict=True):
        assert {key: value for key, value in seen.items() if key in headers} == {
            **headers,
            **({"destination": "/topic/x"} if "destination" in headers else {}),
        }


def test_the_parser_reads_a_frame_as_stomp_py_does() -> None:
    raw = b"MESSAGE\nack:ID\\chost\\c1\nlang:en\nlang:de\nn:\ncontent-length:3\n\na\0b"
    theirs = utils.parse_frame(raw)
    ((command, headers, body),) = Parser().feed(raw + b"\0")
    assert (command, headers, body) == (theirs.cmd, theirs.headers, theirs.body)
    assert headers["lang"] == "en"


def test_a_large_body_in_pieces_is_put_together_once() -> None:
    body = bytes(range(256)) * 4096
    data = send_frame("", {}, body)
    parser = Parser()
    frames = [frame for at in range(0, len(data), 65536) for frame in parser.feed(data[at : at + 65536])]
    assert [frame[2] for frame in frames] == [body]


def test_heartbeats_between_frames_are_no_frames() -> None:
    assert [f[0] for f in Parser().feed(b"\n\n\n" + control("RECEIPT", {"receipt-id": 1}) + b"\n\r\n")] == [
        "RECEIPT"
    ]


@given(PATTERNS)
def test_a_cover_means_all_of_its_pattern_and_ends_at_its_first_many(pattern: str) -> None:
    cover = cover_of(pattern)
    assert covers(cover, pattern)
    assert "#" not in cover.split(".")[:-1]
    assert all(matches(cover, topic) for topic in TOPICS if matches(pattern, topic))


@given(st.lists(PATTERNS, min_size=1, max_size=12), st.booleans())
@example(["a", "#", "*.#"], False)
def test_places_cover_every_pattern(patterns: list[str], ordered: bool) -> None:
    places = places_for(patterns, ordered=ordered)
    assert len(places) <= (1 if ordered else 8)
    for topic in TOPICS:
        if any(matches(pattern, topic) for pattern in patterns):
            assert any(matches(place, topic) for place in places)


def declared(*patterns: str, old: Record | None = None, ordered: bool = False) -> Record:
    subscription = Subscription("s", patterns, ordered=ordered)
    return Record.declared(subscription, old, places_for(patterns, ordered=ordered))


def test_each_topic_has_one_owner_and_keeps_it_when_places_are_added() -> None:
    first = declared("a.*")
    second = declared("a.#", "b", old=first)
    assert second.places[0] == first.places[0]
    for topic in ("a.x", "a.x.y", "b"):
        if first.owner(topic) is not None:
            assert second.owner(topic) == first.owner(topic)
    assert second.owner("a.x.y") == "a.#"
    assert second.owner("c") is None


def test_declaring_the_same_again_changes_nothing() -> None:
    first = declared("a.*", "b")
    assert declared("b", "a.*", old=first) is first


def test_narrower_patterns_need_no_place() -> None:
    first = declared("a.#")
    assert declared("a.b", old=first).places == first.places


def test_an_ordered_subscription_has_one_place() -> None:
    first = declared("a.x", "a.y", ordered=True)
    assert first.places == ("a.#",)
    assert declared("a.z", old=first, ordered=True).places == ("a.#",)
    with pytest.raises(TopologyConflict, match="order"):
        declared("b", old=first, ordered=True)


def test_records_written_at_once_lose_nothing() -> None:
    one, two = declared("a.*"), declared("b")
    merged = Record.merged([one, two])
    assert merged is not None
    assert merged.places == ("a.*", "b")
    assert set(merged.lives) == {*one.lives, *two.lives}
    assert merged.definition.patterns == {"a.*", "b"}
    assert Record.merged([]) is None


def test_a_record_reads_back_as_it_was_written() -> None:
    record = declared("a.*", "b", old=declared("c.#"))
    assert Record.from_json(record.to_json()) == record
    for bad in (b"", b"{}", b"[]", b"null", b'{"places": 1}', b"\xff"):
        with pytest.raises(ValueError):
            Record.from_json(bad)


def test_eras_that_change_nothing_are_not_kept() -> None:
    same = [Record(Definition((Era(since, ("a",)),)), ("a",)) for since in (2.0, 1.0)]
    merged = Record.merged(same)
    assert merged is not None
    assert [era.since for era in merged.definition.eras] == [1.0]


def test_a_dotted_name_is_one_word_of_its_own() -> None:
    assert "." not in one_word("social.eu")
    assert one_word("social.eu") != one_word("social-eu")


def test_names_with_a_meaning_are_reserved_and_others_are_not() -> None:
    for name in ("destination", "receipt", "JMSXGroupID", "AMQ_SCHEDULED_DELAY", "_AMQ_GROUP_ID"):
        assert reserved(name), name
    for name in ("lang", "Destination", "region", "ünïcode", "x-JMS"):
        assert not reserved(name), name


@pytest.mark.parametrize("text", ["x" * 2000, "\\" * 2000, "😀" * 2000, ":" * 2000, '"' * 2000])
def test_a_failure_is_cut_to_one_header_line(text: str) -> None:
    failure = Failure("s", "ValueError", text, 1, 1.0, 2.0)
    headers = MessageCodec().copy(failed(failure), "", 1).headers
    assert line_length(wire.FAILURE, headers[wire.FAILURE]) <= MAX_HEADER
    assert text.startswith(fitting(failure).error)
    assert len(fitting(failure).error) >= 300


def failed(failure: Failure) -> Message:
    message = Message("a.b", None, id="1")
    message.failure = failure
    return message


def test_a_head_the_brokers_refuse_is_refused_first() -> None:
    check_head({"a": "x" * 9000})
    for headers in (
        {"a": "x" * 10_001},
        {f"h{n}": "" for n in range(901)},
        {f"h{n}": "x" * 9000 for n in range(6)},
    ):
        with pytest.raises(MessageError, match="at most"):
            check_head(headers)


def test_text_beyond_the_basic_plane_is_carried_in_ascii() -> None:
    """Classic breaks it where it reads a message from its store, and only there."""
    codec = MessageCodec()
    message = Message(
        "a.b",
        b"",
        key="k😀",
        id="i😀",
        headers={"face": "größe 😀", "destination": "😀", "plain": "größe", "n": 1},
    )
    headers = codec._encode(message)
    assert all(max(value) <= "\uffff" for value in headers.values())
    assert headers["plain"] == "größe"
    read = codec.message("a.b", headers, b"")
    assert (read.key, read.id, dict(read.headers)) == ("k😀", "i😀", dict(message.headers))


@pytest.mark.parametrize("client_id", [None, "social$audit$#"])
async def test_a_client_id_is_asked_for_again_where_the_link_ends_without_a_word(
    monkeypatch: pytest.MonkeyPatch, client_id: str | None
) -> None:
    """Classic refuses one that is taken with ERROR, and now and then closes the link before that is sent."""
    attempts = 0

    async def connect(*_: object) -> Link:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ConnectionFailed("cannot connect") from ConnectionLost("closed by the broker")
        raise ClientBusy("already connected from")

    monkeypatch.setattr(Link, "connect", connect)
    with pytest.raises(ConnectionFailed) as caught:
        await Session(Settings()).connect(client_id)
    assert isinstance(caught.value, ClientBusy) == (client_id is not None)
    assert attempts == (1 if client_id is None else 2)


class ManagedLink:
    """Answers each management message as it was told."""

    lost = None

    def __init__(self, session: Session, succeeded: str, answer: str) -> None:
        self._session = session
        self._answer = ({"_AMQ_OperationSucceeded": succeeded}, json.dumps([answer]).encode())

    async def ask(self, command: str, headers: dict[str, str], body: bytes = b"") -> None:
        if command == "SEND":
            answer, text = self._answer
            self._session._answered(({**answer, "correlation-id": headers["correlation-id"]}, text))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("AMQ229000: Broker is not started. It can not be managed yet", ConnectionLost),
        ("AMQ229213: User: a does not have permission='MANAGE'", AuthenticationFailed),
        ("AMQ229067: Cannot find resource with name queue.x", ConnectionLost),
        ("AMQ229017: Queue x does not exist", ConnectionLost),
        ("AMQ229019: Queue x already exists on address y", PubSubError),
    ],
)
async def test_what_was_deleted_or_is_stopping_is_waited_for_and_a_missing_right_is_not(
    answer: str, error: type[PubSubError]
) -> None:
    session = Session(Settings(backend="activemq"))
    session._main = ManagedLink(session, "false", answer)  # type: ignore[assignment]
    with pytest.raises(PubSubError, match=answer[:9]) as caught:
        await session.manage("broker", "getQueueNames", reply_to="reply")
    assert type(caught.value) is error


class Deaf:
    """A session whose subscription to a queue that is being deleted hears nothing, and no error either."""

    main = None

    @asynccontextmanager
    async def subscribed(self, headers: dict[str, str]) -> AsyncIterator[Box]:
        yield asyncio.Queue()

    async def manage(self, resource: str, operation: str, *arguments: object, reply_to: str) -> object:
        return {"getQueueNames": ["queue"], "getConsumerCount": 0}[operation]


async def test_reading_a_queue_that_is_deleted_under_the_reader_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sent(*_: object) -> None:
        return

    monkeypatch.setattr(_activemq_forms, "store", sent)
    form = _activemq_forms.Artemis(Settings(backend="activemq", activemq={"flavor": "artemis"}))
    with pytest.raises(ConnectionLost, match="queue was deleted while it was read"):
        await asyncio.wait_for(form.sweep(Deaf(), "queue", lambda _: False), 5)  # type: ignore[arg-type]


def test_what_artemis_says_of_a_deleted_queue_says_so() -> None:
    refused = "AMQ339018 Error acknowledging message 320745,320837"
    closed = "consumer with ID 7 of QueueImpl[name=social$sub.audit, postOffice=...] is closed"
    assert _short(refused).startswith(refused)
    for text in (refused, closed):
        assert "was deleted on the broker" in _short(text)
    assert _short("anything else") == "anything else"
