"""Contract 10: per-key order where it is asked for, and full concurrency where it is not."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict

from pubsub_facade.message import Delivery, Message
from pubsub_facade.subscription import Backoff
from pubsub_facade.testing.conformance._suite import (
    DEADLINE,
    SOON,
    Bench,
    Inbox,
    Suite,
    nothing_more,
    receive,
    until,
)


class _Ledger:
    """What each key's handlers did, over all members; a second one of a key at the same time is noted."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.done: defaultdict[str, list[int]] = defaultdict(list)
        self.overlaps: list[str] = []
        self._busy: set[str] = set()

    async def handle(self, delivery: Delivery) -> None:
        key = delivery.key
        assert key is not None
        if key in self._busy:
            self.overlaps.append(key)
        self._busy.add(key)
        try:
            await asyncio.sleep(0.001)  # the work: long enough for another of the key to come in between
            number = delivery.payload
            if number % 7 == 3 and delivery.attempt < 3:
                raise ValueError("fails twice")
            if number % 10 == 5:
                raise ValueError("fails always")
            self.done[key].append(number)
        finally:
            self._busy.discard(key)
            self.inbox.note(delivery)


class Ordering(Suite):
    """One message of a key at a time, in publish order, over all members."""

    async def test_messages_of_a_key_are_handled_in_order_over_three_members_with_failures(
        self, bench: Bench
    ) -> None:
        ledger = _Ledger()
        keys = [f"user-{n}" for n in range(12)]
        for _ in range(3):
            member = bench.client()
            member.subscriber(
                "social.#", subscription="timeline", ordered=True, concurrency=8, max_attempts=3, backoff=SOON
            )(ledger.handle)
            await member.start()
        pubsub = bench.client()
        sent = await pubsub.publish_many(
            Message("social.post", n, key=key) for n in range(20) for key in keys
        )
        good = [n for n in range(20) if n % 10 != 5]
        await ledger.inbox.until_true(
            lambda: all(len(ledger.done[key]) >= len(good) for key in keys), "every key handled"
        )
        assert {key: ledger.done[key] for key in keys} == dict.fromkeys(keys, good)
        assert ledger.overlaps == []
        letters = await bench.until_dead("timeline", 2 * len(keys))
        assert {letter.id for letter in letters} == {m.id for m in sent if m.payload % 10 == 5}
        assert {letter.failure.attempts for letter in letters if letter.failure} == {3}

    async def test_messages_published_one_by_one_keep_their_order(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="timeline", ordered=True) as stream:
            for number in range(30):
                await pubsub.publish("social.post", number, key="user")
            assert [d.payload for d in await receive(stream, 30)] == list(range(30))

    async def test_an_unsettled_message_holds_its_key_and_no_other(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="timeline", ordered=True) as stream:
            await pubsub.publish_many(Message("social.post", n, key="slow") for n in range(3))
            await pubsub.publish_many(Message("social.post", n, key=f"other-{n}") for n in range(20))
            out = await receive(stream, 21, ack=False)
            assert sorted(d.payload for d in out if d.key == "slow") == [0]
            assert len({d.key for d in out}) == 21
            await nothing_more(stream)
            for delivery in out:
                await delivery.ack()
            rest = await receive(stream, 2)
            assert [(d.key, d.payload) for d in rest] == [("slow", 1), ("slow", 2)]

    async def test_a_failing_message_holds_its_key_only_then_becomes_a_dead_letter(
        self, bench: Bench
    ) -> None:
        def act(delivery: Delivery) -> None:
            if delivery.payload == "poison":
                raise ValueError("never")

        inbox = Inbox(act)
        pubsub = bench.client()
        pubsub.subscriber(
            "social.#", subscription="timeline", ordered=True, max_attempts=3, backoff=Backoff(0.3, 0.3, 1, 0)
        )(inbox)
        await pubsub.start()
        await pubsub.publish_many(
            [
                Message("social.post", "poison", key="a"),
                Message("social.post", "behind", key="a"),
                *(Message("social.post", n, key="b") for n in range(10)),
            ]
        )
        await inbox.until_true(lambda: "behind" in inbox.payloads, "the one behind the poison")
        mine = [(seen.payload, seen.attempt) for seen in inbox.seen if seen.key == "a"]
        assert mine == [("poison", 1), ("poison", 2), ("poison", 3), ("behind", 1)]
        assert [seen.payload for seen in inbox.seen if seen.key == "b"] == list(range(10))
        last_poison = max(seen.at for seen in inbox.seen if seen.payload == "poison")
        assert all(seen.at < last_poison for seen in inbox.seen if seen.key == "b"), "key b had to wait"
        (letter,) = await bench.until_dead("timeline", 1)
        assert letter.payload == "poison"

    async def test_a_released_message_keeps_its_place_before_the_others_of_its_key(
        self, bench: Bench
    ) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="timeline", ordered=True) as stream:
            await pubsub.publish_many(Message("social.post", n, key="user") for n in range(5))
            (first,) = await receive(stream, 1, ack=False)
            await first.release()
            assert [d.payload for d in await receive(stream, 5)] == list(range(5))
            await nothing_more(stream)

    async def test_order_is_kept_when_a_member_leaves(self, bench: Bench) -> None:
        keys = [f"user-{n}" for n in range(8)]
        firsts: defaultdict[str, list[int]] = defaultdict(list)
        inbox = Inbox()

        async def handle(delivery: Delivery) -> None:
            assert delivery.key is not None
            await asyncio.sleep(0.001)
            if delivery.payload not in firsts[delivery.key]:  # one may come twice, none may overtake
                firsts[delivery.key].append(delivery.payload)
            inbox.note(delivery)

        members = [bench.client() for _ in range(2)]
        for member in members:
            member.subscriber("social.#", subscription="timeline", ordered=True, concurrency=4)(handle)
            await member.start()
        pubsub = bench.client()
        await pubsub.publish_many(Message("social.post", n, key=key) for n in range(20) for key in keys)
        await inbox.until(20)
        await members[0].close()
        await pubsub.publish_many(Message("social.post", n, key=key) for n in range(20, 25) for key in keys)
        await inbox.until_true(lambda: all(len(firsts[key]) >= 25 for key in keys), "every key handled")
        assert dict(firsts) == {key: list(range(25)) for key in keys}

    async def test_messages_without_a_key_are_not_held_by_each_other(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="timeline", ordered=True) as stream:
            await pubsub.publish_many(Message("social.post", n) for n in range(10))
            out = await receive(stream, 10, ack=False)
            assert sorted(d.payload for d in out) == list(range(10))

    async def test_without_order_handlers_run_at_the_same_time_also_for_one_key(self, bench: Bench) -> None:
        inside = asyncio.Barrier(8)
        inbox = Inbox()

        async def handle(delivery: Delivery) -> None:
            await asyncio.wait_for(inside.wait(), DEADLINE)  # passes only when 8 are inside at once
            inbox.note(delivery)

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", concurrency=8)(handle)
        await pubsub.start()
        await pubsub.publish_many(Message("social.post", n, key="same") for n in range(16))
        await inbox.until(16)
        assert {seen.attempt for seen in inbox.seen} == {1}

    async def test_sync_handlers_run_at_the_same_time_on_threads(self, bench: Bench) -> None:
        inside = threading.Barrier(4)
        threads: set[str] = set()
        done: list[int] = []

        def handle(payload: int) -> None:
            inside.wait(DEADLINE)
            threads.add(threading.current_thread().name)
            done.append(payload)

        pubsub = bench.client()
        pubsub.subscriber("social.#", subscription="analytics", concurrency=4)(handle)
        await pubsub.start()
        await pubsub.publish_many(Message("social.post", n, key="same") for n in range(8))
        await until(lambda: len(done) == 8, "8 messages handled")
        assert sorted(done) == list(range(8))
        assert threading.current_thread().name not in threads
        assert len(threads) == 4
