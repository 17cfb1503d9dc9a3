"""A steady rate on one backend for minutes: memory, file descriptors, threads and tasks must stay flat.

``python -m tests.chaos.soak --backend rabbitmq --minutes 10`` writes ``soak-{backend}.csv`` and a chart,
``soak-{backend}.svg``, and fails where one of them keeps growing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.__main__ import settings_for
from pubsub_facade import AsyncPubSub, Message

FIELDS = ("resident MiB", "file descriptors", "threads", "tasks", "handled/s")
ALLOWED = (25.0, 4, 2, 8)  # growth from the first quarter's median to the last quarter's
KEPT_UP = 0.95  # share of the rate that must have been handled, by the median of the seconds
EVERY = 1.0  # s between two samples


def sample(handled_per_second: float) -> tuple[float, ...]:
    """What this process uses now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(asyncio.all_tasks()),
        handled_per_second,
    )


async def soak(backend: str, minutes: float, rate: float) -> list[tuple[float, ...]]:
    """Publish and handle ``rate`` messages a second; returns a sample a second."""
    samples: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncPubSub(settings_for(backend, Path(folder))) as pubsub:
            handled = 0

            @pubsub.subscriber("soak.#", subscription="soak", concurrency=4)
            async def handle(body: bytes) -> None:
                nonlocal handled
                handled += 1

            await pubsub.start()
            begin = time.monotonic()
            sent = seen = 0
            while (elapsed := time.monotonic() - begin) < minutes * 60:
                behind = int(elapsed * rate) - sent
                if behind > 0:
                    await pubsub.publish_many(
                        Message(f"soak.t{number % 20}", b"x" * 256) for number in range(min(behind, 500))
                    )
                    sent += min(behind, 500)
                if elapsed > EVERY * (len(samples) + 1):
                    samples.append(sample((handled - seen) / EVERY))
                    seen = handled
                await asyncio.sleep(0.01)
            for _ in range(600):
                if handled >= sent:
                    break
                await asyncio.sleep(0.05)
            if handled < sent:
                raise AssertionError(
                    f"{sent - handled} of {sent} messages were not handled within 30 s of the end"
                )
            await pubsub.delete("soak")
    return samples


def growth(samples: list[tuple[float, ...]]) -> list[float]:
    """By field: the last quarter's median less that of the quarter after the warm-up quarter."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]
    return [
        statistics.median(values[at] for values in late) - statistics.median(values[at] for values in early)
        for at in range(len(FIELDS))
    ]


def findings(samples: list[tuple[float, ...]], rate: float) -> list[str]:
    """What is not flat, and whether the rate was kept up."""
    found = [
        f"{field} grew by {value:g}"
        for field, value, allowed in zip(FIELDS, growth(samples), ALLOWED, strict=False)
        if value > allowed
    ]
    handled = statistics.median(values[FIELDS.index("handled/s")] for values in samples)
    if handled < KEPT_UP * rate:
        found.append(f"{handled:g} messages/s were handled, of {rate:g}")
    return found


def chart(samples: list[tuple[float, ...]], title: str) -> str:
    """The samples as an SVG, one row a field, each from zero."""
    width, height = 900, 110
    rows = []
    for at, field in enumerate(FIELDS):
        values = [values[at] for values in samples]
        top = max(*values, 1) * 1.1
        across, up = (width - 80) / max(1, len(values) - 1), (height - 40) / top
        points = " ".join(
            f"{60 + number * across:.1f},{height - 20 - value * up:.1f}"
            for number, value in enumerate(values)
        )
        rows.append(
            f'<g transform="translate(0,{30 + at * height})"><text x="60" y="10">{field}: '
            f"{min(values):,.0f} to {max(values):,.0f}</text>"
            f'<line x1="60" y1="{height - 20}" x2="{width - 20}" y2="{height - 20}" stroke="#999"/>'
            f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.5"/></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{40 + len(FIELDS) * height}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="60" y="20" font-size="15">{title}</text>{"".join(rows)}</svg>'
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--backend", default="sqlite")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=1000, help="messages a second")
    options = parser.parse_args()
    samples = asyncio.run(soak(options.backend, options.minutes, options.rate))
    name = f"soak-{options.backend}"
    lines = [",".join(FIELDS), *(",".join(f"{value:g}" for value in values) for values in samples)]
    Path(f"{name}.csv").write_text("\n".join([*lines, ""]))
    title = f"{options.backend}: {options.rate:g} messages/s for {options.minutes:g} minutes"
    Path(f"{name}.svg").write_text(chart(samples, title))
    bad = findings(samples, options.rate)
    print(title)
    for field, value in zip(FIELDS, growth(samples), strict=True):
        print(f"  {field}: {samples[-1][FIELDS.index(field)]:,.1f} at the end, grown by {value:,.1f}")
    print(f"  written: {name}.csv, {name}.svg")
    for text in bad:
        print(f"NOT AS IT SHOULD BE: {text}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
