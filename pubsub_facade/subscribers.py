"""`Subscribers`: handlers collected in a module that must not import the application object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pubsub_facade.errors import ConfigError
from pubsub_facade.handler import Handler
from pubsub_facade.subscription import Backoff, Subscription, patterns_of

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_BACKOFF = Backoff()


@dataclass(frozen=True, slots=True)
class Registration:
    """One handler and the subscription it serves."""

    handler: Handler
    subscription: Subscription
    concurrency: int


class Subscribers:
    """Collects handlers with `subscriber`; a client takes them with ``include``."""

    def __init__(self) -> None:
        self.registrations: list[Registration] = []

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
        """Register the decorated function as a handler.

        Arguments:
            patterns: what topics (contract 2).
            subscription: durable name; None: ephemeral (contract 4).
            ordered: per-key order (contract 10).
            filter: selector on headers (contract 11).
            concurrency: handlers at once in this process: tasks for async ones, threads for sync ones.
            max_attempts: attempts until the dead letters.
            backoff: how long a failed delivery waits.

        Raises ConfigError, TopicError or FilterError for what cannot work.
        """
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ConfigError(f"concurrency {concurrency!r} is not a whole number of 1 or more")
        declared = Subscription(subscription, patterns_of(patterns), ordered, filter, max_attempts, backoff)

        def register(function: Function) -> Function:
            self.add(Registration(Handler(function), declared, concurrency))
            return function

        return register

    def add(self, registration: Registration) -> None:
        """Take a registration; ConfigError where its subscription is already served otherwise."""
        name = registration.subscription.name
        for other in self.registrations:
            if (
                name is not None
                and other.subscription.name == name
                and other.subscription != registration.subscription
            ):
                raise ConfigError(
                    f"subscription {name!r} has two handlers that disagree: {other.handler.name} declares "
                    f"{other.subscription.patterns}, {registration.handler.name} declares "
                    f"{registration.subscription.patterns}; give one of them another subscription name, "
                    "or both the same patterns and options"
                )
        self.registrations.append(registration)

    def include(self, subscribers: Subscribers) -> None:
        """Take all handlers that another module collected."""
        for registration in subscribers.registrations:
            self.add(registration)
