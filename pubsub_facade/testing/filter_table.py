"""What each filter selects, as a table: the conformance suite asks every backend the same questions.

Each row is ``(filter, headers, whether a message with these headers is selected)`` (contract 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pubsub_facade.filters import HeaderValue

FILTER_TABLE: Final[tuple[tuple[str, Mapping[str, HeaderValue], bool], ...]] = (
    # comparisons
    ("level > 3 AND region = 'eu'", {"level": 5, "region": "eu"}, True),
    ("level > 3 AND region = 'eu'", {"level": 3, "region": "eu"}, False),
    ("level > 3 AND region = 'eu'", {"level": 5, "region": "us"}, False),
    ("level >= 3", {"level": 3}, True),
    ("level < 3", {"level": 3}, False),
    ("level <= 3", {"level": 3}, True),
    ("level <> 3", {"level": 4}, True),
    ("level <> 3", {"level": 3}, False),
    ("3 < level", {"level": 4}, True),
    ("3 < level", {"level": 2}, False),
    ("region = 'EU'", {"region": "eu"}, False),
    ("region <> 'eu'", {"region": "us"}, True),
    ("low < high", {"low": 1, "high": 2.5}, True),
    ("low = high", {"low": "a", "high": "a"}, True),
    # int and float are both numbers
    ("level = 3.0", {"level": 3}, True),
    ("level = 3", {"level": 3.0}, True),
    ("level > 2.5", {"level": 3}, True),
    ("level > 3", {"level": 3.5}, True),
    ("level = -1.5e2", {"level": -150}, True),
    ("level >= 0", {"level": -0.0}, True),
    ("level = 9007199254740993", {"level": 9007199254740993}, True),
    # booleans
    ("urgent = TRUE", {"urgent": True}, True),
    ("urgent = TRUE", {"urgent": False}, False),
    ("urgent <> true", {"urgent": False}, True),
    ("urgent", {"urgent": True}, True),
    ("NOT urgent", {"urgent": False}, True),
    # unlike types: the comparison is false, not unknown
    ("level = 1", {"level": True}, False),
    ("level = TRUE", {"level": 1}, False),
    ("level = 'x'", {"level": 3}, False),
    ("level <> 'x'", {"level": 3}, False),
    ("level > 3", {"level": "5"}, False),
    ("level = 3", {"level": "3"}, False),
    ("NOT (level > 3)", {"level": "5"}, True),
    ("NOT (level = '3')", {"level": 3}, True),
    ("low < high", {"low": "a", "high": "b"}, False),
    # a missing header is NULL: unknown
    ("level = 3", {}, False),
    ("level <> 3", {}, False),
    ("NOT (level = 3)", {}, False),
    ("NOT (level <> 3)", {}, False),
    ("level > 3 OR region = 'eu'", {"region": "eu"}, True),
    ("level > 3 AND region = 'eu'", {"region": "eu"}, False),
    ("NOT (level > 3 AND region = 'eu')", {"region": "us"}, True),
    ("NOT (level > 3 AND region = 'eu')", {"region": "eu"}, False),
    ("NOT (level > 3 OR region = 'eu')", {"region": "us"}, False),
    ("NOT urgent", {}, False),
    ("low = high", {"low": 1}, False),
    ("level IS NULL", {}, True),
    ("level IS NULL", {"level": 0}, False),
    ("level IS NOT NULL", {"level": 0}, True),
    ("level IS NOT NULL", {}, False),
    ("region IS NULL", {"region": ""}, False),
    # IN
    ("region IN ('eu', 'us')", {"region": "us"}, True),
    ("region IN ('eu', 'us')", {"region": "asia"}, False),
    ("region NOT IN ('eu', 'us')", {"region": "asia"}, True),
    ("region NOT IN ('eu', 'us')", {"region": "eu"}, False),
    ("region NOT IN ('eu', 'us')", {}, False),
    ("region NOT IN ('eu', 'us')", {"region": 3}, True),
    ("level IN (1, 2.5)", {"level": 2.5}, True),
    ("level IN (1, 2.5)", {"level": True}, False),
    # LIKE
    ("name LIKE 'a%'", {"name": "abc"}, True),
    ("name LIKE 'a%'", {"name": "bac"}, False),
    ("name LIKE '%c'", {"name": "abc"}, True),
    ("name LIKE 'a_c'", {"name": "abc"}, True),
    ("name LIKE 'a_c'", {"name": "abbc"}, False),
    ("name LIKE '%b%d%'", {"name": "abcde"}, True),
    ("name LIKE '%b%b%'", {"name": "abcde"}, False),
    ("name LIKE 'ab%ba'", {"name": "aba"}, False),
    ("name LIKE 'a%'", {"name": "a\nb"}, True),
    ("name LIKE ''", {"name": ""}, True),
    ("name LIKE '%'", {"name": ""}, True),
    ("name LIKE 'a.c'", {"name": "abc"}, False),
    ("name LIKE '5!%' ESCAPE '!'", {"name": "5%"}, True),
    ("name LIKE '5!%' ESCAPE '!'", {"name": "50"}, False),
    ("name LIKE 'a!_b!!%' ESCAPE '!'", {"name": "a_b!c"}, True),
    ("name NOT LIKE 'a%'", {"name": "bc"}, True),
    ("name NOT LIKE 'a%'", {}, False),
    ("name LIKE '5%'", {"name": 5}, False),
    ("name NOT LIKE '5%'", {"name": 5}, True),
    # BETWEEN
    ("level BETWEEN 2 AND 4", {"level": 2}, True),
    ("level BETWEEN 2 AND 4", {"level": 4.0}, True),
    ("level BETWEEN 2 AND 4", {"level": 5}, False),
    ("level NOT BETWEEN 2 AND 4", {"level": 5}, True),
    ("level NOT BETWEEN 2 AND 4", {"level": "5"}, False),
    ("level NOT BETWEEN 2 AND 4", {}, False),
    ("level BETWEEN 4 AND 2", {"level": 3}, False),
    # strings and names
    ("title = 'it''s'", {"title": "it's"}, True),
    ("title = ''''", {"title": "'"}, True),
    ("title = ''", {"title": ""}, True),
    ("title = 'größe'", {"title": "größe"}, True),
    ("title = '日本'", {"title": "日本"}, True),
    ("title LIKE '日_'", {"title": "日本"}, True),
    ("größe > 3", {"größe": 4}, True),
    ("\"x-tenant\" = 'a'", {"x-tenant": "a"}, True),
    ('"a.b" = 1 AND "say ""hi""" = 2', {"a.b": 1, 'say "hi"': 2}, True),
    ('"and" = 1', {"and": 1}, True),
    # precedence
    ("a = 1 OR b = 1 AND c = 1", {"a": 1}, True),
    ("(a = 1 OR b = 1) AND c = 1", {"a": 1}, False),
    ("NOT a = 1 AND b = 1", {"a": 2, "b": 1}, True),
    ("not a = 1 or b = 1", {"a": 1, "b": 1}, True),
    ("NOT NOT a = 1", {"a": 1}, True),
)
