"""A member that dies, process and all, at one payload: ``python -m tests.chaos.poison CONFIG FILE``."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from pubsub_facade import AsyncPubSub, Backoff, Settings

DEADLY = "deadly"
SUBSCRIPTION = "poison"
MAX_ATTEMPTS = 3


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    pubsub = AsyncPubSub(Settings.load(sys.argv[1]))

    @pubsub.subscriber(
        "poison.#",
        subscription=SUBSCRIPTION,
        max_attempts=MAX_ATTEMPTS,
        concurrency=4,
        backoff=Backoff(initial=0.05, maximum=0.05),
    )
    async def handle(text: str) -> None:
        await asyncio.sleep(0.002)
        if text == DEADLY:
            os.kill(os.getpid(), signal.SIGSEGV)
            await asyncio.sleep(60)
        handled.write(f"{text}\n")

    with Path(sys.argv[2]).open("a", buffering=1) as handled:
        asyncio.run(pubsub.run())


if __name__ == "__main__":
    main()
