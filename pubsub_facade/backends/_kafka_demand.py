"""Who would get a message: asked before a publish where subscribers are required.

Answers from the registry as it was last read, and reads it anew before it says that there is nobody: what was
declared a moment ago, by whatever process, is never overlooked. What is gone counts until the registry is read
again, an ephemeral subscription whose process was killed until its lease ends. Only clients with
``require_subscribers`` have one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from pubsub_facade.backends._kafka_registry import Registry
from pubsub_facade.errors import FilterError, TopicError
from pubsub_facade.filters import Filter
from pubsub_facade.message import Message
from pubsub_facade.subscription import Era
from pubsub_facade.topics import TopicRouter


class Routes:
    """Patterns, with the filters behind them.

    Arguments:
        eras: the rules in force of each subscription.
    """

    def __init__(self, eras: Iterable[Era]) -> None:
        self._router: TopicRouter[str | None] = TopicRouter()  # pattern -> filter; None: all of it
        self._filters: dict[str, Filter] = {}
        for era in eras:
            text = self._known(era.filter)
            for pattern in era.patterns:
                self._add(pattern, text)

    def _add(self, pattern: str, text: str | None) -> None:
        try:
            self._router.add(pattern, text)
        except TopicError:  # of a later version of this package: it may mean anything
            self._router.add("#", text)

    def _known(self, text: str | None) -> str | None:
        """The filter, parsed; None where only a later version of this package understands it: it may take anything."""
        if text is None or text in self._filters:
            return text
        try:
            self._filters[text] = Filter.parse(text)
        except FilterError:
            return None
        return text

    def wanted(self, message: Message) -> bool:
        """Whether a subscription would get the message if it were published now."""
        filters = self._router.match(message.topic)
        if not self._filters or not filters:
            return bool(filters)
        return any(text is None or self._filters[text].matches(message.headers) for text in filters)


class Demand:
    """The view of one client.

    Arguments:
        ensure: makes the registry's Kafka topic unless it is there: only its leader knows for certain that it
            holds nothing.
        max_age: seconds that the view may be old.
    """

    def __init__(self, registry: Registry, ensure: Callable[[], Awaitable[None]], max_age: float) -> None:
        self._registry = registry
        self._ensure = ensure
        self._max_age = max_age
        self._routes = Routes(())
        self._version = -1  # of the registry, when the routes were made
        self._until = -math.inf  # when the first of the leases in them ends

    async def unwanted(self, messages: Sequence[Message]) -> list[Message]:
        """Those that no subscription would get. Raises as the registry does where it cannot be read."""
        anew = time.monotonic() - self._registry.read_at > self._max_age
        if anew:
            await self._read()
        alone = self._alone(messages)
        if alone and not anew:
            await self._read()
            alone = self._alone(alone)
        return alone

    async def _read(self) -> None:
        await self._ensure()
        await self._registry.refresh()

    def _alone(self, messages: Sequence[Message]) -> list[Message]:
        now = time.monotonic()
        if self._version != self._registry.version or now >= self._until:
            self._make(now)
        wanted = self._routes.wanted
        return [message for message in messages if not wanted(message)]

    def _make(self, now: float) -> None:
        eras = [definition.current for definition in self._registry.definitions()]
        leases = [lease for lease in self._registry.leases.values() if lease.until > now]
        for lease in leases:
            eras += lease.eras
        self._routes = Routes(eras)
        self._version = self._registry.version
        self._until = min((lease.until for lease in leases), default=math.inf)
