"""Dead letters of RabbitMQ subscriptions: looked at by getting them and giving them back, removed by ack.

While one iteration holds letters nobody else can get them, and the broker does not count them; so what is to
be removed is looked for in the iterations of this process first, and acknowledged there.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Collection
from typing import Final

from pubsub_facade.backends import _rabbitmq_wire as mapping
from pubsub_facade.backends._rabbitmq_frames import Content
from pubsub_facade.backends._rabbitmq_gets import Gets, ready
from pubsub_facade.backends._rabbitmq_link import NOT_FOUND, ChannelClosed, Link
from pubsub_facade.message import Message

PAGE: Final = 100


class _Browse:
    """One iteration under way, and what it holds."""

    def __init__(self, gets: Gets) -> None:
        self.gets = gets
        self.held: dict[str, list[Content]] = {}
        self.ending = False  # what it holds is on its way back
        self.ended = asyncio.Event()

    def hold(self, page: list[Content]) -> list[Message]:
        letters = [mapping.read_message(content) for content in page]
        for letter, content in zip(letters, page, strict=True):
            self.held.setdefault(letter.id, []).append(content._replace(body=b"", properties=b""))
        return letters

    async def remove(self, ids: Collection[str]) -> set[str]:
        """Remove those of ``ids`` that are held; returns which."""
        removed = {id for id in ids if id in self.held}
        for id in removed:
            for content in self.held.pop(id):
                self.gets.ack(content)
        return removed


class DeadLetterQueues:
    """All dead letters of one link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._browses: defaultdict[str, list[_Browse]] = defaultdict(list)
        self.ended = 0  # iterations that have given back what they held

    async def browse(self, queue: str) -> AsyncGenerator[Message, None]:
        """The letters that are there now, oldest first."""
        await self._all_back(queue)
        browse: _Browse | None = None
        try:
            async with Gets.open(self._link) as gets:
                left = await ready(gets.channel, queue)
                browse = _Browse(gets)
                self._browses[queue].append(browse)
                try:
                    while left > 0:
                        page = await gets.page(queue, min(left, PAGE))
                        left = left - len(page) if page else 0
                        for letter in browse.hold(page):
                            if letter.id in browse.held:
                                yield letter
                finally:
                    browse.ending = True
        finally:
            if browse is not None:
                self._browses[queue].remove(browse)
                self.ended += 1
                browse.ended.set()

    async def held(self, queue: str) -> int:
        """How many letters the iterations of this process hold; those that are ending have ended first."""
        await self._all_back(queue)
        return sum(len(held) for browse in self._browses[queue] for held in browse.held.values())

    async def _all_back(self, queue: str) -> None:
        """Return once no iteration of this process is on its way to give back what it held."""
        for browse in list(self._browses[queue]):
            if browse.ending:
                await browse.ended.wait()

    async def discard(self, queue: str, ids: Collection[str] | None) -> int:
        """Remove letters by id (None: all); returns how many."""
        removed: set[str] = set()
        await self._all_back(queue)
        for browse in list(self._browses[queue]):
            found = await browse.remove(list(browse.held) if ids is None else set(ids))
            if found:
                await ready(browse.gets.channel, queue)  # the answer comes after the acks were seen
            removed |= found
        if ids is None:
            return len(removed) + await self._purge(queue)
        return len(removed) + await self._remove(queue, set(ids) - removed)

    async def _purge(self, queue: str) -> int:
        async with self._link.brief_channel() as channel:
            try:
                answer = await channel.call(channel.pika.queue_purge, queue)
            except ChannelClosed as error:
                if error.code != NOT_FOUND:
                    raise
                return 0
            return int(answer.message_count)

    async def _remove(self, queue: str, ids: set[str]) -> int:
        missing = set(ids)
        removed = 0
        async with Gets.open(self._link) as gets:
            left = await ready(gets.channel, queue) if missing else 0
            while left > 0 and missing:
                page = await gets.page(queue, min(left, PAGE))
                left = left - len(page) if page else 0
                for content in page:
                    id = mapping.envelope_of(content).id
                    if id in ids:
                        gets.ack(content)
                        missing.discard(id)
                        removed += 1
        return removed
