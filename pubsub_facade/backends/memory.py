"""The whole contract in one process: for tests, with faults on demand and a clock that tests can move.

All clients of one process that name the same hub (``memory://NAME``, or none) meet in it, also from
several threads and loops: one lock guards it, and a waiting receiver is woken on its own loop. Nothing
here outlives the process.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import Final

from pubsub_facade.backends._required import unheard
from pubsub_facade.backends.base import Backend, Backlog, Capabilities, Position, Receiver, Timer
from pubsub_facade.errors import ConnectionLost, SendFailed
from pubsub_facade.filters import Filter
from pubsub_facade.message import Delivery, Failure, Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscription import Subscription
from pubsub_facade.topics import PatternSet

HISTORY: Final = 10_000  # messages a namespace keeps for `seek`


class _Entry:
    """One subscription's copy of one message."""

    __slots__ = ("attempt", "due", "failure", "message", "redelivered", "sequence")

    def __init__(self, sequence: int, message: Message, due: float = 0.0) -> None:
        self.sequence = sequence
        self.message = message
        self.due = due
        self.attempt = message.attempt
        self.failure: Failure | None = message.failure
        self.redelivered = False

    def __lt__(self, other: _Entry) -> bool:
        return (self.due, self.sequence) < (other.due, other.sequence)


class _Queue:
    """A subscription: what waits in order, what waits for a time, what is out, what is dead."""

    def __init__(self, subscription: Subscription) -> None:
        self.ready: deque[_Entry] = deque()
        self.parked: list[_Entry] = []  # a heap by due time
        self.out: dict[int, tuple[_Entry, MemoryReceiver]] = {}
        self.dead: dict[int, Message] = {}  # by sequence: a foreign message has no id, twins share one
        self.receivers: list[MemoryReceiver] = []
        self.keys: dict[str, list[MemoryReceiver]] = {}  # ordered: key -> who has messages of it out
        self.define(subscription)

    def define(self, subscription: Subscription) -> None:
        self.ordered = subscription.ordered
        self.patterns = PatternSet(subscription.patterns)
        self.filter = None if subscription.filter is None else Filter.parse(subscription.filter)

    def wants(self, message: Message) -> bool:
        return self.patterns.matches(message.topic) and (
            self.filter is None or self.filter.matches(message.headers)
        )

    def ripen(self, now: float) -> None:
        while self.parked and self.parked[0].due <= now:
            self.ready.append(heapq.heappop(self.parked))

    def take(self, receiver: MemoryReceiver, room: int) -> list[_Entry]:
        if not self.ordered:
            taken = [self.ready.popleft() for _ in range(min(room, len(self.ready)))]
        else:
            taken, kept = [], deque[_Entry]()
            while self.ready and len(taken) < room:
                entry = self.ready.popleft()
                holders = self.keys.get(entry.message.key or "")
                if entry.message.key is not None and holders and holders[0] is not receiver:
                    kept.append(entry)
                    continue
                if entry.message.key is not None:
                    self.keys.setdefault(entry.message.key, []).append(receiver)
                taken.append(entry)
            self.ready.extendleft(reversed(kept))
        for entry in taken:
            self.out[entry.sequence] = (entry, receiver)
        return taken

    def settle(self, sequence: int) -> _Entry | None:
        found = self.out.pop(sequence, None)
        if found is None:
            return None
        entry, receiver = found
        key = entry.message.key
        if self.ordered and key is not None:
            holders = self.keys.get(key, [])
            if receiver in holders:
                holders.remove(receiver)
            if not holders:
                self.keys.pop(key, None)
        return entry

    def forget_out(self) -> None:
        """What is out settles nothing any more, and counts in no window."""
        for _, receiver in self.out.values():
            receiver.forget_one()
        self.out.clear()

    def give_back(self, entries: Iterable[_Entry]) -> None:
        """Back to the line, each where it stood before it was handed out."""
        returned = sorted(entries, key=lambda entry: entry.sequence)
        for entry in returned:
            entry.redelivered = True
        if returned:
            merged = sorted([*returned, *self.ready], key=lambda entry: entry.sequence)
            self.ready = deque(merged)

    def wake(self) -> None:
        for receiver in self.receivers:
            receiver.wake()


class _Namespace:
    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self.ephemeral: list[_Queue] = []
        self.history: deque[Message] = deque(maxlen=HISTORY)
        self.delayed: list[_Entry] = []  # published with a delay: routed when due, a heap

    def all(self) -> list[_Queue]:
        return [*self.queues.values(), *self.ephemeral]


class _Timer:
    """One delivery held in its member: rings on the member's loop, when the hub's clock says so."""

    __slots__ = ("_handle", "_hub", "_loop", "_wake", "delivery", "due")

    def __init__(self, hub: Hub, delivery: Delivery, wake: Callable[[Delivery], None]) -> None:
        self.delivery = delivery
        self.due = hub.now() + delivery.delay
        self._hub = hub
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        hub.timers.add(self)
        self._arm()

    def moved(self) -> None:
        """The hub's clock was moved; from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arm)

    def _arm(self) -> None:
        if self in self._hub.timers:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_later(max(0.0, self.due - self._hub.now()), self._ring)

    def _ring(self) -> None:
        self._hub.timers.discard(self)
        self._wake(self.delivery)

    def cancel(self) -> None:
        self._hub.timers.discard(self)
        if self._handle is not None:
            self._handle.cancel()


class Hub:
    """What a broker process is for the others: shared by all memory backends of one name.

    Tests reach it by `Hub.named`. ``advance(seconds)`` moves its clock; ``fail(operation, error)`` makes
    the next ``send``, ``declare``, ``consume``, ``park`` or ``bury`` raise.
    """

    _hubs: dict[str, Hub] = {}  # noqa: RUF012 - the process-wide register itself
    _hubs_lock = threading.Lock()

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.namespaces: dict[str, _Namespace] = {}
        self._sequence = 0
        self._offset = 0.0
        self.timers: set[_Timer] = set()
        self._faults: dict[str, deque[BaseException]] = {}

    @classmethod
    def named(cls, name: str) -> Hub:
        """The hub of this name in this process, made at first use."""
        with cls._hubs_lock:
            return cls._hubs.setdefault(name, cls())

    @classmethod
    def drop(cls, name: str) -> None:
        """Forget the hub of this name: the next who names it gets a new one."""
        with cls._hubs_lock:
            cls._hubs.pop(name, None)

    def now(self) -> float:
        """The hub's clock, seconds since the epoch."""
        return time.time() + self._offset

    def advance(self, seconds: float) -> None:
        """Let parked, held and delayed messages become due ``seconds`` sooner."""
        with self.lock:
            self._offset += seconds
            for timer in list(self.timers):
                timer.moved()
            for namespace in self.namespaces.values():
                for queue in namespace.all():
                    queue.wake()

    def fail(self, operation: str, error: BaseException) -> None:
        """The next call of ``operation`` raises ``error``; several queue up."""
        with self.lock:
            self._faults.setdefault(operation, deque()).append(error)

    def check(self, operation: str) -> None:
        """Raise what `fail` has prepared for ``operation``."""
        faults = self._faults.get(operation)
        if faults:
            raise faults.popleft()

    def reset(self) -> None:
        """Forget all messages, subscriptions and faults; members are cut off."""
        with self.lock:
            for namespace in self.namespaces.values():
                for queue in namespace.all():
                    for receiver in list(queue.receivers):
                        receiver.cut()
            self.namespaces.clear()
            self._faults.clear()
            self._offset = 0.0

    def namespace(self, name: str) -> _Namespace:
        return self.namespaces.setdefault(name, _Namespace())

    def next(self) -> int:
        self._sequence += 1
        return self._sequence

    def route(self, namespace: _Namespace, message: Message) -> int:
        """A copy to each subscription that wants it; returns to how many."""
        count = 0
        for queue in namespace.all():
            if queue.wants(message):
                queue.ready.append(_Entry(self.next(), message))
                queue.wake()
                count += 1
        return count

    def ripen(self, namespace: _Namespace) -> float | None:
        """Route what was delayed and is due; returns when the next one is."""
        now = self.now()
        while namespace.delayed and namespace.delayed[0].due <= now:
            self.route(namespace, heapq.heappop(namespace.delayed).message)
        return namespace.delayed[0].due if namespace.delayed else None


class MemoryBackend(Backend):
    """The in-process backend; ``[memory]`` in the settings names its hub and its largest payload."""

    name = "memory"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        url = "" if settings.url is None else settings.url.get_secret_value()
        self.hub = Hub.named(url.removeprefix("memory://").strip("/") if url.startswith("memory:") else "")
        self._receivers: list[MemoryReceiver] = []
        self._open = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            durable=False,
            shared=False,
            competing=True,
            stored_attempts=False,
            delay=True,
            replay=True,
            require_subscribers=True,
            backlog=True,
            max_payload=self.settings.memory.max_payload,
        )

    @property
    def _space(self) -> _Namespace:
        return self.hub.namespace(self.settings.namespace)

    async def open(self) -> None:
        with self.hub.lock:
            self.hub.check("open")
        self._open = True

    async def close(self) -> None:
        self._open = False
        for receiver in list(self._receivers):
            await receiver.close()

    async def ping(self) -> None:
        if not self._open:
            raise ConnectionLost("memory: not open")
        with self.hub.lock:
            self.hub.check("ping")

    async def send(self, messages: Sequence[Message]) -> None:
        hub = self.hub
        with hub.lock:
            hub.check("send")
            space = self._space
            refused: list[Message] = []
            for message in messages:
                if self.settings.require_subscribers and not any(
                    queue.wants(message) for queue in space.all()
                ):
                    refused.append(message)
                    continue
                space.history.append(message)
                if message.delay:
                    heapq.heappush(space.delayed, _Entry(hub.next(), message, hub.now() + message.delay))
                    for queue in space.all():
                        queue.wake()
                else:
                    hub.route(space, message)
        if refused:
            raise SendFailed(
                unheard("memory", (message.topic for message in refused), len(messages)),
                {message.id: "not stored" for message in refused},
            )

    async def resend(self, subscription: str, messages: Sequence[Message]) -> None:
        with self.hub.lock:
            self.hub.check("resend")
            queue = self._space.queues.get(subscription)
            if queue is None:
                raise SendFailed(
                    f"memory: no subscription {subscription!r}: declare it first",
                    {message.id: "not stored" for message in messages},
                )
            queue.ready.extend(_Entry(self.hub.next(), message) for message in messages)
            queue.wake()

    async def declare(self, subscription: Subscription) -> None:
        assert subscription.name is not None
        with self.hub.lock:
            self.hub.check("declare")
            queue = self._space.queues.get(subscription.name)
            if queue is None:
                self._space.queues[subscription.name] = _Queue(subscription)
            else:
                queue.define(subscription)

    async def delete(self, subscription: str) -> None:
        with self.hub.lock:
            queue = self._space.queues.pop(subscription, None)
            if queue is not None:
                for receiver in list(queue.receivers):
                    receiver.cut()

    async def consume(self, subscription: Subscription, window: int) -> Receiver:
        with self.hub.lock:
            self.hub.check("consume")
            space = self._space
            if subscription.name is None:
                queue = _Queue(subscription)
                space.ephemeral.append(queue)
            else:
                queue = space.queues.get(subscription.name) or _Queue(subscription)
                space.queues[subscription.name] = queue
            receiver = MemoryReceiver(
                self.hub, space, queue, subscription.label, window, self._receivers.remove
            )
            queue.receivers.append(receiver)
            self._receivers.append(receiver)
            return receiver

    async def inspect(self, subscription: str) -> Backlog:
        with self.hub.lock:
            queue = self._space.queues.get(subscription)
            if queue is None:
                return Backlog(0, 0, 0, None, declared=False)
            waiting = [entry.message.timestamp for entry in (*queue.ready, *queue.parked)]
            known = [timestamp for timestamp in waiting if timestamp is not None]
            oldest = max(0.0, time.time() - min(known)) if known else None
            return Backlog(len(waiting), len(queue.out), len(queue.dead), oldest)

    async def dead(self, subscription: str) -> AsyncIterator[Message]:
        with self.hub.lock:
            queue = self._space.queues.get(subscription)
            letters = [] if queue is None else list(queue.dead.values())
        for letter in letters:
            shown = _copy(letter)
            shown.failure = letter.failure
            yield shown

    async def discard(self, subscription: str, ids: Collection[str] | None) -> int:
        with self.hub.lock:
            queue = self._space.queues.get(subscription)
            if queue is None:
                return 0
            chosen = [place for place, letter in queue.dead.items() if ids is None or letter.id in ids]
            for place in chosen:
                del queue.dead[place]
            return len(chosen)

    async def seek(self, subscription: str, to: Position) -> None:
        with self.hub.lock:
            queue = self._space.queues.get(subscription)
            if queue is None:
                return
            since = to.timestamp() if isinstance(to, datetime) else None
            queue.parked.clear()
            queue.forget_out()
            queue.keys.clear()
            queue.ready = deque(
                _Entry(self.hub.next(), message)
                for message in self._space.history
                if to != "end"
                and queue.wants(message)
                and (since is None or (message.timestamp or 0) >= since)
            )
            queue.wake()


class MemoryReceiver(Receiver):
    """One member's link to a queue of the hub."""

    def __init__(
        self,
        hub: Hub,
        space: _Namespace,
        queue: _Queue,
        label: str,
        window: int,
        forget: Callable[[MemoryReceiver], None],
    ) -> None:
        self._hub = hub
        self._space = space
        self._queue = queue
        self._label = label
        self._window = window
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._out = 0
        self._gone = False
        self._closed = False

    async def receive(self) -> Sequence[Delivery]:
        while True:
            with self._hub.lock:
                if self._gone or self._closed:
                    raise ConnectionLost(f"memory: subscription {self._label!r} was deleted or its hub reset")
                self._hub.check("receive")
                deliveries = self._take()
                if deliveries:
                    return deliveries
                self._waiter = self._loop.create_future()
                self._set_timer()
            try:
                await self._waiter
            finally:
                self._waiter = None
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def _take(self) -> list[Delivery]:
        self._hub.ripen(self._space)
        self._queue.ripen(self._hub.now())
        entries = self._queue.take(self, self._window - self._out)
        self._out += len(entries)
        return [self._delivery(entry) for entry in entries]

    def _delivery(self, entry: _Entry) -> Delivery:
        message = entry.message
        return Delivery(
            self,
            entry.sequence,
            self._label,
            message.topic,
            message.body,
            key=message.key,
            headers=message.headers,
            id=message.id,
            content_type=message.content_type,
            timestamp=message.timestamp,
            attempt=entry.attempt,
            redelivered=entry.redelivered,
            failure=entry.failure,
        )

    def _set_timer(self) -> None:
        dues = [entry.due for entry in (self._queue.parked[:1] + self._space.delayed[:1])]
        if dues:
            self._timer = self._loop.call_later(max(0.0, min(dues) - self._hub.now()), self.wake)

    def wake(self) -> None:
        """Let a waiting `receive` look again; from any thread, with the hub's lock held or on the loop."""
        waiter = self._waiter
        if waiter is None:
            return
        if threading.get_ident() == self._thread:
            if not waiter.done():
                waiter.set_result(None)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: None if waiter.done() else waiter.set_result(None))

    def forget_one(self) -> None:
        """One delivery that is out belongs to this receiver no more."""
        self._out -= 1

    def cut(self) -> None:
        """The queue is gone: `receive` raises ConnectionLost."""
        self._gone = True
        self.wake()

    def _settle(self, delivery: Delivery) -> _Entry | None:
        found = self._queue.out.get(delivery.tag)
        if self._closed or found is None or found[1] is not self:
            return None
        self._out -= 1
        entry = self._queue.settle(delivery.tag)
        if self._queue.ordered:
            self._queue.wake()
        self.wake()
        return entry

    def ack(self, delivery: Delivery) -> None:
        with self._hub.lock:
            self._settle(delivery)

    def release(self, delivery: Delivery) -> None:
        with self._hub.lock:
            entry = self._settle(delivery)
            if entry is not None:
                self._queue.give_back([entry])
                self._queue.wake()

    async def park(self, deliveries: Sequence[Delivery]) -> None:
        with self._hub.lock:
            self._hub.check("park")
            for delivery in deliveries:
                entry = self._settle(delivery)
                if entry is not None:
                    entry.attempt = delivery.attempt + 1
                    entry.failure = delivery.failure
                    entry.due = self._hub.now() + delivery.delay
                    heapq.heappush(self._queue.parked, entry)
            self._queue.wake()

    async def bury(self, deliveries: Sequence[Delivery]) -> None:
        with self._hub.lock:
            self._hub.check("bury")
            for delivery in deliveries:
                entry = self._settle(delivery)
                if entry is not None:
                    letter = _copy(entry.message)
                    letter.failure = delivery.failure
                    self._queue.dead[entry.sequence] = letter

    def hold(self, delivery: Delivery, wake: Callable[[Delivery], None]) -> Timer:
        with self._hub.lock:
            return _Timer(self._hub, delivery, wake)

    async def flush(self) -> None:
        return

    async def close(self) -> None:
        with self._hub.lock:
            if self._closed:
                return
            self._closed = True
            mine = [sequence for sequence, (_, receiver) in self._queue.out.items() if receiver is self]
            self._queue.give_back([entry for entry in map(self._queue.settle, mine) if entry is not None])
            if self in self._queue.receivers:
                self._queue.receivers.remove(self)
            if self._queue in self._space.ephemeral:
                self._space.ephemeral.remove(self._queue)
            self._queue.wake()
            self.wake()
        self._forget(self)


def _copy(message: Message) -> Message:
    copy = Message(message.topic, None, key=message.key, headers=message.headers, id=message.id)
    copy.body = message.body
    copy.content_type = message.content_type
    copy.timestamp = message.timestamp
    return copy
