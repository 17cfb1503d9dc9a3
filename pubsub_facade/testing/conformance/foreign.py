"""Contract 17: what a raw client put on the broker is delivered, and is no crash."""

from __future__ import annotations

import pytest

from pubsub_facade.testing.conformance._suite import Bench, Inbox, SendForeign, Suite, nothing_more, receive


class Foreign(Suite):
    """Messages with no id, no content type and odd headers. Needs the fixture ``send_foreign``."""

    async def test_a_foreign_message_is_delivered(
        self, bench: Bench, send_foreign: SendForeign | None
    ) -> None:
        send = _hook(bench, send_foreign)
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await send(bench.settings(), "social.post", b"\xff raw", {"lang": "en"})
            (delivery,) = await receive(stream, 1)
            assert (delivery.topic, delivery.body, delivery.payload) == (
                "social.post",
                b"\xff raw",
                b"\xff raw",
            )
            assert delivery.headers["lang"] == "en"
            assert (delivery.attempt, delivery.key) == (1, None)
            assert delivery.subscription == "analytics"
            ours = await pubsub.publish("social.post", "ours")
            assert [d.id for d in await receive(stream, 1)] == [ours.id]

    async def test_foreign_messages_are_retried_and_die_each_for_itself(
        self, bench: Bench, send_foreign: SendForeign | None
    ) -> None:
        send = _hook(bench, send_foreign)
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics", window=2) as stream:
            for body in (b"one", b"two"):
                await send(bench.settings(), "social.post", body, {})
            for delivery in await receive(stream, 2, ack=False):
                await delivery.retry(0)
            again = await receive(stream, 2, ack=False)
            assert {(d.body, d.attempt, d.topic) for d in again} == {
                (b"one", 2, "social.post"),
                (b"two", 2, "social.post"),
            }
            for delivery in again:
                await delivery.reject("foreign")
            letters = await bench.until_dead("analytics", 2)
            assert {letter.body for letter in letters} == {b"one", b"two"}
            assert len({letter.id for letter in letters}) == 2, "they cannot be told apart"
            chosen = next(letter for letter in letters if letter.body == b"one")
            assert await pubsub.dead_letters("analytics").replay([chosen.id]) == 1
            assert [d.body for d in await receive(stream, 1)] == [b"one"]
            assert await pubsub.dead_letters("analytics").purge() == 1
            await nothing_more(stream)

    async def test_a_foreign_message_that_lies_in_our_headers_is_no_crash(
        self, bench: Bench, send_foreign: SendForeign | None
    ) -> None:
        send = _hook(bench, send_foreign)
        inbox = Inbox()
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics")(inbox)
        await pubsub.start()
        lies = {
            "pubsub-attempt": "minus one",
            "pubsub-failure": "{not json",
            "pubsub-types": "[1, 2",
            "pubsub-published": "1e999",
            "pubsub-due": "never",
            "pubsub-unknown": "x",
            "pubsub-content-type": "application/json",
        }
        await send(bench.settings(), "social.post", b"{}", lies)
        await inbox.until(1)
        assert inbox.seen[0].payload in ({}, b"{}")
        assert inbox.seen[0].attempt == 1
        after = await pubsub.publish("social.post", "ours")
        await inbox.until_ids([after.id])


def _hook(bench: Bench, send_foreign: SendForeign | None) -> SendForeign:
    if not bench.capabilities.shared:
        pytest.skip("capability shared is false")
    if send_foreign is None:
        pytest.skip("the fixture send_foreign is not given")
    return send_foreign
