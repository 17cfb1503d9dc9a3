"""What ActiveMQ cannot remember of a subscription for us, as it is stored in a queue beside it. Pure.

A subscription waits in *places*: durable subscriptions or queues on the broker, each of them fed by one
cover, a pattern that the broker matches. Places are only ever added, because taking one away would
take what waits in it. A topic may be in several; its owner is the first that covers it, and what comes
from another place is its twin. So the same message is never accepted twice, whichever members know of
which places, and no clock decides.

Records are written beside each other and merged when read: two members that declare at once lose nothing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from pubsub_facade.errors import TopologyConflict
from pubsub_facade.subscription import Definition, Era, Subscription
from pubsub_facade.topics import covers, matches

MAX_PLACES: Final = 8  # more patterns than that are taken together
REMEMBERED: Final = 4096  # topics whose owner is remembered


@dataclass(frozen=True)
class Record:
    """A subscription's definition and its places, oldest first, each named by its cover.

    ``lives`` tells it from one of the same name that was deleted: a copy that a broker's scheduler still
    held then belongs to nobody. There are several where members declared it first at the same time.
    Topics ``apart`` have a place of their own name, which owns them: the wider one no longer gets what is on them
    (Classic, `_activemq_forms.Durable`).
    """

    definition: Definition
    places: tuple[str, ...]
    lives: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    _owners: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def declared(cls, subscription: Subscription, old: Record | None, wanted: Sequence[str]) -> Record:
        """The record after ``subscription`` is declared now; ``old`` itself if nothing changes.

        Arguments:
            wanted: the covers of its patterns.

        Raises TopologyConflict where an ordered subscription would need a second place.
        """
        places = list(old.places) if old is not None else []
        for cover in wanted:
            if not any(covers(place, cover) for place in places):
                places.append(cover)
        apart = old.apart if old is not None else ()
        whole = [place for place in places if place not in apart]
        if subscription.ordered and len(whole) > 1:
            raise TopologyConflict(
                f"activemq: ordered subscription {subscription.name!r} listens to {', '.join(whole[:-1])} "
                f"and cannot keep its order over {whole[-1]} beside it: delete it and declare it again, or "
                "declare the new patterns under another name"
            )
        if old is None:
            return cls(Definition.first(subscription, time.time()), tuple(places), (uuid.uuid4().hex,))
        definition = old.definition.redeclared(subscription, time.time())
        return old if definition is old.definition else cls(definition, tuple(places), old.lives, apart)

    def with_apart(self, topic: str) -> Record:
        """The record after a topic was taken out of wider places; itself where it is in none."""
        if topic in self.apart or not any(place != topic and matches(place, topic) for place in self.places):
            return self
        places = self.places if topic in self.places else (*self.places, topic)
        return Record(self.definition, places, self.lives, (*self.apart, topic))

    def owner(self, topic: str) -> str | None:
        """The place whose copy of a message on ``topic`` counts; None: none of them."""
        try:
            return self._owners[topic]
        except KeyError:
            if len(self._owners) >= REMEMBERED:
                self._owners.clear()
            mine = (place for place in self.places if matches(place, topic))
            owner = topic if topic in self.apart else next(mine, None)
            self._owners[topic] = owner
            return owner

    def to_json(self) -> bytes:
        """As UTF-8 JSON, at most a few KiB."""
        definition = json.loads(self.definition.to_json())
        data = {"places": self.places, "lives": self.lives, "definition": definition}
        return json.dumps({**data, "apart": self.apart} if self.apart else data).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Read what `to_json` wrote; ValueError on anything else."""
        try:
            data = json.loads(text)
            places = tuple(str(place) for place in data["places"])
            lives = tuple(str(life) for life in data["lives"])
            apart = tuple(str(topic) for topic in data.get("apart", ()))
            return cls(Definition.from_json(json.dumps(data["definition"]).encode()), places, lives, apart)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a subscription record: {text[:80]!r}") from error

    @classmethod
    def merged(cls, records: Sequence[Record]) -> Record | None:
        """One record that knows what all of these know; None of none."""
        if not records:
            return None
        if len(records) == 1:
            return records[0]
        places = dict.fromkeys(place for record in records for place in record.places)
        lives = dict.fromkeys(life for record in records for life in record.lives)
        apart = dict.fromkeys(topic for record in records for topic in record.apart)
        eras = _in_order(era for record in records for era in record.definition.eras)
        newest = records[-1].definition
        definition = Definition(eras[-Definition.KEPT :], newest.ordered)
        return cls(definition, tuple(places), tuple(lives), tuple(apart))


def _in_order(eras: Iterable[Era]) -> tuple[Era, ...]:
    """The eras by time, those left out that change nothing."""
    out: list[Era] = []
    for era in sorted(eras, key=lambda era: era.since):
        if not out or (set(out[-1].patterns), out[-1].filter) != (set(era.patterns), era.filter):
            out.append(era)
    return tuple(out)


def cover_of(pattern: str) -> str:
    """The narrowest pattern that both brokers match reliably and that means all topics of ``pattern``.

    Classic has ``>`` at the end only. Artemis has ``#`` anywhere, but misses topics where a word, or a
    wildcard, follows it (tried on 2.40: ``b.*.*.#.b`` did not get ``b.a.b.b``, ``#.#`` got nothing).
    """
    words = pattern.split(".")
    if "#" not in words:
        return pattern
    first = words.index("#")
    after = list(takewhile(lambda word: word in ("*", "#"), words[first:]))
    return ".".join([*words[:first], *(word for word in after if word == "*"), "#"])


def places_for(patterns: Sequence[str], *, ordered: bool) -> list[str]:
    """The covers of the places that a subscription to ``patterns`` needs.

    Arguments:
        ordered: one place only, so that one line keeps the order over all topics.
    """
    needed: list[str] = []
    for cover in map(cover_of, patterns):
        if not any(
            covers(other, cover) for other in needed
        ):  # one of two that mean the same stays: # and *.#
            needed = [other for other in needed if not covers(cover, other)] + [cover]
    if len(needed) > (1 if ordered else MAX_PLACES):
        return [cover_of(together(needed))]
    return needed


def together(patterns: Sequence[str]) -> str:
    """One cover of all patterns: the words they begin with in common, and all below."""
    if len(patterns) == 1:
        return patterns[0]
    split = [pattern.split(".") for pattern in patterns]
    common: list[str] = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1 or words[0] == "#":
            break
        common.append(words[0])
    return ".".join([*common, "#"])
