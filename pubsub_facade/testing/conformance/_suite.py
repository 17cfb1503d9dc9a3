"""What every chapter stands on: the fixtures a driver fills in, clients of its own, and deadlines.

Each case has a namespace nobody else has, and removes at its end all it declared there. Nothing here sleeps
to be in step with a broker: what should come is awaited with a deadline, what should not come is given
`QUIET` seconds after something that would have come behind it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import pytest
import pytest_asyncio

from pubsub_facade.backends.base import Backend, Capabilities
from pubsub_facade.client import AsyncPubSub
from pubsub_facade.message import Delivery, HeaderValue, Message
from pubsub_facade.settings import Settings
from pubsub_facade.stream import Stream
from pubsub_facade.subscription import Backoff, Subscription
from pubsub_facade.sync import PubSub

DEADLINE: Final = float(
    os.environ.get("CONFORMANCE_DEADLINE", "45")
)  # s for what must happen, on a broker that shares two busy cores
QUIET: Final = 0.3  # s that show that nothing more comes
SOON: Final = Backoff(initial=0.05, maximum=0.2, jitter=0)


class SettingsFactory(Protocol):
    """Settings of the backend under test, with ``overrides`` (the namespace among them) above the rest."""

    def __call__(self, **overrides: Any) -> Settings: ...


class SendForeign(Protocol):
    """Publish by a raw client of the broker, as somebody who does not know this package would."""

    def __call__(
        self, settings: Settings, topic: str, body: bytes, headers: Mapping[str, str]
    ) -> Awaitable[None]: ...


NamesOnBroker = Callable[[Settings], Awaitable[set[str]]]
"""What the broker holds for ``settings.namespace``, by the names it has there: queues, topics, groups, exchanges."""

DropNamespace = Callable[[Settings], Awaitable[None]]
"""Remove what no verb of the API removes (topics, exchanges) of ``settings.namespace``."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A delivery as it was when the handler had it."""

    id: str
    topic: str
    key: str | None
    payload: Any
    headers: Mapping[str, HeaderValue]
    attempt: int
    redelivered: bool
    at: float  # time.monotonic()


class Inbox:
    """An async handler that notes what it is given, then does ``act(delivery)``, which may raise."""

    def __init__(self, act: Callable[[Delivery], None] | None = None) -> None:
        self.seen: list[Seen] = []
        self._act = act
        self._changed = asyncio.Event()

    async def __call__(self, delivery: Delivery) -> None:
        self.note(delivery)
        if self._act is not None:
            self._act(delivery)

    def note(self, delivery: Delivery) -> None:
        """Keep what the delivery is like now."""
        self.seen.append(
            Seen(
                delivery.id,
                delivery.topic,
                delivery.key,
                delivery.payload,
                dict(delivery.headers),
                delivery.attempt,
                delivery.redelivered,
                time.monotonic(),
            )
        )
        self._changed.set()

    @property
    def ids(self) -> list[str]:
        return [seen.id for seen in self.seen]

    @property
    def payloads(self) -> list[Any]:
        return [seen.payload for seen in self.seen]

    async def until(self, count: int) -> list[Seen]:
        """Wait until ``count`` deliveries were seen; returns all so far."""
        await self.until_true(lambda: len(self.seen) >= count, f"{count} deliveries")
        return self.seen

    async def until_ids(self, ids: Iterable[str]) -> None:
        """Wait until each of these messages was seen."""
        wanted = set(ids)
        await self.until_true(lambda: wanted.issubset(self.ids), f"all of {len(wanted)} messages")

    async def until_true(self, reached: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE
        while not reached():
            self._changed.clear()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                raise AssertionError(f"waited {DEADLINE} s for {what}; seen {len(self.seen)}") from None


async def eventually(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask until it holds; AssertionError after the deadline."""
    end = time.monotonic() + DEADLINE
    while not await holds():
        if time.monotonic() > end:
            raise AssertionError(f"after {DEADLINE} s still not so: {what}")
        await asyncio.sleep(0.02)


async def until(reached: Callable[[], bool], what: str) -> None:
    """As `eventually`, for what is in this process."""

    async def holds() -> bool:
        return reached()

    await eventually(holds, what)


async def receive(stream: Stream, count: int, *, ack: bool = True) -> list[Delivery]:
    """The next ``count`` deliveries of a stream, acked."""
    received: list[Delivery] = []
    end = time.monotonic() + DEADLINE
    while len(received) < count:
        try:
            batch = await stream.receive_many(count - len(received), max(0.01, end - time.monotonic()))
        except TimeoutError:
            raise AssertionError(f"{len(received)} of {count} deliveries within {DEADLINE} s") from None
        for delivery in batch:
            if ack:
                await delivery.ack()
        received += batch
    return received


async def nothing_more(stream: Stream) -> None:
    """Assert that nothing comes for a while."""
    try:
        delivery = await stream.receive(QUIET)
    except TimeoutError:
        return
    raise AssertionError(f"{delivery!r} came, attempt {delivery.attempt}")


class Bench:
    """Clients of the backend under test, in a namespace of their own.

    Arguments:
        make: settings of the backend.
        drop: the driver's way to remove what the API does not.
    """

    def __init__(self, make: SettingsFactory, drop: DropNamespace | None) -> None:
        self.namespace = "t" + secrets.token_hex(4)
        self.capabilities: Capabilities = AsyncPubSub(make(namespace=self.namespace)).capabilities
        self._make = make
        self._drop = drop
        self._clients: list[AsyncPubSub] = []
        self._sync_clients: list[PubSub] = []
        self._declared: dict[str, set[str]] = {}  # namespace -> subscriptions
        self._touched: set[str] = set()  # namespaces in which a client was connected

    def settings(self, **overrides: Any) -> Settings:
        return self._make(**{"namespace": self.namespace, **overrides})

    def client(self, **overrides: Any) -> AsyncPubSub:
        """A new client, closed at the end of the case."""
        pubsub = AsyncPubSub(self.settings(**overrides))
        self._watch(pubsub)
        self._clients.append(pubsub)
        return pubsub

    def sync_client(self, **overrides: Any) -> PubSub:
        """A new client for sync code, closed at the end of the case."""
        pubsub = PubSub(self.settings(**overrides))
        self._watch(pubsub._client)
        self._sync_clients.append(pubsub)
        return pubsub

    def _watch(self, pubsub: AsyncPubSub) -> None:
        """Note where the client connects and what it declares, to remove it at the end."""
        backend: Backend = pubsub._supervisor.backend
        names = self._declared.setdefault(pubsub.settings.namespace, set())
        open_link, declare = backend.open, backend.declare

        async def opened() -> None:
            self._touched.add(pubsub.settings.namespace)
            await open_link()

        async def declared(subscription: Subscription) -> None:
            names.add(subscription.label)
            await declare(subscription)

        backend.open = opened  # type: ignore[method-assign]
        backend.declare = declared  # type: ignore[method-assign]

    async def until_dead(self, subscription: str, count: int) -> list[Message]:
        """Wait until the subscription has ``count`` dead letters; returns them."""
        pubsub = self.client()
        letters: list[Message] = []

        async def there() -> bool:
            letters[:] = [letter async for letter in pubsub.dead_letters(subscription)]
            return len(letters) >= count

        await eventually(there, f"{count} dead letters of {subscription}")
        return letters

    async def finish(self) -> None:
        """Close every client and remove all that was declared."""
        for sync_client in self._sync_clients:
            await asyncio.to_thread(sync_client.close, 5)
        await asyncio.gather(*(pubsub.close(grace=5) for pubsub in self._clients))
        for namespace in self._touched:
            settings = self.settings(namespace=namespace)
            async with AsyncPubSub(settings) as pubsub:
                await asyncio.gather(*(pubsub.delete(name) for name in self._declared[namespace]))
            if self._drop is not None:
                await self._drop(settings)
        await asyncio.sleep(0)  # transports that were closed say so in the loop's next turn
        left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("pubsub")]
        assert not left, f"tasks that outlived close(): {left}"


class Suite:
    """The fixtures of every chapter. A driver overrides `backend_settings`, and the others where it can."""

    @pytest.fixture
    def backend_settings(self) -> SettingsFactory:
        """Required: how to make settings of the backend under test."""
        raise NotImplementedError(
            "override the fixture backend_settings: return a function that makes Settings"
        )

    @pytest.fixture
    def send_foreign(self) -> SendForeign | None:
        """Optional: a raw client's publish, for contract 17."""
        return None

    @pytest.fixture
    def names_on_broker(self) -> NamesOnBroker | None:
        """Optional: what is on the broker, to see that nothing of a deleted subscription is."""
        return None

    @pytest.fixture
    def drop_namespace(self) -> DropNamespace | None:
        """Optional: how to remove what is left on the broker after a case."""
        return None

    @pytest_asyncio.fixture
    async def bench(
        self, backend_settings: SettingsFactory, drop_namespace: DropNamespace | None
    ) -> AsyncIterator[Bench]:
        """Clients and names of the case's own."""
        bench = Bench(backend_settings, drop_namespace)
        yield bench
        await bench.finish()
