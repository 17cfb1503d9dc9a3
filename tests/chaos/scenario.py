"""One chaos run: publish, let faults happen, wait for what was promised, and settle accounts.

The rule: each message id whose publish returned was handled by each subscription, or is in its dead
letters, or is still in its backlog. Anything else is lost. Duplicates are counted, and bounded by what
can be in hand at each fault.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pubsub_facade import AsyncPubSub, Settings
from tests.chaos import autopsy
from tests.chaos.books import BOOKS, bookings
from tests.chaos.injuries import injuries_for
from tests.chaos.workload import BATCH, SUBSCRIPTIONS, WINDOW, is_to_be_booked, is_to_be_rejected
from tests.chaos.world import MEMBERS, PUBLISHERS, World


@dataclass
class Result:
    """What a run came to; counts are over both subscriptions."""

    form: str
    seed: int
    faults: list[str]
    published: int = 0
    handled: int = 0
    dead: int = 0
    misburied: list[str] = field(default_factory=list)  # ids of dead letters that no handler rejected
    duplicates: int = 0
    booked: int = 0  # messages that had their effect in a database
    misbooked: dict[str, int] = field(default_factory=dict)  # id -> how often, where it is not once
    stuck: int = 0  # came only when the broker was started again
    lost: dict[str, list[str]] = field(default_factory=dict)
    longest_gap: float = 0.0  # s from the end of a fault until the next delivery was handled
    seconds: float = 0.0

    @property
    def bound(self) -> int:
        """Duplicates that the faults can account for: what was in hand at each, once more."""
        return len(self.faults) * (
            len(SUBSCRIPTIONS) * WINDOW * (MEMBERS + 1) + PUBLISHERS * BATCH * len(SUBSCRIPTIONS)
        )

    def breaches(self) -> list[str]:
        """What the contract forbids and this run shows, one line each."""
        found = [f"lost of {name}: {ids[:20]}" for name, ids in self.lost.items() if ids]
        if self.stuck and self.form != "artemis":  # its own fault, told in docs/reliability.md
            found.append(f"{self.stuck} came only when the broker was started again")
        if self.misburied:
            found.append(f"in the dead letters, and no handler rejected them: {self.misburied[:20]}")
        if self.misbooked:
            found.append(f"not booked once: {self.misbooked}")
        if self.duplicates > self.bound:
            found.append(f"{self.duplicates} duplicates, more than {self.bound}")
        return found

    @property
    def missing(self) -> int:
        """Deliveries that have not come."""
        return self.lost_count + sum(not times for times in self.misbooked.values())

    @property
    def lost_count(self) -> int:
        return sum(map(len, self.lost.values()))

    def row(self) -> str:
        """As a row of the table in ``docs/reliability.md``."""
        figures = (
            self.form,
            self.seed,
            len(self.faults),
            self.published,
            self.handled,
            self.dead,
            self.duplicates,
            self.booked,
            len(self.misbooked),
            self.stuck,
            self.lost_count,
            f"{self.longest_gap:.1f} s",
            f"{self.seconds:.0f} s",
        )
        return f"| {' | '.join(map(str, figures))} |"


HEADER = (
    "| backend | seed | faults | published | handled | dead letters | duplicates | booked | not once | stuck | lost "
    "| longest gap | took |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def run(
    form: str,
    folder: Path,
    *,
    seed: int,
    count: int,
    faults: int,
    rate: float,
    patience: float,
    only: Sequence[str] = (),
) -> Result:
    """Run one scenario.

    Arguments:
        form: backend form.
        folder: empty, for this run.
        seed: draws the faults, and when they happen.
        count: messages of each publisher, at least.
        faults: how many happen at least, while messages are published.
        rate: messages a second of each publisher.
        patience: seconds to wait, after the last fault, for what was promised.
        only: the names of the injuries to draw from; all that can happen to the form where it is empty.
    """
    world = World(form, folder, seed, count, rate)
    begin = time.monotonic()
    result = Result(form, seed, [])
    ends: list[float] = []
    with world.running():
        world.start_publishers()
        menu = [injury for injury in injuries_for(form) if not only or injury.__name__ in only]
        while len(result.faults) < faults:
            round_ = menu[:]
            world.random.shuffle(round_)
            for injury in round_[: faults - len(result.faults)]:
                time.sleep(world.random.uniform(0.2, 1.5))
                injury(world)
                ends.append(time.time())
                world.check_members(injury.__name__)
                result.faults.append(injury.__name__)
        world.wait_published(patience + 2 * count / rate)
        asyncio.run(settle_accounts(world, result, patience))
        for member in world.members:
            member.terminate()
    result.longest_gap = _longest_gap(folder, ends)
    result.seconds = time.monotonic() - begin
    return result


async def settle_accounts(world: World, result: Result, patience: float) -> None:
    """Wait for what was promised; where the broker sits on it, restart the broker and wait once more."""
    published = {line for path in world.folder.glob("published-*") for line in path.read_text().split()}
    result.published = len(published)
    async with AsyncPubSub(Settings.load(world.direct)) as pubsub:
        await _wait(world, pubsub, result, published, patience)
        missing = result.missing
        if missing and world.broker is not None:
            for name in (*SUBSCRIPTIONS, BOOKS):
                print(
                    f"{world.form}: {missing} are missing; {name}: {await pubsub.backlog(name)}", flush=True
                )
            await pubsub.close()
            autopsy.write(world)
            await asyncio.to_thread(world.broker.restart)
            async with AsyncPubSub(Settings.load(world.direct)) as again:
                await _wait(world, again, result, published, patience)
            result.stuck = missing - result.missing


async def _wait(
    world: World, pubsub: AsyncPubSub, result: Result, published: set[str], patience: float
) -> None:
    deadline = time.monotonic() + patience
    while True:
        handled = {name: _handled(world.folder, name) for name in SUBSCRIPTIONS}
        dead = {name: [letter.id async for letter in pubsub.dead_letters(name)] for name in SUBSCRIPTIONS}
        result.lost = {
            name: sorted(published - set(handled[name]) - set(dead[name])) for name in SUBSCRIPTIONS
        }
        result.booked, result.misbooked = _booked(world.folder, published)
        if not (result.lost_count or result.misbooked) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    result.handled = sum(len(set(ids)) for ids in handled.values())
    result.dead = sum(len(set(ids)) for ids in dead.values())
    result.misburied = [id for ids in dead.values() for id in ids if not is_to_be_rejected(id)]
    result.duplicates = sum(len(ids) - len(set(ids)) for ids in handled.values())


def _booked(folder: Path, published: set[str]) -> tuple[int, dict[str, int]]:
    """How many messages were booked, and those that were not booked once."""
    booked = bookings(folder)
    due = {id for id in published if is_to_be_booked(id)}
    return len(booked), {id: booked[id] for id in due.union(booked) if booked[id] != 1}


def _handled(folder: Path, subscription: str) -> list[str]:
    """Ids as often as they were handled; a line that a kill cut short does not count."""
    return [
        line.split()[0]
        for path in folder.glob(f"handled-{subscription}-*")
        for line in path.read_text().splitlines()
        if line.count(" ") == 2
    ]


def _longest_gap(folder: Path, ends: list[float]) -> float:
    times = sorted(
        float(line.split()[1])
        for path in folder.glob("handled-*")
        for line in path.read_text().splitlines()
        if line.count(" ") == 2
    )
    gaps = [min((at - end for at in times if at >= end), default=0.0) for end in ends]
    return max(gaps, default=0.0)
