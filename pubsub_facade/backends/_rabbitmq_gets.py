"""Looking into a queue without being its consumer: many Basic.Gets at once, so that a page costs one round trip.

What was got is out until its channel is closed, and then goes back to where it was: a moment after the
channel has closed, for which `Gets` waits, so that the next who looks finds it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends._rabbitmq_link import NOT_FOUND, Channel, ChannelClosed, Link
from pubsub_facade.errors import PubSubError

RETURN_TIMEOUT: Final = 0.5  # s to wait for what was got to be back: others may be getting it


class Gets:
    """A channel that gets. One page at a time."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._page: list[frames.Content] = []
        self._missing = 0
        self._held: dict[int, str] = {}  # delivery tag -> queue
        self._done: asyncio.Future[None] | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, link: Link) -> AsyncIterator[Gets]:
        """On a channel of its own; what is not acknowledged goes back at the end."""
        async with link.brief_channel() as watch:
            expected: dict[str, int] = {}
            try:
                async with link.brief_channel() as channel:
                    gets = cls(channel)
                    link.attach(channel.number, gets)
                    try:
                        yield gets
                    finally:
                        expected = await gets._expected(watch)
            finally:
                for queue, count in expected.items():
                    await _until_back(watch, queue, count)

    async def _expected(self, watch: Channel) -> dict[str, int]:
        """How many messages each queue has once all that is out is back."""
        try:
            return {
                queue: held + await ready(watch, queue)
                for queue, held in Counter(self._held.values()).items()
            }
        except PubSubError:  # the link is lost: they are back without our help
            return {}

    async def page(self, queue: str, limit: int) -> list[frames.Content]:
        """Up to ``limit`` messages from the head; fewer: no more are there. Raises ConnectionLost."""
        if self.channel.error is not None:
            raise self.channel.error
        self._page = []
        self._missing = limit
        self._done = self.channel.future()
        self.channel.link.write([frames.get(self.channel.number, queue)] * limit)
        await self._done
        for content in self._page:
            self._held[content.tag] = queue
        return self._page

    async def all(self, queue: str) -> list[frames.Content]:
        """All messages that are there now: for short queues."""
        found: list[frames.Content] = []
        while len(page := await self.page(queue, 16)) == 16:
            found += page
        return found + page

    def ack(self, content: frames.Content) -> None:
        """Remove a message that was got."""
        self._held.pop(content.tag, None)
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


async def ready(channel: Channel, queue: str) -> int:
    """How many messages wait in a queue; 0 where there is none of this name, which closes the channel."""
    try:
        answer = await channel.call(channel.pika.queue_declare, queue, passive=True)
    except ChannelClosed as error:
        if error.code != NOT_FOUND:
            raise
        return 0
    return int(answer.message_count)


async def _until_back(channel: Channel, queue: str, count: int) -> None:
    end = time.monotonic() + RETURN_TIMEOUT
    pause = 0.001
    while channel.error is None and await ready(channel, queue) < count and time.monotonic() < end:
        await asyncio.sleep(pause)
        pause *= 2
