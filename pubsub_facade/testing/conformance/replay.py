"""Contract 14 and 15: what comes later than it was published, and what comes once more."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from pubsub_facade.backends.base import Position
from pubsub_facade.client import AsyncPubSub
from pubsub_facade.errors import MessageError, UnsupportedFeature
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import Bench, Suite, nothing_more, receive


class Replay(Suite):
    """Delay and seek, or a clear refusal."""

    async def test_a_delayed_message_comes_when_its_time_has_come(self, bench: Bench) -> None:
        pubsub = bench.client()
        if not bench.capabilities.delay:
            with pytest.raises(UnsupportedFeature, match="delay") as caught:
                await pubsub.publish("social.post", "later", delay=1)
            assert caught.value.backend == pubsub.settings.backend
            assert pubsub.state == "idle"
            return
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            began = time.monotonic()
            await pubsub.publish("social.post", "later", delay=1, key="k", headers={"n": 1})
            await pubsub.publish_many(
                [Message("social.post", "soon", delay=0.3), Message("social.post", "now")]
            )
            received = []
            for _ in range(3):
                (delivery,) = await receive(stream, 1)
                received.append((delivery.payload, time.monotonic() - began))
            assert [payload for payload, _ in received] == ["now", "soon", "later"]
            assert received[1][1] >= 0.28
            assert 0.95 <= received[2][1] < 15
            assert (delivery.key, dict(delivery.headers), delivery.attempt) == ("k", {"n": 1}, 1)
            await nothing_more(stream)

    async def test_seek_takes_a_time_with_its_zone_the_beginning_or_the_end(self, bench: Bench) -> None:
        pubsub = bench.client()
        if await _is_refused(pubsub, "end"):
            return
        for wrong in (datetime.now(), "middle", 7):  # noqa: DTZ005 - a time without a zone is refused
            with pytest.raises(MessageError):
                await pubsub.seek("analytics", wrong)  # type: ignore[arg-type]
        assert pubsub.state == "idle"

    async def test_seek_to_the_beginning_hands_out_the_history_again(self, bench: Bench) -> None:
        pubsub = bench.client()
        if await _is_refused(pubsub, "beginning"):
            return
        sent = await _publish_and_settle(bench, 10)
        await pubsub.publish("other.topic", "not of this subscription")
        await pubsub.seek("analytics", "beginning")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            received = await receive(stream, 10)
            assert {(d.id, d.payload) for d in received} == {(m.id, m.payload) for m in sent}
            now = await pubsub.publish("social.post", "now")
            assert [d.id for d in await receive(stream, 1)] == [now.id]
            await nothing_more(stream)

    async def test_seek_to_a_time_hands_out_what_was_published_since(self, bench: Bench) -> None:
        pubsub = bench.client()
        if await _is_refused(pubsub, datetime.now(UTC)):
            return
        await _publish_and_settle(bench, 5)
        time.sleep(0.02)  # noqa: ASYNC251 - brokers keep milliseconds
        later = await _publish_and_settle(bench, 5)
        assert later[0].published_at is not None
        await pubsub.seek("analytics", later[0].published_at)
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            assert {d.id for d in await receive(stream, 5)} == {message.id for message in later}
            await nothing_more(stream)

    async def test_seek_to_the_end_leaves_out_what_waits(self, bench: Bench) -> None:
        pubsub = bench.client()
        if await _is_refused(pubsub, "end"):
            return
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.declare("social.#", subscription="notifications")
        waiting = await pubsub.publish_many(Message("social.post", n) for n in range(5))
        await pubsub.seek("analytics", "end")
        now = await pubsub.publish("social.post", "now")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            assert [d.id for d in await receive(stream, 1)] == [now.id]
            await nothing_more(stream)
        async with pubsub.subscribe("social.#", subscription="notifications") as stream:
            assert {d.id for d in await receive(stream, 6)} == {m.id for m in (*waiting, now)}


async def _is_refused(pubsub: AsyncPubSub, to: Position) -> bool:
    """Whether the broker keeps no history; then asserts that seek says so."""
    if pubsub.capabilities.replay:
        return False
    with pytest.raises(UnsupportedFeature, match="replay") as caught:
        await pubsub.seek("analytics", to)
    assert caught.value.backend == pubsub.settings.backend
    assert pubsub.state == "idle"
    return True


async def _publish_and_settle(bench: Bench, count: int) -> list[Message]:
    pubsub = bench.client()
    async with pubsub.subscribe("social.#", subscription="analytics") as stream:
        sent = await pubsub.publish_many(Message("social.post", n) for n in range(count))
        await receive(stream, count)
    await pubsub.close()
    return sent
