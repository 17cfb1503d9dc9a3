"""Where messages go: the subscriptions as of one generation of the file, and batches made ready for it.

All that can be computed before a transaction is computed here, because nobody else can write during it.
Pure: no SQL is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pubsub_facade.filters import Filter
from pubsub_facade.message import Message
from pubsub_facade.topics import TopicRouter

COLUMNS: Final = 8
"""Columns of one message in `Outgoing.flat`."""

dumps: Final = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(slots=True)
class Route:
    """A subscription of this namespace, and who is there to take its messages."""

    id: int
    line: int
    name: str | None
    patterns: tuple[str, ...]
    filter: Filter | None
    ordered: bool
    members: int = 0
    processes: tuple[str, ...] = ()  # the tokens of theirs


class Routes:
    """Where messages go, as of one generation of the file."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.by_line: dict[int, Route] = {}
        self.by_id: dict[int, Route] = {}
        self.by_name: dict[str, Route] = {}
        self.filtered = False
        self._router: TopicRouter[int] = TopicRouter()

    def add(self, route: Route) -> None:
        self.by_line[route.line] = route
        self.by_id[route.id] = route
        if route.name is not None:
            self.by_name[route.name] = route
        self.filtered = self.filtered or route.filter is not None
        for pattern in route.patterns:
            self._router.add(pattern, route.line)

    def lines(self, message: Message) -> tuple[int, ...]:
        """The lines that a message published now joins."""
        lines = self._router.match(message.topic)
        if not self.filtered:
            return lines
        by_line = self.by_line
        return tuple(
            line
            for line in lines
            if (chosen := by_line[line].filter) is None or chosen.matches(message.headers)
        )


class Outgoing:
    """Messages ready to be stored: their columns in a row, and which of them go to which lines together."""

    __slots__ = ("flat", "groups", "messages", "only", "target")

    def __init__(self, messages: Sequence[Message], now: float, only: str | None = None) -> None:
        self.messages = messages
        self.only = only
        self.target: int | None = None
        self.flat = _flat(messages, now)
        self.groups: dict[tuple[tuple[int, ...], float], list[int]] = {}

    def route(self, routes: Routes, now: float, *, required: bool) -> list[Message]:
        """Choose the lines; returns the messages that have none, where one is required."""
        self.groups.clear()
        alone: list[Message] = []
        lines: tuple[int, ...] = ()
        if self.only is not None:
            required = True
            if (route := routes.by_name.get(self.only)) is not None:
                self.target = route.id
                lines = (route.line,)
        for offset, message in enumerate(self.messages):
            if self.only is None:
                lines = routes.lines(message)
            if lines:
                due = now + message.delay if message.delay else 0.0
                self.groups.setdefault((lines, due), []).append(offset)
            elif required:
                alone.append(message)
        return alone


def _flat(messages: Sequence[Message], now: float) -> list[Any]:
    flat: list[Any] = []
    for message in messages:
        flat += (
            message.id,
            message.topic,
            message.key,
            dumps(message.headers) if message.headers else None,
            message.content_type,
            message.timestamp,
            now + message.delay if message.delay else None,
            message.body,
        )
    return flat


_statements: dict[int, str] = {}


def insert_statement(rows: int) -> str:
    sql = _statements.get(rows)
    if sql is None:
        values = ",".join(f"(?4+{row},?1,?,?,?,?,?,?,?2,?,?3,?)" for row in range(rows))
        sql = _statements[rows] = (
            "INSERT INTO messages (position, namespace, id, topic, key, headers, content_type, published, stored,"
            f" due, target, body) VALUES {values}"
        )
    return sql
