"""Memory stays flat: many messages through one process, which publishes and handles them.

``python -m benchmarks.memory [--backend sqlite] [--count 1000000]`` prints the resident size after each tenth, and
fails where it grew by more than ``ALLOWED`` MiB after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.__main__ import settings_for
from benchmarks.raw import BODY
from pubsub_facade import AsyncPubSub, Message

ALLOWED = 50.0
BATCH = 500
AHEAD = 20_000  # messages published and not handled yet, at most


def resident() -> float:
    """MiB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def run(backend: str, count: int) -> list[float]:
    """Resident MiB after each tenth of ``count`` messages was handled."""
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncPubSub(settings_for(backend, Path(folder))) as pubsub:
            handled = 0
            moved = asyncio.Event()

            @pubsub.subscriber("memory.#", subscription="memory")
            async def handle(body: bytes) -> None:
                nonlocal handled
                handled += 1
                if handled % BATCH == 0:
                    moved.set()
                if handled % (count // 10) == 0:
                    sizes.append(resident())

            await pubsub.start()
            begin = time.perf_counter()
            for sent in range(0, count, BATCH):
                while sent - handled > AHEAD:
                    moved.clear()
                    await moved.wait()
                await pubsub.publish_many(
                    [Message(f"memory.t{number % 20}", BODY) for number in range(BATCH)], timeout=120
                )
            while handled < count:
                moved.clear()
                async with asyncio.timeout(60):
                    await moved.wait()
            print(f"{backend}: {count / (time.perf_counter() - begin):,.0f} messages/s published and handled")
            await pubsub.delete("memory")
    return sizes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--backend", default="sqlite")
    parser.add_argument("--count", type=int, default=1_000_000, help="a multiple of 5,000")
    options = parser.parse_args()
    sizes = asyncio.run(run(options.backend, options.count))
    print("resident MiB after each tenth:", ", ".join(f"{size:.0f}" for size in sizes))
    grown = max(sizes) - sizes[0]
    print(f"grown by {grown:.1f} MiB after the first tenth; allowed are {ALLOWED:.0f}")
    return 1 if grown > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
