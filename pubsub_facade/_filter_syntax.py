"""The filter language's grammar: text to nodes, and what the nodes are.

`filters` says what the language means; here is only what may be written. The parser reads left to right
with a list of open parentheses: linear in the text, no recursion, bounded depth and length.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pubsub_facade.errors import FilterError

HeaderValue = str | int | float | bool

MAX_LENGTH: Final = 8192
"""Characters a filter may have."""

MAX_NESTING: Final = 50
"""Parentheses that may be open at once."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A condition that reads no header."""

    value: bool


@dataclass(frozen=True, slots=True)
class Compare:
    """A header against a literal; the header is always on the left."""

    name: str
    operator: str
    value: HeaderValue


@dataclass(frozen=True, slots=True)
class CompareHeaders:
    left: str
    operator: str
    right: str


@dataclass(frozen=True, slots=True)
class In:
    name: str
    values: tuple[str | int | float, ...]


@dataclass(frozen=True, slots=True)
class Like:
    """``pattern``: characters as they are, `ONE` and `MANY` for the unescaped wildcards."""

    name: str
    pattern: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IsNull:
    name: str


@dataclass(frozen=True, slots=True)
class Not:
    node: Node


@dataclass(frozen=True, slots=True)
class And:
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    nodes: tuple[Node, ...]


Node = Constant | Compare | CompareHeaders | In | Like | IsNull | Not | And | Or

ONE: Final = "any one"  # longer than one character, so never one of a pattern's own
MANY: Final = "any many"

FLIPPED: Final = {"=": "=", "<>": "<>", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
OPERATORS: Final[dict[str, Callable[[HeaderValue, HeaderValue], bool]]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def names_of(node: Node) -> set[str]:
    """Every header ``node`` reads."""
    found: set[str] = set()
    todo = [node]
    while todo:
        match todo.pop():
            case Compare(name=name) | In(name=name) | Like(name=name) | IsNull(name=name):
                found.add(name)
            case CompareHeaders(left, _, right):
                found |= {left, right}
            case Not(inner):
                todo.append(inner)
            case And(nodes) | Or(nodes):
                todo += nodes
            case _:
                pass
    return found


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def like_types(left: object, right: object) -> bool:
    if isinstance(left, str):
        return isinstance(right, str)
    if isinstance(left, bool):
        return isinstance(right, bool)
    return is_number(left) and is_number(right)


KEYWORDS: Final = frozenset(
    ("AND", "OR", "NOT", "IN", "LIKE", "ESCAPE", "BETWEEN", "IS", "NULL", "TRUE", "FALSE")
)
_TOKEN: Final = re.compile(
    r"(?P<space>[ \t\r\n\f]++)"
    r"|(?P<word>(?:[^\W\d]|\$)[\w$]*+)"
    r"|(?P<number>(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?)"
    r"|(?P<string>'(?:[^']|'')*+')"
    r'|(?P<name>"(?:[^"]|"")*+")'
    r"|(?P<symbol><>|<=|>=|[=<>(),+*/-])"
)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # keyword, name, number, string, symbol or end
    text: str  # a keyword in capitals, a name or string without its quotes
    position: int


@dataclass(frozen=True, slots=True)
class _Name:
    """An operand that is a header."""

    name: str


@dataclass(frozen=True, slots=True)
class _Operand:
    value: _Name | HeaderValue
    position: int


def _negated(node: Node, negate: bool) -> Node:
    return Not(node) if negate else node


def _tokens(text: str) -> list[_Token]:
    out: list[_Token] = []
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise _error(text, position, _unreadable(text, position))
        kind, value = str(found.lastgroup), found[0]
        if kind == "word":
            capitals = value.upper() if value.isascii() else value
            kind, value = ("keyword", capitals) if capitals in KEYWORDS else ("name", value)
        elif kind == "string":
            value = value[1:-1].replace("''", "'")
        elif kind == "name":
            value = value[1:-1].replace('""', '"')
            if not value:
                raise _error(text, position, "expected a header name between the double quotes, found none")
        elif kind == "number":
            _check_number_end(text, position, found.end(), value)
        if kind != "space":
            out.append(_Token(kind, value, position))
        position = found.end()
    out.append(_Token("end", "", len(text)))
    return out


def _unreadable(text: str, position: int) -> str:
    character = text[position]
    if character == "'":
        return "expected a closing ' for this string, found the end (a quote inside is written twice: '')"
    if character == '"':
        return 'expected a closing " for this header name, found the end'
    hints = {
        "!": "not equal is written <>",
        "%": "strings are quoted: '...%'",
        ".": 'a header name with a dot is quoted: "a.b"',
        ";": "one filter is one condition",
        "&": "and is written AND",
        "|": "or is written OR",
    }
    hint = f" ({hints[character]})" if character in hints else ""
    return f"expected a header, a literal or an operator, found {character!r}{hint}"


def _check_number_end(text: str, start: int, end: int, value: str) -> None:
    """JMS reads 010 as octal and has 0x10 and 5L: we refuse what two readers would read differently."""
    rest = text[end : end + 1]
    if rest == "." or rest == "$" or rest == "_" or rest.isalnum():
        raise _error(text, end, f"expected a decimal number to end here, found {rest!r}")
    if len(value) > 1 and value[0] == "0" and value.isdigit():
        raise _error(text, start, "expected a decimal number without leading zeros (JMS reads them as octal)")


def _error(text: str, position: int, problem: str) -> FilterError:
    """A FilterError that shows the text around ``position`` and a caret below the place."""
    start = max(0, position - 50)
    shown = "".join(c if c.isprintable() else " " for c in text[start : position + 30])
    caret = " " * (position - start + (start > 0)) + "^"
    before, after = "…" * (start > 0), "…" * (position + 30 < len(text))
    return FilterError(
        f"filter does not parse at character {position + 1}: {problem}\n  {before}{shown}{after}\n  {caret}"
    )


class _Level:
    """What is between one pair of parentheses so far: AND groups joined by OR, and whether NOT is pending."""

    __slots__ = ("groups", "negate")

    def __init__(self) -> None:
        self.groups: list[list[Node]] = [[]]
        self.negate = False

    def add(self, node: Node) -> None:
        self.groups[-1].append(Not(node) if self.negate else node)
        self.negate = False

    def node(self) -> Node:
        nodes = [group[0] if len(group) == 1 else And(tuple(group)) for group in self.groups]
        return nodes[0] if len(nodes) == 1 else Or(tuple(nodes))


class Parser:
    """Reads conditions left to right with a list of open parentheses: no recursion."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._index = 0

    def parse(self) -> Node:
        if self._peek().kind == "end":
            raise FilterError("filter is empty: give a condition, as \"region = 'eu'\", or no filter at all")
        levels = [_Level()]
        while True:
            if self._accept("NOT"):
                levels[-1].negate = not levels[-1].negate
            elif self._peek().text == "(" and self._peek().kind == "symbol":
                if len(levels) > MAX_NESTING:
                    raise _error(
                        self._text, self._peek().position, f"more than {MAX_NESTING} open parentheses"
                    )
                self._index += 1
                levels.append(_Level())
            else:
                levels[-1].add(self._condition())
                if self._behind_condition(levels):
                    return levels[0].node()

    def _behind_condition(self, levels: list[_Level]) -> bool:
        """Close what is closed here, then take AND or OR; True at the end of the text."""
        while len(levels) > 1 and self._accept(")"):
            node = levels.pop().node()
            levels[-1].add(node)
        if self._accept("AND"):
            return False
        if self._accept("OR"):
            levels[-1].groups.append([])
            return False
        if self._peek().kind == "end" and len(levels) == 1:
            return True
        raise self._expected("AND, OR or ')'" if len(levels) > 1 else "AND, OR or the end")

    def _condition(self) -> Node:
        left = self._operand("a header or a literal")
        token = self._peek()
        if token.kind == "symbol" and token.text in OPERATORS:
            self._index += 1
            return self._compare(left, token.text, self._operand("a value"))
        if self._accept("IS"):
            negate = self._accept("NOT")
            if not self._accept("NULL"):
                raise self._expected("NULL" if negate else "NULL or NOT NULL")
            return _negated(IsNull(self._header(left)), negate)
        negate = self._accept("NOT")
        if self._accept("IN"):
            return _negated(self._in(self._header(left)), negate)
        if self._accept("LIKE"):
            return _negated(self._like(self._header(left)), negate)
        if self._accept("BETWEEN"):
            return self._between(left, negate)
        if negate:
            raise self._expected("IN, LIKE or BETWEEN")
        if isinstance(left.value, _Name):
            return Compare(left.value.name, "=", True)
        if isinstance(left.value, bool):
            return Constant(left.value)
        raise self._expected("a comparison (=, <>, <, <=, >, >=, IN, LIKE, BETWEEN)")

    def _compare(self, left: _Operand, how: str, right: _Operand) -> Node:
        if how not in ("=", "<>"):
            for side in (left, right):
                if isinstance(side.value, str | bool):
                    problem = f"{how} compares numbers; strings and booleans have = and <>"
                    raise _error(self._text, side.position, problem)
        if isinstance(left.value, _Name):
            if isinstance(right.value, _Name):
                return CompareHeaders(left.value.name, how, right.value.name)
            return Compare(left.value.name, how, right.value)
        if isinstance(right.value, _Name):
            return Compare(right.value.name, FLIPPED[how], left.value)
        return Constant(like_types(left.value, right.value) and OPERATORS[how](left.value, right.value))

    def _between(self, operand: _Operand, negate: bool) -> Node:
        low = self._operand("the lower bound")
        if not self._accept("AND"):
            raise self._expected("AND and the upper bound")
        high = self._operand("the upper bound")
        if negate:
            return Or((self._compare(operand, "<", low), self._compare(operand, ">", high)))
        return And((self._compare(operand, ">=", low), self._compare(operand, "<=", high)))

    def _in(self, name: str) -> In:
        if not self._accept("("):
            raise self._expected("'(' and a list of literals")
        values: list[str | int | float] = []
        while True:
            operand = self._operand("a string or a number")
            value = operand.value
            if isinstance(value, _Name | bool):
                raise _error(self._text, operand.position, "expected a string or a number in the list of IN")
            values.append(value)
            if self._accept(")"):
                return In(name, tuple(dict.fromkeys(values)))
            if not self._accept(","):
                raise self._expected("',' or ')'")

    def _like(self, name: str) -> Like:
        pattern = self._string("a pattern in quotes, as 'a%'")
        escape = ""
        if self._accept("ESCAPE"):
            token = self._string("one character in quotes")
            escape = token.text
            if len(escape) != 1:
                raise _error(self._text, token.position, "expected exactly one character after ESCAPE")
        out: list[str] = []
        characters = iter(pattern.text)
        for character in characters:
            if character == escape:
                escaped = next(characters, "")
                if escaped not in ("%", "_", escape):
                    problem = f"expected %, _ or {escape} behind the escape character in this pattern"
                    raise _error(self._text, pattern.position, problem)
                out.append(escaped)
            elif character == "%":
                if out[-1:] != [MANY]:
                    out.append(MANY)
            else:
                out.append(ONE if character == "_" else character)
        return Like(name, tuple(out))

    def _operand(self, expected: str) -> _Operand:
        token = self._peek()
        self._index += 1
        match token.kind:
            case "number":
                return _Operand(self._number(token, 1), token.position)
            case "name":
                return _Operand(_Name(token.text), token.position)
            case "string":
                return _Operand(token.text, token.position)
            case "keyword" if token.text in ("TRUE", "FALSE"):
                return _Operand(token.text == "TRUE", token.position)
            case "symbol" if token.text in ("+", "-"):
                if self._peek().kind != "number":
                    raise self._expected(f"a number behind {token.text}")
                self._index += 1
                return _Operand(
                    self._number(self._tokens[self._index - 1], -1 if token.text == "-" else 1),
                    token.position,
                )
        self._index -= 1
        if token.kind == "keyword" and token.text == "NULL":
            problem = f"expected {expected}, found NULL (use IS NULL or IS NOT NULL)"
            raise _error(self._text, token.position, problem)
        raise self._expected(expected)

    def _number(self, token: _Token, sign: int) -> int | float:
        if token.text.isdigit():
            exact = sign * int(token.text) if len(token.text) < 20 else 1 << 64
            if not -(1 << 63) <= exact < 1 << 63:
                raise _error(self._text, token.position, "expected an integer of 64 bits, found a larger one")
            return exact
        approximate = sign * float(token.text)
        if approximate in (float("inf"), float("-inf")):
            raise _error(self._text, token.position, "expected a number up to 1.8e308, found a larger one")
        return approximate

    def _string(self, expected: str) -> _Token:
        token = self._peek()
        if token.kind != "string":
            raise self._expected(expected)
        self._index += 1
        return token

    def _header(self, operand: _Operand) -> str:
        if not isinstance(operand.value, _Name):
            raise _error(self._text, operand.position, "expected a header here, found a literal")
        return operand.value.name

    def _peek(self) -> _Token:
        return self._tokens[self._index]

    def _accept(self, text: str) -> bool:
        """Go past the next token if it is this keyword or symbol."""
        token = self._tokens[self._index]
        if token.text != text or token.kind not in ("keyword", "symbol"):
            return False
        self._index += 1
        return True

    def _expected(self, expected: str) -> FilterError:
        token = self._peek()
        if token.kind == "end":
            found = "the end"
        elif token.kind == "symbol" and token.text in "+-*/":
            found = f"{token.text!r} (arithmetic is not part of filters)"
        else:
            found = f"{token.text[:40]!r}"
        return _error(self._text, token.position, f"expected {expected}, found {found}")
