"""Required subscribers on Kafka, without a broker: who would get a message, and how ephemeral ones become known."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("aiokafka", reason="the extra kafka is not installed")

from pubsub_facade import AuthenticationFailed, ConnectionLost, Message, SendFailed, Settings, Subscription
from pubsub_facade.backends import _kafka_presence, _kafka_registry
from pubsub_facade.backends._kafka_cluster import Cluster
from pubsub_facade.backends._kafka_demand import Demand, Routes
from pubsub_facade.backends._kafka_presence import Presence
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_records import TP, Outgoing
from pubsub_facade.backends._kafka_registry import Ends, Entry, Lease, Move, Registry
from pubsub_facade.backends._required import unheard
from pubsub_facade.backends.kafka import KafkaBackend
from pubsub_facade.errors import TopologyConflict
from pubsub_facade.subscription import Definition, Era

TOPIC = "ns...registry"


class Log:
    """The registry's Kafka topic, its cluster and its producer in one."""

    def __init__(self) -> None:
        self.topics = {TOPIC: [0]}
        self.ids: dict[str, str] = {}
        self.records: list[Any] = []
        self.stores = 0
        self.asked = 0  # how often somebody wanted to know where it ends
        self.lost: Exception | None = None

    async def refresh(self, names: object) -> None:
        return

    async def offsets(self, wanted: Mapping[TP, int]) -> dict[TP, int]:
        await asyncio.sleep(0)
        self.asked += 1
        if self.lost is not None:
            raise self.lost
        return dict.fromkeys(wanted, len(self.records))

    async def store(self, lines: Mapping[TP, Sequence[Outgoing]]) -> None:
        await asyncio.sleep(0)
        if self.lost is not None:
            raise self.lost
        self.stores += 1
        for each in lines[(TOPIC, 0)]:
            self.put(each.key, each.value, each.timestamp)

    def put(self, key: bytes | None, value: bytes | None, timestamp: float) -> None:
        self.records.append(
            SimpleNamespace(offset=len(self.records), key=key, value=value, timestamp=timestamp)
        )

    def last(self, key: str) -> Any:
        """What the last record of a key holds; KeyError where there is none."""
        values = {record.key.decode(): record.value for record in self.records}
        return None if values[key] is None else json.loads(values[key])

    def registry(self) -> Registry:
        """As another process has it."""
        return Registry(cast(Cluster, self), cast(Producer, self), TOPIC)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    async def read(cluster: object, tp: TP, start: int, stop: int) -> AsyncIterator[Any]:
        for record in log.records[start:stop]:
            await asyncio.sleep(0)
            yield record

    monkeypatch.setattr(_kafka_registry, "read", read)
    return log


async def nothing() -> None:
    return


def demand(registry: Registry, max_age: float = 1000.0) -> Demand:
    return Demand(registry, nothing, max_age)


async def declare(registry: Registry, name: str, *patterns: str, filter: str | None = None) -> None:
    subscription = Subscription(name, patterns, filter=filter)
    now = time.time()

    def change(before: Entry | None) -> Entry:
        if before is None:
            move = Move(1, "end", Ends(now, {}))
            return Entry(Definition.first(subscription, now), move)
        return Entry(before.definition.redeclared(subscription, now), before.move)

    await registry.change(name, change)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.005)


# -- who would get it ---------------------------------------------------------------------------------


async def test_what_no_pattern_means_is_unwanted(log: Log) -> None:
    await declare(log.registry(), "analytics", "social.#", "*.created")
    messages = [Message(topic, 1) for topic in ("social.post", "user.created", "other.topic", "created")]
    assert await demand(log.registry()).unwanted(messages) == messages[2:]


async def test_what_every_filter_leaves_out_is_unwanted_by_the_rules_in_force(log: Log) -> None:
    registry = log.registry()
    await declare(registry, "some", "social.#", filter="n > 3")
    small, large = Message("social.post", 1, headers={"n": 1}), Message("social.post", 1, headers={"n": 5})
    bare = Message("social.post", 1)
    assert await demand(log.registry()).unwanted([small, large, bare]) == [small, bare]
    await declare(registry, "some", "social.#", filter="n < 3")
    assert await demand(log.registry()).unwanted([small, large, bare]) == [large, bare]
    await declare(registry, "all", "social.post")
    assert await demand(log.registry()).unwanted([small, large, bare]) == []


@pytest.mark.parametrize("era", [Era(0.0, ("a",), "n ~~ 3"), Era(0.0, ("a.{b,c}",), None)])
def test_a_rule_that_only_a_later_version_understands_may_take_anything(era: Era) -> None:
    assert Routes([era]).wanted(Message("a", 1))


async def test_what_another_process_declared_a_moment_ago_is_never_overlooked(log: Log) -> None:
    mine, theirs = log.registry(), log.registry()
    view = demand(mine)
    assert len(await view.unwanted([Message("a.0", 1)])) == 1
    for number in range(5):
        await declare(theirs, f"s{number}", f"a.{number}")
        assert await view.unwanted([Message(f"a.{number}", 1)]) == []


async def test_the_registry_is_read_before_a_refusal_and_not_for_what_is_wanted(log: Log) -> None:
    await declare(log.registry(), "s", "a.#")
    view = demand(log.registry())
    await view.unwanted([Message("a.b", 1)])
    before = log.asked
    for _ in range(100):
        assert await view.unwanted([Message("a.b", 1)]) == []
    assert log.asked == before
    assert len(await view.unwanted([Message("b", 1)])) == 1
    assert log.asked == before + 1


async def test_a_view_that_is_too_old_is_not_asked(log: Log) -> None:
    other = log.registry()
    await declare(other, "s", "a")
    view = demand(log.registry(), max_age=0.0)
    assert await view.unwanted([Message("a", 1)]) == []
    await other.remove("s")
    assert len(await view.unwanted([Message("a", 1)])) == 1


async def test_nothing_is_called_unwanted_where_the_registry_cannot_be_read(log: Log) -> None:
    view = demand(log.registry())
    assert len(await view.unwanted([Message("a", 1)])) == 1
    log.lost = ConnectionLost("away")
    with pytest.raises(ConnectionLost):
        await view.unwanted([Message("a", 1)])


async def test_who_asks_while_another_reads_sees_what_was_stored_before_it_asked(log: Log) -> None:
    mine = log.registry()
    await declare(log.registry(), "s", "a")
    first = asyncio.ensure_future(mine.refresh())
    await asyncio.sleep(0)
    await declare(log.registry(), "t", "b")
    await mine.refresh()
    assert mine.entry("t") is not None
    await first


# -- leases -------------------------------------------------------------------------------------------


async def test_a_lease_counts_until_it_ends(log: Log) -> None:
    await log.registry().lease("token", [Era(0.0, ("a",), None)], 0.2, ())
    view = demand(log.registry())
    assert await view.unwanted([Message("a", 1)]) == []
    end = time.monotonic() + 10
    while not await view.unwanted([Message("a", 1)]):
        assert time.monotonic() < end, "it never ends"
        await asyncio.sleep(0.01)


async def test_a_lease_that_goes_on_changes_nothing_and_one_that_comes_back_does(log: Log) -> None:
    theirs, mine = log.registry(), log.registry()
    versions = []
    for seconds in (60.0, 60.0, 0.0, 60.0):
        await theirs.lease("token", [Era(0.0, ("a",), None)], seconds, ())
        await mine.refresh()
        versions.append(mine.version)
    assert [after - before for before, after in itertools.pairwise(versions)] == [0, 0, 1]


async def test_a_lease_that_is_renewed_goes_on(log: Log) -> None:
    theirs = log.registry()
    view = demand(log.registry())
    for _ in range(6):
        await theirs.lease("token", [Era(0.0, ("a",), None)], 0.3, ())
        await asyncio.sleep(0.1)
        assert await view.unwanted([Message("a", 1)]) == []


def test_a_lease_that_lay_there_for_too_long_is_over_when_it_is_read_first() -> None:
    data = Lease.json_of([Era(0.0, ("a",), None)], 60.0)
    now = time.monotonic()
    assert now + 59 < Lease.from_json(data, 0.0, 0.0).until < now + 61
    assert now + 19 < Lease.from_json(data, 0.0, 100.0).until < now + 21
    assert Lease.from_json(data, 0.0, 121.0).until < now + 0.1


async def test_a_clock_that_is_wrong_ends_no_lease_that_was_seen_coming(log: Log) -> None:
    mine = log.registry()
    await mine.refresh()
    value = json.dumps(Lease.json_of([Era(0.0, ("a",), None)], 60.0)).encode()
    log.put(b"here:slow", value, (time.time() - 7200) * 1000)
    assert await demand(mine).unwanted([Message("a", 1)]) == []
    assert len(await demand(log.registry()).unwanted([Message("a", 1)])) == 1


@pytest.mark.parametrize("value", [b"{", b"[]", b'{"for": 1, "seconds": 1}', b'{"for": []}', b"\xff"])
async def test_a_lease_of_somebody_elses_making_is_passed_over(log: Log, value: bytes) -> None:
    log.put(b"here:odd", value, time.time() * 1000)
    await declare(log.registry(), "s", "a")
    mine = log.registry()
    assert await demand(mine).unwanted([Message("a", 1)]) == []
    assert mine.leases == {}


# -- making oneself known -----------------------------------------------------------------------------


async def test_one_lease_holds_all_that_a_client_has_and_goes_with_the_last(log: Log) -> None:
    presence = Presence(log.registry(), "me", nothing)
    owners = [object() for _ in range(20)]
    await asyncio.gather(
        *(presence.enter(owner, Subscription(None, (f"a.{n}",))) for n, owner in enumerate(owners))
    )
    assert log.stores == 2, "those that begin while another writes share the next write"
    assert sorted(patterns for patterns, _ in log.last("here:me")["for"]) == sorted(
        [f"a.{n}"] for n in range(20)
    )
    for owner in owners[1:]:
        await presence.leave(owner)
    assert log.last("here:me")["for"] == [[["a.0"], None]]
    await presence.leave(owners[0])
    assert log.last("here:me") is None
    stores = log.stores
    await presence.leave(owners[0])
    assert log.stores == stores


async def test_a_lease_is_renewed_while_it_is_needed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kafka_presence, "RENEW", 0.01)
    presence = Presence(log.registry(), "me", nothing)
    await presence.enter(self := object(), Subscription(None, ("a",)))
    await eventually(lambda: log.stores > 4, "it is renewed")
    await presence.leave(self)
    stores = log.stores
    await asyncio.sleep(0.05)
    assert (log.stores, log.last("here:me")) == (stores, None)


@pytest.mark.parametrize(
    "error", [SendFailed("too few replicas", {}), AuthenticationFailed("too few replicas")]
)
async def test_a_lease_that_cannot_be_written_is_told_and_tried_again(
    log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(_kafka_presence, "RETRY", 0.01)
    monkeypatch.setattr(_kafka_presence, "RENEW", 0.01)
    presence = Presence(log.registry(), "me", nothing)
    log.lost = error
    await presence.enter(self := object(), Subscription(None, ("a.b",)))
    assert "a.b could not be noted in the registry yet: too few replicas" in caplog.text
    log.lost = None
    await eventually(lambda: log.stores > 0, "it is written at last")
    assert log.last("here:me")["for"] == [[["a.b"], None]]
    await presence.leave(self)


async def test_a_lost_link_is_told_to_who_begins_and_not_to_who_leaves(log: Log) -> None:
    presence = Presence(log.registry(), "me", nothing)
    await presence.enter(first := object(), Subscription(None, ("a",)))
    log.lost = ConnectionLost("away")
    with pytest.raises(ConnectionLost):
        await presence.enter(object(), Subscription(None, ("b",)))
    await presence.leave(first)
    presence.stop()


async def test_leases_of_clients_that_are_long_gone_are_taken_away(log: Log) -> None:
    value = json.dumps(Lease.json_of([Era(0.0, ("a",), None)], 60.0)).encode()
    log.put(b"here:killed", value, (time.time() - 3600) * 1000)
    log.put(b"here:alive", value, (time.time() - 30) * 1000)
    registry = log.registry()
    await registry.refresh()
    presence = Presence(registry, "me", nothing)
    await presence.enter(self := object(), Subscription(None, ("a",)))
    assert log.last("here:killed") is None
    assert log.last("here:alive") is not None
    await presence.leave(self)


# -- what the publisher is told -----------------------------------------------------------------------


def backend(monkeypatch: pytest.MonkeyPatch, log: Log) -> tuple[KafkaBackend, list[Message]]:
    """One that requires subscribers, and what it stores."""
    stored: list[Message] = []

    async def store(messages: Sequence[Message]) -> None:
        stored.extend(messages)

    made = KafkaBackend(Settings(backend="kafka", require_subscribers=True))
    monkeypatch.setattr(made, "_demand", demand(log.registry()))
    monkeypatch.setattr(made, "_store", store)
    return made, stored


def test_a_refusal_names_the_topics_and_what_to_do() -> None:
    topics = ["a", "b", "a", "c", "d", "e"]
    assert unheard("kafka", topics, 9) == (
        "kafka: 6 of 9 messages have no subscription (require_subscribers is set), on 'a', 'b', 'c' and 2 more: run "
        "the handlers first, or `pubsub declare NAME PATTERN` with a pattern that matches"
    )
    assert "on 'a':" in unheard("kafka", ["a"], 1)


async def test_of_a_batch_only_what_nobody_would_get_is_refused(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await declare(log.registry(), "s", "a")
    made, stored = backend(monkeypatch, log)
    messages = [Message("a" if n % 2 else "b", n, id=str(n)) for n in range(4)]
    with pytest.raises(
        SendFailed, match=r"2 of 4 messages have no subscription \(require_subscribers is set\), on 'b': run"
    ) as caught:
        await made.send(messages)
    assert caught.value.fates == {"0": "not stored", "2": "not stored"}
    assert stored == messages[1::2]
    await made.send(messages[1::2])


async def test_what_is_refused_and_what_fails_are_told_together(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await declare(log.registry(), "s", "a")
    made, _ = backend(monkeypatch, log)

    async def store(messages: Sequence[Message]) -> None:
        raise SendFailed("disk full", {messages[0].id: "unknown"})

    monkeypatch.setattr(made, "_store", store)
    with pytest.raises(SendFailed, match=r"no subscription.*disk full") as caught:
        await made.send([Message(topic, 1, id=topic) for topic in ("a", "b")])
    assert caught.value.fates == {"a": "unknown", "b": "not stored"}


async def test_where_it_cannot_be_known_who_would_get_it_nothing_is_stored(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stored = backend(monkeypatch, log)
    log.lost = TopologyConflict("no")
    with pytest.raises(SendFailed, match="cannot be known") as caught:
        await made.send([Message("a", 1, id="x")])
    assert (caught.value.fates, stored) == ({"x": "not stored"}, [])
    log.lost = ConnectionLost("away")
    with pytest.raises(ConnectionLost):
        await made.send([Message("a", 1, id="x")])
    assert stored == []
