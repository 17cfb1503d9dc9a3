"""Contract 7 and 8: what a handler's error means, how often it is tried again, and when."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from pubsub_facade.message import Delivery, Message, Reject, Retry
from pubsub_facade.subscription import Backoff
from pubsub_facade.testing.conformance._suite import SOON, Bench, Inbox, Suite, nothing_more, receive


class Unprintable(Exception):
    """An error that cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


ERRORS: dict[str, BaseException] = {
    "ValueError": ValueError("bad"),
    "no text": ValueError(),
    "unprintable": Unprintable(),
    "surrogate": ValueError("\udcff"),
    "long text": ValueError("x" * 100_000),
    "TimeoutError": TimeoutError(),
    "StopIteration": StopIteration(),
    "StopAsyncIteration": StopAsyncIteration(),
    "ExceptionGroup": ExceptionGroup("several", [ValueError("one"), KeyError("two")]),
    "CancelledError": asyncio.CancelledError(),
    "GeneratorExit": GeneratorExit(),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "BaseException": BaseException("the root"),
    "Retry": Retry(),
    "Retry now": Retry(0),
}


class Retrying(Suite):
    """A failed message comes again by the policy, and holds up nobody."""

    async def test_a_message_is_tried_max_attempts_times_and_then_is_a_dead_letter(
        self, bench: Bench
    ) -> None:
        inbox = Inbox(_fail)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", max_attempts=3, backoff=SOON)(inbox)
        await pubsub.start()
        sent = await pubsub.publish("social.post", "poison")
        await inbox.until(3)
        await bench.until_dead("analytics", 1)
        assert [(seen.id, seen.attempt) for seen in inbox.seen] == [(sent.id, 1), (sent.id, 2), (sent.id, 3)]
        assert [seen.redelivered for seen in inbox.seen] == [False, True, True]

    async def test_a_message_that_succeeds_in_the_end_is_no_dead_letter(self, bench: Bench) -> None:
        def act(delivery: Delivery) -> None:
            if delivery.attempt < 3:
                raise ValueError("not yet")

        inbox = Inbox(act)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", max_attempts=3, backoff=SOON)(inbox)
        await pubsub.start()
        await pubsub.publish("social.post", {"a": 1}, key="k", headers={"n": 1, "f": 1.5, "b": True})
        await inbox.until(3)
        first, *others = inbox.seen
        for again in others:
            assert (again.payload, again.key, again.headers) == (first.payload, first.key, first.headers)
        await pubsub.close()
        assert await bench.client().dead_letters("analytics").count() == 0
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            await nothing_more(stream)

    async def test_each_attempt_waits_longer_by_the_backoff(self, bench: Bench) -> None:
        inbox = Inbox(_fail)
        backoff = Backoff(initial=0.2, factor=3, maximum=0.5, jitter=0)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", max_attempts=4, backoff=backoff)(inbox)
        await pubsub.start()
        await pubsub.publish("social.post", "poison")
        seen = await inbox.until(4)
        gaps = [later.at - earlier.at for earlier, later in pairwise(seen)]
        for gap, delay in zip(gaps, (0.2, 0.5, 0.5), strict=True):
            assert 0.95 * delay <= gap <= delay + 5, gaps

    async def test_a_waiting_message_does_not_hold_up_others(self, bench: Bench) -> None:
        def act(delivery: Delivery) -> None:
            if delivery.payload == "poison":
                raise ValueError("again in a minute")

        inbox = Inbox(act)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", backoff=Backoff(60, 60))(inbox)
        await pubsub.start()
        began = time.monotonic()
        await pubsub.publish_many(Message("social.post", "poison", key="a") for _ in range(150))
        good = await pubsub.publish_many(Message("social.post", n, key="a") for n in range(50))
        await inbox.until_ids(message.id for message in good)
        assert time.monotonic() - began < 50
        assert len(inbox.seen) == 200

    @pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
    async def test_whatever_a_handler_raises_is_its_message_s_failure_only(
        self, bench: Bench, ordered: bool
    ) -> None:
        def act(delivery: Delivery) -> None:
            if delivery.attempt == 1:
                raise ERRORS[delivery.payload]

        inbox = Inbox(act)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", backoff=SOON, ordered=ordered)(inbox)
        await pubsub.start()
        await pubsub.publish_many(Message("social.post", kind, key=kind) for kind in ERRORS)
        await inbox.until(2 * len(ERRORS))
        assert sorted(inbox.payloads) == sorted([*ERRORS, *ERRORS])
        after = await pubsub.publish("social.post", "ValueError")
        await inbox.until_ids([after.id])

    async def test_a_handler_that_is_cancelled_from_within_fails_its_message_only(self, bench: Bench) -> None:
        inbox = Inbox()

        async def handle(delivery: Delivery) -> None:
            inbox.note(delivery)
            if delivery.attempt == 1:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", backoff=SOON)(handle)
        await pubsub.start()
        await pubsub.publish_many(Message("social.post", n) for n in range(3))
        await inbox.until(6)
        assert sorted((seen.payload, seen.attempt) for seen in inbox.seen) == [
            (number, attempt) for number in range(3) for attempt in (1, 2)
        ]

    async def test_retry_after_is_the_handler_s_own_delay(self, bench: Bench) -> None:
        def act(delivery: Delivery) -> None:
            if delivery.attempt == 1:
                raise Retry(after=0.3)
            if delivery.attempt == 2:
                raise Retry(after=0)

        inbox = Inbox(act)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", backoff=Backoff(60, 60))(inbox)
        await pubsub.start()
        await pubsub.publish("social.post", "hello")
        seen = await inbox.until(3)
        assert [each.attempt for each in seen] == [1, 2, 3]
        assert 0.28 <= seen[1].at - seen[0].at < 20
        assert seen[2].at - seen[1].at < 20

    async def test_reject_makes_a_dead_letter_at_once(self, bench: Bench) -> None:
        def act(delivery: Delivery) -> None:
            raise Reject("not for us: größe\nline 2")

        inbox = Inbox(act)
        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics")(inbox)
        await pubsub.start()
        await pubsub.publish("social.post", "hello")
        (letter,) = await bench.until_dead("analytics", 1)
        assert letter.failure is not None
        assert (letter.failure.error_type, letter.failure.error) == ("Reject", "not for us: größe\nline 2")
        assert len(inbox.seen) == 1

    async def test_a_stream_s_owner_retries_and_rejects_by_hand(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics", max_attempts=3) as stream:
            sent = await pubsub.publish("social.post", "hello")
            (first,) = await receive(stream, 1, ack=False)
            began = time.monotonic()
            await first.retry(after=0.3)
            (second,) = await receive(stream, 1, ack=False)
            assert time.monotonic() - began >= 0.28
            assert (second.id, second.attempt, second.payload) == (sent.id, 2, "hello")
            await second.reject("enough")
            await second.retry()  # settled already: does nothing
            await nothing_more(stream)
        (letter,) = [letter async for letter in pubsub.dead_letters("analytics")]
        assert letter.failure is not None
        assert (letter.failure.error, letter.failure.attempts) == ("enough", 2)

    async def test_a_handler_may_settle_by_hand_and_that_counts(self, bench: Bench) -> None:
        inbox = Inbox()

        async def handle(delivery: Delivery) -> None:
            inbox.note(delivery)
            if delivery.payload == "ack":
                await delivery.ack()
                raise ValueError("too late to fail")
            if delivery.payload == "reject":
                await delivery.reject("by hand")
            if delivery.payload == "retry" and delivery.attempt == 1:
                await delivery.retry(0)
            if delivery.payload == "release" and inbox.payloads.count("release") == 1:
                await delivery.release()

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics")(handle)
        await pubsub.start()
        await pubsub.publish_many(
            Message("social.post", kind) for kind in ("ack", "reject", "retry", "release")
        )
        await inbox.until(6)
        (letter,) = await bench.until_dead("analytics", 1)
        assert letter.payload == "reject"
        began = time.monotonic()
        await pubsub.close(grace=20)
        assert time.monotonic() - began < 15, "something in hand was not accounted for"
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            await nothing_more(stream)
        assert sorted((seen.payload, seen.attempt) for seen in inbox.seen) == [
            ("ack", 1),
            ("reject", 1),
            ("release", 1),
            ("release", 1),
            ("retry", 1),
            ("retry", 2),
        ]

    async def test_an_attempt_that_waits_outlives_its_member(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            sent = await pubsub.publish("social.post", "hello")
            (first,) = await receive(stream, 1, ack=False)
            await first.retry(after=0.5)
        await pubsub.close()
        async with bench.client().subscribe("social.#", subscription="analytics") as stream:
            (again,) = await receive(stream, 1)
            assert again.id == sent.id
            assert again.attempt == 2 or (not bench.capabilities.stored_attempts and again.attempt == 1)
            await nothing_more(stream)

    async def test_an_ephemeral_subscription_retries_too_and_then_drops(self, bench: Bench) -> None:
        inbox = Inbox(_fail)
        pubsub = bench.client()
        pubsub.subscriber("social.#", max_attempts=3, backoff=SOON)(inbox)
        await pubsub.start()
        await pubsub.publish("social.post", "poison")
        await inbox.until(3)
        after = await pubsub.publish("social.post", "next")
        await inbox.until_ids([after.id])
        assert [seen.attempt for seen in inbox.seen[:4]] == [1, 2, 3, 1]


def _fail(delivery: Delivery) -> None:
    raise ValueError(f"attempt {delivery.attempt} of {delivery.id}")
