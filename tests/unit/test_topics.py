"""Topics and patterns mean one thing (contract 1 and 2), however they are asked."""

from __future__ import annotations

import itertools
import pickle
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_facade import topics
from pubsub_facade.errors import TopicError
from pubsub_facade.testing.pattern_table import PATTERN_TABLE
from pubsub_facade.topics import (
    REMEMBERED,
    PatternSet,
    TopicRouter,
    check_pattern,
    check_topic,
    covers,
    jms_destination,
    matches,
    to_regex,
)

WORDS = ("a", "b", "ab", "a-_9")
topic_words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7)
topic_texts = topic_words.map(".".join)
patterns = st.lists(st.sampled_from((*WORDS, "*", "#", "#")), min_size=1, max_size=7).map(".".join)

SHORT_PATTERNS = [
    ".".join(words) for n in (1, 2, 3) for words in itertools.product(("a", "b", "*", "#"), repeat=n)
]
SHORT_TOPICS = [".".join(words) for n in range(1, 6) for words in itertools.product("abc", repeat=n)]


def means(pattern: list[str], topic: list[str]) -> bool:
    """The contract, word by word: what everything else is held against."""
    if not pattern:
        return not topic
    if pattern[0] == "#":
        return any(means(pattern[1:], topic[taken:]) for taken in range(len(topic) + 1))
    return bool(topic) and pattern[0] in ("*", topic[0]) and means(pattern[1:], topic[1:])


def routed(pattern: str, topic: str) -> bool:
    router: TopicRouter[int] = TopicRouter()
    router.add(pattern, 1)
    return router.match(topic) == (1,)


WAYS: dict[str, Callable[[str, str], bool]] = {
    "matches": matches,
    "PatternSet": lambda pattern, topic: PatternSet([pattern]).matches(topic),
    "TopicRouter": routed,
    "to_regex": lambda pattern, topic: re.fullmatch(to_regex(pattern), topic) is not None,
    "reference": lambda pattern, topic: means(pattern.split("."), topic.split(".")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("pattern", "topic", "expected"), PATTERN_TABLE)
def test_a_pattern_means_what_the_table_says(way: str, pattern: str, topic: str, expected: bool) -> None:
    assert WAYS[way](check_pattern(pattern), check_topic(topic)) is expected


def test_the_table_is_worth_publishing() -> None:
    assert len(PATTERN_TABLE) == len({row[:2] for row in PATTERN_TABLE}) >= 40


@settings(max_examples=1000, deadline=None)
@given(patterns, topic_texts)
def test_all_ways_to_match_agree(pattern: str, topic: str) -> None:
    assert {name: way(pattern, topic) for name, way in WAYS.items()} == dict.fromkeys(
        WAYS, means(pattern.split("."), topic.split("."))
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(patterns, max_size=6), st.lists(topic_texts, min_size=1, max_size=6))
def test_a_pattern_set_matches_what_any_of_its_patterns_matches(chosen: list[str], asked: list[str]) -> None:
    compiled = PatternSet(chosen)
    for topic in asked + asked:
        assert compiled.matches(topic) is any(matches(pattern, topic) for pattern in chosen)


# --- grammar ---


@pytest.mark.parametrize("topic", ["a", "A9", "a.b", "a-b_c.0.-._", "x" * 200, ".".join("a" * 100)])
def test_a_valid_topic_is_returned(topic: str) -> None:
    assert check_topic(topic) is topic
    assert check_topic(topic) is topic
    assert check_pattern(topic) is topic


@pytest.mark.parametrize("pattern", ["*", "#", "*.#", "a.*.b.#.c", "#.#", ".".join("#" * 100)])
def test_a_valid_pattern_is_returned_and_is_no_topic(pattern: str) -> None:
    assert check_pattern(pattern) is pattern
    with pytest.raises(TopicError, match="wildcards belong in patterns"):
        check_topic(pattern)


@pytest.mark.parametrize("check", [check_topic, check_pattern])
@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("", "is empty"),
        ("x" * 201, "has 201 characters: give at most 200"),
        (".a", "empty word at position 0"),
        ("a.", "empty word at position 2 .word 2."),
        ("ab..c", "empty word at position 3 .word 2."),
        ("ab.c d", "has ' ' at position 4"),
        ("ab\n", r"has '\\n' at position 2"),
        ("a.b/c", "has '/' at position 3"),
        ("é", "has 'é' at position 0"),
        ("a.٣", "has '٣' at position 2"),
        ("a.b*", r"has '\*' at position 3"),
        ("a.##", "has '#' at position 2"),
        (5, "5 is of type int: give a str"),
        (None, "None is of type NoneType"),
        (b"a", "is of type bytes"),
        (["a"], "is of type list"),
    ],
)
def test_what_is_outside_the_grammar_is_refused_with_the_reason(
    check: Callable[[object], str], value: object, wrong: str
) -> None:
    for _ in range(2):
        with pytest.raises(TopicError, match=wrong) as caught:
            check(value)
        assert repr(value)[:40] in str(caught.value)
        assert len(str(caught.value)) < 300


@given(st.text(max_size=8), st.sampled_from((check_topic, check_pattern)))
def test_any_text_is_valid_or_a_topic_error(text: str, check: Callable[[str], str]) -> None:
    words = text.split(".")
    extra = r"|[*#]" if check is check_pattern else ""
    if all(re.fullmatch(f"[A-Za-z0-9_-]+{extra}", word) for word in words):
        assert check(text) == text
    else:
        with pytest.raises(TopicError, match=re.escape(repr(text)[:40])):
            check(text)


def test_the_cache_of_good_topics_is_bounded() -> None:
    for number in range(2 * REMEMBERED + 10):
        check_topic(f"t{number}")
    assert len(topics._good_topics) <= REMEMBERED


# --- PatternSet and TopicRouter ---


def test_a_pattern_set_is_a_set_of_patterns() -> None:
    one = PatternSet(["a.*", "b", "a.*"])
    assert list(one) == ["a.*", "b"]
    assert len(one) == 2
    assert "a.*" in one
    assert "a.c" not in one
    assert 5 not in one
    same = PatternSet(["b", "a.*"])
    assert one == same
    assert hash(one) == hash(same)
    assert one != PatternSet(["b"])
    assert one != ["a.*", "b"]
    assert pickle.loads(pickle.dumps(one)) == one
    assert not PatternSet([]).matches("a")


def test_a_pattern_set_refuses_what_is_no_list_of_patterns() -> None:
    with pytest.raises(TopicError, match="give a list"):
        PatternSet("a.b")
    with pytest.raises(TopicError, match="position 1"):
        PatternSet(["a", "b c"])


def test_the_memories_of_asked_topics_are_bounded() -> None:
    compiled = PatternSet(["t.#"])
    router: TopicRouter[str] = TopicRouter()
    router.add("t.#", "x")
    for number in range(2 * REMEMBERED + 10):
        assert compiled.matches(f"t.{number}")
        assert router.match(f"t.{number}") == ("x",)
    assert len(compiled._known) <= REMEMBERED
    assert len(router._known) <= REMEMBERED


def test_a_router_finds_each_value_once() -> None:
    router: TopicRouter[str] = TopicRouter()
    router.add("a.#", "x")
    router.add("a.*", "x")
    router.add("a.b", "y")
    router.add("#", "z")
    assert sorted(router.match("a.b")) == ["x", "y", "z"]
    assert sorted(router.match("a")) == ["x", "z"]
    assert router.match("b") == ("z",)


def test_a_router_forgets_what_it_answered_when_it_changes() -> None:
    router: TopicRouter[str] = TopicRouter()
    assert router.match("a.b") == ()
    router.add("a.*", "x")
    assert router.match("a.b") == ("x",)
    router.add("a.b", "x")
    router.remove("a.*", "x")
    assert router.match("a.b") == ("x",)
    assert router.match("a.c") == ()
    router.remove("a.b", "x")
    assert router.match("a.b") == ()
    assert len(router) == 0
    assert router._root.children == {}
    with pytest.raises(KeyError):
        router.remove("a.b", "x")
    with pytest.raises(TopicError):
        router.add("a..b", "x")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), patterns, st.integers(0, 3)), max_size=12),
    st.lists(topic_texts, min_size=1, max_size=4),
)
def test_a_router_is_a_set_of_patterns_and_values(
    changes: list[tuple[bool, str, int]], asked: list[str]
) -> None:
    router: TopicRouter[int] = TopicRouter()
    model: set[tuple[str, int]] = set()
    for add, pattern, value in changes:
        if add:
            router.add(pattern, value)
            model.add((pattern, value))
        elif model:
            gone = min(model)
            router.remove(*gone)
            model.remove(gone)
        assert set(router) == model
        for topic in asked:
            found = router.match(topic)
            assert len(found) == len(set(found))
            assert set(found) == {value for pattern, value in model if matches(pattern, topic)}


# --- covers and destinations ---


def test_covers_is_right_for_all_short_patterns() -> None:
    meant = {
        pattern: frozenset(topic for topic in SHORT_TOPICS if matches(pattern, topic))
        for pattern in SHORT_PATTERNS
    }
    for wider, narrower in itertools.product(SHORT_PATTERNS, repeat=2):
        assert covers(wider, narrower) is (meant[narrower] <= meant[wider]), (wider, narrower)


@settings(max_examples=500, deadline=None)
@given(patterns, patterns, topic_texts)
def test_covers_is_sound(wider: str, narrower: str, topic: str) -> None:
    if covers(wider, narrower) and matches(narrower, topic):
        assert matches(wider, topic)
    assert covers(narrower, narrower)
    assert covers("#", narrower)


@pytest.mark.parametrize(
    ("pattern", "destination", "exact"),
    [
        ("a.b", "a.b", True),
        ("a.*.c", "a.*.c", True),
        ("*", "*", True),
        ("a.#", "a.>", True),
        ("a.#.#", "a.>", True),
        ("#", ">", True),
        ("#.z", ">", False),
        ("a.#.z", "a.>", False),
        ("a.*.#", "a.*.>", False),
        ("a.#.*", "a.*.>", False),
        ("*.b.#.c.*", "*.b.>", False),
    ],
)
def test_classic_is_asked_for_the_narrowest_that_covers(pattern: str, destination: str, exact: bool) -> None:
    assert jms_destination(pattern) == (destination, exact)


@settings(max_examples=300, deadline=None)
@given(patterns, topic_texts)
def test_what_classic_sends_covers_the_pattern(pattern: str, topic: str) -> None:
    destination, exact = jms_destination(pattern)
    sent = matches(re.sub(r"(^|\.)>$", r"\1#", destination), topic)
    assert sent or not matches(pattern, topic)
    if exact:
        assert sent is matches(pattern, topic)


# --- time ---


@pytest.mark.parametrize("way", [way for way in WAYS if way != "reference"])
@pytest.mark.parametrize(
    "pattern",
    [
        ".".join("#" * 100),
        ".".join(["#", "a"] * 49 + ["#", "b"]),
        ".".join(["#", "*"] * 49 + ["#", "b"]),
        ".".join(["#", "a", "*"] * 33 + ["b"]),
        ".".join(["a", "#"] * 49 + ["b"]),
    ],
)
def test_many_wildcards_take_no_exponential_time(way: str, pattern: str) -> None:
    start = time.perf_counter()
    for topic in (".".join("a" * 100), ".".join("a" * 99) + ".c", "a" * 200):
        WAYS[way](pattern, topic)
    assert time.perf_counter() - start < 2


def test_covers_gives_up_rather_than_take_long() -> None:
    start = time.perf_counter()
    hard = ".".join(["#", "a", *"*" * 60])
    assert covers(hard, hard)
    assert not covers(hard, ".".join(["#", "b", *"*" * 60]))
    assert not covers(hard, ".".join(["#", "a", *"*" * 59, "#", "a"]))
    assert time.perf_counter() - start < 5
