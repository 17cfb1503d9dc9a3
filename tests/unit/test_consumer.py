"""The engine of one member, on the memory backend with faults on demand: nothing is lost, nobody is held up."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from pubsub_facade import (
    AsyncPubSub,
    Backoff,
    Closed,
    ConnectionLost,
    Delivery,
    Message,
    Reject,
    Retry,
    Settings,
    TopologyConflict,
)
from pubsub_facade._failure_text import text_of
from pubsub_facade.backends.memory import Hub
from pubsub_facade.consumer import Consumer
from pubsub_facade.testing.conformance import Inbox, nothing_more, receive, until
from pubsub_facade.topics import check_topic

SOON = Backoff(0.01, 0.05, jitter=0)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"engine-{uuid.uuid4().hex}"
    yield name
    Hub.drop(name)


@pytest.fixture
def hub(name: str) -> Hub:
    return Hub.named(name)


@pytest.fixture
async def pubsub(name: str) -> AsyncIterator[AsyncPubSub]:
    client = AsyncPubSub(Settings.load(url=f"memory://{name}", reconnect_min=0.01, reconnect_max=0.05))
    yield client
    await client.close(grace=2)


async def test_a_lost_link_is_joined_again_and_what_was_in_hand_comes_again(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        await pubsub.publish_many(Message("a", n) for n in range(5))
        old = await receive(stream, 2, ack=False)
        hub.fail("receive", ConnectionLost("cut"))
        await old[0].ack()  # wakes the member: it looks again and is cut off
        consumer = stream._consumer
        assert consumer is not None
        await until(lambda: consumer._receiver is not old[0].receiver, "joined again")
        got = await receive(stream, 4, ack=False)
        await old[1].ack()  # of the old link: does nothing
        assert sorted(d.payload for d in got) == [1, 2, 3, 4]
        for delivery in got:
            await delivery.ack()
        await nothing_more(stream)


async def test_a_fault_in_the_driver_is_survived(pubsub: AsyncPubSub, hub: Hub) -> None:
    inbox = Inbox()
    pubsub.subscriber("a", subscription="s")(inbox)
    hub.fail("receive", RuntimeError("a fault in the driver"))
    await pubsub.start()
    hub.fail("consume", RuntimeError("and another one while joining again"))
    sent = await pubsub.publish("a", 1)
    await inbox.until(1)
    assert inbox.ids == [sent.id]


async def test_a_member_that_cannot_join_again_says_so(pubsub: AsyncPubSub, hub: Hub) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        hub.fail("declare", TopologyConflict("somebody made it a queue of another kind"))
        hub.fail("receive", ConnectionLost("cut"))
        await pubsub.publish("a", 1)  # wakes the member: it looks again and is cut off
        with pytest.raises(TopologyConflict, match="another kind"):
            await stream.receive(10)


async def test_a_handler_at_work_while_the_link_is_lost_finishes_and_the_message_comes_again(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    gate, inbox = asyncio.Event(), Inbox()

    async def handle(delivery: Delivery) -> None:
        inbox.note(delivery)
        await gate.wait()

    pubsub.subscriber("a", subscription="s", ordered=True)(handle)
    await pubsub.start()
    sent = await pubsub.publish("a", 1, key="k")
    await inbox.until(1)
    hub.fail("receive", ConnectionLost("cut"))
    await pubsub.publish("a", 2, key="other")
    gate.set()
    await inbox.until(3)
    assert inbox.ids.count(sent.id) == 2, "the ack of the old link settled a message of the new one"


async def test_copies_that_are_not_stored_are_kept_and_stored_later(pubsub: AsyncPubSub, hub: Hub) -> None:
    def act(delivery: Delivery) -> None:
        if delivery.attempt < 3:
            raise ValueError("again")

    inbox = Inbox(act)
    pubsub.subscriber("a", subscription="s", backoff=SOON)(inbox)
    await pubsub.start()
    for _ in range(2):
        hub.fail("park", RuntimeError("the broker is full"))
    await pubsub.publish("a", 1)
    await inbox.until(3)
    assert [seen.attempt for seen in inbox.seen] == [1, 2, 3]


async def test_a_dead_letter_that_is_not_stored_is_kept_and_stored_later(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        hub.fail("bury", RuntimeError("the broker is full"))
        await pubsub.publish("a", 1)
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.reject("bad")  # returns when the copy is stored
        assert await pubsub.dead_letters("s").count() == 1


async def test_who_waits_for_a_copy_that_is_not_stored_in_time_is_told_so(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        for _ in range(100):
            hub.fail("bury", RuntimeError("the broker is full"))
        sent = await pubsub.publish("a", 1)
        (delivery,) = await receive(stream, 1, ack=False)
        rejecting = asyncio.create_task(delivery.reject("bad"))
        await until(lambda: delivery.settled, "it is under way")
    with pytest.raises(Closed, match="comes again"):
        await asyncio.wait_for(rejecting, 5)
    async with pubsub.subscribe("a", subscription="s") as stream:
        assert [d.id for d in await receive(stream, 1)] == [sent.id]


@pytest.mark.parametrize("operation", ["park", "bury"])
async def test_a_link_lost_while_a_copy_is_stored_loses_no_message(
    pubsub: AsyncPubSub, hub: Hub, operation: str
) -> None:
    inbox = Inbox()
    seen: list[str] = []

    async def handle(delivery: Delivery) -> None:
        inbox.note(delivery)
        seen.append(delivery.id)
        if seen.count(delivery.id) == 1:
            hub.fail(operation, ConnectionLost("cut"))
            hub.fail("receive", ConnectionLost("cut"))
            if operation == "park":
                raise ValueError("again")
            await delivery.reject("bad")

    pubsub.subscriber("a", subscription="s", backoff=SOON)(handle)
    await pubsub.start()
    first = await pubsub.publish("a", 1)
    await inbox.until(1)
    second = await pubsub.publish("a", 2)  # the member looks again and finds the link lost
    await inbox.until_true(lambda: inbox.ids.count(first.id) >= 2, "the first message again")
    await inbox.until_ids([second.id])


async def test_a_copy_for_an_old_link_does_not_hold_its_key(pubsub: AsyncPubSub) -> None:
    """A dead letter of an old link and one of the present link are stored in one go; both fail."""
    async with pubsub.subscribe("a", subscription="s", ordered=True) as stream:
        await pubsub.publish_many([Message("a", 1, key="k"), Message("a", 2, key="j")])
        old, present = await receive(stream, 2, ack=False)
        consumer = stream._consumer
        assert consumer is not None

        class Refusing:
            async def bury(self, deliveries: list[Delivery]) -> None:
                raise RuntimeError("gone")

        live = present.receiver
        old.receiver = Refusing()  # type: ignore[assignment]
        failing = live.bury
        calls: list[int] = []

        async def once(deliveries: list[Delivery]) -> None:
            calls.append(len(deliveries))
            if len(calls) == 1:
                raise RuntimeError("not now")
            await failing(deliveries)

        live.bury = once  # type: ignore[method-assign, assignment]
        await asyncio.wait_for(asyncio.gather(present.reject("x"), old.reject("x")), 10)
        assert calls == [1, 1]
        await pubsub.publish("a", 3, key="k")
        (behind,) = await receive(stream, 1)
        assert behind.payload == 3


async def test_a_message_whose_attempts_were_lost_with_their_processes_is_a_dead_letter(
    pubsub: AsyncPubSub, hub: Hub
) -> None:
    async with pubsub.subscribe("a", subscription="s", max_attempts=2) as stream:
        sent = await pubsub.publish("a", 1)
        (delivery,) = await receive(stream, 1, ack=False)
        entry, _ = hub.namespaces["pubsub"].queues["s"].out[delivery.tag]
        entry.attempt = 3  # what a broker that counts says after the second crash
        await delivery.release()
        await nothing_more(stream)
        (letter,) = [letter async for letter in pubsub.dead_letters("s")]
        assert letter.id == sent.id
        assert letter.failure is not None
        assert (letter.failure.error_type, letter.failure.attempts) == ("ProcessLost", 2)


async def test_a_delivery_awaited_by_two_tasks_is_not_forgotten_when_one_leaves(pubsub: AsyncPubSub) -> None:
    """The first is woken and cancelled in the same turn of the loop: the second gets what came."""
    async with pubsub.subscribe("a", subscription="s") as stream:
        first = asyncio.create_task(stream.receive())
        second = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        consumer = stream._consumer
        assert consumer is not None
        await until(lambda: len(consumer._idle) == 2, "both wait")
        consumer._lanes.push(Delivery(consumer._receiver, 1, "s", "a", b"x"))  # type: ignore[arg-type]
        consumer._wake()
        first.cancel()
        delivery = await asyncio.wait_for(second, 5)
        assert delivery.body == b"x"
        assert first.cancelled()


async def test_a_wait_that_times_out_in_the_turn_a_message_comes_breaks_nothing(pubsub: AsyncPubSub) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        consumer = stream._consumer
        assert consumer is not None
        waiting = asyncio.create_task(stream.receive())
        await until(lambda: len(consumer._idle) == 1, "it waits")
        waiting.cancel()  # its future is cancelled now, its task runs later
        consumer._idle[0].cancel()
        receiver = consumer._receiver
        consumer._lanes.push(Delivery(receiver, 1, "s", "a", b"x"))  # type: ignore[arg-type]
        consumer._wake()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert consumer.receiving
        taken = consumer.take()
        assert taken is not None
        assert taken.body == b"x"


async def test_a_handler_that_does_not_end_when_cancelled_does_not_hold_close(
    pubsub: AsyncPubSub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_facade.workers.STOP_TIMEOUT", 0.1)
    entered, gate = asyncio.Event(), asyncio.Event()

    async def handle(payload: int) -> None:
        entered.set()
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    pubsub.subscriber("a", subscription="s")(handle)
    await pubsub.start()
    await pubsub.publish("a", 1)
    await entered.wait()
    await asyncio.wait_for(pubsub.close(grace=0.1), 5)
    gate.set()
    left = [task for task in asyncio.all_tasks() if task.get_name().startswith("pubsub-handler")]
    await asyncio.wait(left, timeout=5)


async def test_a_failure_during_the_drain_waits_for_nothing(pubsub: AsyncPubSub) -> None:
    """An ordered message that fails while closing is not held for its backoff: it goes back."""
    entered = asyncio.Event()
    stopped = asyncio.Event()

    async def handle(payload: int) -> None:
        entered.set()
        await stopped.wait()
        raise ValueError("again in an hour")

    pubsub.subscriber("a", subscription="s", ordered=True, backoff=Backoff(3600, 3600))(handle)
    await pubsub.start()
    sent = await pubsub.publish("a", 1, key="k")
    await entered.wait()
    consumer = pubsub._members[0][0]
    closing = asyncio.create_task(pubsub.close())
    await until(lambda: consumer._stopping, "it drains")
    stopped.set()
    await asyncio.wait_for(closing, 5)
    assert not consumer._held
    async with AsyncPubSub(pubsub.settings) as other, other.subscribe("a", subscription="s") as stream:
        assert [d.id for d in await receive(stream, 1)] == [sent.id]


async def test_cancelling_all_tasks_ends_the_workers(name: str) -> None:
    """What `asyncio.run` does at its end to a client nobody closed: it must not hang."""
    client = AsyncPubSub(url=f"memory://{name}")
    entered = asyncio.Event()

    async def handle(payload: int) -> None:
        entered.set()
        await asyncio.sleep(3600)

    client.subscriber("a", subscription="s", concurrency=3)(handle)
    await client.start()
    await client.publish("a", 1)
    await entered.wait()
    mine = [task for task in asyncio.all_tasks() if task.get_name().startswith("pubsub")]
    for task in mine:
        task.cancel()
    _, running = await asyncio.wait(mine, timeout=5)
    assert not running
    await client.close(grace=0)


async def test_a_stream_that_cannot_be_entered_is_forgotten(pubsub: AsyncPubSub, hub: Hub) -> None:
    hub.fail("declare", TopologyConflict("no"))
    with pytest.raises(TopologyConflict):
        async with pubsub.subscribe("a", subscription="s"):
            pass
    assert not pubsub._streams


async def test_a_member_keeps_nothing_of_what_it_has_settled(
    pubsub: AsyncPubSub, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory stays flat: after many messages of every outcome a member reaches at most its last delivery."""
    caplog.set_level(logging.CRITICAL, "pubsub_facade")  # pytest keeps log records, and so their tracebacks

    def act(delivery: Delivery) -> None:
        if delivery.payload % 10 == 0:
            raise ValueError("dies")

    for ordered in (False, True):
        inbox = Inbox(act)
        pubsub.subscriber("a", subscription=f"s-{ordered}", ordered=ordered, max_attempts=2, backoff=SOON)(
            inbox
        )
        await pubsub.start()
        await pubsub.publish_many(Message("a", n, key=str(n % 7)) for n in range(500))
        await inbox.until(550)
        consumer: Consumer = pubsub._members[-1][0]
        await consumer.settle(10)
        assert (len(consumer._lanes), consumer._held, consumer._copied, consumer._lanes._busy) == (
            0,
            {},
            {},
            set(),
        )
    gc.collect()
    mine = {consumer for consumer, _ in pubsub._members}
    kept = [each for each in gc.get_objects() if isinstance(each, Delivery) and each.settler in mine]
    assert len(kept) <= len(mine)


async def test_dead_letters_outlive_a_replay_that_failed(
    pubsub: AsyncPubSub, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    async with pubsub.subscribe("a", subscription="s") as stream:
        await pubsub.publish("a", 1)
        (delivery,) = await receive(stream, 1, ack=False)
        await delivery.reject("bad")
    hub.fail("resend", RuntimeError("full"))
    letters = pubsub.dead_letters("s")
    with pytest.raises(RuntimeError):
        await letters.replay()
    (letter,) = [letter async for letter in letters]
    assert letter.failure is not None
    assert letter.failure.error == "bad"


def _line_of(text: str) -> int:
    """The number of the line of this file that holds ``text`` first."""
    return Path(__file__).read_text().splitlines().index(text) + 1


def _lookup(counts: dict[str, int]) -> int:
    return counts["nobody"]  # the place that is told


def _load(body: str) -> object:
    return json.loads(body)


@pytest.mark.parametrize("sync", [False, True])
async def test_a_failure_tells_its_place_and_the_last_one_its_traceback(
    pubsub: AsyncPubSub, caplog: pytest.LogCaptureFixture, sync: bool
) -> None:
    secret = "the-value-of-a-variable"

    async def handle(payload: int) -> None:
        _lookup({secret: payload})

    def handle_here(payload: int) -> None:
        _lookup({secret: payload})

    caplog.set_level(logging.INFO, "pubsub_facade")
    pubsub.subscriber("a", subscription="s", max_attempts=2, backoff=SOON)(handle_here if sync else handle)
    await pubsub.start()
    await pubsub.publish("a", 1)
    letters = pubsub.dead_letters("s")
    while not await letters.count():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    line = _line_of('    return counts["nobody"]  # the place that is told')
    place = f"'nobody' (tests/unit/test_consumer.py:{line} in _lookup)"
    (letter,) = [letter async for letter in letters]
    assert letter.failure is not None
    assert (letter.failure.error_type, letter.failure.error) == ("KeyError", place)
    retried, buried = [record for record in caplog.records if "attempt" in record.getMessage()]
    assert retried.getMessage().endswith(f"KeyError: {place}")
    assert retried.exc_info is None
    assert buried.getMessage().endswith(f"KeyError: {place}")
    assert caplog.text.count("Traceback") == 1
    assert secret not in caplog.text


def _raised(function: Callable[..., object], *arguments: object) -> BaseException:
    try:
        function(*arguments)
    except BaseException as error:
        return error
    raise AssertionError


def test_the_place_is_in_the_application_and_not_in_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _line_of("    return json.loads(body)")
    assert text_of(_raised(_load, "{")).endswith(f"(tests/unit/test_consumer.py:{line} in _load)")
    inside = text_of(_raised(json.loads, "{"))  # _raised is the last of ours
    assert inside.endswith(" in _raised)")
    error = _raised(json.loads, "{")
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next  # called by nobody: the standard library tells itself
    assert re.search(r"/json/decoder\.py:\d+ in raw_decode\)$", text_of(error))
    monkeypatch.chdir("/")
    assert f"({__file__.removeprefix('/')}:" in text_of(_raised(_load, "{"))
    monkeypatch.chdir(Path(__file__).parents[1] / "contrib")
    assert f"({__file__}:" in text_of(_raised(_load, "{"))


def test_the_place_is_where_the_application_called_this_library() -> None:
    error = _raised(check_topic, "no..topic")
    assert text_of(error).endswith(" in _raised)")
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next
    assert text_of(error) == str(error)


def test_a_place_is_told_though_the_text_is_too_long_or_missing() -> None:
    def fail(text: str) -> None:
        raise ValueError(text)

    long = text_of(_raised(fail, "x" * 5000))
    assert len(long) == 2000
    assert long.endswith("x (" + text_of(_raised(fail, ""))[1:])
    assert text_of(ValueError("never raised")) == "never raised"


def test_what_a_handler_answers_on_purpose_is_told_as_it_is() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert text_of(_raised(fail, Reject("not for us"))) == "not for us"
    assert text_of(_raised(fail, Retry(5))) == "retry after 5 s"


async def test_seek_frees_the_window(pubsub: AsyncPubSub) -> None:
    async with pubsub.subscribe("a", subscription="s", window=3) as stream:
        await pubsub.publish_many(Message("a", n) for n in range(5))
        old = await receive(stream, 3, ack=False)
        await pubsub.seek("s", "beginning")
        for delivery in old:
            await delivery.ack()
        assert [d.payload for d in await receive(stream, 5)] == list(range(5))
