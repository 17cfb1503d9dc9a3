"""One relay as a process, for tests that kill it: URL of the database, name of the table, name of the application."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import sqlalchemy as sa

from pubsub_facade import AsyncPubSub
from pubsub_facade.contrib.outbox import Relay
from pubsub_facade.contrib.sqlalchemy import Outbox


async def main(url: str, table: str, batch: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"relay {os.getpid()} runs", flush=True)  # from here on SIGTERM is a request, not an end
    async with AsyncPubSub() as pubsub:
        store = Outbox(sa.MetaData(), table).store(sa.create_engine(url), lease=3)
        await Relay(pubsub, store, batch=batch, publish_timeout=2).run(stop)


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
