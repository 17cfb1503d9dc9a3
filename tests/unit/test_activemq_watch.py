"""What ActiveMQ Classic's advisories say, and which places of a subscription a removal hits."""

from __future__ import annotations

import json

import pytest

from pubsub_facade import Settings
from pubsub_facade.backends._activemq_forms import Artemis, Classic, Durable, Form, Virtual
from pubsub_facade.backends._activemq_record import Record
from pubsub_facade.backends._activemq_watch import COMES, Place, told
from pubsub_facade.subscription import Definition, Subscription

GONE = (
    b'{"DestinationInfo":{"commandId":0,"responseRequired":false,"connectionId":{"value":"ID:vm-1:4"},'
    b'"destination":{"@class":"ActiveMQTopic","string":"pt.a","null":""},"operationType":1,"timeout":0}}'
)  # as 6.1.7 says it


def record(*places: str) -> Record:
    return Record(Definition.first(Subscription("audit", ("#",)), 0), places, ("one",))


def test_an_advisory_names_what_is_gone() -> None:
    assert told(GONE) == (Place("topic", "pt.a"), True)
    assert told(GONE.replace(b"ActiveMQTopic", b"ActiveMQQueue")) == (Place("queue", "pt.a"), True)
    comes = GONE.replace(b'"operationType":1', b'"operationType":0')
    assert told(comes) == (Place("topic", "pt.a"), False)
    assert COMES in comes
    assert COMES not in GONE


@pytest.mark.parametrize(
    "body", [b"", b"1", b"[]", b"{}", b'{"DestinationInfo": 1}', b'{"ConsumerInfo":{}}', b"\xff"]
)
def test_what_is_no_such_advisory_is_passed_over(body: bytes) -> None:
    assert told(body) is None


def hits(form: type[Form], gone: Place, *places: str) -> list[str]:
    return form(Settings(backend="activemq", namespace="social.eu")).hit(gone, "audit", record(*places))


def test_a_removed_topic_hits_the_durable_subscriptions_that_match_it() -> None:
    assert hits(Durable, Place("topic", "social~eu.a.x"), "a.*", "a.x", "b.#", "#") == ["a.*", "a.x", "#"]
    for gone in (
        Place("topic", "social~eu$notice"),
        Place("topic", "social.a.x"),
        Place("topic", "a.x"),
        Place("queue", "social~eu.a.x"),
    ):
        assert hits(Durable, gone, "a.*", "#") == []


def test_of_the_topics_that_keep_wildcards_only_its_own_concerns_a_subscription() -> None:
    assert hits(Durable, Place("topic", "social~eu.a.~audit"), "a.*", "#", "a.x") == ["a.*"]
    assert hits(Durable, Place("topic", "social~eu.a.~other"), "a.*", "#") == []


def test_a_removed_queue_hits_the_place_that_it_is() -> None:
    queue = Place("queue", "Consumer.audit.VirtualTopic.social~eu.a.>")
    assert hits(Virtual, queue, "#", "a.#") == ["a.#"]
    assert hits(Virtual, Place("topic", queue.name), "a.#") == []
    assert hits(Virtual, Place("queue", "Consumer.other.VirtualTopic.social~eu.a.>"), "a.#") == []
    assert hits(Virtual, Place("topic", "VirtualTopic.social~eu.a.x"), "a.#") == []


def test_artemis_tells_its_members_itself() -> None:
    assert not issubclass(Artemis, Classic)
    assert hits(Artemis, Place("queue", "social~eu$sub.audit$#"), "#") == []


def test_a_topic_apart_is_owned_by_its_own_place_whatever_came_first() -> None:
    apart = record("a.*", "#").with_apart("a.x")
    assert apart.places == ("a.*", "#", "a.x")
    assert [apart.owner(topic) for topic in ("a.x", "a.y", "b")] == ["a.x", "a.*", "#"]
    assert apart.with_apart("a.x") is apart


def test_a_topic_that_only_its_own_place_matches_is_not_apart() -> None:
    only = record("a.x", "b.*")
    assert only.with_apart("a.x") is only
    assert record("a.x", "a.*").with_apart("a.x").places == ("a.x", "a.*")


def test_what_is_apart_outlives_writing_merging_and_declaring_again() -> None:
    old = record("a.*")
    apart = old.with_apart("a.x")
    assert Record.from_json(apart.to_json()) == apart
    assert json.loads(old.to_json()).keys() == {"places", "lives", "definition"}
    merged = Record.merged([old, apart])
    assert merged is not None
    assert merged.owner("a.x") == "a.x"
    again = Record.declared(Subscription("audit", ("a.*", "c")), apart, ["a.*", "c"])
    assert (again.apart, again.places) == (("a.x",), ("a.*", "a.x", "c"))


def test_an_ordered_subscription_with_a_topic_apart_is_declared_again() -> None:
    ordered = Subscription("audit", ("a.*",), ordered=True)
    first = Record.declared(ordered, None, ["a.*"])
    apart = first.with_apart("a.x")
    assert Record.declared(ordered, apart, ["a.*"]) is apart
