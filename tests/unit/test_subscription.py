"""Subscriptions, backoff, and the eras by which what waits is judged."""

from __future__ import annotations

import random

import pytest

from pubsub_facade import Backoff, ConfigError, FilterError, Subscription, TopicError
from pubsub_facade.subscription import Definition, Era, patterns_of


def test_backoff_grows_to_its_maximum_with_jitter_below() -> None:
    backoff = Backoff(initial=1, maximum=10, factor=2, jitter=0)
    assert [backoff.delay(attempt) for attempt in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert backoff.delay(10_000) == 10
    random.seed(4)
    delays = [Backoff(8, 8, 1, jitter=0.25).delay(1) for _ in range(1000)]
    assert 6 <= min(delays) < 6.2
    assert 7.8 < max(delays) <= 8
    assert Backoff(0, 0).delay(3) == 0


@pytest.mark.parametrize(
    "arguments",
    [(-1, 1), (2, 1), (1, 1e9), (1, 2, 0.5), (1, 2, 2, -0.1), (1, 2, 2, 1.1), (float("nan"), 1)],
)
def test_a_backoff_that_cannot_work_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="Backoff"):
        Backoff(*arguments)


def test_a_subscription_is_checked_as_a_whole() -> None:
    assert Subscription("analytics", ("a.*",)).label == "analytics"
    assert Subscription(None, ("a.*",)).label == ""
    for name in ("", "a b", "a.", "a.dead", "s" * 101, 7):
        with pytest.raises(ConfigError, match="subscription name"):
            Subscription(name, ("a",))  # type: ignore[arg-type]
    with pytest.raises(TopicError):
        Subscription("s", ())
    with pytest.raises(TopicError):
        Subscription("s", ("a..b",))
    with pytest.raises(FilterError):
        Subscription("s", ("a",), filter="a >")
    for attempts in (0, -1, True, 2.0, "3"):
        with pytest.raises(ConfigError, match="max_attempts"):
            Subscription("s", ("a",), max_attempts=attempts)  # type: ignore[arg-type]


def test_patterns_lose_their_twins_and_keep_their_order() -> None:
    assert patterns_of(["b", "a", "b", "a.#"]) == ("b", "a", "a.#")


def definition() -> Definition:
    first = Definition.first(Subscription("s", ("old.*", "both.*"), filter="level > 3"), 100.0)
    return first.redeclared(Subscription("s", ("new.*", "both.*")), 200.0)


def test_what_waits_is_judged_by_the_rules_it_was_published_under() -> None:
    rules = definition()
    high, low = {"level": 5}, {"level": 1}
    assert rules.accepts("old.1", high, 150.0)
    assert not rules.accepts("old.1", low, 150.0)
    assert not rules.accepts("new.1", high, 150.0)
    assert not rules.accepts("old.1", high, 200.0)
    assert rules.accepts("new.1", low, 200.0)
    assert rules.accepts("both.1", high, 150.0)
    assert rules.accepts("both.1", low, 250.0)
    assert rules.accepts("old.1", high, 50.0), "before the first era: its clock may be behind"
    assert rules.patterns == {"old.*", "both.*", "new.*"}
    assert rules.current.patterns == ("new.*", "both.*")


def test_a_foreign_message_without_a_time_is_taken_if_any_era_takes_it() -> None:
    rules = definition()
    assert rules.accepts("new.1", {}, None)
    assert rules.accepts("old.1", {"level": 5}, None)
    assert not rules.accepts("old.1", {"level": 1}, None)
    assert not rules.accepts("other", {}, None)


def test_declaring_the_same_again_is_the_same_definition() -> None:
    rules = definition()
    assert rules.redeclared(Subscription("s", ("both.*", "new.*")), 300.0) is rules


def test_a_clock_that_went_back_does_not_reorder_eras() -> None:
    rules = definition().redeclared(Subscription("s", ("third",)), 150.0)
    assert [era.since for era in rules.eras] == [100.0, 200.0, 200.0]
    assert rules.accepts("third", {}, 201.0)


def test_only_so_many_eras_are_kept() -> None:
    rules = Definition.first(Subscription("s", ("p-0",)), 0.0)
    for number in range(1, 40):
        rules = rules.redeclared(Subscription("s", (f"p-{number}",)), float(number))
    assert len(rules.eras) == Definition.KEPT
    assert rules.accepts("p-39", {}, 100.0)
    assert rules.accepts(f"p-{40 - Definition.KEPT}", {}, 0.0)


def test_a_definition_survives_as_json() -> None:
    rules = definition()
    assert Definition.from_json(rules.to_json()) == rules
    ordered = Definition.first(Subscription("s", ("a",), ordered=True), 1.5)
    assert Definition.from_json(ordered.to_json()).ordered
    for text in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'{"eras": []}',
        b'{"eras": [{}]}',
        b'{"eras": [7], "ordered": 1}',
    ):
        with pytest.raises(ValueError):
            Definition.from_json(text)


def test_an_era_filters_and_matches() -> None:
    assert Era(0, ("a.#",), "x = 1").accepts("a.b", {"x": 1})
    assert not Era(0, ("a.#",), "x = 1").accepts("a.b", {})
    assert not Era(0, ("a.#",)).accepts("b", {})
