"""Contract 6 and 8: a process that dies with messages in hand loses none."""

from __future__ import annotations

import asyncio
import multiprocessing
import os

import pytest

from pubsub_facade.client import AsyncPubSub
from pubsub_facade.message import Message
from pubsub_facade.settings import Settings
from pubsub_facade.testing.conformance._suite import DEADLINE, SOON, Bench, Inbox, Suite, until


def _die(settings: Settings, ordered: bool) -> None:
    """A member that dies at once, with what it was handed unsettled."""

    async def run() -> None:
        pubsub = AsyncPubSub(settings)

        async def handle(payload: int) -> None:
            if payload == 2:
                os._exit(7)

        pubsub.subscriber("social.#", subscription="analytics", ordered=ordered)(handle)
        await pubsub.start()
        await asyncio.sleep(DEADLINE)

    asyncio.run(run())


class Crashing(Suite):
    """A second process, killed by its own handler."""

    @pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
    async def test_what_a_dead_process_had_in_hand_comes_again_with_its_attempts_counted(
        self, bench: Bench, ordered: bool
    ) -> None:
        if not bench.capabilities.shared:
            pytest.skip("capability shared is false")
        pubsub = bench.client()
        await pubsub.declare("social.#", subscription="analytics", ordered=ordered)
        sent = await pubsub.publish_many(Message("social.post", n, key="k") for n in range(5))
        process = multiprocessing.get_context("spawn").Process(target=_die, args=(bench.settings(), ordered))
        process.start()
        try:
            await until(lambda: process.exitcode is not None, "the member has died")
        finally:
            process.kill()
            process.join()
        assert process.exitcode == 7
        inbox = Inbox()
        survivor = bench.client()
        survivor.subscriber("social.#", subscription="analytics", ordered=ordered, backoff=SOON)(inbox)
        await survivor.start()
        await inbox.until_ids(message.id for message in sent[2:])
        (fatal,) = [seen for seen in inbox.seen if seen.id == sent[2].id]
        if bench.capabilities.stored_attempts:
            assert fatal.attempt == 2
        else:
            assert fatal.attempt in (1, 2)
        if ordered:
            firsts = list(dict.fromkeys(inbox.payloads))
            assert firsts == sorted(firsts)
