"""Filters on headers: the JMS selector subset, parsed once and evaluated for each message (contract 11).

The language and its logic are those of JMS 2.0, section 3.8.1.1 ("Message selector syntax"), less
arithmetic and plus three things: header names that are no identifiers in double quotes, numbers in
``IN`` lists, and a header alone as a condition. Pure, no I/O, and nothing is ever compiled from text
but by this parser: its time is linear in the text, its depth and length are bounded.

The rules, where one might wonder:

- A header that is not there is NULL. A comparison with NULL is *unknown*; AND, OR and NOT follow SQL-92's
  three-valued logic; a message is selected only if the whole is true.
- Numbers compare with numbers, int with float, by their exact mathematical value (bool is no number).
  A comparison of unlike types is false, not unknown, ``<>`` too: ``x <> 1`` and ``x = 1`` are both false
  for ``x = 'a'``, and NOT of either is true.
- Strings and booleans have only ``=`` and ``<>``. A literal against that is refused; a header is false.
- ``NOT IN`` and ``NOT LIKE`` are NOT of ``IN`` and ``LIKE``: true for a header of another type. ``x BETWEEN
  a AND b`` is ``x >= a AND x <= b``, ``NOT BETWEEN`` is ``x < a OR x > b``: both false for another type.
- Keywords are case-insensitive; header names and strings are not.
"""

from __future__ import annotations

from collections.abc import Callable

from pubsub_facade._filter_jms import select
from pubsub_facade._filter_syntax import MAX_LENGTH, HeaderValue, Node, Parser, names_of
from pubsub_facade._filter_tests import Headers, compile_test
from pubsub_facade.errors import FilterError

__all__ = ["Filter", "HeaderValue", "Headers"]


class Filter:
    """A condition on headers. Made by `parse`; compares and hashes by its text."""

    __slots__ = ("_node", "_text", "identifiers", "matches")

    identifiers: frozenset[str]
    """The headers the condition reads."""

    matches: Callable[[Headers], bool]
    """``matches(headers)``: whether a message with these headers is selected. Never raises."""

    def __init__(self, text: str, node: Node) -> None:
        self._text = text
        self._node = node
        self.identifiers = frozenset(names_of(node))
        self.matches = compile_test(node, True)

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read a filter.

        Arguments:
            text: as ``priority > 3 AND region = 'eu'``; at most 8,192 characters and 50 nested parentheses.

        Raises FilterError, which shows the place, what was expected there and what was found.
        """
        if not isinstance(text, str):
            raise FilterError(f"filter {text!r:.60} is of type {type(text).__name__}: give a str")
        if len(text) > MAX_LENGTH:
            raise FilterError(f"filter has {len(text)} characters: give at most {MAX_LENGTH}")
        return cls(text, Parser(text).parse())

    def to_jms(self, rename: Callable[[str], str | None]) -> str:
        """A selector for a JMS broker that selects *at least* what this filter selects.

        A driver hands it to the broker to save traffic and still asks `matches`, which alone decides:
        brokers differ from the specification (Classic and Artemis take ``<>`` of unlike types for true),
        and over STOMP all values are text, which they convert by the literal's type. So numbers are
        written as floating-point, and what a broker could wrongly turn down becomes ``IS NOT NULL``.
        A driver that carries numbers as text must write infinities as Java does: ``Infinity``.

        Arguments:
            rename: header name -> the broker's identifier for it, or None if it has none. The conditions
                on a header without one, or with one that Classic and Artemis could not read as such
                (not ASCII, a keyword, ``JMS...``, ``AMQ...``), are left to `matches`.

        Returns "" where the broker can decide nothing: by JMS an empty selector is no selector.
        """
        selector = select(self._node, True, rename)
        if isinstance(selector, bool):
            return "" if selector else "FALSE"
        return selector

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Filter.parse({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Filter) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[Callable[[str], Filter], tuple[str]]:
        return Filter.parse, (self._text,)
