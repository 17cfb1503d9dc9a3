"""What a subscription is: its name, its patterns, and the rules its members follow.

`Definition` is what a broker cannot keep for us and a driver stores beside the queue: the patterns and
the filter in force, and those in force before, so that what already waits is judged by the rules it
was published under (contract 3). Pure: no I/O.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from pubsub_facade.errors import ConfigError, TopicError
from pubsub_facade.filters import Filter
from pubsub_facade.message import HeaderValue
from pubsub_facade.topics import PatternSet, check_pattern

MAX_SUBSCRIPTION: Final = 100
DEAD: Final = ".dead"  # what the dead letters of a subscription are called after its name (contract 9)
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a failed delivery waits: ``initial * factor ** (attempt - 1)``, at most ``maximum``.

    Arguments:
        initial: seconds after the first failure.
        maximum: seconds at most.
        factor: how much longer each time, 1 or more.
        jitter: share of the delay that is drawn at random, 0 to 1: 0.2 gives 80 % to 100 %.
    """

    initial: float = 1.0
    maximum: float = 300.0
    factor: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.initial <= self.maximum < 1e9 and self.factor >= 1 and 0 <= self.jitter <= 1):
            raise ConfigError(
                f"{self} is not usable: give 0 <= initial <= maximum (seconds), factor >= 1 and jitter from 0 to 1"
            )

    def delay(self, attempt: int) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (from 1)."""
        exponent = min(attempt - 1, 64)
        delay = min(self.initial * self.factor**exponent, self.maximum)
        return delay * (1 - self.jitter * random.random())


@dataclass(frozen=True)
class Subscription:
    """A durable name plus patterns (contract 3); without a name: ephemeral (contract 4).

    Arguments:
        name: words as in a topic, at most 100 characters; None: ephemeral.
        patterns: at least one (contract 2).
        ordered: per-key order across all members (contract 10).
        filter: a selector on headers (contract 11).
        max_attempts: attempts until the dead letters, 1 or more.
        backoff: how long a failed delivery waits.
    """

    name: str | None
    patterns: tuple[str, ...]
    ordered: bool = False
    filter: str | None = None
    max_attempts: int = 5
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if self.name is not None:
            check_subscription(self.name)
        if not self.patterns:
            raise TopicError("a subscription needs at least one pattern: '#' is every topic")
        for pattern in self.patterns:
            check_pattern(pattern)
        if self.filter is not None:
            Filter.parse(self.filter)
        if (
            isinstance(self.max_attempts, bool)
            or not isinstance(self.max_attempts, int)
            or self.max_attempts < 1
        ):
            raise ConfigError(f"max_attempts {self.max_attempts!r} is not a whole number of 1 or more")

    @property
    def label(self) -> str:
        """What a delivery shows as its subscription: the name, or "" for an ephemeral one."""
        return self.name or ""


def check_subscription(name: object) -> str:
    """Return ``name`` if a subscription can have it, else raise ConfigError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > MAX_SUBSCRIPTION:
        raise ConfigError(
            f"subscription name {name!r} is not usable: give words of A-Z a-z 0-9 _ - joined by dots, "
            f"at most {MAX_SUBSCRIPTION} characters, as 'analytics'"
        )
    if name.endswith(DEAD):
        raise ConfigError(
            f"subscription name {name!r} is that of the dead letters of {name.removesuffix(DEAD)!r}: choose another"
        )
    return name


@dataclass(frozen=True)
class Era:
    """The patterns and the filter in force from ``since`` (seconds since the epoch) until the next era."""

    since: float
    patterns: tuple[str, ...]
    filter: str | None = None

    @cached_property
    def _patterns(self) -> PatternSet:
        return PatternSet(self.patterns)

    @cached_property
    def _filter(self) -> Filter | None:
        return None if self.filter is None else Filter.parse(self.filter)

    def accepts(self, topic: str, headers: Mapping[str, HeaderValue]) -> bool:
        """Whether a message published in this era is for the subscription."""
        return self._patterns.matches(topic) and (self._filter is None or self._filter.matches(headers))


@dataclass(frozen=True)
class Definition:
    """A subscription as its broker should remember it; a driver stores `to_json` where it survives.

    Times are the clocks of publishers and declarers: they should agree (NTP) to better than the time
    between a redeploy's declare and the first message that depends on it.
    """

    eras: tuple[Era, ...]
    ordered: bool = False

    KEPT: Final = 16  # eras; what waits longer than 16 redeclarations is judged by the oldest kept

    @classmethod
    def first(cls, subscription: Subscription, now: float) -> Definition:
        """The definition of a subscription declared for the first time at ``now`` (seconds since the epoch)."""
        return cls((Era(now, subscription.patterns, subscription.filter),), subscription.ordered)

    def redeclared(self, subscription: Subscription, now: float) -> Definition:
        """This definition after ``subscription`` was declared again at ``now``; itself if nothing changed."""
        current = self.current
        if set(current.patterns) == set(subscription.patterns) and current.filter == subscription.filter:
            return self
        era = Era(max(now, current.since), subscription.patterns, subscription.filter)
        return Definition((*self.eras, era)[-self.KEPT :], self.ordered)

    @property
    def current(self) -> Era:
        """The rules in force."""
        return self.eras[-1]

    @property
    def patterns(self) -> frozenset[str]:
        """Every pattern of every era: what the driver must still receive."""
        return frozenset(pattern for era in self.eras for pattern in era.patterns)

    def accepts(self, topic: str, headers: Mapping[str, HeaderValue], timestamp: float | None) -> bool:
        """Whether a message is for the subscription, by the rules of the time it was published.

        Without a timestamp (a foreign message) any era's yes is a yes: better once too often than lost.
        """
        if timestamp is None:
            return any(era.accepts(topic, headers) for era in self.eras)
        for era in reversed(self.eras):
            if era.since <= timestamp:
                return era.accepts(topic, headers)
        return self.eras[0].accepts(topic, headers)

    def to_json(self) -> bytes:
        """As UTF-8 JSON, at most a few KiB."""
        eras = [{"since": era.since, "patterns": era.patterns, "filter": era.filter} for era in self.eras]
        return json.dumps({"version": 1, "ordered": self.ordered, "eras": eras}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Definition:
        """Read what `to_json` wrote; ValueError on anything else."""
        try:
            data = json.loads(text)
            eras = tuple(Era(float(e["since"]), tuple(e["patterns"]), e["filter"]) for e in data["eras"])
            if not eras:
                raise ValueError("no eras")
            return cls(eras, bool(data["ordered"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a subscription definition: {text[:80]!r}") from error


def patterns_of(patterns: Iterable[str]) -> tuple[str, ...]:
    """Patterns as a tuple without twins, in the order given. Raises TopicError for a decorator without parentheses."""
    given = tuple(dict.fromkeys(patterns))
    for pattern in given:
        if callable(pattern):
            name = getattr(pattern, "__qualname__", repr(pattern))
            raise TopicError(
                f"pattern {name} is a function: write "
                '@subscriber("social.post.*", subscription="..."), with patterns of your own, above it'
            )
    return given
