"""Looking into a queue without being its consumer: many Basic.Gets at once, so that a page costs one round trip.

What was got is out until its channel is closed, and then goes back to where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends._rabbitmq_link import Channel, Link
from pubsub_facade.errors import PubSubError


class Gets:
    """A channel that gets. One page at a time."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._page: list[frames.Content] = []
        self._missing = 0
        self._done: asyncio.Future[None] | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, link: Link) -> AsyncIterator[Gets]:
        """On a channel of its own; what is not acknowledged goes back at the end."""
        async with link.brief_channel() as channel:
            gets = cls(channel)
            channel.on_closed.append(gets._on_closed)
            link.attach(channel.number, gets)
            yield gets

    async def page(self, queue: str, limit: int) -> list[frames.Content]:
        """Up to ``limit`` messages from the head; fewer: no more are there. Raises ConnectionLost."""
        if self.channel.error is not None:
            raise self.channel.error
        self._page = []
        self._missing = limit
        self._done = asyncio.get_running_loop().create_future()
        self.channel.link.write([frames.get(self.channel.number, queue)] * limit)
        await self._done
        return self._page

    async def all(self, queue: str) -> list[frames.Content]:
        """All messages that are there now: for short queues."""
        found: list[frames.Content] = []
        while len(page := await self.page(queue, 16)) == 16:
            found += page
        return found + page

    def ack(self, content: frames.Content) -> None:
        """Remove a message that was got."""
        if self.channel.error is None:
            self.channel.link.write([frames.ack(self.channel.number, content.tag, multiple=False)])

    # -- Sink ---------------------------------------------------------------------------------------

    def content(self, content: frames.Content) -> None:
        self._page.append(content)
        self._answered()

    def empty(self) -> None:
        self._answered()

    def confirmed(self, tag: int, multiple: bool, stored: bool) -> None:
        return

    def _answered(self) -> None:
        self._missing -= 1
        if not self._missing and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _on_closed(self, error: PubSubError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
