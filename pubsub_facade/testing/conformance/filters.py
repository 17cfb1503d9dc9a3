"""Contract 11: a filter selects the same messages on every backend, whoever evaluates it."""

from __future__ import annotations

import pytest

from pubsub_facade.errors import FilterError
from pubsub_facade.filters import Filter
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import Bench, Inbox, Suite, eventually, nothing_more, receive
from pubsub_facade.testing.filter_table import FILTER_TABLE

FILTERS = list(dict.fromkeys(text for text, _, _ in FILTER_TABLE))
ROWS = [dict(headers) for _, headers, _ in FILTER_TABLE]


class Filtering(Suite):
    """The selector language, asked of the broker itself."""

    async def test_each_filter_selects_exactly_its_messages(self, bench: Bench) -> None:
        """Each filter sees each row's headers, twice: what is selected wrongly first shows while the rest arrives."""
        pubsub = bench.client()
        inboxes: dict[str, Inbox] = {}
        for text in FILTERS:
            inboxes[text] = inbox = Inbox()
            pubsub.subscriber("social.#", filter=text)(inbox)
        await pubsub.start()
        chosen = {
            text: [number for number, headers in enumerate(ROWS) if Filter.parse(text).matches(headers)]
            for text in FILTERS
        }
        for round in (1, 2):
            await pubsub.publish_many(
                Message("social.post", number, headers=headers) for number, headers in enumerate(ROWS)
            )
            for text, inbox in inboxes.items():
                await inbox.until(round * len(chosen[text]))
        for text, inbox in inboxes.items():
            assert sorted(inbox.payloads) == sorted(2 * chosen[text]), text
        for number, (text, _, selected) in enumerate(FILTER_TABLE):
            assert (number in inboxes[text].payloads) is selected, (text, ROWS[number])

    async def test_what_a_filter_leaves_out_is_settled(self, bench: Bench) -> None:
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="analytics", filter="level > 3")
        sent = await pubsub.publish_many(
            Message("social.post", level, headers={"level": level}) for level in range(10)
        )
        async with pubsub.subscribe(
            "social.#", subscription="analytics", filter="level > 3", window=2
        ) as stream:
            received = await receive(stream, 6)
            assert {d.id for d in received} == {message.id for message in sent[4:]}
            await nothing_more(stream)
            if bench.capabilities.backlog:

                async def empty() -> bool:
                    backlog = await pubsub.backlog("analytics")
                    return backlog.waiting == 0 and backlog.in_flight in (0, None)

                await eventually(empty, "nothing waits that the filter leaves out")

    async def test_a_retried_message_passes_its_filter_again(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe(
            "social.#", subscription="analytics", filter="region = 'eu' AND level > 3"
        ) as stream:
            await pubsub.publish("social.post", "x", headers={"region": "eu", "level": 4})
            (first,) = await receive(stream, 1, ack=False)
            await first.retry(0)
            (second,) = await receive(stream, 1, ack=False)
            await second.reject("enough")
            await pubsub.dead_letters("analytics").replay()
            (third,) = await receive(stream, 1)
            assert (third.attempt, third.payload) == (1, "x")

    async def test_a_filter_that_does_not_parse_is_refused(self, bench: Bench) -> None:
        pubsub = bench.client()
        for text in ("", "level >", "level > 3 AND", "(a = 1", "a == 1", "a LIKE 3", "a = 'x", "1 +"):
            with pytest.raises(FilterError):
                pubsub.subscribe("social.#", filter=text)
        assert pubsub.state == "idle"
