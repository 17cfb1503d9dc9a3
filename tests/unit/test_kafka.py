"""The parts of the Kafka driver that need no broker: where retries wait, and what a commit says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("aiokafka", reason="the extra kafka is not installed")

from pubsub_facade import Message, Settings
from pubsub_facade.backends._kafka_cluster import Cluster
from pubsub_facade.backends._kafka_log import Records
from pubsub_facade.backends._kafka_member import share_out
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_partition import MAX_METADATA, Partition, Progress
from pubsub_facade.backends._kafka_records import Outgoing
from pubsub_facade.backends._kafka_retry import PARTITIONS, SLACK, SOON, SOON_PARTITIONS, place, ready_at
from pubsub_facade.backends._kafka_topics import Topics
from pubsub_facade.backends.kafka import KafkaBackend

TP = ("t", 0)


class Record:
    """As much of a record as a partition looks at."""

    def __init__(self, offset: int) -> None:
        self.offset = offset


class Fetched(Records):
    """Records with these offsets."""

    def __init__(self, offsets: list[int]) -> None:
        super().__init__(b"", None, 0)
        self.next_fetch_offset = offsets[-1] + 1 if offsets else 0
        self._iterator = iter([Record(offset) for offset in offsets])


def partition(start: Progress, count: int, guess: int = 1) -> Partition:
    made = Partition(TP, "topic", start, guess, ordered=False)
    made.feed(Fetched(list(range(start.offset, count))), 1, count)
    return made


def take(part: Partition, count: int = 1000) -> list[int]:
    """Hand out the next ones; returns their offsets."""

    def offsets() -> Iterator[int]:
        for _ in range(count):
            record: Any = part.next()
            if record is None:
                return
            part.open[record.offset] = None
            yield record.offset

    return list(offsets())


@given(st.floats(0, 10_000), st.integers(0, 100))
def test_a_delay_is_waited_for_in_few_steps_and_never_cut_short(delay: float, spread: int) -> None:
    now, due = 1000.0, 1000.0 + delay
    steps = 0
    while due - now > SLACK:
        where = place(due - now, spread)
        assert 0 <= where < PARTITIONS
        at = ready_at(where, now, due)
        assert now < at <= due
        assert where >= SOON_PARTITIONS or at == due
        now = at
        steps += 1
        assert steps <= 22
    assert delay > SOON or steps <= 1


@given(st.floats(0, 10_000), st.integers(1, PARTITIONS))
def test_a_retry_topic_with_fewer_partitions_is_used_as_it_is(delay: float, partitions: int) -> None:
    assert 0 <= place(delay, 7, partitions) < partitions


@given(st.sets(st.integers(0, 49)), st.integers(0, 50))
def test_what_a_commit_says_is_all_that_comes_again(settled: set[int], reached: int) -> None:
    part = partition(Progress(0), 50)
    taken = take(part, reached)
    for offset in settled & set(taken):
        part.settle(offset)
    progress = part.progress(0)
    assert all(offset in settled for offset in range(progress.offset))
    restored = Progress.read(progress.offset, progress.metadata())
    again = take(partition(restored, 50))
    assert again == [offset for offset in range(50) if offset not in settled & set(taken)]


def test_a_message_in_a_dead_members_hands_counts_and_one_behind_its_window_does_not() -> None:
    part = partition(Progress(0), 100)
    take(part, 5)
    for offset in (0, 2):
        part.settle(offset)
    part.handed.add(1)
    left = part.progress(10)
    after = Partition(TP, "topic", Progress.read(left.offset, left.metadata()), 1, ordered=False)
    assert [after.count(offset) for offset in (1, 3, 5, 14, 15)] == [1, 1, 1, 1, 0]
    assert after.seen(14)
    assert not after.seen(15)


def test_a_message_in_the_hands_of_a_member_that_left_in_order_does_not_count() -> None:
    part = partition(Progress(0), 10)
    take(part, 3)
    part.handed.update((0, 1, 2))
    left = part.progress(0)
    after = Partition(TP, "topic", Progress.read(left.offset, left.metadata()), 1, ordered=False)
    assert [after.count(offset) for offset in range(4)] == [0, 0, 0, 0]
    assert after.seen(2)
    assert not after.seen(3)


def test_counts_grow_over_deaths() -> None:
    start = Progress(0)
    for death in range(1, 4):
        part = Partition(TP, "topic", start, 1, ordered=False)
        part.feed(Fetched([0]), 1, 1)
        assert part.count(0) == (death - 1)
        assert take(part) == [0]
        part.counts[0] = part.count(0)
        part.handed.add(0)
        left = part.progress(1)
        start = Progress.read(left.offset, left.metadata())
    assert start.open == {0: 3}


def test_a_commit_of_another_tool_says_its_offset_and_nothing_else() -> None:
    for metadata in ("", "note", "[]", "{}", '{"open": [[1]]}', '{"moves": 1}'):
        progress = Progress.read(7, metadata)
        assert (progress.offset, progress.moves, progress.window, progress.open) == (7, None, 0, {})
        assert take(partition(progress, 10)) == [7, 8, 9]


@given(st.sets(st.integers(0, 100_000), min_size=1, max_size=3000))
def test_metadata_fits_and_loses_nothing(open: set[int]) -> None:
    mark = min(open)
    progress = Progress(mark, 5, 100, max(open) + 1, dict.fromkeys(open, 1))
    text = progress.metadata()
    assert len(text) <= MAX_METADATA
    restored = Progress.read(mark, text)
    done = {offset for offset in range(mark, restored.reached) if offset not in restored.open}
    assert not done & open


@given(st.integers(1, 7), st.lists(st.integers(1, 9), max_size=6))
def test_members_that_want_the_same_get_the_same_number_of_partitions(
    members: int, counts: list[int]
) -> None:
    topics = {f"t{number}": [1] * count for number, count in enumerate(counts)}
    shares = share_out({f"m{number}": list(topics) for number in range(members)}, topics)
    sizes = [len(tps) for tps in shares.values()]
    assert sum(sizes) == sum(counts)
    assert max(sizes) - min(sizes) <= 1


def test_every_partition_goes_to_one_member_that_wants_it() -> None:
    topics = {"a": [1] * 5, "b": [1] * 4}
    shares = share_out({"m1": ["a", "b"], "m2": ["a"], "m3": ["b", "gone"]}, topics)
    everything = [tp for tps in shares.values() for tp in tps]
    assert sorted(everything) == sorted([("a", n) for n in range(5)] + [("b", n) for n in range(4)])
    assert all(topic == "a" for topic, _ in shares["m2"])
    assert all(topic == "b" for topic, _ in shares["m3"])


class LaggingCluster:
    """Brokers that hear of a new topic one after another: the second to be asked does not know it yet."""

    def __init__(self) -> None:
        self.topics: dict[str, list[int]] = {}
        self.made: list[str] = []
        self.told = False

    async def refresh(self, names: Collection[str]) -> None:
        self.topics = {} if self.told else {name: [0] for name in names if name in self.made}
        self.told = bool(self.topics)

    async def call_controller(self, request: Any) -> Any:
        self.made += [name for name, *_ in request.create_topic_requests]
        return SimpleNamespace(topic_errors=[(name, 0, None) for name in self.made])


async def test_a_topic_that_was_made_is_published_to_though_another_broker_has_not_heard_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(backend="kafka", namespace="ns")
    backend = KafkaBackend(settings)
    cluster = LaggingCluster()
    topics = Topics(cast(Cluster, cluster), Names("ns"), settings.kafka, {})
    stored: list[tuple[str, int]] = []

    async def store(lines: Mapping[tuple[str, int], Sequence[Outgoing]]) -> None:
        stored.extend(lines)

    producer = SimpleNamespace(store=store, turn=lambda: 0, partition=lambda key, count: 0)
    monkeypatch.setattr(
        backend, "_shared", SimpleNamespace(cluster=cluster, topics=topics, producer=producer)
    )
    for topic in ("a", "b"):
        await backend.send([Message(topic, 1)])
    assert cluster.made == ["ns.a", "ns.b"]
    assert stored == [("ns.a", 0), ("ns.b", 0)]
