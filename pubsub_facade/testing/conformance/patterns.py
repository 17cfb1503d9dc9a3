"""Contract 1 and 2: topics and patterns mean the same on every broker."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pubsub_facade.errors import TopicError
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import Bench, Inbox, Suite, nothing_more, receive
from pubsub_facade.testing.pattern_table import PATTERN_TABLE
from pubsub_facade.topics import PatternSet

PATTERNS = sorted({pattern for pattern, _, _ in PATTERN_TABLE})
TOPICS = sorted({topic for _, topic, _ in PATTERN_TABLE})
BAD_TOPICS: Any = ("", ".", "a.", ".a", "a..b", "a b", "a/b", "a.*", "a.#", "ä", "a\n", "a" * 201, 7, None)
BAD_PATTERNS: Any = ("", "a.", "a..b", "a*", "a.b#", "a.**", "a b", "ä.*", "*" * 201, 7)


class Patterns(Suite):
    """Which topics a pattern means, asked of the broker itself."""

    async def test_each_pattern_gets_exactly_its_topics_also_those_first_published_later(
        self, bench: Bench
    ) -> None:
        """Two rounds: what the first delivers wrongly shows while the second arrives."""
        pubsub = bench.client()
        inboxes: dict[str, Inbox] = {}
        for number, pattern in enumerate(PATTERNS):
            inboxes[pattern] = inbox = Inbox()
            pubsub.subscriber(pattern, subscription=f"pattern-{number}")(inbox)
        await pubsub.start()
        for round in (1, 2):
            await pubsub.publish_many(Message(topic, round) for topic in TOPICS)
            for pattern, inbox in inboxes.items():
                meant = [topic for topic in TOPICS if PatternSet([pattern]).matches(topic)]
                await inbox.until(round * len(meant))
        for pattern, inbox in inboxes.items():
            got = sorted(seen.topic for seen in inbox.seen)
            meant = sorted(2 * [topic for topic in TOPICS if PatternSet([pattern]).matches(topic)])
            assert got == meant, pattern
        for pattern, topic, wanted in PATTERN_TABLE:
            assert (topic in {seen.topic for seen in inboxes[pattern].seen}) is wanted, (pattern, topic)

    async def test_several_patterns_that_match_one_message_give_one_copy(self, bench: Bench) -> None:
        pubsub = bench.client()
        patterns = ("social.post", "social.*", "#", "*.post")
        async with pubsub.subscribe(*patterns, subscription="analytics") as stream:
            sent = await pubsub.publish_many([Message("social.post", 1), Message("chat", 2)])
            assert {d.id for d in await receive(stream, 2)} == {m.id for m in sent}
            await nothing_more(stream)

    async def test_topics_that_differ_by_case_or_sign_are_different_topics(self, bench: Bench) -> None:
        pubsub = bench.client()
        topics = ["a.b", "A.b", "a-b", "a_b", "a.b-c", "a.b_c", "ab", "a.b.c"]
        async with AsyncExitStack() as stack:
            streams = {
                topic: await stack.enter_async_context(pubsub.subscribe(topic, subscription=f"s{number}"))
                for number, topic in enumerate(topics)
            }
            await pubsub.publish_many(Message(topic, topic) for topic in topics)
            for topic, stream in streams.items():
                assert [(d.topic, d.payload) for d in await receive(stream, 1)] == [(topic, topic)]
            await asyncio.gather(*(nothing_more(stream) for stream in streams.values()))

    async def test_the_longest_names_work(self, bench: Bench) -> None:
        """A topic of 200 characters, a subscription of 100, a namespace of 60, and dead letters for them."""
        pubsub = bench.client(namespace=bench.namespace + "n" * (60 - len(bench.namespace)))
        topic = ".".join(["w" * 39] * 4) + "." + "x" * 40
        assert len(topic) == 200
        name = "s" * 100
        async with pubsub.subscribe("#", subscription=name) as stream:
            sent = await pubsub.publish(topic, "long", key="k")
            (delivery,) = await receive(stream, 1, ack=False)
            assert (delivery.id, delivery.topic, delivery.subscription) == (sent.id, topic, name)
            await delivery.retry(0)
            (again,) = await receive(stream, 1, ack=False)
            assert (again.topic, again.attempt) == (topic, 2)
            await again.reject("too long a story")
        letters = [letter async for letter in pubsub.dead_letters(name)]
        assert [(letter.id, letter.topic) for letter in letters] == [(sent.id, topic)]

    async def test_a_bad_topic_is_refused_before_anything_is_sent(self, bench: Bench) -> None:
        pubsub = bench.client()
        for topic in BAD_TOPICS:
            with pytest.raises(TopicError, match=re.escape(repr(topic)[:20])):
                await pubsub.publish_many([Message("fine", 1), Message(topic, 2)])
        assert pubsub.state == "idle"

    async def test_a_bad_pattern_is_refused_before_anything_is_declared(self, bench: Bench) -> None:
        pubsub = bench.client()
        for pattern in BAD_PATTERNS:
            with pytest.raises(TopicError, match=re.escape(repr(pattern)[:20])):
                pubsub.subscribe(pattern, subscription="analytics")
            with pytest.raises(TopicError):
                await pubsub.declare("fine", pattern, subscription="analytics")
        assert pubsub.state == "idle"
