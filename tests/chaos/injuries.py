"""What can happen: each function does one thing to a `World` and returns when it is over."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import Final

from brokers.rabbitmq import RabbitMQ
from pubsub_facade import AsyncPubSub, PublishTimeout, Settings
from pubsub_facade.testing.faults import wait_until
from tests.chaos import deletions
from tests.chaos.deletions import handled
from tests.chaos.levers import CRASHED, POINTS
from tests.chaos.workload import SPARE
from tests.chaos.world import HANDED_OUT, HEARTBEAT, Process, World

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


def member_told_to_end_while_nobody_answers(world: World) -> None:
    """It cannot say what it has handled, and ends all the same."""
    assert world.proxy is not None
    member = world.random.choice(world.members)
    member.wait_receiving()
    world.random.choice((world.proxy.refuse, world.proxy.swallow, world.proxy.stall))()
    try:
        code = member.terminate(60)  # its grace is 30 s, an attempt to connect takes 10 s
    finally:
        world.proxy.restore()
    assert code == 0, f"a member that was told to end while nobody answered ended with {code}"
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
        guest.wait_receiving()
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


def ended_at(point: str) -> Injury:
    """Ends the first process that comes to one of `levers.POINTS`, as ``kill -9`` would."""

    def injury(world: World) -> None:
        chosen = world.publishers if point == "sending" else world.members
        world.levers.point = point
        try:
            wait_until(lambda: any(map(_crashed, chosen)), 60, f"a process to end while {point}")
        finally:
            world.levers.point = None
        time.sleep(0.05)  # a second one may have come to the point at the same moment
        for process in chosen:
            if _crashed(process):
                process.again()

    injury.__name__ = f"ended_while_{point}"
    return injury


def _crashed(process: Process) -> bool:
    return process.popen.poll() == CRASHED


def handlers_slower_than_the_broker_allows(world: World) -> None:
    """All handlers that begin in this half second outlast RabbitMQ's time-out, a lease, and Kafka's session."""
    world.levers.slow = DAWDLE
    time.sleep(0.5)
    world.levers.slow = 0
    time.sleep(DAWDLE)


def clock_jumps(world: World) -> None:
    """That of every process of ours, and it stays; back by little only, as what waits comes so much later."""
    world.levers.clock += world.random.choice((-8, -3, 5, 60, 600))
    time.sleep(1)


def clock_jumps_by_days(world: World) -> None:
    """Not for Kafka, which refuses what claims to be from more than an hour ahead."""
    world.levers.clock += 10 * 86400
    time.sleep(1)


def something_deleted_under_its_members(world: World) -> None:
    asyncio.run(deletions.delete(world, world.random.choice(deletions.DELETIONS[world.form])))


def memory_or_disk_alarm(world: World) -> None:
    """Publishers are blocked: publish waits, then raises, and what it calls not stored is not."""
    asyncio.run(_alarm(world, world.random.choice(ALARMS), world.random.choice(ALARM_LASTS)))


DAWDLE: Final = HANDED_OUT + 3  # s
ALARMS: Final = (
    (("set_vm_memory_high_watermark", "0.00001"), ("set_vm_memory_high_watermark", "0.4")),
    (("set_disk_free_limit", "100000GB"), ("set_disk_free_limit", "50MB")),
)
ALARM_LASTS: Final = (0.0, 2.0, 9.0)  # s, beside the time that the commands take; the last outlasts a publish


async def _alarm(world: World, commands: tuple[tuple[str, ...], tuple[str, ...]], lasts: float) -> None:
    assert isinstance(world.broker, RabbitMQ)
    sound, lift = commands
    async with AsyncPubSub(Settings.load(world.direct)) as pubsub:
        await pubsub.publish(f"{SPARE}.before", "the link is there")
        world.broker.ctl(*sound)
        refused: set[str] = set()
        try:
            message = await pubsub.publish(f"{SPARE}.alarm", "during", timeout=1)
        except PublishTimeout as error:
            refused = {id for id, fate in error.fates.items() if fate == "not stored"}
        else:
            raise AssertionError(f"{message} was called sent during the alarm of {sound}")
        finally:
            await asyncio.sleep(lasts)
            world.broker.ctl(*lift)
        after = await pubsub.publish(f"{SPARE}.after", "lifted")
        await asyncio.to_thread(
            wait_until, lambda: after.id in handled(world), deletions.FOUND_AGAIN, "what came after the alarm"
        )
        assert not refused & handled(world), f"{refused} were called not stored, and were"


PROCESSES: Final[tuple[Injury, ...]] = (
    member_killed,
    publisher_killed,
    member_told_to_end,
    member_frozen,
    members_come_and_go,
    *map(ended_at, POINTS),
    handlers_slower_than_the_broker_allows,
    clock_jumps,
)

BROKERED: Final[tuple[Injury, ...]] = (
    *PROCESSES,
    member_told_to_end_while_nobody_answers,
    broker_killed,
    cut_every_connection,
    half_open_link,
    cut_in_the_middle_of_a_frame,
    broker_paused_longer_than_the_heartbeat,
    refuse_connections_for_a_second,
    broker_restarted,
    stalled_link,
)

MENUS: Final[dict[str, tuple[Injury, ...]]] = {
    "sqlite": (*PROCESSES, database_locked_for_a_second, clock_jumps_by_days),
    "rabbitmq": (*BROKERED, memory_or_disk_alarm),
}


def injuries_for(form: str) -> tuple[Injury, ...]:
    """What can happen to this backend form."""
    menu = MENUS.get(form, BROKERED)
    return (*menu, something_deleted_under_its_members) if form in deletions.DELETIONS else menu
