"""What the loop asks of the writer's thread, one object for each batch: what to do, and who is told.

An operation is made on the loop, run in the thread in a transaction that it shares with others, possibly
again if that fails, and told its result on the loop. ``run`` must do all it does through the `Store`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pubsub_facade.backends._sqlite_routes import Outgoing, Routes
from pubsub_facade.backends._sqlite_store import Claimed, Store
from pubsub_facade.errors import PubSubError, SendFailed
from pubsub_facade.message import Delivery, Message

Done = Callable[[Any], None]
"""Called on the loop with the result, or with the PubSubError instead of one."""


class Operation(ABC):
    """Something to do on the file.

    Arguments:
        done: who is told.
    """

    __slots__ = ("done",)

    durable: ClassVar[bool] = False
    """Whether its transaction must outlive a power cut: a lost ack only brings a message again."""

    def __init__(self, done: Done) -> None:
        self.done = done

    @abstractmethod
    def run(self, store: Store, wall: float) -> Any:
        """Do it, in a transaction; the result."""

    def prepare(self, routes: Routes, wall: float) -> None:  # noqa: B027 - most have nothing to compute
        """Compute what can be computed before the transaction; again if the routes change."""

    def idle(self, store: Store, wall: float) -> Any:
        """The result if it can be had without a transaction, because there is nothing to do; else None."""
        return None

    def refusal(self, text: str) -> PubSubError:
        """The error for: certainly not done."""
        return PubSubError(text)


class Send(Operation):
    """Store messages; the result is a list of those that found no subscription, where one is required.

    Arguments:
        only: the one subscription they are for; None: whoever's patterns match.
        required: refuse what nobody would get.
    """

    __slots__ = ("_only", "_outgoing", "_ready", "_refused", "_required", "messages")

    durable = True

    def __init__(self, messages: Sequence[Message], only: str | None, *, required: bool, done: Done) -> None:
        super().__init__(done)
        self.messages = messages
        self._only = only
        self._required = required
        self._outgoing = Outgoing(messages, time.time(), only)
        self._ready = self._outgoing
        self._refused: list[Message] = []

    def prepare(self, routes: Routes, wall: float) -> None:
        self._ready = self._outgoing
        self._refused = self._ready.route(routes, wall, required=self._required)
        if self._refused:
            refused = {id(message) for message in self._refused}
            kept = [message for message in self.messages if id(message) not in refused]
            self._ready = Outgoing(kept, wall, self._only)
            self._ready.route(routes, wall, required=self._required)

    def run(self, store: Store, wall: float) -> list[Message]:
        if self._ready.messages:
            store.insert(self._ready, wall)
        return self._refused

    def refusal(self, text: str) -> PubSubError:
        return SendFailed(text, {message.id: "not stored" for message in self.messages})


class Turn(Operation):
    """One member's acks and releases, and its wish for more; the result is a `Claimed`.

    Arguments:
        line: that of the deliveries settled.
        room: how many more it can take.
        suspect: whether one of them may have been in hand when a process died.
    """

    __slots__ = ("acks", "line", "member", "releases", "room", "subscription", "suspect")

    def __init__(
        self,
        member: int,
        subscription: int,
        line: int,
        *,
        acks: list[int],
        releases: list[int],
        room: int,
        suspect: bool,
        done: Done,
    ) -> None:
        super().__init__(done)
        self.member = member
        self.subscription = subscription
        self.line = line
        self.acks = acks
        self.releases = releases
        self.room = room
        self.suspect = suspect

    def run(self, store: Store, wall: float) -> Claimed:
        route = store.routes.by_id.get(self.subscription)
        ordered = route is not None and route.ordered and route.members > 1
        keys = store.keys_held(self.line, self.member, self.acks) if ordered and self.acks else None
        if self.acks:
            store.settle(self.line, self.member, self.acks)
        if self.releases:
            store.release(self.line, self.member, self.releases)
        claimed = Claimed(None, None, None)
        if route is not None:
            claimed = Claimed(route.line, None, None)
            if self.room:
                claimed = store.claim(route, self.member, self.room, suspect=self.suspect, now=wall)
        if keys and not keys <= store.keys_held(self.line, self.member):
            store.touch(self.line)  # others may have the keys now
        return claimed

    def idle(self, store: Store, wall: float) -> Claimed | None:
        if self.acks or self.releases:
            return None
        route = store.routes.by_id.get(self.subscription)
        if route is None:
            return Claimed(None, None, None)
        if not self.room:
            return Claimed(route.line, None, None)
        due, ready, suspects = store.probe(route.line, 1)
        first = bool(suspects and self.suspect)
        if due is not None and due <= wall:
            return None
        if route.ordered and (ready or first):
            if store.choose(route, self.member, 1, suspect=first)[0] != "[]":
                return None
        elif ready or first:
            return None
        return Claimed(route.line, None, due)


class Copy(Operation):
    """Park or bury deliveries of one member."""

    __slots__ = ("_deliveries", "_line", "_member", "_park")

    def __init__(
        self, member: int, line: int, deliveries: Sequence[Delivery], *, park: bool, done: Done
    ) -> None:
        super().__init__(done)
        self._member = member
        self._line = line
        self._deliveries = deliveries
        self._park = park

    def run(self, store: Store, wall: float) -> None:
        if self._park:
            store.park(self._line, self._member, self._deliveries, wall)
        else:
            store.bury(self._line, self._member, self._deliveries)


class Call(Operation):
    """Anything else: ``function(store)`` alone, in a transaction of its own or in none."""

    __slots__ = ("_function", "transaction")

    durable = True

    def __init__(self, function: Callable[[Store], Any], *, transaction: bool, done: Done) -> None:
        super().__init__(done)
        self._function = function
        self.transaction = transaction

    def run(self, store: Store, wall: float) -> Any:
        return self._function(store)


def resolver(future: asyncio.Future[Any]) -> Done:
    """A `Done` that resolves ``future``, unless its waiter has gone."""

    def done(result: Any) -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    return done
