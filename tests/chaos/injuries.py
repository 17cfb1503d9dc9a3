"""What can happen: each function does one thing to a `World` and returns when it is over."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Final

from tests.chaos.world import HEARTBEAT, World

Injury = Callable[[World], None]


def cut_every_connection(world: World) -> None:
    assert world.proxy is not None
    world.proxy.cut()


def cut_in_the_middle_of_a_frame(world: World) -> None:
    assert world.proxy is not None
    world.proxy.cut_after(world.random.randrange(1, 3000), world.random.choice(("up", "down")))


def refuse_connections_for_a_second(world: World) -> None:
    assert world.proxy is not None
    world.proxy.refuse()
    time.sleep(1)
    world.proxy.restore()


def half_open_link(world: World) -> None:
    """Heartbeats must notice: nothing is told to anybody."""
    assert world.proxy is not None
    world.proxy.swallow()
    time.sleep(3 * HEARTBEAT)
    world.proxy.restore()


def stalled_link(world: World) -> None:
    assert world.proxy is not None
    world.proxy.stall(world.random.choice(("up", "down", "both")))
    time.sleep(1.5)
    world.proxy.restore()


def broker_killed(world: World) -> None:
    assert world.broker is not None
    world.broker.kill()
    world.broker.start()


def broker_restarted(world: World) -> None:
    assert world.broker is not None
    world.broker.restart()


def broker_paused_longer_than_the_heartbeat(world: World) -> None:
    assert world.broker is not None
    world.broker.pause()
    time.sleep(3 * HEARTBEAT)
    world.broker.resume()


def member_killed(world: World) -> None:
    world.random.choice(world.members).again()


def member_told_to_end(world: World) -> None:
    member = world.random.choice(world.members)
    member.wait_receiving()
    code = member.terminate()
    assert code == 0, f"a member that was told to end ended with {code}"
    member.again()


def member_frozen(world: World) -> None:
    victim = world.random.choice(world.members).victim()
    victim.pause()
    time.sleep(3 * HEARTBEAT)
    victim.resume()


def publisher_killed(world: World) -> None:
    publisher = world.random.choice(world.publishers)
    if publisher.running:
        publisher.again()


def members_come_and_go(world: World) -> None:
    for _ in range(3):
        guest = world.add_member()
        time.sleep(1)
        world.members.remove(guest)
        if world.random.random() < 0.5:
            guest.kill()
        else:
            guest.terminate()


def database_locked_for_a_second(world: World) -> None:
    connection = sqlite3.connect(world.folder / "chaos.db", timeout=30, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(1)
        connection.execute("ROLLBACK")
    finally:
        connection.close()


PROCESSES: Final[tuple[Injury, ...]] = (
    member_killed,
    publisher_killed,
    member_told_to_end,
    member_frozen,
    members_come_and_go,
)

BROKERED: Final[tuple[Injury, ...]] = (
    broker_killed,
    member_killed,
    cut_every_connection,
    publisher_killed,
    half_open_link,
    member_told_to_end,
    cut_in_the_middle_of_a_frame,
    members_come_and_go,
    broker_paused_longer_than_the_heartbeat,
    refuse_connections_for_a_second,
    broker_restarted,
    stalled_link,
    member_frozen,
)

EMBEDDED: Final[tuple[Injury, ...]] = (*PROCESSES, database_locked_for_a_second)


def injuries_for(form: str) -> tuple[Injury, ...]:
    """What can happen to this backend form."""
    return EMBEDDED if form == "sqlite" else BROKERED
