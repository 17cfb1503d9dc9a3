"""The long chaos runs: ``python -m tests.chaos --seed 1 [--backend NAME …]`` prints a table row for each backend."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import traceback
from pathlib import Path

from tests.chaos import scenario
from tests.chaos.world import FORMS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--backend", action="append", choices=FORMS, help="default: all")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--messages", type=int, default=20_000, help="of both publishers together, at least")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--rate", type=float, default=100, help="messages a second of each publisher")
    parser.add_argument("--keep", type=Path, help="folder for the logs; default: a temporary one")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    print(scenario.HEADER, flush=True)
    bad = 0
    for form in options.backend or FORMS:
        with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
            folder = options.keep / form if options.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                result = scenario.run(
                    form,
                    folder,
                    seed=options.seed,
                    count=options.messages // 2,
                    faults=options.faults,
                    rate=options.rate,
                    patience=120,
                )
            except Exception:
                bad += 1
                print(f"| {form} | {options.seed} | ended early |", flush=True)
                traceback.print_exc()
                continue
        print(result.row(), flush=True)
        for found in result.breaches():
            bad += 1
            print(f"  {found}", file=sys.stderr, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
