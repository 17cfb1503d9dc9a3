"""Contract 9: what a dead letter holds, and what can be done with it."""

from __future__ import annotations

import asyncio
import time

import pytest

from pubsub_facade.errors import PubSubError
from pubsub_facade.message import Delivery, HeaderValue, Message
from pubsub_facade.testing.conformance._suite import (
    SOON,
    Bench,
    Inbox,
    Suite,
    nothing_more,
    receive,
    until,
)


class DeadLettering(Suite):
    """Listed, counted, replayed to one subscription, edited, purged."""

    async def test_a_dead_letter_is_the_original_message_and_why_it_failed(self, bench: Bench) -> None:
        def act(delivery: Delivery) -> None:
            raise ValueError(f"attempt {delivery.attempt}: größe\n: {'x' * 3000}")

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", max_attempts=2, backoff=SOON)(Inbox(act))
        await pubsub.start()
        began = time.time()
        headers: dict[str, HeaderValue] = {
            "text": "größe\n:",
            "int": 7,
            "float": 0.1,
            "bool": True,
            "empty": "",
        }
        body = bytes(range(256))
        sent = await pubsub.publish("social.post.created", body, key="schlüssel", headers=headers)
        (letter,) = await bench.until_dead("analytics", 1)
        assert (letter.id, letter.topic, letter.key) == (sent.id, "social.post.created", "schlüssel")
        assert (letter.body, letter.payload, letter.content_type) == (body, body, sent.content_type)
        assert dict(letter.headers) == headers
        assert {name: type(value) for name, value in letter.headers.items()} == {
            name: type(value) for name, value in headers.items()
        }
        assert letter.published_at == sent.published_at
        failure = letter.failure
        assert failure is not None
        assert (failure.subscription, failure.error_type, failure.attempts) == ("analytics", "ValueError", 2)
        assert failure.error.startswith("attempt 2: größe\n: xxx")
        assert len(failure.error) == 2000
        assert began <= failure.first_at < failure.last_at <= time.time()

    async def test_an_undecodable_payload_is_a_dead_letter_at_once(self, bench: Bench) -> None:
        handled: list[int] = []

        async def handle(payload: int) -> None:
            handled.append(payload)

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics")(handle)
        await pubsub.start()
        await pubsub.publish_many(
            Message("social.post", payload, id=f"id-{number}")
            for number, payload in enumerate([1, "no number", 2, b"\xff{", {"a": 1}, None, 3])
        )
        letters = await bench.until_dead("analytics", 4)
        await until(lambda: len(handled) == 3, "the good ones handled")
        assert sorted(handled) == [1, 2, 3]
        assert {letter.id for letter in letters} == {"id-1", "id-3", "id-4", "id-5"}
        assert {(f.error_type, f.attempts) for letter in letters if (f := letter.failure)} == {
            ("DecodeError", 1)
        }
        assert {letter.id: letter.payload for letter in letters}["id-3"] == b"\xff{"

    async def test_dead_letters_are_listed_in_order_and_stay(self, bench: Bench) -> None:
        pubsub = bench.client()
        await _kill(bench, "analytics", range(7))
        letters = pubsub.dead_letters("analytics")
        for _ in range(2):
            assert [letter.payload async for letter in letters] == list(range(7))
            assert await letters.count() == 7
        assert (await pubsub.backlog("analytics")).dead in (7, None)
        async for letter in letters:
            assert letter.payload == 0
            break
        assert await letters.count() == 7

    async def test_dead_letters_belong_to_their_subscription_only(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="notifications")
        await _kill(bench, "analytics", range(3))
        assert await pubsub.dead_letters("notifications").count() == 0
        assert await pubsub.dead_letters("never-declared").count() == 0
        async with pubsub.subscribe("social.#", subscription="notifications") as stream:
            assert sorted(d.payload for d in await receive(stream, 3)) == [0, 1, 2]

    async def test_a_replay_goes_to_that_subscription_only(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="notifications")
        sent = await _kill(bench, "analytics", range(5))
        ids = [message.id for message in sent]
        async with pubsub.subscribe("social.#", subscription="notifications") as others:
            await receive(others, 5)
            letters = pubsub.dead_letters("analytics")
            assert await letters.replay(ids=[ids[1], ids[3], "no such id"]) == 2
            assert [letter.id async for letter in letters] == [ids[0], ids[2], ids[4]]
            async with pubsub.subscribe("social.#", subscription="analytics") as stream:
                again = await receive(stream, 2)
                assert {(d.id, d.payload, d.attempt) for d in again} == {(ids[1], 1, 1), (ids[3], 3, 1)}
                assert {(d.topic, d.key) for d in again} == {("social.post", "1"), ("social.post", "3")}
                assert await letters.replay() == 3
                assert {d.id for d in await receive(stream, 3)} == {ids[0], ids[2], ids[4]}
                assert await letters.count() == 0
                assert await letters.replay() == 0
                await nothing_more(stream)
            await nothing_more(others)

    async def test_a_replayed_message_can_die_again(self, bench: Bench) -> None:
        pubsub = bench.client()
        (sent,) = await _kill(bench, "analytics", ["poison"])
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.dead_letters("analytics").replay()
            (again,) = await receive(stream, 1, ack=False)
            await again.reject("still bad")
        (letter,) = await bench.until_dead("analytics", 1)
        assert letter.id == sent.id
        assert letter.failure is not None
        assert (letter.failure.error, letter.failure.attempts) == ("still bad", 1)

    async def test_a_dead_letter_is_edited_and_replayed(self, bench: Bench) -> None:
        pubsub = bench.client()
        sent = await _kill(bench, "analytics", ["bad", "worse"])
        letters = pubsub.dead_letters("analytics")
        await letters.edit(sent[0].id, {"now": "good"}, headers={"edited": True})
        with pytest.raises(PubSubError, match="no-such-id"):
            await letters.edit("no-such-id", "x")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            (again,) = await receive(stream, 1)
            assert (again.id, again.key, again.payload) == (sent[0].id, sent[0].key, {"now": "good"})
            assert dict(again.headers) == {"edited": True}
            await nothing_more(stream)
        assert [letter.id async for letter in letters] == [sent[1].id]

    async def test_dead_letters_are_purged_by_id_and_all(self, bench: Bench) -> None:
        pubsub = bench.client()
        ids = [message.id for message in await _kill(bench, "analytics", range(5))]
        letters = pubsub.dead_letters("analytics")
        assert await letters.purge([ids[0], ids[3], "no such id"]) == 2
        assert [letter.id async for letter in letters] == [ids[1], ids[2], ids[4]]
        assert await letters.purge() == 3
        assert await letters.purge() == 0
        assert [letter async for letter in letters] == []
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await nothing_more(stream)

    async def test_new_dead_letters_can_follow_a_purge(self, bench: Bench) -> None:
        await _kill(bench, "analytics", range(3))
        assert await bench.client().dead_letters("analytics").purge() == 3
        (sent,) = await _kill(bench, "analytics", ["later"])
        (letter,) = await bench.until_dead("analytics", 1)
        assert letter.id == sent.id

    async def test_several_hundred_dead_letters_are_listed_and_replayed(self, bench: Bench) -> None:
        pubsub = bench.client()
        sent = await _kill(bench, "analytics", range(250))
        letters = pubsub.dead_letters("analytics")
        assert await letters.count() == 250
        assert await letters.replay() == 250
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            assert {d.id for d in await receive(stream, 250)} == {message.id for message in sent}


async def _kill(bench: Bench, subscription: str, payloads: range | list[str]) -> list[Message]:
    """Publish messages to ``social.post`` and make each a dead letter of ``subscription``, in order."""
    pubsub = bench.client()
    async with pubsub.subscribe("social.#", subscription=subscription, window=500) as stream:
        sent = await pubsub.publish_many(
            Message("social.post", payload, key=str(payload)) for payload in payloads
        )
        place = {message.id: number for number, message in enumerate(sent)}
        received = await receive(stream, len(sent), ack=False)
        received.sort(key=lambda delivery: place[delivery.id])
        await asyncio.gather(*(delivery.reject("killed for the case") for delivery in received))
    return sent
