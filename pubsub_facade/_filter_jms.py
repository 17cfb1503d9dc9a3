"""The filter language for JMS brokers: nodes to a selector that selects at least as much.

A broker may decide less than `filters` does, never turn down what `filters` would select. What is safe
to say was read off Classic's and Artemis' selector sources; each doubt becomes ``IS NOT NULL``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from pubsub_facade._filter_syntax import (
    KEYWORDS,
    MANY,
    ONE,
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
)
from pubsub_facade._filter_tests import like_matcher

_BROKER_NAME: Final = re.compile(r"(?!JMS|AMQ)[A-Za-z_$][A-Za-z0-9_$]*")
_BROKER_KEYWORDS: Final = KEYWORDS | {"XPATH", "XQUERY"}
_EXACT_FLOAT: Final = float(1 << 53)
_WORDS_OF_VALUES: Final = ("true", "false", "inf", "-inf", "nan", "infinity", "-infinity")
_NUMBER_CHARACTERS: Final = frozenset("0123456789+-.eE")

Rename = Callable[[str], str | None]


def select(node: Node, wanted: bool, rename: Rename) -> str | bool:
    """A selector that is true at least where ``node`` is ``wanted``; True: everywhere, False: nowhere."""
    match node:
        case Not(inner):
            return select(inner, not wanted, rename)
        case And(nodes) | Or(nodes):
            selectors: list[str | bool] = []
            for inner in nodes:
                selectors.append(select(inner, wanted, rename))
            return _join(selectors, "AND" if isinstance(node, And) == wanted else "OR")
        case Constant(value):
            return value is wanted
        case CompareHeaders(left, _, right):  # over STOMP both are text and would compare as text
            return _join([_not_null(_jms(left, rename)), _not_null(_jms(right, rename))], "AND")
        case IsNull(name) | Compare(name=name) | In(name=name) | Like(name=name):
            jms = _jms(name, rename)
            if jms is None:
                return True
            return _select_atom(node, jms) if wanted else _select_false_atom(node, jms)


def _join(selectors: Sequence[str | bool], word: str) -> str | bool:
    decisive = word == "OR"
    if decisive in selectors:
        return decisive
    texts = [selector for selector in selectors if isinstance(selector, str)]
    if len(texts) < 2:
        return texts[0] if texts else not decisive
    joined = f" {word} ".join(texts)
    return f"({joined})" if decisive else joined


def _jms(name: str, rename: Rename) -> str | None:
    """The broker's identifier; None for what Classic or Artemis cannot read or take for their own."""
    jms = rename(name)
    if jms is None or not _BROKER_NAME.fullmatch(jms) or jms.upper() in _BROKER_KEYWORDS:
        return None
    return jms


def _not_null(jms: str | None) -> str | bool:
    return True if jms is None else f"{jms} IS NOT NULL"


def _select_atom(node: Compare | In | Like | IsNull, jms: str) -> str:
    match node:
        case IsNull():
            return f"{jms} IS NULL"
        case Compare(_, how, literal):
            return _select_compare(jms, how, literal)
        case In(_, values):
            strings = [value for value in values if isinstance(value, str)]
            choices = [_select_compare(jms, "=", value) for value in values if not isinstance(value, str)]
            if strings:
                choices.append(f"{jms} IN ({', '.join(_quoted(value) for value in strings)})")
            return choices[0] if len(choices) == 1 else f"({' OR '.join(choices)})"
        case Like(_, pattern):
            return f"{jms} LIKE {_quoted_pattern(pattern)}"


def _select_compare(jms: str, how: str, literal: HeaderValue) -> str:
    if isinstance(literal, bool):
        return f"{jms} {how} {'TRUE' if literal else 'FALSE'}"
    if isinstance(literal, str):
        return f"{jms} {how} {_quoted(literal)}"
    number = float(literal)
    if abs(number) >= _EXACT_FLOAT:  # neighbours become the same number when the broker reads them as doubles
        if how == "<>":
            return f"{jms} IS NOT NULL"
        how = {"<": "<=", ">": ">="}.get(how, how)
    if number == 0:  # Double.compareTo puts -0.0 below 0.0
        zero = {"=": f"({jms} >= -0.0 AND {jms} <= 0.0)", ">=": f"{jms} >= -0.0", "<=": f"{jms} <= 0.0"}
        return zero.get(how, f"{jms} {how} 0.0")
    return f"{jms} {how} {number!r}"


def _select_false_atom(node: Compare | In | Like | IsNull, jms: str) -> str:
    """NOT of a condition is true for a header of another type, whose text the broker may take for a match."""
    match node:
        case Compare(_, "=", str(literal)) if not _reads_as_value((*literal,)):
            return f"NOT ({jms} = {_quoted(literal)})"
        case In(_, values) if not any(is_number(v) or _reads_as_value((*str(v),)) for v in values):
            return f"NOT ({' OR '.join(f'{jms} = {_quoted(str(value))}' for value in values)})"
        case Like(_, pattern) if not _reads_as_value(pattern):
            return f"NOT ({jms} LIKE {_quoted_pattern(pattern)})"
    return f"{jms} IS NOT NULL"


def _reads_as_value(pattern: Sequence[str]) -> bool:
    """Whether a LIKE pattern (or plain characters) may match the text of a number or a boolean."""
    if pattern and all(item in (ONE, MANY) or item in _NUMBER_CHARACTERS for item in pattern):
        return True
    matches = like_matcher([item.lower() if len(item) == 1 else item for item in pattern])
    return any(matches(word) for word in _WORDS_OF_VALUES)


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _quoted_pattern(pattern: Sequence[str]) -> str:
    signs = {ONE: "_", MANY: "%"}
    if any(item in "%_" for item in pattern if len(item) == 1):
        signs |= {"%": "\\%", "_": "\\_", "\\": "\\\\"}
        return _quoted("".join(signs.get(item, item) for item in pattern)) + " ESCAPE '\\'"
    return _quoted("".join(signs.get(item, item) for item in pattern))
