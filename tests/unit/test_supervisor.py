"""One connection for all who ask: one attempt at a time, backed off, told as it changes."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from pubsub_facade import AsyncPubSub, AuthenticationFailed, Closed, ConnectionFailed, ConnectionLost
from pubsub_facade.supervisor import Supervisor


class Broker:
    name = "fake"
    place = ""

    def __init__(self, *outcomes: BaseException | None) -> None:
        self.outcomes = list(outcomes)
        self.opened = 0
        self.closed = 0
        self.at_once = 0
        self.gate: asyncio.Event | None = None

    async def open(self) -> None:
        self.at_once += 1
        assert self.at_once == 1, "two attempts at once"
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
            outcome = self.outcomes.pop(0) if self.outcomes else None
            if outcome is not None:
                raise outcome
            self.opened += 1
        finally:
            self.at_once -= 1

    async def close(self) -> None:
        self.closed += 1


def supervised(*outcomes: BaseException | None) -> tuple[Supervisor, Broker]:
    broker = Broker(*outcomes)
    backend: Any = broker
    return Supervisor(backend, 0.01, 0.04), broker


async def test_however_many_ask_there_is_one_attempt() -> None:
    supervisor, broker = supervised(ConnectionFailed("away"), None)
    await asyncio.gather(*(supervisor.ready() for _ in range(20)))
    assert (broker.opened, supervisor.attempts) == (1, 2)


async def test_one_attempt_is_raised_to_who_does_not_wait() -> None:
    supervisor, broker = supervised(ConnectionFailed("away"))
    with pytest.raises(ConnectionFailed, match="away"):
        await supervisor.open()
    assert str(supervisor.last_error) == "away"
    with pytest.raises(ConnectionFailed, match="away"):  # within the pause: no attempt, the same answer
        await supervisor.open()
    assert supervisor.attempts == 1
    await supervisor.ready()
    assert supervisor.last_error is None
    assert broker.opened == 1


async def test_waiting_does_not_mend_a_wrong_password() -> None:
    supervisor, _ = supervised(AuthenticationFailed("wrong password"))
    with pytest.raises(AuthenticationFailed):
        await supervisor.ready()


async def test_attempts_are_spaced_out() -> None:
    supervisor, _ = supervised(*[ConnectionFailed("away")] * 5)
    began = asyncio.get_running_loop().time()
    await supervisor.ready()
    took = asyncio.get_running_loop().time() - began
    assert supervisor.attempts == 6
    assert took >= 0.5 * (0.01 + 0.02 + 0.04 + 0.04 + 0.04)


async def test_a_lost_link_is_closed_once_and_opened_by_the_next_who_needs_it() -> None:
    supervisor, broker = supervised()
    states: list[str] = []
    supervisor.on_state(states.append)
    await supervisor.open()
    epoch = supervisor.epoch
    await asyncio.gather(*(supervisor.lost(epoch, ConnectionLost("cut")) for _ in range(5)))
    assert (broker.opened, broker.closed) == (1, 1)
    await supervisor.open()
    await supervisor.lost(epoch, ConnectionLost("an old link's news"))
    assert (broker.opened, broker.closed) == (2, 1)
    assert states == ["connecting", "connected", "reconnecting", "connected"]


async def test_who_asks_in_the_very_turn_in_which_a_close_ended_gets_a_new_link() -> None:
    """The task is done and its callbacks have not run: waiting for it again would never let them."""
    supervisor, broker = supervised()
    await supervisor.open()
    losing = asyncio.create_task(supervisor.lost(supervisor.epoch, ConnectionLost("cut")))
    while broker.closed == 0:  # noqa: ASYNC110 - until the turn in which it is closed
        await asyncio.sleep(0)
    assert await asyncio.wait_for(supervisor.ready(), 5) is supervisor.backend
    await losing
    assert broker.opened == 2


async def test_an_operation_is_run_again_on_a_new_link() -> None:
    supervisor, broker = supervised()
    calls: list[int] = []

    async def operation(backend: Any) -> str:
        calls.append(supervisor.epoch)
        if len(calls) < 3:
            raise ConnectionLost("cut under it")
        return "done"

    assert await supervisor.run(operation) == "done"
    assert calls == [1, 2, 3]
    assert broker.opened == 3


async def test_an_operation_that_loses_every_link_fails_in_the_end() -> None:
    supervisor, _ = supervised()

    async def operation(backend: Any) -> None:
        raise ConnectionLost("cut under it")

    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(supervisor.run(operation), 10)


async def test_who_stops_waiting_does_not_stop_the_attempt() -> None:
    supervisor, broker = supervised()
    broker.gate = asyncio.Event()
    first = asyncio.create_task(supervisor.ready())
    second = asyncio.create_task(supervisor.ready())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    broker.gate.set()
    await second
    assert broker.opened == 1


async def test_closing_ends_an_attempt_and_tells_who_waits() -> None:
    supervisor, broker = supervised()
    broker.gate = asyncio.Event()
    waiting = asyncio.create_task(supervisor.ready())
    await asyncio.sleep(0.01)
    await supervisor.close()
    with pytest.raises(Closed):
        await waiting
    with pytest.raises(Closed):
        await supervisor.open()
    await supervisor.close()
    assert broker.closed == 1
    assert supervisor.state == "closed"


async def test_a_listener_that_raises_is_logged_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, _ = supervised()

    def listener(state: str) -> None:
        raise ValueError("a listener's own fault")

    supervisor.on_state(listener)
    await supervisor.open()
    assert supervisor.state == "connected"
    assert "a listener's own fault" in caplog.text


async def test_the_same_failure_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, _ = supervised(*[ConnectionFailed("away")] * 4, ConnectionFailed("still away"))
    with caplog.at_level(logging.INFO, "pubsub_facade"):
        await supervisor.ready()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["fake: away", "fake: still away", "fake: connected"]


async def test_links_that_die_young_are_made_again_less_and_less_often() -> None:
    pubsub = AsyncPubSub(url="memory://young", reconnect_min=0.02, reconnect_max=0.5)
    supervisor = pubsub._supervisor
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        await supervisor.ready()
        await supervisor.lost(supervisor.epoch, ConnectionLost("gone at once"))
    assert 3 <= supervisor.attempts <= 12, "a link that opens and dies must not be a hot loop"
    await pubsub.close()


async def test_a_further_link_that_cannot_be_made_is_waited_for_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor, broker = supervised()
    outcomes: list[BaseException | None] = [ConnectionFailed("away"), ConnectionFailed("away"), None]

    async def join(backend: Any) -> str:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome
        return "joined"

    assert await supervisor.run(join, patient=True) == "joined"
    assert [record.message for record in caplog.records] == ["fake: trying again: away"]
    assert (broker.opened, broker.closed) == (1, 0)


@pytest.mark.parametrize(
    ("error", "patient"), [(ConnectionFailed("away"), False), (AuthenticationFailed("no"), True)]
)
async def test_a_further_link_is_not_waited_for_in_vain(error: ConnectionFailed, patient: bool) -> None:
    supervisor, _ = supervised()

    async def join(backend: Any) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await supervisor.run(join, patient=patient)
