"""What ActiveMQ Classic's management takes away under running members, and how they hear of it.

The broker drops the subscriptions to a topic or queue that is removed (``removeTopic``, ``removeQueue``, the console)
and tells their clients nothing. But it publishes an advisory for each destination that comes or goes, and one link of
each process with members listens to them. A link of its own, because a broker that denies advisories, or cannot put
them into words (it needs XStream and Jettison, which the distribution has), may end the link over them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from pubsub_facade.backends._activemq_session import Session
from pubsub_facade.backends._stomp import BrokerRefused, Frame, Link
from pubsub_facade.errors import AuthenticationFailed, ConnectionLost

log = logging.getLogger("pubsub_facade")

COMES: Final = b'"operationType":0'  # in all that the broker tells of what is there already
TRIES: Final = 2  # links that may end before anything came, until advisories count as not to be had
ADVISORIES: Final = {
    "destination": "/topic/ActiveMQ.Advisory.Topic,/topic/ActiveMQ.Advisory.Queue",
    "transformation": "jms-advisory-json",
    "ack": "auto",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A topic or queue of the broker, by its name there."""

    kind: Literal["topic", "queue"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def told(body: bytes) -> tuple[Place, bool] | None:
    """Of an advisory: which destination it is about, and whether that is gone; None of anything else. Pure."""
    try:
        info = json.loads(body)["DestinationInfo"]
        kind, name = info["destination"]["@class"], info["destination"]["string"]
        gone = info["operationType"] == 1
    except (ValueError, KeyError, TypeError):
        return None
    return Place("queue" if str(kind).endswith("Queue") else "topic", str(name)), gone


class Watch:
    """The link of one backend that hears what is removed.

    Arguments:
        removed: called on the loop with what was removed on the broker, whoever's it was.
        lost: called on the loop when the link is lost: what was removed from then on nobody has told us.
    """

    def __init__(
        self, session: Session, removed: Callable[[Place], None], lost: Callable[[ConnectionLost], None]
    ) -> None:
        self._session = session
        self._removed = removed
        self._lost = lost
        self._link: Link | None = None
        self._starting = asyncio.Lock()
        self._heard = False  # something came on this link
        self._told_so = False
        self.reset()

    def reset(self) -> None:
        """The broker may be another one: what could not be had may now be."""
        self._denied = False

    async def ready(self) -> None:
        """Return when removals are heard of, or cannot be. Raises ConnectionFailed."""
        async with self._starting:
            for _ in range(TRIES):
                if self._denied or (self._link is not None and self._link.lost is None):
                    return
                await self._start()
            if self._link is None or self._link.lost is not None:
                self._deny("the broker ends the link that asks for advisories")

    async def _start(self) -> None:
        link = await self._session.connect()
        self._heard = False
        link.on_messages = self._received
        self._link = link
        try:
            await link.ask("SUBSCRIBE", {**ADVISORIES, "id": "1"})
        except ConnectionLost:
            return  # `ready` tries again, and tells
        except (BrokerRefused, AuthenticationFailed) as error:
            self._deny(str(error))
            await self.close()
            return
        except BaseException:
            await self.close()
            raise
        link.on_lost = self._ended

    def _received(self, frames: list[Frame]) -> None:
        self._heard = True
        for _, body in frames:
            if COMES not in body:
                news = told(body)
                if news is not None and news[1]:
                    self._removed(news[0])

    def _ended(self, error: ConnectionLost) -> None:
        if self._heard:
            self._lost(error)
        else:
            self._deny(str(error))

    def _deny(self, why: str) -> None:
        self._denied = True
        if not self._told_so:
            self._told_so = True
            log.info(
                "activemq: members will not notice when their topics or queues are removed by the console: %s",
                why,
            )

    async def close(self) -> None:
        """Leave. Idempotent; never raises."""
        link, self._link = self._link, None
        if link is not None:
            link.on_lost = link.on_messages = _ignore
            await link.close()


def _ignore(_: object) -> None:
    return
