"""What our topics and groups are called on Kafka.

A user's topic keeps its name, behind the namespace, so that raw clients find it. Names of our own hold an
empty word (``..``), which no topic can, so the two never meet. Kafka refuses a topic whose name equals
another's once dots are read as underscores, and names over 249 characters: such topics live under an alias.
Pure: no I/O.
"""

from __future__ import annotations

import hashlib
from typing import Final

from pubsub_facade.errors import TopicError
from pubsub_facade.topics import check_topic

MAX_NAME: Final = 249  # characters of a Kafka topic
_ALIAS: Final = "...alias."


class Names:
    """The names of one namespace.

    Arguments:
        namespace: its dots are doubled, so that ``a`` with topic ``b.c`` is not ``a.b`` with topic ``c``.
    """

    __slots__ = ("_alias", "_parsed", "_plain", "registry", "root")

    def __init__(self, namespace: str) -> None:
        self.root = namespace.replace(".", "..")
        self.registry = f"{self.root}...registry"
        self._plain = f"{self.root}."
        self._alias = f"{self.root}{_ALIAS}"
        self._parsed: dict[str, str | None] = {}

    def topic(self, topic: str) -> str:
        """The Kafka topic that ``topic`` has where nothing stands against it."""
        name = self._plain + topic
        return name if len(name) <= MAX_NAME else self.alias(topic)

    def alias(self, topic: str) -> str:
        """The Kafka topic that ``topic`` has where Kafka refuses the plain name."""
        return self._alias + _digest(topic)

    def is_alias(self, name: str) -> bool:
        """Whether a Kafka topic is one of our aliases; the registry knows whose."""
        return name.startswith(self._alias)

    def parse(self, name: str) -> str | None:
        """The topic whose plain name this is; None for Kafka topics that are none of this namespace."""
        if not name.startswith(self._plain):
            return None
        if name not in self._parsed:
            try:
                self._parsed[name] = check_topic(name[len(self._plain) :])
            except TopicError:
                self._parsed[name] = None
        return self._parsed[name]

    def group(self, subscription: str) -> str:
        """The consumer group of a subscription."""
        return self._plain + subscription

    def retry(self, subscription: str) -> str:
        """The Kafka topic that holds a subscription's own copies: retries and replays."""
        return self._own("retry", subscription)

    def dead(self, subscription: str) -> str:
        """The Kafka topic that holds a subscription's dead letters."""
        return self._own("dead", subscription)

    def _own(self, kind: str, subscription: str) -> str:
        """Escaped, because the names of our own must not depend on what Kafka refuses."""
        escaped = subscription.replace("-", "--").replace("_", "-u")
        name = f"{self.root}...{kind}.{escaped}"
        return name if len(name) <= MAX_NAME else f"{self.root}...{kind}.{_digest(subscription)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
