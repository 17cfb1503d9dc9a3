"""Each backend beside its raw driver, in one run: ``python -m benchmarks [--backend NAME …] [--count N]``.

The brokers are those of ``make brokers``. Prints a Markdown table; rates are messages a second, medians of
``--runs`` runs in which ours and the raw driver take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import uuid
from pathlib import Path

from benchmarks import ours
from benchmarks.raw import RAW, SIZE
from pubsub_facade import Settings

ROOT = Path(__file__).resolve().parent.parent


def settings_for(name: str, folder: Path) -> Settings:
    """The settings of a backend form, in a namespace of its own."""
    namespace = f"bench-{uuid.uuid4().hex[:8]}"
    if name == "sqlite":
        return Settings(backend="sqlite", namespace=namespace, sqlite={"path": folder / "bench.db"})
    return Settings.load(ROOT / ".brokers" / f"pubsub.{name}.toml", namespace=namespace)


def measure(name: str, count: int, runs: int) -> str:
    """A row of the table."""
    driver, raw_publish, raw_consume = RAW[name]
    rates: dict[str, list[float]] = {"raw publish": [], "publish": [], "raw consume": [], "consume": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_for(name, Path(folder))
            place = f"raw_{uuid.uuid4().hex[:8]}"
            rates["raw publish"].append(asyncio.run(raw_publish(settings, place, count)))
            rates["publish"].append(asyncio.run(ours.publish(settings, "bench", count)))
            rates["raw consume"].append(asyncio.run(raw_consume(settings, place, count)))
            rates["consume"].append(asyncio.run(ours.consume(settings, "bench", count)))
            asyncio.run(ours.delete(settings, "bench"))
    median = {label: statistics.median(values) for label, values in rates.items()}
    return (
        f"| {name} | {driver} | {median['raw publish']:,.0f} | {median['publish']:,.0f} "
        f"| {median['raw consume']:,.0f} | {median['consume']:,.0f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--backend", action="append", choices=RAW, help="default: all")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.count} messages of {SIZE} bytes, median of {options.runs} runs, messages a second\n")
    print("| backend | raw driver | raw publish | publish | raw consume | consume |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.backend or RAW:
        print(measure(name, options.count, options.runs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
