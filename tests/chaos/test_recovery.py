"""Once a fault is over, deliveries resume at once; until then nobody hammers the broker or fills the log."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest

from pubsub_facade import AsyncPubSub, Settings
from tests.chaos import injuries
from tests.chaos.world import FORMS, HEARTBEAT, World

RESUME: Final = 2.0  # s from the end of a fault to the next delivery
KAFKA_JOINS: Final = 10.0  # s: a group with no member yet, on a broker that has just come, may wait so long
PATIENCE: Final = 30.0  # s
LINES: Final = (
    16  # of the log, for one fault: a link is lost, its member joins again, each change is one line
)

NOTICED: Final = {"kafka": 6 + 10, "rabbitmq": 1.5 * HEARTBEAT}
"""Seconds to notice that nothing comes any more; Kafka: `session_timeout`, and `connect_timeout` for a new link."""

BROKERED = [pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS if form != "sqlite"]


def refused_for_three_seconds(world: World) -> None:
    assert world.proxy is not None
    world.proxy.refuse()
    time.sleep(3)
    world.proxy.restore()


FAULTS: Final = (
    injuries.cut_every_connection,
    refused_for_three_seconds,
    injuries.half_open_link,
    injuries.stalled_link,
    injuries.broker_killed,
)


class Traffic:
    """A client that publishes to itself all the time, and when it handled something last."""

    def __init__(self, config: Path) -> None:
        self.pubsub = AsyncPubSub(Settings.load(config))
        self.handled: list[float] = []  # time.monotonic() of each
        self.pubsub.subscriber("recovery.#", subscription="recovery")(self._handle)

    async def _handle(self, number: int) -> None:
        self.handled.append(time.monotonic())

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        async with self.pubsub:
            await self.pubsub.start()
            flow = asyncio.create_task(self._publish())
            try:
                await self.since(time.monotonic())
                yield
            finally:
                flow.cancel()
                await asyncio.wait([flow])

    async def _publish(self) -> None:
        number = 0
        while True:
            number += 1
            await self.pubsub.publish("recovery.topic", number, timeout=PATIENCE)
            await asyncio.sleep(0.02)

    async def since(self, when: float) -> float:
        """Seconds from ``when`` to the first delivery handled after it, once there is one."""
        deadline = time.monotonic() + PATIENCE
        while not self.handled or self.handled[-1] < when:
            assert time.monotonic() < deadline, f"nothing was handled for {PATIENCE} s"
            await asyncio.sleep(0.01)
        return next(at for at in self.handled if at >= when) - when

    @property
    def attempts(self) -> int:
        """To connect, so far."""
        return self.pubsub._supervisor.attempts


def most_attempts(settings: Settings, seconds: float) -> float:
    """Attempts to connect in an outage of so long, by the backoff with its jitter, and one more for each end."""
    doublings = math.log2(settings.reconnect_max / settings.reconnect_min)
    return 3 + doublings + seconds / (settings.reconnect_max / 2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", BROKERED)
async def test_deliveries_resume_once_a_fault_is_over(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pubsub_facade")
    world = World(form, tmp_path, seed=0, count=0, rate=1)
    with world.serving():
        traffic = Traffic(world.config)
        async with traffic.flowing():
            for fault in FAULTS:
                await _resumes(world, traffic, fault, caplog)


async def _resumes(
    world: World, traffic: Traffic, fault: Callable[[World], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    attempts, began = traffic.attempts, time.monotonic()
    await asyncio.to_thread(fault, world)
    ended = time.monotonic()
    took = await traffic.since(ended)
    lines = [record.getMessage() for record in caplog.records]
    tries = traffic.attempts - attempts
    print(f"{world.form}: {fault.__name__}: resumed after {took:.2f} s, {tries} attempts, {len(lines)} lines")
    assert took < RESUME, f"{fault.__name__}: {lines}"
    allowed = most_attempts(traffic.pubsub.settings, time.monotonic() - began)
    assert tries <= allowed, f"{fault.__name__}: {tries} attempts to connect, {allowed:.0f} at most: {lines}"
    assert len(lines) <= LINES, f"{fault.__name__}: {lines}"
    same = [line for line, after in itertools.pairwise(lines) if line == after]
    assert not same, f"{fault.__name__}: a line for each try: {lines}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", BROKERED)
async def test_a_half_open_link_is_noticed(form: str, tmp_path: Path) -> None:
    world = World(form, tmp_path, seed=0, count=0, rate=1)
    with world.serving():
        assert world.proxy is not None
        traffic = Traffic(world.config)
        lost = asyncio.Event()
        traffic.pubsub.on_state(lambda state: lost.set() if state == "reconnecting" else None)
        async with traffic.flowing():
            world.proxy.swallow()
            began = time.monotonic()
            async with asyncio.timeout(60):
                await lost.wait()
            took = time.monotonic() - began
            world.proxy.restore()
            print(f"{form}: noticed after {took:.2f} s")
            assert took < NOTICED.get(form, 1.5 * HEARTBEAT) + 1  # the second is this machine's
            await traffic.since(time.monotonic())


@pytest.mark.timeout(60)
async def test_deliveries_resume_once_the_file_is_free(tmp_path: Path) -> None:
    world = World("sqlite", tmp_path, seed=0, count=0, rate=1)
    with world.serving():
        traffic = Traffic(world.config)
        async with traffic.flowing():
            await asyncio.to_thread(injuries.database_locked_for_a_second, world)
            assert await traffic.since(time.monotonic()) < RESUME
            assert traffic.attempts == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", BROKERED)
async def test_a_member_waits_for_a_broker_that_is_absent(form: str, tmp_path: Path) -> None:
    world = World(form, tmp_path, seed=0, count=0, rate=1)
    with world.serving():
        assert world.proxy is not None
        world.proxy.refuse()
        traffic = Traffic(world.config)
        stop = asyncio.Event()
        serving = asyncio.create_task(traffic.pubsub.serve(stop))
        began = time.monotonic()
        while time.monotonic() < began + 3:
            await asyncio.sleep(0.05)
            assert not serving.done(), serving
        assert 2 <= traffic.attempts <= most_attempts(traffic.pubsub.settings, 3)
        world.proxy.restore()
        ended = time.monotonic()
        async with AsyncPubSub(Settings.load(world.direct)) as publisher:
            await publisher.declare("recovery.#", subscription="recovery")
            while not traffic.handled:
                assert time.monotonic() < ended + PATIENCE, "nothing arrives"
                await publisher.publish("recovery.topic", 1)
                await asyncio.sleep(0.05)
        print(f"{form}: absent at start: resumed after {traffic.handled[0] - ended:.2f} s")
        assert traffic.handled[0] - ended < (KAFKA_JOINS if form == "kafka" else RESUME) + 1
        stop.set()
        await serving
