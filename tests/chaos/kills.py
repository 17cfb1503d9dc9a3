"""Three processes on one SQLite file, killed at random points: ``python -m tests.chaos.kills FOLDER KILLS SEED``.

Each publishes and handles all the time, and one after the other is ended by ``kill -9`` and started again. They are
forked from this process, which has imported everything, so that hundreds of deaths take seconds. At the end
nobody publishes, a last member handles what is left, and the accounts are printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pubsub_facade import AsyncPubSub, Backoff, Delivery, Message, PubSubError, Reject, Settings

PROCESSES: Final = 3
SUBSCRIPTIONS: Final = ("ledger", "audit")
LEASE: Final = 1.0  # s
BATCH: Final = 5
LONGEST_LIFE: Final = 0.6  # s
PATIENCE: Final = LEASE + 10  # s until all that is left is handled


class Lines:
    """What a process knows for certain, one write a line: a kill leaves at most the last one short."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        self._file.write(f"{text}\n".encode())


def whole_lines(folder: Path, pattern: str) -> Iterator[str]:
    for path in folder.glob(pattern):
        yield from path.read_text().rpartition("\n")[0].split()


def settings(folder: Path) -> Settings:
    return Settings(backend="sqlite", sqlite={"path": folder / "kills.db", "lease": LEASE})


def member(folder: Path) -> AsyncPubSub:
    """A client that handles both subscriptions: some messages fail once, and some are rejected."""
    pubsub = AsyncPubSub(settings(folder))
    for name in SUBSCRIPTIONS:
        handled = Lines(folder / f"handled-{name}-{os.getpid()}")

        async def handle(number: int, delivery: Delivery, handled: Lines = handled) -> None:
            if number % 29 == 0:
                raise Reject("one in some")
            if number % 7 == 0 and delivery.attempt == 1:
                raise ValueError("the first time")
            await asyncio.sleep(0)
            handled.write(delivery.id)

        pubsub.subscriber(
            "kills.#",
            subscription=name,
            concurrency=4,
            max_attempts=1000,
            backoff=Backoff(initial=0.05, maximum=0.05),
        )(handle)
    return pubsub


async def live(folder: Path, who: int) -> None:
    """Publish and handle until killed; what a predecessor was not certain of is published again, ids and all."""
    pubsub = member(folder)
    await pubsub.start()
    done = sum(1 for _ in whole_lines(folder, f"published-{who}"))
    confirmed = Lines(folder / f"published-{who}")
    while True:
        numbers = range(done, done + BATCH)
        await pubsub.publish_many(
            [Message(f"kills.t{number % 3}", number, id=f"{who}-{number}") for number in numbers]
        )
        for number in numbers:
            confirmed.write(f"{who}-{number}")
        done = numbers.stop
        await asyncio.sleep(0.01)


def fork(folder: Path, who: int) -> int:
    """Start process number ``who``; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        asyncio.run(live(folder, who))
    except PubSubError as error:
        print(f"process {who}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)  # whatever it was: only a kill ends such a process


def kill(pid: int) -> None:
    """``kill -9``; AssertionError where it had ended by itself."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    assert not ended, f"process {pid} ended by itself with {status}"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def slaughter(folder: Path, kills: int, random: random.Random) -> None:
    """Kill one after the other, at random; each is started again at once."""
    pids = [fork(folder, who) for who in range(PROCESSES)]
    try:
        for _ in range(kills):
            time.sleep(random.uniform(0, LONGEST_LIFE / PROCESSES))
            who = random.randrange(PROCESSES)
            kill(pids[who])
            pids[who] = fork(folder, who)
    finally:
        for pid in pids:
            kill(pid)


async def settle_accounts(folder: Path) -> dict[str, Any]:
    """Handle what is left, and say what became of each message that was confirmed."""
    published = set(whole_lines(folder, "published-*"))
    begin = time.monotonic()
    async with member(folder) as pubsub:
        await pubsub.start()
        while True:
            handled = {name: list(whole_lines(folder, f"handled-{name}-*")) for name in SUBSCRIPTIONS}
            dead = {name: [letter.id async for letter in pubsub.dead_letters(name)] for name in SUBSCRIPTIONS}
            lost = {name: sorted(published - {*handled[name], *dead[name]}) for name in SUBSCRIPTIONS}
            if not any(lost.values()) or time.monotonic() - begin > PATIENCE:
                break
            await asyncio.sleep(0.1)
    return {
        "published": len(published),
        "handled": {name: len(set(ids)) for name, ids in handled.items()},
        "dead": {name: len(ids) for name, ids in dead.items()},
        "duplicates": sum(len(ids) - len(set(ids)) for ids in handled.values()),
        "lost": lost,
        "settled_after": round(time.monotonic() - begin, 2),
    }


def integrity(folder: Path) -> list[str]:
    """What SQLite says of the file; ``["ok"]`` where it is whole."""
    connection = sqlite3.connect(folder / "kills.db")
    try:
        return [row[0] for row in connection.execute("PRAGMA integrity_check")]
    finally:
        connection.close()


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    begin = time.monotonic()
    slaughter(folder, kills, random.Random(seed))
    accounts = asyncio.run(settle_accounts(folder))
    accounts |= {"integrity": integrity(folder), "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps(accounts))


if __name__ == "__main__":
    main()
