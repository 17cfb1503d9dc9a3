"""`AsyncPubSub`: publish, subscribe, subscriber, run, close. The facade itself; each verb's work is elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pubsub_facade._tasks import cancel
from pubsub_facade.backends import create
from pubsub_facade.backends.base import Backend, Backlog, Capabilities, Finding, Position
from pubsub_facade.codec import encode
from pubsub_facade.consumer import WINDOW, Consumer
from pubsub_facade.dead_letters import DeadLetters
from pubsub_facade.errors import Closed, MessageError, PayloadTooLarge, UnsupportedFeature
from pubsub_facade.message import HeaderValue, Message, new_id
from pubsub_facade.publisher import Publisher
from pubsub_facade.settings import Settings
from pubsub_facade.stream import Stream
from pubsub_facade.subscribers import DEFAULT_BACKOFF, Registration, Subscribers
from pubsub_facade.subscription import Backoff, Subscription, check_subscription, patterns_of
from pubsub_facade.supervisor import State, Supervisor
from pubsub_facade.workers import Workers, workers_for

log = logging.getLogger("pubsub_facade")

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)  # that ask a process to end
GRACE: Final = 30.0  # s that close() gives handlers in hand


class AsyncPubSub:
    """One publish/subscribe API over whichever broker the settings name. Connects on first use.

    Arguments:
        settings: complete settings; None: read from the usual places.
        url: the broker's address, as ``PUBSUB_URL``.
        overrides: any `Settings` field, above all other sources.

    Raises ConfigError for settings that cannot work, UnsupportedFeature for one the backend cannot do.
    """

    def __init__(self, settings: Settings | None = None, *, url: str | None = None, **overrides: Any) -> None:
        if url is not None:
            overrides["url"] = url
        if settings is None:
            settings = Settings.load(**overrides)
        elif overrides:
            raise TypeError(f"give settings, or {', '.join(overrides)}, and not both")
        self.settings = settings
        self.subscribers = Subscribers()
        backend = create(settings)
        self.capabilities: Capabilities = backend.capabilities
        if settings.require_subscribers and not self.capabilities.require_subscribers:
            raise UnsupportedFeature(
                backend.name,
                "require_subscribers",
                "leave it out: this broker cannot tell whether anybody listens",
            )
        self._supervisor = Supervisor(backend, settings.reconnect_min, settings.reconnect_max)
        self._publisher: Publisher | None = None
        self._members: list[tuple[Consumer, Workers]] = []
        self._streams: set[Stream] = set()
        self.left = 0
        """Deliveries that `close` gave back unfinished: the grace time ended before their handlers did."""
        self._closed = False
        self._closing: asyncio.Task[None] | None = None

    # -- publish ----------------------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        id: str | None = None,
        delay: float = 0,
        timeout: float | None = None,
    ) -> Message:
        """Publish one message; returns once the broker has confirmed it durable (contract 5).

        Arguments:
            topic: dotted words.
            payload: bytes, str, or anything that becomes JSON.
            key: what order is kept by.
            headers: name -> str, int, float or bool.
            id: the message's id; None: a new UUIDv7.
            delay: seconds until it is delivered at the earliest (capability ``delay``).
            timeout: seconds to wait, through outages too; None: ``publish_timeout`` of the settings.

        Raises TopicError, MessageError, PayloadTooLarge, UnsupportedFeature before anything is sent;
        PublishTimeout or SendFailed with the message's fate after.
        """
        message = self.prepare(Message(topic, payload, key=key, headers=headers, id=id, delay=delay))
        await self._publish([message], timeout)
        return message

    async def publish_many(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Publish messages as one confirmed batch; returns them with ids and times, in order.

        Arguments:
            messages: all are checked before the first is sent.
            timeout: seconds for the whole batch; None: ``publish_timeout`` of the settings.

        Raises as `publish`; the ``fates`` of a SendFailed say which messages are not confirmed.
        """
        prepared = [self.prepare(message) for message in messages]
        if prepared:
            await self._publish(prepared, timeout)
        return prepared

    async def _publish(self, messages: list[Message], timeout: float | None) -> None:
        await self.publisher().publish(messages, self.timeout(timeout))

    def timeout(self, timeout: float | None) -> float:
        """The publish timeout in seconds; MessageError for what is not a positive number."""
        if timeout is None:
            return self.settings.publish_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 1e9:
            raise MessageError(f"timeout {timeout!r} is not a positive number of seconds")
        return timeout

    def publisher(self) -> Publisher:
        """The way in, made at first use on the running loop. Raises Closed."""
        if self._closed:
            raise Closed("this client is closed: make a new one")
        if self._publisher is None:
            self._publisher = Publisher(self._supervisor)
        return self._publisher

    def prepare(self, message: Message) -> Message:
        """A checked, encoded copy of ``message`` with id and time, ready for a driver. Needs no loop."""
        if not isinstance(message, Message):
            raise MessageError(f"{message!r} is not a Message: write Message(topic, payload)")
        message.check()
        if message.delay and not self.capabilities.delay:
            raise UnsupportedFeature(
                self._supervisor.backend.name,
                "delay",
                "publish later, or choose a backend with the capability",
            )
        prepared = Message(
            message.topic,
            message.payload,
            key=message.key,
            headers=dict(message.headers) if message.headers else None,
            delay=message.delay,
        )
        prepared.body, prepared.content_type = encode(message.payload)
        limit = self.capabilities.max_payload
        if len(prepared.body) > limit:
            raise PayloadTooLarge(
                f"payload of {len(prepared.body)} bytes on {message.topic!r} is over the limit of {limit} bytes of "
                f"backend {self._supervisor.backend.name!r}: send a reference to it, or raise max_payload"
            )
        prepared.timestamp = now = round(
            time.time(), 6
        )  # what published_at can say exactly, so that seek finds it
        prepared.id = message.id or new_id(now)
        return prepared

    # -- subscribe --------------------------------------------------------------------------------

    def subscribe(
        self,
        *patterns: str,
        subscription: str | None = None,
        ordered: bool = False,
        filter: str | None = None,
        window: int = WINDOW,
        max_attempts: int = 5,
        backoff: Backoff = DEFAULT_BACKOFF,
    ) -> Stream:
        """A member as an async context manager and async iterator of `Delivery`.

        Arguments:
            patterns: what topics (contract 2).
            subscription: durable name; None: ephemeral.
            ordered: per-key order: the next of a key comes after the one before is settled.
            filter: selector on headers (contract 11).
            window: deliveries received and not settled at once.
            max_attempts: attempts until the dead letters.
            backoff: how long a retried delivery waits.

        Raises ConfigError, TopicError, FilterError at once; TopologyConflict, ConnectionFailed on entering.
        """
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise MessageError(f"window {window!r} is not a whole number of 1 or more")
        declared = Subscription(subscription, patterns_of(patterns), ordered, filter, max_attempts, backoff)
        tuned = self._tuned(declared)

        async def join() -> Consumer:
            if self._closed:
                raise Closed("this client is closed: make a new one")
            self._streams.add(stream)
            return Consumer(self._supervisor, tuned, window)

        stream = Stream(join, self._streams.discard)
        return stream

    def subscriber(
        self,
        *patterns: str,
        subscription: str | None = None,
        ordered: bool = False,
        filter: str | None = None,
        concurrency: int = 1,
        max_attempts: int = 5,
        backoff: Backoff = DEFAULT_BACKOFF,
    ) -> Callable[[Function], Function]:
        """Register the decorated function as a handler, run by `start` and `run`; see `Subscribers.subscriber`."""
        return self.subscribers.subscriber(
            *patterns,
            subscription=subscription,
            ordered=ordered,
            filter=filter,
            concurrency=concurrency,
            max_attempts=max_attempts,
            backoff=backoff,
        )

    def include(self, subscribers: Subscribers) -> None:
        """Take the handlers collected by `Subscribers` of another module."""
        self.subscribers.include(subscribers)

    async def declare(
        self, *patterns: str, subscription: str, ordered: bool = False, filter: str | None = None
    ) -> None:
        """Make the subscription exist: from the return on, nothing published on its topics is missed.

        Declaring again with other patterns or another filter changes it (contract 3). Raises TopologyConflict
        where the broker cannot change it without losing what waits.
        """
        declared = Subscription(subscription, patterns_of(patterns), ordered, filter)
        check_subscription(subscription)
        await self._run(lambda backend: backend.declare(declared))

    async def delete(self, subscription: str) -> None:
        """Remove the subscription and all it holds on the broker, dead letters included."""
        check_subscription(subscription)
        await self._run(lambda backend: backend.delete(subscription))

    async def backlog(self, subscription: str) -> Backlog:
        """How much waits, is in flight and is dead; ``declared`` is False where there is no such subscription."""
        check_subscription(subscription)
        return await self._run(lambda backend: backend.inspect(subscription))

    async def seek(self, subscription: str, to: Position) -> None:
        """Move the subscription in its history (capability ``replay``).

        Arguments:
            to: a time (aware datetime), ``"beginning"`` or ``"end"``.
        """
        check_subscription(subscription)
        if not self.capabilities.replay:
            raise UnsupportedFeature(
                self._supervisor.backend.name,
                "replay",
                "keep history in a store of your own, or use sqlite or kafka",
            )
        if to not in ("beginning", "end") and getattr(to, "tzinfo", None) is None:
            raise MessageError(
                f"cannot seek to {to!r}: give a datetime with a time zone, 'beginning' or 'end'"
            )
        await self._run(lambda backend: backend.seek(subscription, to))

    def dead_letters(self, subscription: str) -> DeadLetters:
        """The subscription's dead letters: iterate, count, replay, edit, purge."""
        check_subscription(subscription)
        return DeadLetters(self._supervisor, subscription)

    async def _run(self, operation: Callable[[Backend], Awaitable[T]]) -> T:
        if self._closed:
            raise Closed("this client is closed: make a new one")
        return await self._supervisor.run(operation)

    def _tuned(self, subscription: Subscription) -> Subscription:
        """The subscription with what ``[subscriptions.NAME]`` of the settings says instead."""
        tuning = self.settings.subscriptions.get(subscription.name or "")
        if tuning is None:
            return subscription
        backoff = dataclasses.replace(
            subscription.backoff,
            **_given(initial=tuning.backoff_initial, maximum=tuning.backoff_maximum),
        )
        changes = _given(
            patterns=None if tuning.topics is None else patterns_of(tuning.topics),
            filter=tuning.filter,
            ordered=tuning.ordered,
            max_attempts=tuning.max_attempts,
        )
        return dataclasses.replace(subscription, backoff=backoff, **changes)

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, declare what the settings provision, and start a member for each handler.

        Returns when all are receiving. Raises ConnectionFailed where the broker cannot be reached.
        """
        await self._start(patient=False)

    async def _start(self, *, patient: bool) -> None:
        if self._closed:
            raise Closed("this client is closed: make a new one")
        await (self._supervisor.ready() if patient else self._supervisor.open())
        await self._provision()
        started = {id(workers) for _, workers in self._members}
        try:
            for registration in self.subscribers.registrations[len(self._members) :]:
                await self._start_member(registration, patient=patient)
        except BaseException:
            new = [member for member in self._members if id(member[1]) not in started]
            await self._stop_members(new, 0)
            self._members = [member for member in self._members if member not in new]
            raise

    async def _provision(self) -> None:
        served = {registration.subscription.name for registration in self.subscribers.registrations}
        for name, tuning in self.settings.subscriptions.items():
            if tuning.topics and name not in served:
                subscription = self._tuned(Subscription(name, tuple(tuning.topics)))
                await self._supervisor.run(lambda backend, s=subscription: backend.declare(s))  # type: ignore[misc]

    async def _start_member(self, registration: Registration, *, patient: bool) -> None:
        subscription = self._tuned(registration.subscription)
        tuning = self.settings.subscriptions.get(subscription.name or "")
        concurrency = (tuning.concurrency if tuning else None) or registration.concurrency
        consumer = Consumer(self._supervisor, subscription, max(WINDOW, 2 * concurrency))
        workers = workers_for(consumer, registration.handler, concurrency)
        await consumer.start(patient=patient)
        workers.start()
        self._members.append((consumer, workers))

    async def run(self, grace: float = GRACE) -> None:
        """`start`, handle until SIGTERM or SIGINT, then `close`. Waits for a broker that is absent.

        Arguments:
            grace: seconds that handlers in hand and unconfirmed messages get at the end.

        A second signal ends the process at once: what was not handled was not settled. Raises the error of a
        member that cannot go on (authentication, configuration, topology).
        """
        stop = asyncio.Event()
        with set_by_signals(stop):
            await self.serve(stop, grace)

    async def serve(self, stop: asyncio.Event, grace: float = GRACE) -> None:
        """As `run`, until ``stop`` is set, without touching signals."""
        try:
            if not await _unless(stop, self._start(patient=True)):
                return
            for consumer, _ in self._members:
                subscription = consumer.subscription
                log.info(
                    "%s: receiving %s for %s",
                    self._supervisor.backend.name,
                    " ".join(subscription.patterns),
                    subscription.label or "(ephemeral)",
                )
            while not stop.is_set():
                for consumer, _ in self._members:
                    if consumer.error is not None:
                        raise consumer.error
                await _unless(stop, asyncio.sleep(0.5))
        finally:
            await self.close(grace)

    async def ping(self) -> None:
        """One round trip to the broker. Raises ConnectionFailed or ConnectionLost where there is none."""
        if self._closed:
            raise Closed("this client is closed: make a new one")
        backend = await self._supervisor.open()
        epoch = self._supervisor.epoch
        try:
            async with asyncio.timeout(self.settings.connect_timeout):
                await backend.ping()
        except Exception as error:
            await self._supervisor.lost(epoch, error)
            raise

    async def diagnose(self) -> list[Finding]:
        """What the broker's settings mean for reliability, and what to mend; as ``pubsub doctor`` shows it."""
        return await self._run(lambda backend: backend.diagnose())

    @property
    def state(self) -> State:
        """idle, connecting, connected, reconnecting or closed."""
        return self._supervisor.state

    def on_state(self, listener: Callable[[State], None]) -> None:
        """Call ``listener(state)`` on the event loop at each change of the connection's state."""
        self._supervisor.on_state(listener)

    async def close(self, grace: float = GRACE) -> None:
        """Stop receiving, finish what is in hand, settle, give back the rest, leave. Idempotent.

        Arguments:
            grace: seconds that handlers in hand and unconfirmed messages get.
        """
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.get_running_loop().create_task(self._close(grace), name="pubsub-close")
        await asyncio.shield(self._closing)

    async def _close(self, grace: float) -> None:
        end = time.monotonic() + grace
        for stream in list(self._streams):
            await stream.close()
        await self._stop_members(self._members, grace)
        if self._publisher is not None:
            await self._publisher.close(max(0.0, end - time.monotonic()))
        await self._supervisor.close()

    async def _stop_members(self, members: list[tuple[Consumer, Workers]], grace: float) -> None:
        end = time.monotonic() + grace
        for consumer, _ in members:
            await consumer.stop_receiving()
        for consumer, workers in members:
            await consumer.settle(max(0.0, end - time.monotonic()))
            await workers.stop()
            left = await consumer.leave()
            self.left += left
            if left:
                log.warning(
                    "subscription %s: %s",
                    consumer.subscription.label or "(ephemeral)",
                    f"1 delivery was not finished within {grace:g} s; it comes again"
                    if left == 1
                    else f"{left} deliveries were not finished within {grace:g} s; they come again",
                )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class Ending:
    """The first signal begins the end, a later one ends the process at once.

    Two that come together are one: ``timeout`` and some service managers send each twice.
    """

    TOGETHER: Final = 0.3  # s

    def __init__(self) -> None:
        self._since: float | None = None

    def begins(self, number: int) -> bool:
        """Whether signal ``number`` is the first; does not return for one that is later."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            log.info("signal %s: finishing what is in hand", signal.Signals(number).name)
            return True
        if now - self._since > self.TOGETHER:
            os._exit(128 + number)
        return False


@contextmanager
def set_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop``, as `Ending` says. For the loop of the main thread."""
    loop = asyncio.get_running_loop()
    ending = Ending()

    def on_signal(number: int) -> None:
        if ending.begins(number):
            stop.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


async def _unless(stop: asyncio.Event, coroutine: Any) -> bool:
    """Run ``coroutine`` unless ``stop`` is set first, which cancels it; True if it finished."""
    task = asyncio.ensure_future(coroutine)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        await cancel(task, stopped)
