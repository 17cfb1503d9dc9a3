"""Confirmed publishing: what is confirmed is stored, what is not says so, and a lost link is made good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from pubsub_facade import (
    AuthenticationFailed,
    Closed,
    ConnectionFailed,
    ConnectionLost,
    Message,
    PublishTimeout,
    SendFailed,
)
from pubsub_facade.publisher import MAX_BATCH, MAX_BATCH_BYTES, Publisher
from pubsub_facade.supervisor import Supervisor

Step = Callable[[Sequence[Message]], Any]


class Broker:
    """A backend that keeps what it is sent, and does ``steps`` first, one a call."""

    name = "fake"
    place = ""

    def __init__(self, pipeline: int = 1, *, begins: bool = False) -> None:
        self.pipeline = pipeline
        self.begins = begins
        self.stored: list[str] = []
        self.batches: list[list[str]] = []
        self.steps: list[Step] = []
        self.opens: list[BaseException | None] = []

    async def open(self) -> None:
        error = self.opens.pop(0) if self.opens else None
        if error is not None:
            raise error

    async def close(self) -> None: ...

    def begin(self, messages: Sequence[Message]) -> asyncio.Future[None] | None:
        return asyncio.ensure_future(self.send(messages)) if self.begins else None

    async def send(self, messages: Sequence[Message]) -> None:
        ids = [message.id for message in messages]
        self.batches.append(ids)
        if self.steps:
            result = self.steps.pop(0)(messages)
            if asyncio.isfuture(result) or asyncio.iscoroutine(result):
                await result
        self.stored += ids


class Bench:
    def __init__(self, pipeline: int = 1, *, begins: bool = False) -> None:
        self.broker = Broker(pipeline, begins=begins)
        backend: Any = self.broker
        self.supervisor = Supervisor(backend, 0.01, 0.05)
        self.publisher = Publisher(self.supervisor)

    def publish(self, *ids: str, timeout: float = 5, body: bytes = b"x") -> asyncio.Task[None]:
        messages = [Message("t", None, id=id) for id in ids]
        for message in messages:
            message.body = body
        return asyncio.create_task(self.publisher.publish(messages, timeout))


@pytest.fixture(
    params=[(1, False), (4, False), (4, True)], ids=["one at a time", "several, by tasks", "several, begun"]
)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    pipeline, begins = request.param
    bench = Bench(pipeline, begins=begins)
    yield bench
    await bench.publisher.close(0)
    await bench.supervisor.close()


@pytest.fixture
async def single() -> AsyncIterator[Bench]:
    """With a broker that takes one batch at a time: what comes meanwhile waits in line."""
    bench = Bench()
    yield bench
    await bench.publisher.close(0)
    await bench.supervisor.close()


def failing(error: BaseException) -> Step:
    def step(messages: Sequence[Message]) -> None:
        raise error

    return step


def gated(gate: asyncio.Event) -> Step:
    return lambda messages: gate.wait()


async def test_what_queued_while_a_batch_was_under_way_is_the_next_batch(single: Bench) -> None:
    gate = asyncio.Event()
    single.broker.steps.append(gated(gate))
    first = single.publish("first")
    while not single.broker.batches:  # noqa: ASYNC110 - until the pump has taken it
        await asyncio.sleep(0)
    others = [single.publish(f"id-{n}") for n in range(50)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *others)
    assert single.broker.batches == [["first"], [f"id-{n}" for n in range(50)]]


async def test_batches_are_bounded_in_count_and_bytes(bench: Bench) -> None:
    await bench.publish(*(f"id-{n}" for n in range(2 * MAX_BATCH + 1)))
    assert [len(batch) for batch in bench.broker.batches] == [MAX_BATCH, MAX_BATCH, 1]
    bench.broker.batches.clear()
    await bench.publish(*(f"big-{n}" for n in range(5)), body=bytes(MAX_BATCH_BYTES // 2))
    assert [len(batch) for batch in bench.broker.batches] == [2, 2, 1]


async def test_a_lost_link_is_made_good_with_the_same_messages_in_order(bench: Bench) -> None:
    bench.broker.steps += [failing(ConnectionLost("cut")), failing(ConnectionLost("cut again"))]
    tasks = [bench.publish(f"id-{n}") for n in range(10)]
    await asyncio.gather(*tasks)
    assert bench.broker.stored == [f"id-{n}" for n in range(10)]
    assert len(bench.broker.batches) == 3
    assert bench.supervisor.attempts == 3


async def test_with_batches_in_flight_everything_unconfirmed_is_sent_again_in_the_old_order() -> None:
    bench = Bench(pipeline=3)
    gates = [asyncio.Event() for _ in range(3)]

    def lost_when(gate: asyncio.Event) -> Step:
        async def step() -> None:
            await gate.wait()
            raise ConnectionLost("cut")

        return lambda messages: step()

    bench.broker.steps += [lost_when(gates[0]), gated(gates[1]), lost_when(gates[2])]
    tasks = [bench.publish(*(f"{batch}-{n}" for n in range(MAX_BATCH))) for batch in "abcd"]
    while len(bench.broker.batches) < 3:  # noqa: ASYNC110 - until three are in flight
        await asyncio.sleep(0)
    gates[2].set()
    gates[1].set()  # the one in the middle was confirmed
    await asyncio.sleep(0.01)
    assert len(bench.broker.batches) == 3, "nothing is sent before all that was in flight has come back"
    gates[0].set()
    await asyncio.gather(*tasks)
    firsts = [batch[0] for batch in bench.broker.batches]
    assert firsts == ["a-0", "b-0", "c-0", "a-0", "c-0", "d-0"]
    assert len(bench.broker.stored) == len(set(bench.broker.stored)) == 4 * MAX_BATCH
    await bench.publisher.close(0)
    await bench.supervisor.close()


async def test_with_nothing_else_in_line_what_was_in_flight_is_sent_again() -> None:
    bench = Bench(pipeline=3)
    gate = asyncio.Event()

    async def lost() -> None:
        await gate.wait()
        raise ConnectionLost("cut")

    bench.broker.steps.append(lambda messages: lost())
    task = bench.publish("a", "b")
    while not bench.broker.batches:  # noqa: ASYNC110 - until it is in flight
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # the pump waits for more
    gate.set()
    await task
    assert bench.broker.batches == [["a", "b"], ["a", "b"]]
    await bench.publisher.close(0)
    await bench.supervisor.close()


async def test_a_wrong_password_after_a_lost_link_is_told_with_what_is_unknown() -> None:
    bench = Bench(pipeline=3)
    bench.broker.opens = [None, AuthenticationFailed("the password was changed")]
    bench.broker.steps.append(failing(ConnectionLost("cut")))
    with pytest.raises(SendFailed, match="password was changed") as caught:
        await bench.publish("a")
    assert caught.value.fates == {"a": "unknown"}
    await bench.publish("b")
    assert bench.broker.stored == ["b"]
    await bench.publisher.close(0)
    await bench.supervisor.close()


async def test_a_batch_that_failed_in_part_fails_only_its_own_callers(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.broker.steps += [
        gated(gate),
        failing(SendFailed("refused", {"b": "not stored", "d": "unknown"})),
    ]
    first = bench.publish("first")
    while not bench.broker.batches:  # noqa: ASYNC110
        await asyncio.sleep(0)
    good, bad, mixed = bench.publish("a"), bench.publish("b"), bench.publish("c", "d", "e")
    await asyncio.sleep(0)
    gate.set()
    await first
    await good
    with pytest.raises(SendFailed) as caught:
        await bad
    assert caught.value.fates == {"b": "not stored"}
    with pytest.raises(SendFailed) as caught:
        await mixed
    assert caught.value.fates == {"d": "unknown"}


async def test_a_fault_in_the_driver_leaves_fates_unknown_and_the_next_publish_works(bench: Bench) -> None:
    bench.broker.steps.append(failing(RuntimeError("a fault in the driver")))
    with pytest.raises(SendFailed, match="a fault in the driver") as caught:
        await bench.publish("a", "b")
    assert caught.value.fates == {"a": "unknown", "b": "unknown"}
    assert isinstance(caught.value.__cause__, RuntimeError)
    await bench.publish("c")
    assert bench.broker.stored == ["c"]


async def test_publish_waits_for_a_broker_that_is_away(bench: Bench) -> None:
    bench.broker.opens = [ConnectionFailed("nobody there")] * 3
    await bench.publish("a")
    assert bench.broker.stored == ["a"]
    assert bench.supervisor.attempts == 4


async def test_a_timeout_while_the_broker_is_away_says_certainly_not_stored(bench: Bench) -> None:
    bench.broker.opens = [ConnectionFailed("nobody there")] * 1000
    with pytest.raises(PublishTimeout, match="nobody there") as caught:
        await bench.publish("a", "b", timeout=0.1)
    assert caught.value.fates == {"a": "not stored", "b": "not stored"}
    bench.broker.opens.clear()
    await bench.publish("c")
    assert bench.broker.stored == ["c"], "what was given up was sent all the same"


async def test_a_timeout_without_a_confirm_says_unknown(single: Bench) -> None:
    gate = asyncio.Event()
    single.broker.steps.append(gated(gate))
    slow = single.publish("a", timeout=0.1)
    while not single.broker.batches:  # noqa: ASYNC110
        await asyncio.sleep(0)
    behind = single.publish("b", timeout=0.05)
    with pytest.raises(PublishTimeout) as caught:
        await behind
    assert caught.value.fates == {"b": "not stored"}
    with pytest.raises(PublishTimeout) as caught:
        await slow
    assert caught.value.fates == {"a": "unknown"}
    gate.set()
    await single.publish("c")
    assert single.broker.stored == ["a", "c"]


async def test_each_publish_has_a_timeout_of_its_own(bench: Bench) -> None:
    bench.broker.opens = [ConnectionFailed("nobody there")] * 1000
    patient = bench.publish("patient", timeout=30)
    hasty = bench.publish("hasty", timeout=0.05)
    with pytest.raises(PublishTimeout):
        await hasty
    assert not patient.done()
    bench.broker.opens.clear()
    await patient
    assert bench.broker.stored == ["patient"]


async def test_a_wrong_password_is_told_at_once_to_everybody_in_line(bench: Bench) -> None:
    bench.broker.opens = [AuthenticationFailed("wrong password")]
    tasks = [bench.publish("a"), bench.publish("b")]
    for task in tasks:
        with pytest.raises(AuthenticationFailed):
            await task


async def test_a_waiter_that_is_cancelled_takes_nothing_with_it(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.broker.steps.append(gated(gate))
    tasks = [bench.publish("a"), bench.publish("b"), bench.publish("c")]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()
    gate.set()
    await tasks[2]
    assert bench.broker.stored == ["a", "b", "c"]
    assert not bench.publisher._pending


async def test_close_waits_for_what_is_in_line_and_refuses_what_comes_later(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.broker.steps.append(gated(gate))
    task = bench.publish("a")
    while not bench.broker.batches:  # noqa: ASYNC110
        await asyncio.sleep(0)
    closing = asyncio.create_task(bench.publisher.close(10))
    await asyncio.sleep(0)
    with pytest.raises(Closed):
        await bench.publish("late")
    gate.set()
    await asyncio.wait_for(closing, 5)
    await task
    assert bench.broker.stored == ["a"]


async def test_what_close_cannot_wait_for_is_told_with_its_fate(single: Bench) -> None:
    single.broker.steps.append(gated(asyncio.Event()))
    sent = single.publish("sent")
    while not single.broker.batches:  # noqa: ASYNC110
        await asyncio.sleep(0)
    unsent = single.publish("unsent")
    await asyncio.sleep(0)
    await asyncio.wait_for(single.publisher.close(0.05), 5)
    with pytest.raises(SendFailed) as caught:
        await sent
    assert caught.value.fates == {"sent": "unknown"}
    with pytest.raises(Closed):
        await unsent


async def test_a_driver_that_cannot_open_for_a_reason_of_its_own_is_told(bench: Bench) -> None:
    bench.broker.opens = [RuntimeError("a fault while opening")]
    with pytest.raises(Exception, match="a fault while opening"):
        await bench.publish("a", timeout=0.3)
    await bench.publish("b")
    assert bench.broker.stored == ["b"]


async def test_what_a_driver_cannot_begin_fails_and_holds_up_nobody() -> None:
    bench = Bench(pipeline=3, begins=True)
    begin = bench.broker.begin

    def faulty(messages: Sequence[Message]) -> asyncio.Future[None] | None:
        if messages[0].id == "bad":
            raise RuntimeError("a fault in the driver")
        return begin(messages)

    bench.broker.begin = faulty  # type: ignore[method-assign]
    await bench.publish("a")
    with pytest.raises(SendFailed, match="a fault in the driver") as caught:
        await bench.publish("bad")
    assert caught.value.fates == {"bad": "unknown"}
    await bench.publish("b")
    assert bench.broker.stored == ["a", "b"]
    await bench.publisher.close(0)
    await bench.supervisor.close()


async def test_what_is_begun_does_not_overtake_what_still_waits() -> None:
    bench = Bench(pipeline=4, begins=True)
    gate = asyncio.Event()
    bench.broker.steps.append(gated(gate))
    begin = bench.broker.begin
    bench.broker.begin = lambda messages: None  # type: ignore[method-assign]
    first = bench.publish("first")
    while not bench.broker.batches:  # noqa: ASYNC110
        await asyncio.sleep(0)
    begun: list[str] = []

    def noted(messages: Sequence[Message]) -> asyncio.Future[None] | None:
        begun.append(messages[0].id)
        return begin(messages)

    bench.broker.begin = noted  # type: ignore[method-assign]
    second = bench.publish("second")
    await asyncio.sleep(0.01)
    assert not begun, "the second was begun while the first waited in a task"
    gate.set()
    await asyncio.gather(first, second)
    await bench.publish("third")
    assert begun == ["third"]
    await bench.publisher.close(0)
    await bench.supervisor.close()
