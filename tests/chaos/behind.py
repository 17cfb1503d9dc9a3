"""A subscription far behind starts at full speed with flat memory: ``python -m tests.chaos.behind --backend sqlite``.

Publishes ``--count`` messages to a subscription without members, then joins as one, in a process of its own, and
prints its rate and its size after each tenth. Fails where the first message took longer than ``FIRST`` seconds,
the process grew by more than ``GROWTH`` MiB after the first tenth, or a tenth was slower than half the median.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.memory import resident
from benchmarks.raw import BODY
from brokers.broker import ROOT, STATE
from pubsub_facade import AsyncPubSub, Message, Settings

FIRST: Final = 5.0  # s
GROWTH: Final = 50.0  # MiB
BATCH: Final = 5000
NAME: Final = "behind"


def settings_for(backend: str, folder: Path) -> Settings:
    """In a namespace that is named after the folder, on the brokers that all share."""
    if backend == "sqlite":
        return Settings(backend="sqlite", sqlite={"path": folder / "behind.db"})
    return Settings.load(STATE / f"pubsub.{backend}.toml", namespace=f"behind-{folder.name}")


async def fall_behind(backend: str, folder: Path, count: int) -> None:
    """Let so many messages wait."""
    async with AsyncPubSub(settings_for(backend, folder)) as pubsub:
        await pubsub.delete(NAME)
        await pubsub.declare("behind.#", subscription=NAME)
        begin = time.perf_counter()
        for _ in range(0, count, BATCH):
            await pubsub.publish_many([Message("behind.topic", BODY) for _ in range(BATCH)], timeout=120)
        print(f"{backend}: published {count / (time.perf_counter() - begin):,.0f} messages/s", flush=True)


async def catch_up(backend: str, folder: Path, count: int) -> bool:
    """Handle all that waits; whether it went as it should."""
    async with AsyncPubSub(settings_for(backend, folder)) as pubsub:
        handled = 0
        times: list[float] = []
        sizes: list[float] = []
        first = asyncio.Event()
        last = asyncio.Event()

        @pubsub.subscriber("behind.#", subscription=NAME)
        async def handle(body: bytes) -> None:
            nonlocal handled
            handled += 1
            if handled == 1:
                first.set()
            if handled % (count // 10) == 0:
                times.append(time.perf_counter())
                sizes.append(resident())
            if handled == count:
                last.set()

        begin = time.perf_counter()
        await pubsub.start()
        await first.wait()
        waited = time.perf_counter() - begin
        await last.wait()
    async with AsyncPubSub(settings_for(backend, folder)) as pubsub:
        await pubsub.delete(NAME)
    ends = [begin + waited, *times]
    rates = [count / 10 / (after - before) for before, after in itertools.pairwise(ends)]
    print(f"{backend}: the first of {count:,} came after {waited:.2f} s")
    print(f"{backend}: messages/s in each tenth:", ", ".join(f"{rate:,.0f}" for rate in rates))
    print(f"{backend}: resident MiB after each tenth:", ", ".join(f"{size:.0f}" for size in sizes))
    steady = min(rates) >= statistics.median(rates) / 2
    return waited < FIRST and max(sizes) - sizes[0] < GROWTH and steady


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.behind")
    parser.add_argument("--backend", default="sqlite")
    parser.add_argument("--count", type=int, default=1_000_000, help=f"a multiple of {10 * BATCH}")
    parser.add_argument("--catch-up", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.catch_up is not None:
        return 0 if asyncio.run(catch_up(options.backend, options.catch_up, options.count)) else 1
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(fall_behind(options.backend, Path(folder), options.count))
        again = [*sys.argv[1:], "--catch-up", folder]
        return subprocess.run(
            [sys.executable, "-m", "tests.chaos.behind", *again], cwd=ROOT, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
