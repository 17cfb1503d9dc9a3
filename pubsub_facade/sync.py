"""`PubSub`: the verbs of `AsyncPubSub` for sync code, from any number of threads, over one loop thread.

The thread is made at first use, once a process, and again in a forked child: nothing of the parent's
links is touched there. Publishes that wait together are handed to the loop together and share confirms;
each result wakes its own caller.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, Final, Self, TypeVar

from pubsub_facade.backends.base import Backlog, Capabilities, Finding, Position
from pubsub_facade.client import GRACE, SIGNALS, AsyncPubSub, Ending
from pubsub_facade.consumer import WINDOW
from pubsub_facade.dead_letters import DeadLetters
from pubsub_facade.errors import Closed, PubSubError
from pubsub_facade.message import HeaderValue, Message
from pubsub_facade.publisher import Done
from pubsub_facade.settings import Settings
from pubsub_facade.stream import Stream
from pubsub_facade.subscribers import DEFAULT_BACKOFF, Subscribers
from pubsub_facade.subscription import Backoff
from pubsub_facade.supervisor import State
from pubsub_facade.workers import BlockingDelivery, blocking

log = logging.getLogger("pubsub_facade")

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

BATCH: Final = 64  # deliveries or dead letters fetched by one hand-over
LOOK_UP: Final = 0.25  # s between two looks of the main thread at the signals that came
EXIT_GRACE: Final = 5.0  # s that an interpreter exit gives unconfirmed messages


class _Waiter:
    """One blocked caller: woken alone, by the loop thread."""

    __slots__ = ("_lock", "error")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._lock.acquire()

    def done(self, error: BaseException | None) -> None:
        self.error = error
        self._lock.release()

    def wait(self) -> None:
        self._lock.acquire()
        if self.error is not None:
            raise self.error


class _LoopThread:
    """The process's event loop for sync callers."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._line: deque[tuple[AsyncPubSub, list[Message], float, Done]] = deque()
        self._awake = False
        self._thread = threading.Thread(target=self._run, name="pubsub-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def end(self) -> None:
        """At the interpreter's exit: nothing is called any more."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(1)
        if not self._thread.is_alive():
            self.loop.close()

    def check_caller(self) -> None:
        """Refuse calls that would wait for the thread they run on."""
        if threading.current_thread() is self._thread:
            raise PubSubError(
                "PubSub was called from an async handler on its own loop, where it would wait for itself: "
                "make the handler a plain def, or publish with AsyncPubSub and await"
            )

    def publish(self, client: AsyncPubSub, messages: list[Message], timeout: float) -> None:
        """Hand messages to the loop, with all that other threads hand over meanwhile, and wait for the confirm."""
        waiter = _Waiter()
        self.submit(client, messages, timeout, waiter.done)
        waiter.wait()

    def submit(self, client: AsyncPubSub, messages: list[Message], timeout: float, done: Done) -> None:
        """`publish` without the wait; ``done`` is called on this loop, as `Publisher.submit` says."""
        self._line.append((client, messages, timeout, done))
        if not self._awake:
            self._awake = True
            self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._awake = False
        line = self._line
        publishers = set()
        while line:
            client, messages, timeout, done = line.popleft()
            try:
                publisher = client.publisher()
            except PubSubError as error:
                done(error)
            else:
                publisher.enqueue(messages, timeout, done)
                publishers.add(publisher)
        for publisher in publishers:
            publisher.launch()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result; a KeyboardInterrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Closed("the client was closed during the call") from None
        except KeyboardInterrupt:
            future.cancel()
            raise

    def attend(self, serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
        """As `call` of ``serve(stop)``, for a long run; on the main thread SIGTERM and SIGINT set ``stop``.

        A signal that the system hands to another thread does not interrupt a lock: the main thread looks up.
        """
        self.check_caller()
        stop = asyncio.Event()
        ending = Ending()

        def on_signal(number: int, frame: FrameType | None) -> None:
            if ending.begins(number):
                self.loop.call_soon_threadsafe(stop.set)

        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
        try:
            future = asyncio.run_coroutine_threadsafe(serve(stop), self.loop)
            while not concurrent.futures.wait([future], LOOK_UP).done:
                pass
            future.result()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


_thread: _LoopThread | None = None
_thread_lock = threading.Lock()
_clients: weakref.WeakSet[PubSub] = weakref.WeakSet()
_parents: list[object] = []  # a forked child keeps what it must never close: the parent's links


def _loop_thread() -> _LoopThread:
    global _thread
    if _thread is None:
        with _thread_lock:
            if _thread is None:
                _thread = _LoopThread()
    return _thread


def _forked() -> None:
    global _thread, _thread_lock
    _parents.append(_thread)
    _thread = None
    _thread_lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _flush_at_exit() -> None:
    for client in list(_clients):
        if not client._used:  # nothing is open, and Python 3.12 starts no thread any more to close it on
            continue
        try:
            client.close(EXIT_GRACE)
        except PubSubError as error:
            log.error("at exit: %s", error)
    global _thread
    thread, _thread = _thread, None
    if thread is not None:
        thread.end()


class PubSub:
    """One publish/subscribe API over whichever broker the settings name, for sync code. Thread-safe.

    Arguments: as `AsyncPubSub`. Connects on first use; works in forked children, each with links of its own.
    """

    def __init__(self, settings: Settings | None = None, *, url: str | None = None, **overrides: Any) -> None:
        self._client = AsyncPubSub(settings, url=url, **overrides)
        self._pid = os.getpid()
        self._used = False
        self.settings = self._client.settings
        self.capabilities: Capabilities = self._client.capabilities
        _clients.add(self)

    def _here(self) -> AsyncPubSub:
        """This process's client: after a fork a new one, with the same settings and handlers."""
        if self._pid != os.getpid():
            with _thread_lock:  # made anew in each child: threads that come first at once share one client
                if self._pid != os.getpid():
                    self._renew()
        self._used = True
        return self._client

    def _renew(self) -> None:
        if self._client not in _parents:
            _parents.append(self._client)
        client = AsyncPubSub(self.settings)
        client.subscribers = self._client.subscribers
        self._client, self._used = client, False
        self._pid = os.getpid()  # last: who sees it takes the client without the lock

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        thread = _loop_thread()
        try:
            thread.check_caller()
        except PubSubError:
            coroutine.close()
            raise
        return thread.call(coroutine)

    # -- publish ----------------------------------------------------------------------------------

    def publish(
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
        """Publish one message; returns once the broker has confirmed it. See `AsyncPubSub.publish`."""
        client = self._here()
        message = client.prepare(Message(topic, payload, key=key, headers=headers, id=id, delay=delay))
        self._publish(client, [message], timeout)
        return message

    def publish_many(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Publish messages as one confirmed batch. See `AsyncPubSub.publish_many`."""
        client = self._here()
        prepared = [client.prepare(message) for message in messages]
        if prepared:
            self._publish(client, prepared, timeout)
        return prepared

    def prepare(self, message: Message) -> Message:
        """A checked, encoded copy of ``message`` with id and time; nothing is sent. See `AsyncPubSub.prepare`."""
        return self._client.prepare(message)

    def _publish(self, client: AsyncPubSub, messages: list[Message], timeout: float | None) -> None:
        thread = _loop_thread()
        thread.check_caller()
        thread.publish(client, messages, client.timeout(timeout))

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
    ) -> SyncStream:
        """A member as a context manager and iterator of deliveries. See `AsyncPubSub.subscribe`."""
        stream = self._here().subscribe(
            *patterns,
            subscription=subscription,
            ordered=ordered,
            filter=filter,
            window=window,
            max_attempts=max_attempts,
            backoff=backoff,
        )
        return SyncStream(self, stream)

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
        """Register the decorated function as a handler, sync or async. See `Subscribers.subscriber`."""
        return self._client.subscribers.subscriber(
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
        self._client.include(subscribers)

    @property
    def subscribers(self) -> Subscribers:
        """The handlers registered so far."""
        return self._client.subscribers

    def declare(
        self, *patterns: str, subscription: str, ordered: bool = False, filter: str | None = None
    ) -> None:
        """Make the subscription exist. See `AsyncPubSub.declare`."""
        self._call(self._here().declare(*patterns, subscription=subscription, ordered=ordered, filter=filter))

    def delete(self, subscription: str) -> None:
        """Remove the subscription and all it holds on the broker."""
        self._call(self._here().delete(subscription))

    def backlog(self, subscription: str) -> Backlog:
        """How much waits, is in flight and is dead. See `AsyncPubSub.backlog`."""
        return self._call(self._here().backlog(subscription))

    def seek(self, subscription: str, to: Position) -> None:
        """Move the subscription in its history. See `AsyncPubSub.seek`."""
        self._call(self._here().seek(subscription, to))

    def dead_letters(self, subscription: str) -> SyncDeadLetters:
        """The subscription's dead letters: iterate, count, replay, edit, purge."""
        return SyncDeadLetters(self, self._here().dead_letters(subscription))

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a member for each handler, in the background. See `AsyncPubSub.start`."""
        self._call(self._here().start())

    def run(self, grace: float = GRACE) -> None:
        """`start`, handle until SIGTERM or SIGINT, then `close`. Call it from the main thread.

        Arguments:
            grace: seconds that handlers in hand and unconfirmed messages get at the end.
        """
        client = self._here()
        _loop_thread().attend(lambda stop: client.serve(stop, grace))

    def ping(self) -> None:
        """One round trip to the broker. Raises ConnectionFailed or ConnectionLost where there is none."""
        self._call(self._here().ping())

    def diagnose(self) -> list[Finding]:
        """What the broker's settings mean for reliability, and what to mend. See `AsyncPubSub.diagnose`."""
        return self._call(self._here().diagnose())

    @property
    def left(self) -> int:
        """Deliveries that `close` gave back unfinished."""
        return self._client.left

    @property
    def state(self) -> State:
        """idle, connecting, connected, reconnecting or closed."""
        return self._client.state

    def on_state(self, listener: Callable[[State], None]) -> None:
        """Call ``listener(state)`` on the loop thread at each change of the connection's state."""
        self._client.on_state(listener)

    def close(self, grace: float = GRACE) -> None:
        """Stop receiving, finish what is in hand, settle, give back the rest, leave. Idempotent."""
        if self._pid == os.getpid() and self._used:
            self._call(self._client.close(grace))
        elif self._pid == os.getpid():
            self._call(self._client.close(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SyncStream:
    """What `PubSub.subscribe` returns: ``with`` it, then iterate it. For one thread at a time."""

    def __init__(self, pubsub: PubSub, stream: Stream) -> None:
        self._pubsub = pubsub
        self._stream = stream
        self._fetched: deque[BlockingDelivery] = deque()

    def __enter__(self) -> Self:
        self._pubsub._call(self._stream.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[BlockingDelivery]:
        return self

    def __next__(self) -> BlockingDelivery:
        try:
            return self.receive()
        except Closed:
            raise StopIteration from None

    def receive(self, timeout: float | None = None) -> BlockingDelivery:
        """The next delivery; TimeoutError when none came within ``timeout`` seconds, Closed at the end."""
        if not self._fetched:
            batch = self._pubsub._call(self._stream.receive_many(BATCH, timeout))
            self._fetched.extend(blocking(delivery) for delivery in batch)
        return self._fetched.popleft()

    def close(self) -> None:
        """Leave: what was received and not settled goes back to the subscription. Idempotent."""
        self._fetched.clear()
        self._pubsub._call(self._stream.close())


class SyncDeadLetters:
    """`DeadLetters` for sync code: iterate, count, replay, edit, purge."""

    def __init__(self, pubsub: PubSub, letters: DeadLetters) -> None:
        self._pubsub = pubsub
        self._letters = letters
        self.subscription = letters.subscription

    def __iter__(self) -> Iterator[Message]:
        letters = self._letters.__aiter__()

        async def fetch() -> list[Message]:
            batch: list[Message] = []
            async for letter in letters:
                batch.append(letter)
                if len(batch) == BATCH:
                    break
            return batch

        while batch := self._pubsub._call(fetch()):
            yield from batch

    def count(self) -> int:
        """How many there are."""
        return self._pubsub._call(self._letters.count())

    def replay(self, ids: Iterable[str] | None = None) -> int:
        """Hand them out again, to this subscription only; returns how many. None: all."""
        return self._pubsub._call(self._letters.replay(None if ids is None else set(ids)))

    def edit(self, id: str, *args: Any, **changes: Any) -> None:
        """Replay one dead letter with another payload or other headers. See `DeadLetters.edit`."""
        self._pubsub._call(self._letters.edit(id, *args, **changes))

    def purge(self, ids: Iterable[str] | None = None) -> int:
        """Remove them for good; returns how many. None: all."""
        return self._pubsub._call(self._letters.purge(None if ids is None else set(ids)))
