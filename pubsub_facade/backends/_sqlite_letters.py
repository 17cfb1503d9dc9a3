"""The dead letters in the file: a page at a time, each page bounded by the bytes it holds in memory."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Final

from pubsub_facade import wire
from pubsub_facade.backends._sqlite_routes import dumps
from pubsub_facade.backends._sqlite_store import CLAIM_BYTES, CONTENT, Store, failure_of, headers_of
from pubsub_facade.message import Message


def last_letter(store: Store, name: str) -> int:
    """The number of a subscription's newest dead letter, 0 where there is none."""
    store.look()
    route = store.routes.by_name.get(name)
    return 0 if route is None else int(store.one(_LAST, route.id) or 0)


def letters(store: Store, name: str, after: int, last: int) -> tuple[int, list[Message]]:
    """Some dead letters with numbers above ``after`` up to ``last``, and the number to go on from."""
    store.look()
    route = store.routes.by_name.get(name)
    if route is None:
        return last, []
    numbers: list[int] = []
    total = 0
    for number, size in json.loads(store.one(_SIZES, route.id, after, last)):
        if numbers and total + size > CLAIM_BYTES:
            break
        numbers.append(number)
        total += size
    if not numbers:
        return last, []
    chosen = dumps(numbers)
    return numbers[-1], _unpack(store.one(_METADATA, chosen), store.one(_BODIES, chosen))


def discard(store: Store, name: str, ids: Collection[str] | None) -> int:
    """Delete dead letters by message id, or all; returns how many."""
    route = store.routes.by_name.get(name)
    if route is None:
        return 0
    only = "" if ids is None else " AND id IN (SELECT value FROM json_each(:ids))"
    deleted = store.connection.execute(
        f"DELETE FROM dead WHERE subscription = :subscription{only}",
        {"subscription": route.id, "ids": dumps(list(ids or ()))},
    )
    return deleted.rowcount


def _unpack(metadata: str, bodies: bytes) -> list[Message]:
    unpacked: list[Message] = []
    start = 0
    for size, id, topic, key, headers, content_type, published, failure in json.loads(metadata):
        letter = Message(topic, None, key=key, headers=headers_of(headers), id=id)
        letter.body = bodies[start : start + size]
        letter.content_type = content_type
        letter.timestamp = None if published is None else wire.number(published, None)
        letter.failure = failure_of(failure)
        unpacked.append(letter)
        start += size
    return unpacked


_LAST: Final = "SELECT max(number) FROM dead WHERE subscription = ?"

_SIZES: Final = """
SELECT json_group_array(json_array(number, length(body))) FROM (
    SELECT number, body FROM dead WHERE subscription = ? AND number > ? AND number <= ? ORDER BY number LIMIT 200)"""

_METADATA: Final = f"""
SELECT json_group_array(json_array({CONTENT}, CAST(m.failure AS TEXT)))
FROM (SELECT value FROM json_each(?1) ORDER BY value) j CROSS JOIN dead m ON m.number = j.value"""

_BODIES: Final = """
SELECT CAST(group_concat(m.body, '') AS BLOB)
FROM (SELECT value FROM json_each(?1) ORDER BY value) j CROSS JOIN dead m ON m.number = j.value"""
