"""The filter language's evaluation: nodes to closures that are asked for each message.

`filters` says what the language means. Nothing here compiles text or recurses deeper than the parser
let nodes nest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from pubsub_facade._filter_syntax import (
    MANY,
    ONE,
    OPERATORS,
    And,
    Compare,
    CompareHeaders,
    Constant,
    HeaderValue,
    In,
    IsNull,
    Like,
    Node,
    Not,
    Or,
    is_number,
    like_types,
)

Headers = Mapping[str, HeaderValue]
Test = Callable[[Headers], bool]


def compile_test(node: Node, wanted: bool) -> Test:
    """A test whether ``node`` is true, or whether it is false; unknown is neither.

    Splitting three values into two questions keeps each closure to a plain bool: NOT swaps the
    question, AND and OR swap roles when asked for false (De Morgan holds in SQL-92's logic).
    """
    match node:
        case Not(inner):
            return compile_test(inner, not wanted)
        case And(nodes) | Or(nodes):
            tests = []
            for inner in nodes:
                tests.append(compile_test(inner, wanted))
            return _all(tests) if isinstance(node, And) == wanted else _any(tests)
        case Constant(value):
            return lambda headers: value is wanted
        case IsNull(name):
            if wanted:
                return lambda headers: headers.get(name) is None
            return lambda headers: headers.get(name) is not None
        case CompareHeaders(left, how, right):
            return _compare_headers(left, how, right, wanted)
        case Compare(name, how, literal):
            test = _compare(name, how, literal)
        case In(name, values):
            test = _in(name, values)
        case Like(name, pattern):
            test = _like(name, pattern)
    if wanted:
        return test
    return lambda headers: headers.get(name) is not None and not test(headers)


def _all(tests: Sequence[Test]) -> Test:
    if len(tests) == 2:
        first, second = tests
        return lambda headers: first(headers) and second(headers)

    def every(headers: Headers) -> bool:
        for test in tests:  # noqa: SIM110 (a generator costs more than the tests)
            if not test(headers):
                return False
        return True

    return every


def _any(tests: Sequence[Test]) -> Test:
    if len(tests) == 2:
        first, second = tests
        return lambda headers: first(headers) or second(headers)

    def some(headers: Headers) -> bool:
        for test in tests:  # noqa: SIM110
            if test(headers):
                return True
        return False

    return some


def _compare(name: str, how: str, literal: HeaderValue) -> Test:
    compare = OPERATORS[how]
    if isinstance(literal, bool):
        other = literal if how == "=" else not literal
        return lambda headers: headers.get(name) is other
    if isinstance(literal, str):
        if how == "=":
            return lambda headers: headers.get(name) == literal

        def differs(headers: Headers) -> bool:
            value = headers.get(name)
            return isinstance(value, str) and value != literal

        return differs

    def number(headers: Headers) -> bool:
        value = headers.get(name)
        if value.__class__ is int or value.__class__ is float or is_number(value):
            return compare(value, literal)  # type: ignore[arg-type]
        return False

    return number


def _compare_headers(left: str, how: str, right: str, wanted: bool) -> Test:
    compare = OPERATORS[how]
    ordering = how not in ("=", "<>")

    def test(headers: Headers) -> bool:
        one, other = headers.get(left), headers.get(right)
        if one is None or other is None:
            return False
        alike = is_number(one) and is_number(other) if ordering else like_types(one, other)
        return (alike and compare(one, other)) is wanted

    return test


def _in(name: str, values: Sequence[str | int | float]) -> Test:
    strings = frozenset(value for value in values if isinstance(value, str))
    numbers = frozenset(value for value in values if not isinstance(value, str))

    def test(headers: Headers) -> bool:
        value = headers.get(name)
        if isinstance(value, str):
            return value in strings
        return bool(numbers) and is_number(value) and value in numbers

    return test


def _like(name: str, pattern: Sequence[str]) -> Test:
    matches = like_matcher(pattern)

    def test(headers: Headers) -> bool:
        value = headers.get(name)
        return isinstance(value, str) and matches(value)

    return test


class _Segment:
    """The characters between two ``%``: found by the C string search, or by a regex without repetition."""

    __slots__ = ("_regex", "_text", "length")

    def __init__(self, characters: Sequence[str]) -> None:
        self.length = len(characters)
        self._text = "".join(characters)
        self._regex: re.Pattern[str] | None = None
        if ONE in characters:
            text = "".join("." if c is ONE else re.escape(c) for c in characters)
            self._regex = re.compile(text, re.DOTALL)

    def find(self, value: str, start: int, end: int) -> int:
        """Where it first is in ``value[start:end]``; -1 if nowhere."""
        if self._regex is None:
            return value.find(self._text, start, end)
        found = self._regex.search(value, start, end)
        return -1 if found is None else found.start()


def like_matcher(pattern: Sequence[str]) -> Callable[[str], bool]:
    """A test for one LIKE pattern, given as `Like` holds it.

    Each part between two ``%`` is taken at the first place it fits and never moved: about one pass over
    the value, at most length of value x length of pattern steps where ``_`` is used.
    """
    parts: list[list[str]] = [[]]
    for item in pattern:
        if item is MANY:
            parts.append([])
        else:
            parts[-1].append(item)
    segments = [_Segment(part) for part in parts]
    first, *middle, last = segments if len(segments) > 1 else [segments[0], _Segment(())]
    shortest = sum(segment.length for segment in segments)
    exact = len(segments) == 1

    def matches(value: str) -> bool:
        if len(value) < shortest or (exact and len(value) != shortest):
            return False
        end = len(value) - last.length
        if first.find(value, 0, first.length) < 0 or last.find(value, end, len(value)) < 0:
            return False
        start = first.length
        for segment in middle:
            at = segment.find(value, start, end)
            if at < 0:
                return False
            start = at + segment.length
        return True

    return matches
