"""What things of ours are called on RabbitMQ, how their queues are declared, and what is remembered of them.

Names hold a ``:`` wherever two subscriptions could otherwise meet: no namespace and no subscription has one.
Pure: no I/O.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Final

from pubsub_facade.subscription import Definition, Era

LEVELS: Final = tuple(125 << step for step in range(26))
"""How long, in ms, a queue of waiting messages holds one at most: 1/8 s to 48 days, the longest RabbitMQ has."""

KEEP_ALL: Final = 1_000_000
"""A delivery limit that is never met. With any limit a quorum queue puts what comes back where it was, without
one at its end; and RabbitMQ 4 drops messages after 20 returns where none is given."""

HASH_WEIGHT: Final = "20"  # points each ordered queue has on the hash ring: more spread keys more evenly


def level_for(delay: float) -> tuple[int, int]:
    """Where a message waits ``delay`` seconds: the level, and its own ms there (no more than the level)."""
    ms = min(max(1, math.ceil(delay * 1000)), LEVELS[-1])
    return next(level for level in LEVELS if level >= ms), ms


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one subscription's things."""

    namespace: str
    subscription: str

    @property
    def queue(self) -> str:
        """What waits; of an ordered one the prefix of its queues."""
        return f"{self.namespace}.{self.subscription}"

    @property
    def apart(self) -> str:
        """A queue: what was out twice when a process or link was lost, handed out one at a time."""
        return f"{self.queue}:apart"

    @property
    def dead(self) -> str:
        return f"{self.queue}:dead"

    @property
    def definition(self) -> str:
        """A queue that holds `Record`s."""
        return f"{self.queue}:definition"

    @property
    def lock(self) -> str:
        """A queue that exists while somebody changes the definition."""
        return f"{self.queue}:lock"

    @property
    def hash(self) -> str:
        """An exchange that spreads keys over the ordered queues."""
        return f"{self.queue}:hash"

    def ordered(self, index: int) -> str:
        return f"{self.queue}:{index}"

    def retry(self, level: int) -> str:
        """A queue of what waits ``level`` ms at most for its next attempt."""
        return f"{self.queue}:retry.{level}"

    def queues(self, spread: int) -> list[str]:
        """What members consume from first of all.

        Arguments:
            spread: how many queues an ordered subscription is spread over; 0: one queue.
        """
        return [self.ordered(index) for index in range(spread)] if spread else [self.queue]


def due_exchange(namespace: str) -> str:
    """Where delayed messages arrive when they are due, on their way to the topic exchange."""
    return f"{namespace}:due"


def sink(namespace: str) -> str:
    """A queue of length 1 beside the topic exchange: a due message that nobody wants has somewhere to go."""
    return f"{namespace}:sink"


def delay(namespace: str, level: int) -> str:
    """A queue and an exchange: messages published with a delay of ``level`` ms at most."""
    return f"{namespace}:delay.{level}"


def notices(namespace: str) -> str:
    """An exchange: tells the members in all processes of a changed definition."""
    return f"{namespace}:notices"


@dataclass(frozen=True, slots=True)
class Arguments:
    """How our queues are declared.

    Arguments:
        replicas: members of each quorum queue; None: the broker's default.
    """

    replicas: int | None

    def quorum(self, **more: Any) -> dict[str, Any]:
        """A durable queue that drops nothing."""
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": KEEP_ALL}
        if self.replicas is not None:
            arguments["x-quorum-initial-group-size"] = self.replicas
        return {**arguments, **more}

    def handing_on(self, ttl: int, exchange: str) -> dict[str, Any]:
        """A quorum queue that hands on what has had its time, and keeps it until that is confirmed."""
        return self.quorum(
            **{
                "x-message-ttl": ttl,
                "x-dead-letter-exchange": exchange,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
        )

    def ordered(self) -> dict[str, Any]:
        """A quorum queue with one active consumer at a time."""
        return self.quorum(**{"x-single-active-consumer": True})


@dataclass(frozen=True)
class Record:
    """What the definition queue remembers of a subscription.

    Arguments:
        namespace, subscription: whose it is.
        spread: queues an ordered one is spread over; 0: one queue.
        levels: of its retry queues, in ms.
    """

    namespace: str
    subscription: str
    definition: Definition
    spread: int = 0
    levels: tuple[int, ...] = ()

    @property
    def names(self) -> Names:
        return Names(self.namespace, self.subscription)

    @property
    def queues(self) -> list[str]:
        return self.names.queues(self.spread)

    @property
    def filtering(self) -> Definition | None:
        """What the members filter by: the filters of each era; None without any.

        The patterns are the broker's: what was routed here is for this subscription.
        """
        eras = self.definition.eras
        if all(era.filter is None for era in eras):
            return None
        anything = tuple(Era(era.since, ("#",), era.filter) for era in eras)
        return dataclasses.replace(self.definition, eras=anything)

    @property
    def age(self) -> tuple[float, int, int]:
        """Sorts records of one subscription from old to new."""
        return self.definition.current.since, len(self.definition.eras), len(self.levels)

    def to_json(self) -> bytes:
        data = {
            "namespace": self.namespace,
            "subscription": self.subscription,
            "spread": self.spread,
            "levels": self.levels,
            "definition": json.loads(self.definition.to_json()),
        }
        return json.dumps(data).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Read what `to_json` wrote; ValueError on anything else."""
        try:
            data = json.loads(text)
            return cls(
                str(data["namespace"]),
                str(data["subscription"]),
                Definition.from_json(json.dumps(data["definition"]).encode()),
                int(data["spread"]),
                tuple(int(level) for level in data["levels"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a subscription's record: {text[:80]!r}") from error
