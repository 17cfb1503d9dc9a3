"""Kafka's topics told apart by id: what is asked of which broker, and what commits and pins of another topic say."""

from __future__ import annotations

from io import BytesIO
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("aiokafka", reason="the extra kafka is not installed")

from aiokafka.protocol.metadata import MetadataResponse_v5

from pubsub_facade import Settings
from pubsub_facade.backends._kafka_cluster import Cluster
from pubsub_facade.backends._kafka_fetch import Session, answers
from pubsub_facade.backends._kafka_partition import Partition, Progress
from pubsub_facade.backends._kafka_pins import places
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.backends._kafka_registry import Ends, Entry, Move
from pubsub_facade.backends._kafka_wire import FETCH_IDS, METADATA_IDS, Metadata, TopicId
from pubsub_facade.subscription import Definition, Subscription

OLD, NEW = "P-wWv3jBQwOU2vYvb0xJdg", "6JwPbNPgTZCOEkQHYvhTHA"
METADATA, FETCH = 3, 1
T = ("t", 0)


def test_an_id_is_the_text_that_kafkas_tools_show() -> None:
    raw = bytes(range(240, 256))
    assert TopicId.decode(BytesIO(raw)) == "8PHy8_T19vf4-fr7_P3-_w"
    assert TopicId.encode("8PHy8_T19vf4-fr7_P3-_w") == raw
    assert TopicId.decode(BytesIO(TopicId.encode(None))) is None


def test_a_broker_is_asked_for_what_it_knows() -> None:
    for highest, expected in (
        (4, 4),
        (METADATA_IDS - 1, 5),
        (METADATA_IDS, METADATA_IDS),
        (13, METADATA_IDS),
    ):
        asked = Metadata(["t"]).prepare({METADATA: (0, highest)})
        assert (asked.API_VERSION, asked.allow_auto_topic_creation) == (expected, False)
        assert type(asked).SCHEMA.decode(BytesIO(asked.encode()))
    for highest, ids, expected in (
        (FETCH_IDS - 1, {"t": NEW}, 11),
        (FETCH_IDS, {"t": NEW}, FETCH_IDS),
        (17, {"t": NEW}, FETCH_IDS),
        (17, {"t": None}, 11),
    ):
        wanted = Session().request({T: 5}, 0, ids).prepare({FETCH: (0, highest)})
        assert (wanted.API_VERSION, wanted.session_epoch) == (expected, 0)
        assert type(wanted).SCHEMA.decode(BytesIO(wanted.encode()))


def test_a_session_tells_no_topic_by_name_that_was_told_by_id() -> None:
    session = Session()

    def told(offsets: dict[TP, int], ids: dict[str, str | None]) -> tuple[int, Any, Any]:
        asked = session.request(offsets, 0, ids).prepare({FETCH: (0, 17)})
        session.answered(SimpleNamespace(API_VERSION=asked.API_VERSION, error_code=0, session_id=7))
        named = [(row[0], part[0]) for row in asked.topics for part in row[1]]
        return asked.session_id, named, [row[0] for row in asked.forgotten_topics_data]

    assert told({T: 0}, {"t": OLD}) == (0, [(OLD, 0)], [])
    assert told({T: 0}, {"t": OLD}) == (7, [], [])
    assert told({T: 0}, {"t": NEW}) == (7, [(NEW, 0)], [OLD])
    assert told({T: 0, ("u", 0): 3}, {"t": NEW, "u": None}) == (0, [("t", 0), ("u", 0)], [])
    assert told({T: 0}, {"t": NEW}) == (0, [(NEW, 0)], [])


def test_an_answer_by_id_is_of_the_topic_that_was_asked_for() -> None:
    part = (0, 0, 9, 9, 0, None, -1, b"", {})
    response = SimpleNamespace(API_VERSION=FETCH_IDS, topics=[(NEW, [part], {}), (OLD, [part], {})])
    assert [fetched.tp for fetched in answers(response, {T: 4}, {"t": NEW})] == [T]


def test_an_id_that_some_brokers_do_not_tell_stays_known() -> None:
    cluster = Cluster(Settings(backend="kafka").kafka, 1.0, {})
    parts = [(0, 0, 1, 0, [1], [1], [], {})]
    by_id = SimpleNamespace(
        API_VERSION=METADATA_IDS,
        brokers=[(1, "h", 9092, None, {})],
        controller_id=1,
        topics=[(0, "t", OLD, False, parts, -1, {})],
    )
    without = MetadataResponse_v5(
        0, [(1, "h", 9092, None)], "c", 1, [(0, "t", False, [(0, 0, 1, [1], [1], [])])]
    )
    cluster._learn(by_id, None)
    cluster._learn(without, None)
    assert (cluster.ids, cluster.version) == ({"t": OLD}, 1)
    by_id.topics = [(0, "t", NEW, False, parts, -1, {})]
    cluster._learn(by_id, ["t"])
    assert (cluster.ids, cluster.version) == ({"t": NEW}, 2)


def test_a_commit_says_whose_offsets_it_holds() -> None:
    part = Partition(T, "topic", Progress(3, topic_id=OLD), 1, ordered=False)
    progress = part.progress(10)
    assert Progress.read(3, progress.metadata()) == progress
    assert progress.topic_id == OLD
    assert "topic" not in Progress(3).metadata()


class Group:
    """A cluster with one topic, and what a group has committed for it."""

    def __init__(self, id: str | None, commit: Progress | None) -> None:
        self.ids = {} if id is None else {"t": id}
        self._commit = commit

    async def coordinator(self, group: str) -> int:
        return 1

    async def call(self, node: int, request: Any, link: object) -> Any:
        said = self._commit
        row = (0, -1, "", 0) if said is None else (0, said.offset, said.metadata(), 0)
        number, offset, metadata, code = row
        return SimpleNamespace(error_code=0, topics=[("t", [(number, offset, metadata, code)])])

    async def offsets(self, wanted: dict[TP, int]) -> dict[TP, int]:
        raise AssertionError("times need not be asked for where ids tell")


async def begins(id: str | None, commit: Progress | None, pins: dict[str, str]) -> Progress:
    """Where a member begins on a topic with this id; it was declared when the topic with the pins' id ended at 20."""
    definition = Definition.first(Subscription("s", ("t",)), 0.0)
    entry = Entry(definition, Move(5, "end", Ends(1.0, {T: 20}, pins)))
    return (await places(cast(Cluster, Group(id, commit)), "g", "retry", [T], entry))[T]


async def test_a_commit_or_pin_of_another_topic_says_nothing() -> None:
    mine, other = Progress(30, 5, topic_id=NEW), Progress(30, 5, topic_id=OLD)
    assert (await begins(NEW, mine, {"t": NEW})).offset == 30
    assert (await begins(NEW, other, {"t": OLD})).offset == 0
    assert (await begins(NEW, other, {"t": NEW})).offset == 20
    assert (await begins(NEW, None, {"t": NEW})).offset == 20
    assert (await begins(NEW, None, {"t": OLD})).offset == 0
    assert (await begins(NEW, other, {"t": OLD})).topic_id == NEW


async def test_a_commit_that_names_no_topic_is_believed_and_so_are_all_where_brokers_tell_no_ids() -> None:
    assert (await begins(NEW, Progress(30, 5), {"t": NEW})).offset == 30
    assert (await begins(None, Progress(30, 5, topic_id=OLD), {"t": OLD})).offset == 30
    assert (await begins(None, Progress(30, 5), {})).topic_id is None


def test_pins_are_stored_with_the_ids_of_their_topics() -> None:
    ends = Ends(1.0, {T: 20}, {"t": OLD})
    assert Ends.from_json(ends.to_json()) == ends
    assert Ends.from_json([1.0, {"t": {"0": 20}}]) == Ends(1.0, {T: 20})
