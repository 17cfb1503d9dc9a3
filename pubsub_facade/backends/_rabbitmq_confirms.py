"""Publishing with confirms: messages are written in one go, and what the broker says of them is sorted back.

One channel, one numbering. A group is what one call wrote; its future is done when each of its messages
is confirmed, refused or returned. Confirms come singly and in ranges, in any order; a returned message is
returned before it is confirmed (tried, and in RabbitMQ's documentation).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends._rabbitmq_link import Channel, Link, unused
from pubsub_facade.backends._rabbitmq_wire import envelope_of
from pubsub_facade.errors import ConnectionLost, Fate, PubSubError

MAX_METHODS: Final = 1024  # publish frames remembered, one for each topic
SLOW: Final = (
    5.0  # s: a full queue refuses at once; a node that looks for a lost one takes 7 s for each message
)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message on its way to an exchange.

    Arguments:
        exchange: "": the default one, which takes the routing key for the name of a queue.
        mandatory: return it where no queue would get it.
    """

    id: str
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    mandatory: bool


class _Group:
    """What one call wrote: tags ``first`` to ``last``."""

    __slots__ = ("done", "first", "judge", "last", "messages", "refused", "singles", "upto")

    def __init__(
        self, first: int, messages: Sequence[Outgoing], done: asyncio.Future[Outcome], judge: Judge | None
    ) -> None:
        self.judge = judge
        self.first = first
        self.last = first + len(messages) - 1
        self.messages = messages
        self.done = done
        self.upto = first - 1  # all up to here have their answer
        self.singles: set[int] = set()  # above it: have their answer
        self.refused: list[Outgoing] = []

    def settle(self, tag: int, multiple: bool, stored: bool) -> None:
        if not stored:
            begin = self.upto + 1 if multiple else tag
            for each in range(begin, min(tag, self.last) + 1):
                if each not in self.singles:
                    self.refused.append(self.messages[each - self.first])
        if multiple:
            self.upto = max(self.upto, min(tag, self.last))
            self.singles = {single for single in self.singles if single > self.upto}
        elif tag == self.upto + 1:
            self.upto = tag
        else:
            self.singles.add(tag)
        while self.singles and self.upto + 1 in self.singles:
            self.upto += 1
            self.singles.discard(self.upto)


@dataclass(slots=True)
class Outcome:
    """What became of a group: the rest of it is stored.

    Arguments:
        count: messages of the group.
        returned: ids that no queue would get: certainly not stored.
        returning: the routing keys of those.
        refused: ids that a queue refused; another may have stored them.
        refusing: the routing keys of those.
    """

    count: int
    returned: list[str] = field(default_factory=list)
    returning: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    refusing: set[str] = field(default_factory=set)

    @property
    def fates(self) -> dict[str, Fate]:
        """As `SendFailed` wants them."""
        fates: dict[str, Fate] = dict.fromkeys(self.refused, "unknown")
        fates.update(dict.fromkeys(self.returned, "not stored"))
        return fates


Judge = Callable[[Outcome], PubSubError | None]
"""Which error an outcome is for who wrote; None: it is none."""


class Confirms:
    """A channel in confirm mode. Dead once its channel is."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._link = channel.link
        self._next = 1
        self._groups: deque[_Group] = deque()
        self._since = 0.0  # (loop time) the last confirm, or the first group written after it
        self._returned: set[str] = set()
        self._methods: dict[tuple[str, str, bool], bytes] = {}
        self._loop = asyncio.get_running_loop()
        self._frame_max: int = self._link.params.frame_max

    @classmethod
    async def open(cls, link: Link) -> Confirms:
        """On a channel of its own."""
        channel = await link.open_channel()
        confirms = cls(channel)
        channel.on_closed.append(confirms._on_closed)
        link.unanswered.append(confirms._waiting)
        link.attach(channel.number, confirms)
        await channel.call(channel.pika.confirm_delivery, unused)
        return confirms

    @property
    def error(self) -> PubSubError | None:
        """Why it is dead; None while it works."""
        return self._channel.error

    def write(self, messages: Sequence[Outgoing], judge: Judge | None = None) -> asyncio.Future[Outcome]:
        """Send messages, in order; the future has their outcome, or ConnectionLost. At least one message.

        Arguments:
            judge: says which outcome is an error of the future.
        """
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if self._channel.error is not None:
            future.set_exception(_lost(self._channel.error))
            return future
        if not self._groups:
            self._since = self._loop.time()
        number, limit = self._channel.number, self._frame_max
        data: list[bytes] = []
        for message in messages:
            data.append(self._method(message))
            data += frames.publish_content(number, message.properties, message.body, limit)
        self._groups.append(_Group(self._next, messages, future, judge))
        self._next += len(messages)
        self._link.write(data)
        return future

    def _method(self, message: Outgoing) -> bytes:
        key = (message.exchange, message.routing_key, message.mandatory)
        method = self._methods.get(key)
        if method is None:
            if len(self._methods) >= MAX_METHODS:
                self._methods.clear()
            method = self._methods[key] = frames.publish_method(
                self._channel.number, message.exchange, message.routing_key, mandatory=message.mandatory
            )
        return method

    # -- Sink ---------------------------------------------------------------------------------------

    def content(self, content: frames.Content) -> None:
        """A message comes back: no queue would get it."""
        self._returned.add(envelope_of(content).id)

    def confirmed(self, tag: int, multiple: bool, stored: bool) -> None:
        """The broker answers for one message, or for all up to it."""
        complete = False
        waited, self._since = self._link.heard - self._since, self._link.heard
        if not stored and waited > SLOW:
            why = f"it refused a message after {waited:.1f} s"
            self._loop.call_soon(self._link.give_up, why)  # what is not confirmed goes to another node
            return
        for group in self._groups:
            if group.first > tag:
                break
            if multiple or tag <= group.last:
                group.settle(tag, multiple, stored)
                complete = complete or group.upto >= group.last
        if complete:
            for group in [group for group in self._groups if group.upto >= group.last]:
                self._groups.remove(group)
                self._finish(group)

    def empty(self) -> None:
        return

    def _finish(self, group: _Group) -> None:
        outcome = Outcome(len(group.messages), refused=[message.id for message in group.refused])
        outcome.refusing = {message.routing_key for message in group.refused}
        if self._returned:
            returned = [message for message in group.messages if message.id in self._returned]
            outcome.returned = [message.id for message in returned]
            outcome.returning = [message.routing_key for message in returned]
            self._returned.difference_update(outcome.returned)
        if group.done.done():
            return
        error = group.judge(outcome) if group.judge is not None else None
        if error is None:
            group.done.set_result(outcome)
        else:
            group.done.set_exception(error)

    def _waiting(self) -> float | None:
        """Since when nothing was confirmed: a broker that is busy confirms some."""
        return self._since if self._groups else None

    def _on_closed(self, error: PubSubError) -> None:
        self._link.unanswered.remove(self._waiting)
        while self._groups:
            future = self._groups.popleft().done
            if not future.done():
                future.set_exception(_lost(error))
                future.exception()  # retrieved here: nobody may be waiting any more
        self._returned.clear()

    async def close(self) -> None:
        await self._channel.close()


def _lost(error: PubSubError) -> PubSubError:
    """An error of its own for each who waits: a traceback grows with each raise."""
    copy = type(error)(*error.args) if type(error) is ConnectionLost else error
    if copy is not error:
        copy.__cause__ = error.__cause__
    return copy
