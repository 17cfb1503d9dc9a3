"""That this client's ephemeral subscriptions are there, so that publishers who require subscribers know.

Kafka knows nothing of a reader without a group. So each client with ephemeral subscriptions holds one lease in
the registry: written when one begins or ends, renewed now and then, taken away with the last one, and over by
itself where the client was killed. Nothing is written for a message. That it cannot be written keeps no
subscription from working: it is told to the log, and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from pubsub_facade.backends._kafka_registry import Registry
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.subscription import Era, Subscription

log = logging.getLogger("pubsub_facade")

LEASE: float = 60.0  # seconds that a client counts as there after its last word
RENEW: float = 20.0  # seconds between two words
RETRY: Final = 1.0  # seconds until what could not be written is tried again
ENTER_WAIT: Final = 10.0  # seconds that a beginning subscription waits for its lease
LEAVE_WAIT: Final = 2.0
FORGOTTEN: Final = 600.0  # seconds after its end that a lease of a client that was killed is taken away


class Presence:
    """The lease of one client.

    Arguments:
        token: names the client.
        ensure: makes the registry's Kafka topic unless it is there.
    """

    def __init__(self, registry: Registry, token: str, ensure: Callable[[], Awaitable[None]]) -> None:
        self._registry = registry
        self._token = token
        self._ensure = ensure
        self._here: dict[object, Era] = {}
        self._version = 0  # of what is to be written
        self._written = 0
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def enter(self, owner: object, subscription: Subscription) -> None:
        """Return when publishers can know of it. Raises ConnectionLost; what else is in the way is only logged."""
        self._here[owner] = Era(0.0, subscription.patterns, subscription.filter)
        self._version += 1
        try:
            async with asyncio.timeout(ENTER_WAIT):
                await self._write()
        except ConnectionLost:
            raise
        except (PubSubError, TimeoutError) as error:
            log.warning(
                "kafka: an ephemeral subscription to %s could not be noted in the registry yet: %s; publishers with "
                "require_subscribers may refuse what only it would get",
                ", ".join(subscription.patterns),
                error or "no answer in time",
            )
        if self._here and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._keep(), name="pubsub-kafka-presence")

    async def leave(self, owner: object) -> None:
        """It is gone. Bounded; never raises: what cannot be told now is over with the lease."""
        if not self.forget(owner):
            return
        try:
            async with asyncio.timeout(LEAVE_WAIT):
                await self._write()
        except (PubSubError, TimeoutError) as error:
            log.debug("kafka: the registry was not told that an ephemeral subscription is gone: %s", error)

    def forget(self, owner: object) -> bool:
        """It is gone, and nothing can be told now; False where it was not here."""
        if self._here.pop(owner, None) is None:
            return False
        self._version += 1
        if not self._here:
            self.stop()
        return True

    def stop(self) -> None:
        """No more renewals."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _keep(self) -> None:
        retry = RETRY
        pause = RENEW if self._written == self._version else retry
        while True:
            await asyncio.sleep(pause)
            self._version += 1
            try:
                await self._write()
            except PubSubError as error:  # `enter`, or who uses the link, tells what is wrong
                log.debug("kafka: the lease of ephemeral subscriptions is not renewed yet: %s", error)
                pause, retry = retry, min(2 * retry, RENEW)
            else:
                pause, retry = RENEW, RETRY

    async def _write(self) -> None:
        """Return when what is here now is stored: those who wait while another writes share the next write."""
        wanted = self._version
        async with self._writing:
            if self._written >= wanted:
                return
            version = self._version
            eras = dict.fromkeys(self._here.values())
            if eras:
                await self._ensure()
            now = time.time()
            ended = [
                token
                for token, lease in self._registry.leases.items()
                if lease.over + FORGOTTEN < now and token != self._token
            ]
            await self._registry.lease(self._token, eras, LEASE, ended)
            self._written = version
