"""What tests see and steer on the memory backend: what was published, its clock, its faults, when it is quiet.

Reads the hub that the clients under test meet in; adds nothing to what they do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, overload

from pubsub_facade.backends.memory import Hub, _Queue
from pubsub_facade.codec import decode
from pubsub_facade.errors import DecodeError
from pubsub_facade.message import Delivery, Message
from pubsub_facade.settings import Settings
from pubsub_facade.topics import PatternSet

LOOK: Final = 0.002  # s between two looks at whether it is quiet


class TestHub:
    """The hub of one test.

    Arguments:
        name: of the memory hub: clients with ``url`` meet in it.
    """

    __test__ = False

    def __init__(self, name: str) -> None:
        self.url = f"memory://{name}"
        self._name = name
        self._hub = Hub.named(name)

    def settings(self, **overrides: Any) -> Settings:
        """Settings of a client that meets here; ``overrides`` are fields of `Settings`."""
        return Settings.load(url=self.url, **overrides)

    def advance(self, seconds: float) -> None:
        """Let retries, delayed messages and held keys become due ``seconds`` sooner, without waiting."""
        self._hub.advance(seconds)

    def fail(self, operation: str, error: BaseException) -> None:
        """The next ``open``, ``send``, ``declare``, ``consume``, ``receive``, ``park`` or ``bury`` raises ``error``."""
        self._hub.fail(operation, error)

    @property
    def quiet(self) -> bool:
        """Whether no subscription with a member has a message that is due, or in a handler's hands.

        What waits for a retry, and what waits behind it by key, is quiet until `advance` makes it due.
        """
        hub = self._hub
        with hub.lock:
            now = hub.now()
            held = [timer.delivery for timer in hub.timers if timer.due > now]
            spaces = list(hub.namespaces.values())
            return not any(
                (space.delayed and space.delayed[0].due <= now)
                or any(_busy(queue, held, now) for queue in space.all() if queue.receivers)
                for space in spaces
            )

    def drain(self, timeout: float = 10) -> None:
        """Wait until it is `quiet`; TimeoutError after ``timeout`` seconds. For sync tests."""
        deadline = time.monotonic() + timeout
        while not self.quiet:
            self._check(deadline, timeout)
            time.sleep(LOOK)

    async def adrain(self, timeout: float = 10) -> None:
        """`drain` for async tests."""
        deadline = time.monotonic() + timeout
        while not self.quiet:
            self._check(deadline, timeout)
            await asyncio.sleep(LOOK)

    def _check(self, deadline: float, timeout: float) -> None:
        if time.monotonic() > deadline:
            spaces = self._hub.namespaces.values()
            busy = [
                f"{name}: {len(queue.ready)} wait, {len(queue.out)} in hand"
                for space in spaces
                for name, queue in space.queues.items()
                if queue.receivers and (queue.ready or queue.out)
            ]
            raise TimeoutError(f"subscriptions are still busy after {timeout:g} s: {'; '.join(busy)}")

    def forget(self) -> None:
        """Drop everything: members are cut off, the name is free."""
        self._hub.reset()
        Hub.drop(self._name)


def _busy(queue: _Queue, held: Sequence[Delivery], now: float) -> bool:
    mine = [delivery for delivery in held if delivery.receiver in queue.receivers]
    tags = {delivery.tag for delivery in mine}
    keys = {delivery.key for delivery in mine if queue.ordered and delivery.key is not None}
    due = [entry for entry in queue.parked if entry.due <= now]
    return any(
        entry.sequence not in tags and entry.message.key not in keys
        for entry in (*due, *queue.ready, *(entry for entry, _ in queue.out.values()))
    )


class Published(Sequence[Message]):
    """What was published on a test's hub so far, oldest first, each as its receivers see it.

    Looks at the last 10,000 messages of each namespace. Payloads are decoded: a model is what its JSON says.
    """

    def __init__(self, hub: TestHub) -> None:
        self._hub = hub._hub
        self._cleared: set[str] = set()

    def _stored(self) -> list[Message]:
        with self._hub.lock:
            return [message for space in self._hub.namespaces.values() for message in space.history]

    def _messages(self) -> list[Message]:
        stored = sorted(self._stored(), key=lambda message: message.timestamp or 0)
        return [_received(message) for message in stored if message.id not in self._cleared]

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return self._messages()[index]

    def __len__(self) -> int:
        return len(self._messages())

    def __iter__(self) -> Iterator[Message]:
        return iter(self._messages())

    def on(self, *patterns: str) -> list[Message]:
        """Those on topics that match a pattern."""
        wanted = PatternSet(patterns)
        return [message for message in self._messages() if wanted.matches(message.topic)]

    @property
    def topics(self) -> list[str]:
        """The topic of each."""
        return [message.topic for message in self._messages()]

    def one(self, pattern: str = "#", **fields: Any) -> Message:
        """The only one on ``pattern`` whose payload has these fields; AssertionError if there is none or more."""
        found = [message for message in self.on(pattern) if _has(message.payload, fields)]
        if len(found) != 1:
            wish = f"{pattern!r} with {fields}" if fields else f"{pattern!r}"
            seen = "".join(f"\n  {message.topic}: {message.payload!r}" for message in self._messages())
            raise AssertionError(
                f"{len(found)} messages were published on {wish}, not 1; published were:{seen or ' none'}"
            )
        return found[0]

    def clear(self) -> None:
        """Forget what was published so far."""
        self._cleared.update(message.id for message in self._messages())

    def __repr__(self) -> str:
        return f"<{len(self)} published: {self.topics}>"


def _has(payload: Any, fields: Mapping[str, Any]) -> bool:
    if not fields:
        return True
    if not isinstance(payload, Mapping):
        return False
    return all(name in payload and payload[name] == value for name, value in fields.items())


def _received(message: Message) -> Message:
    copy = Message(
        message.topic,
        None,
        key=message.key,
        headers=dict(message.headers),
        id=message.id,
        delay=message.delay,
    )
    copy.body, copy.content_type, copy.timestamp = message.body, message.content_type, message.timestamp
    try:
        copy.payload = decode(message.body, message.content_type)
    except DecodeError:
        copy.payload = message.body
    return copy
