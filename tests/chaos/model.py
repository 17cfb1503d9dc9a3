"""A tiny model of the contract, and a state machine that holds a backend against it, step by step.

The model of a subscription is three sets of message ids: waiting, in hand, dead. Every step is something a user
or the world can do; after each, what the backend hands out must be what the model says is there. Only where a
seek went before may some ids come that need not: what was published before the declaration, and retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import uuid
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pubsub_facade import AsyncPubSub, Backoff, ConnectionLost, Delivery, Settings, Stream
from pubsub_facade.backends.base import Receiver
from pubsub_facade.backends.sqlite import SqliteBackend
from pubsub_facade.topics import matches

T = TypeVar("T")

TOPICS = ("a", "a.b", "a.c", "a.b.c", "b.c")
PATTERNS = ("#", "a.*", "a.#", "*.c", "a.b.c", "#.c")
NAMES = ("one", "two")
MAX_ATTEMPTS = 3


@dataclass
class Expected:
    """What one subscription holds, by the model."""

    pattern: str
    waiting: dict[str, int] = field(default_factory=dict)  # id -> attempt it must come with, at least
    dead: set[str] = field(default_factory=set)
    hand: dict[str, Delivery] = field(default_factory=dict)
    maybe: set[str] = field(default_factory=set)  # what a seek, or a lost link, may bring and need not
    history: list[str] = field(default_factory=list)  # what was published for it since it was declared
    tried: dict[str, int] = field(default_factory=dict)  # id -> the last attempt that was seen
    stream: Stream | None = None
    left: list[Receiver] = field(default_factory=list)  # whose links were lost: what they brought comes again


def holding(machine: ContractMachine) -> bool:
    """Whether any delivery is in hand."""
    return any(expected.hand for expected in machine.expected.values())


class ContractMachine(RuleBasedStateMachine):
    """Subclass it with ``settings``: a function that makes settings with a fresh namespace."""

    settings: Callable[[str], Settings]
    patience = 20.0  # s until something that must come has not come
    moment = 0.1  # s in which nothing more may come at the end
    has_link = False  # to a broker, which a crash can cut
    has_file = False  # of which a crash leaves open what it had in hand

    @initialize(pattern=st.sampled_from(PATTERNS))
    def connect(self, pattern: str) -> None:
        self.namespace = f"model-{uuid.uuid4().hex[:10]}"
        self.published: list[tuple[str, str]] = []  # id and topic of all
        self.crashed: list[tuple[AbstractEventLoop, AsyncPubSub]] = []
        self._begin()
        self.expected: dict[str, Expected] = {NAMES[0]: Expected(pattern)}
        self.run(self.pubsub.declare(pattern, subscription=NAMES[0]))

    def _begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pubsub = AsyncPubSub(type(self).settings(self.namespace))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 2 * self.patience))

    # -- what a user does -------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), pattern=st.sampled_from(PATTERNS))
    def declare(self, name: str, pattern: str) -> None:
        known = self.expected.setdefault(name, Expected(pattern))
        if known.stream is None:
            self.run(self.pubsub.declare(known.pattern, subscription=name))

    @rule(topic=st.sampled_from(TOPICS), count=st.integers(1, 3))
    def publish(self, topic: str, count: int) -> None:
        for _ in range(count):
            message = self.run(self.pubsub.publish(topic, {"n": count}, key=topic))
            for expected in self.expected.values():
                if matches(expected.pattern, topic):
                    expected.waiting[message.id] = 1
                    expected.history.append(message.id)
            self.published.append((message.id, topic))

    @precondition(lambda self: any(expected.waiting for expected in self.expected.values()))
    @rule(data=st.data(), count=st.integers(1, 3))
    def receive(self, data: st.DataObject, count: int) -> None:
        name = data.draw(
            st.sampled_from(sorted(name for name, each in self.expected.items() if each.waiting))
        )
        for _ in range(min(count, len(self.expected[name].waiting))):
            self._take(name)

    def _take(self, name: str) -> None:
        expected = self.expected[name]
        stream = self._stream(name)
        try:
            delivery = self.run(stream.receive(self.patience))
            while delivery.receiver in expected.left:
                delivery = self.run(stream.receive(self.patience))
        except TimeoutError:
            raise AssertionError(
                f"{name}: nothing came within {self.patience} s; waiting are {expected.waiting}"
            ) from None
        assert delivery.id in expected.waiting or delivery.id in expected.maybe, (
            f"{name} got {delivery!r}, which the model does not have waiting"
        )
        least = expected.waiting.pop(delivery.id, 1)
        expected.tried[delivery.id] = delivery.attempt
        assert delivery.attempt >= least, f"{delivery!r} came as attempt {delivery.attempt}, not {least}"
        assert matches(expected.pattern, delivery.topic)
        if delivery.id in expected.hand:
            self.run(delivery.ack())  # a twin that a seek brought
        else:
            expected.hand[delivery.id] = delivery

    def _stream(self, name: str) -> Stream:
        expected = self.expected[name]
        if expected.stream is None:
            expected.stream = self.pubsub.subscribe(
                expected.pattern,
                subscription=name,
                max_attempts=MAX_ATTEMPTS,
                backoff=Backoff(initial=0.01, maximum=0.01),
            )
            self.run(expected.stream.__aenter__())
        return expected.stream

    def _in_hand(self, data: st.DataObject) -> tuple[Expected, Delivery]:
        names = sorted(name for name, expected in self.expected.items() if expected.hand)
        expected = self.expected[data.draw(st.sampled_from(names))]
        return expected, expected.hand.pop(data.draw(st.sampled_from(sorted(expected.hand))))

    @precondition(holding)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        _, delivery = self._in_hand(data)
        self.run(delivery.ack())
        self.run(delivery.ack())  # a second settlement does nothing

    @precondition(holding)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        expected, delivery = self._in_hand(data)
        self.run(delivery.retry())
        if delivery.attempt >= MAX_ATTEMPTS:
            expected.dead.add(delivery.id)
        else:
            expected.waiting[delivery.id] = delivery.attempt + 1

    @precondition(holding)
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        expected, delivery = self._in_hand(data)
        self.run(delivery.reject("the model says so"))
        expected.dead.add(delivery.id)

    @precondition(holding)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        expected, delivery = self._in_hand(data)
        self.run(delivery.release())
        expected.waiting[delivery.id] = 1

    @precondition(lambda self: any(expected.dead for expected in self.expected.values()))
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, each in self.expected.items() if each.dead)))
        expected = self.expected[name]
        id = data.draw(st.sampled_from(sorted(expected.dead)))
        assert self.run(self.pubsub.dead_letters(name).replay([id])) == 1
        expected.dead.discard(id)
        expected.waiting[id] = 1

    @precondition(lambda self: self.pubsub.capabilities.replay and self._away())
    @rule(data=st.data(), to=st.sampled_from(("beginning", "end")))
    def seek(self, data: st.DataObject, to: Literal["beginning", "end"]) -> None:
        name = data.draw(st.sampled_from(self._away()))
        expected = self.expected[name]
        self.run(self.pubsub.seek(name, to))
        expected.maybe |= {id for id, topic in self.published if matches(expected.pattern, topic)}
        expected.waiting = dict.fromkeys(expected.history, 1) if to == "beginning" else {}

    def _away(self) -> list[str]:
        """Subscriptions of which no member is there."""
        return sorted(name for name, expected in self.expected.items() if expected.stream is None)

    # -- what the world does ----------------------------------------------------------------------

    @precondition(lambda self: any(expected.stream for expected in self.expected.values()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, each in self.expected.items() if each.stream)))
        self._leave(self.expected[name])

    def _leave(self, expected: Expected) -> None:
        stream, expected.stream = expected.stream, None
        if stream is not None:
            self.run(stream.close())
        self._came_back(expected)

    def _came_back(self, expected: Expected) -> None:
        for id in expected.hand:
            expected.waiting[id] = 1
        expected.hand.clear()

    @rule()
    def lose_the_link(self) -> None:
        supervisor = self.pubsub._supervisor
        for expected in self.expected.values():
            consumer = expected.stream and expected.stream._consumer
            if consumer and consumer._receiver is not None:
                expected.left.append(consumer._receiver)
            # What is on its way when a link is lost may be handed out before and after.
            if type(self).has_link:
                expected.maybe |= expected.waiting.keys() | expected.hand.keys()
        self.run(supervisor.lost(supervisor.epoch, ConnectionLost("the model cut it")))
        for expected in self.expected.values():
            self._came_back(expected)

    @precondition(
        lambda self: (
            (type(self).has_link or type(self).has_file) and not self.crashed and self._may_be_tried_again()
        )
    )
    @rule()
    def crash(self) -> None:
        """The process ends at once, and another takes its place: here, its loop never turns again."""
        if type(self).has_link:
            _cut_all(self.loop)
        else:
            _end_writer(self.pubsub)
            for expected in self.expected.values():
                expected.maybe |= expected.tried.keys()  # acks that had yet to be written
        self.crashed.append((self.loop, self.pubsub))
        self._begin()
        for expected in self.expected.values():
            expected.stream = None
            self._came_back(expected)

    def _may_be_tried_again(self) -> bool:
        """Whether nothing is at its last attempt: a crash may count as one, and needs not."""
        return all(
            attempt < MAX_ATTEMPTS
            for expected in self.expected.values()
            for attempt in expected.tried.values()
        )

    # -- the end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "pubsub"):
            return
        try:
            for name, expected in self.expected.items():
                self._came_back_by_leaving(expected)
                while expected.waiting:
                    self._take(name)
                    for delivery in expected.hand.values():
                        self.run(delivery.ack())
                    expected.hand.clear()
                self._nothing_more(name)
                dead = self.run(_ids(self.pubsub, name))
                if expected.maybe:  # what is handled once more may die once more
                    dead = sorted(set(dead))
                assert dead == sorted(expected.dead), f"{name}: dead letters {dead}, model {expected.dead}"
        finally:
            self.run(self._forget())
            self.loop.close()
            for loop, pubsub in self.crashed:
                loop.run_until_complete(pubsub.close(grace=0))
                loop.close()

    def _nothing_more(self, name: str) -> None:
        expected, stream = self.expected[name], self._stream(name)
        with contextlib.suppress(TimeoutError):
            while True:
                delivery = self.run(stream.receive(self.moment))
                assert delivery.id in expected.maybe, f"{name} got {delivery!r} after all that was waiting"
                self.run(delivery.ack())

    def _came_back_by_leaving(self, expected: Expected) -> None:
        if expected.hand:
            self._leave(expected)

    async def _forget(self) -> None:
        for expected in self.expected.values():
            if expected.stream is not None:
                await expected.stream.close()
        for name in self.expected:
            await self.pubsub.delete(name)
        await self.pubsub.close()


def _cut_all(loop: AbstractEventLoop) -> None:
    """End every connection that a loop has, without a word from those who use them."""
    selector: selectors.BaseSelector = loop._selector  # type: ignore[attr-defined]
    for key in list(selector.get_map().values()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(key.fd)) as end:
            if end.family in (socket.AF_INET, socket.AF_INET6):
                end.shutdown(socket.SHUT_RDWR)


def _end_writer(pubsub: AsyncPubSub) -> None:
    """End the thread that has the file, and close its pipe, as the kernel does: nobody is told by the file."""
    backend = pubsub._supervisor.backend
    assert isinstance(backend, SqliteBackend)
    writer = backend._writer
    if writer is not None:
        writer._stopping = writer._abandoned = True
        writer._queue.put(None)
        writer.thread.join(10)
        assert not writer.thread.is_alive()


async def _ids(pubsub: AsyncPubSub, name: str) -> list[str]:
    return sorted([letter.id async for letter in pubsub.dead_letters(name)])
