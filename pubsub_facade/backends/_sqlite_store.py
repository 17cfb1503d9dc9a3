"""What the embedded backend asks of SQL: store, route, claim, settle. No threads, no waiting for messages.

Each step of a statement gives up the interpreter's lock and takes it again, which beside a busy thread
costs up to 5 ms: so a batch of any size is a handful of steps. Rows go in as one multi-row INSERT, lists
of numbers as JSON arrays, and deliveries come out as one JSON text and one BLOB of all bodies. Nothing
here may loop over messages with a statement each, nor compute in Python while a transaction is open.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from pubsub_facade.backends._sqlite_routes import COLUMNS, Outgoing, Route, Routes, dumps, insert_statement
from pubsub_facade.backends._sqlite_schema import CLAIMED, PARKED, READY, SUSPECT
from pubsub_facade.filters import Filter
from pubsub_facade.message import Delivery, Failure, HeaderValue, Message
from pubsub_facade.subscription import Subscription
from pubsub_facade.wire import failure_from

ROWS: Final = 250  # messages in one INSERT
CLAIM_BYTES: Final = 8 << 20  # bodies handed out by one claim, if there are two


class Reaped(Exception):
    """Another process took this one for dead."""


class Claim(NamedTuple):
    """What one claim found, still packed: unpacked after the commit."""

    line: int
    metadata: str
    bodies: bytes


class Claimed(NamedTuple):
    """The outcome of one member's turn."""

    line: int | None  # None: the subscription is gone
    claim: Claim | None
    due: float | None  # when the next parked one is due


class Store:
    """One connection's statements. Between `begin` and `commit` the file is this process's alone.

    Arguments:
        connection: in autocommit mode.
        namespace: whose subscriptions and messages are seen.
    """

    def __init__(self, connection: sqlite3.Connection, namespace: str) -> None:
        self.connection = connection
        self.namespace = namespace
        self.process: int | None = None
        self.routes = Routes(-1)
        self.horizon = 0  # messages below it have outlived their retention
        self.last = 0  # the last message's position
        self.touched: dict[int, tuple[str, ...]] = {}  # line in which something became claimable -> processes
        self._execute = connection.execute

    def one(self, sql: str, *parameters: Any) -> Any:
        """The first column of the first row; None where there is no row."""
        row = self._execute(sql, parameters).fetchone()
        return None if row is None else row[0]

    def added(self, sql: str, *parameters: Any) -> int:
        """Insert a row; returns its number."""
        number = self._execute(sql, parameters).lastrowid
        assert number is not None
        return number

    # -- transactions -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Become the only writer and learn what the others changed. Raises SQLITE_BUSY."""
        self._execute("BEGIN IMMEDIATE")
        self.touched.clear()
        self.look()

    def look(self) -> None:
        """Read the state; load the routes if another process, or this one, changed them. Raises Reaped."""
        generation, self.horizon, self.last = self._execute(
            "SELECT (SELECT value FROM state WHERE name = 'generation'),"
            " (SELECT value FROM state WHERE name = 'horizon'),"
            " coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'messages'), 0)"
        ).fetchone()
        if generation != self.routes.generation:
            self.routes = self._load(generation)

    def commit(self) -> None:
        self._execute("COMMIT")

    def rollback(self) -> None:
        """Undo; never raises: SQLite may have done so already."""
        self.touched.clear()
        if self.connection.in_transaction:
            try:
                self._execute("ROLLBACK")
            except sqlite3.Error:
                pass

    def changed(self) -> None:
        """Let every process load its routes anew before its next transaction."""
        self._execute("UPDATE state SET value = value + 1 WHERE name = 'generation'")
        self.look()

    def _load(self, generation: int) -> Routes:
        if self.process is not None and not self.one("SELECT 1 FROM processes WHERE id = ?", self.process):
            raise Reaped
        routes = Routes(generation)
        rows = self.one(
            "SELECT json_group_array(json_array(id, line, name, patterns, filter, ordered))"
            " FROM subscriptions WHERE namespace = ?",
            self.namespace,
        )
        for id, line, name, patterns, text, ordered in json.loads(rows):
            chosen = None if text is None else Filter.parse(text)
            routes.add(Route(id, line, name, tuple(json.loads(patterns)), chosen, bool(ordered)))
        members = self.one(
            "SELECT json_group_array(json_array(m.subscription, p.token)) FROM members m"
            " JOIN processes p ON p.id = m.process JOIN subscriptions s ON s.id = m.subscription"
            " WHERE s.namespace = ?",
            self.namespace,
        )
        for subscription, token in json.loads(members):
            route = routes.by_id[subscription]
            route.members += 1
            if token not in route.processes:
                route.processes = (*route.processes, token)
        return routes

    # -- publish ----------------------------------------------------------------------------------

    def insert(self, outgoing: Outgoing, now: float) -> None:
        """Store messages and a delivery for each of their lines."""
        base = self.last + 1
        count = len(outgoing.messages)
        for start in range(0, count, ROWS):
            rows = min(ROWS, count - start)
            flat = outgoing.flat[start * COLUMNS : (start + rows) * COLUMNS]
            self._execute(insert_statement(rows), [self.namespace, now, outgoing.target, base + start, *flat])
        self.last += count
        for (lines, due), offsets in outgoing.groups.items():
            self._deliver(base, offsets, lines, due)

    def _deliver(self, base: int, offsets: list[int], lines: Iterable[int], due: float) -> None:
        for line in lines:
            self.touch(line)
        for ordered in (False, True):
            chosen = [line for line in lines if self.routes.by_line[line].ordered is ordered]
            if chosen:
                self._execute(
                    _DELIVER_ORDERED if ordered else _DELIVER,
                    (base, dumps(offsets), dumps(chosen), PARKED if due else READY, due),
                )

    # -- claim ------------------------------------------------------------------------------------

    def probe(self, line: int, limit: int) -> tuple[float | None, int, bool]:
        """When the next parked delivery is due, how many are ready (counted up to a limit), any suspects."""
        row: tuple[float | None, int, bool] = self._execute(_PROBE, {"line": line, "limit": limit}).fetchone()
        return row

    def ripen(self, line: int, now: float, limit: int) -> None:
        """Put parked deliveries that are due back in line."""
        self._execute(
            f"UPDATE deliveries SET state = {READY}, due = 0 WHERE line = ?1 AND position IN (SELECT position"
            f" FROM deliveries WHERE line = ?1 AND state = {PARKED} AND due <= ?2 ORDER BY due LIMIT ?3)",
            (line, now, limit),
        )

    def claim(self, route: Route, member: int, room: int, *, suspect: bool, now: float) -> Claimed:
        """Hand a member at most ``room`` deliveries, in order, and its fair share of what is there.

        Arguments:
            suspect: whether it may get one that was in hand when a process died: one at a time, so that
                only the message that kills its process is found in hand again and again.
        """
        line = route.line
        limit = room * max(1, route.members)
        due, ready, suspects = self.probe(line, limit)
        if due is not None and due <= now:
            self.ripen(line, now, limit)
            due, ready, suspects = self.probe(line, limit)
        first = bool(suspects and suspect)
        share = min(room - first, -(-ready // max(1, route.members)))
        if not share and not first:
            return Claimed(line, None, due)
        positions, total = self.choose(route, member, share, suspect=first)
        if total > CLAIM_BYTES:
            positions = self._within_budget(positions)
        if positions == "[]":
            return Claimed(line, None, due)
        metadata = self.one(_METADATA, positions, line)
        bodies = self.one(_BODIES, positions)
        self._execute(
            f"UPDATE deliveries SET state = {CLAIMED}, due = 0, owner = ?"
            " WHERE line = ? AND position IN (SELECT value FROM json_each(?))",
            (member, line, positions),
        )
        return Claimed(line, Claim(line, metadata, bodies), due)

    def choose(self, route: Route, member: int, share: int, *, suspect: bool) -> tuple[str, int]:
        """The positions, as JSON, and the size of their bodies."""
        parameters: dict[str, Any] = {"line": route.line, "share": share, "suspects": int(suspect)}
        sql = _CANDIDATES
        if route.ordered:
            parameters |= self._order(route.line, member, suspect=suspect)
            sql = _CANDIDATES_ORDERED
        row: tuple[str, int] = self._execute(sql, parameters).fetchone()
        return row

    def _order(self, line: int, member: int, *, suspect: bool) -> dict[str, Any]:
        """Which keys other members hold, and which suspect may go: nothing overtakes within a key."""
        held = set(
            json.loads(
                self.one(
                    "SELECT json_group_array(DISTINCT CAST(key AS TEXT)) FROM deliveries"
                    f" WHERE line = ? AND state = {CLAIMED} AND owner <> ? AND key IS NOT NULL",
                    line,
                    member,
                )
            )
        )
        waiting = json.loads(
            self.one(
                "SELECT json_group_array(json_array(position, CAST(key AS TEXT))) FROM deliveries"
                f" WHERE line = ? AND state = {SUSPECT}",
                line,
            )
        )
        first = next((position for position, key in sorted(waiting, key=_first) if key not in held), -1)
        blocked = held.union(key for _, key in waiting if key is not None)
        return {
            "first": first if suspect else -1,
            "blocked": dumps(list(blocked)),
        }

    def _within_budget(self, positions: str) -> str:
        sizes = json.loads(
            self.one(
                "SELECT json_group_array(json_array(position, length(body))) FROM messages"
                " WHERE position IN (SELECT value FROM json_each(?))",
                positions,
            )
        )
        kept: list[int] = []
        total = 0
        for position, size in sorted(sizes):
            if kept and total + size > CLAIM_BYTES:
                break
            kept.append(position)
            total += size
        return dumps(kept)

    # -- settle -----------------------------------------------------------------------------------

    def settle(self, line: int, member: int, positions: Sequence[int]) -> None:
        """Handled: forget these deliveries of the member, and messages that nobody needs any more."""
        text = dumps(positions)
        self._execute(_SETTLE, (line, member, text))
        if min(positions) < self.horizon:
            self.forget(text)

    def keys_held(self, line: int, member: int, positions: Sequence[int] | None = None) -> set[str]:
        """The keys of what a member holds, or of these of its deliveries."""
        only = "" if positions is None else " AND position IN (SELECT value FROM json_each(:positions))"
        row = self._execute(
            "SELECT json_group_array(DISTINCT CAST(key AS TEXT)) FROM deliveries"
            f" WHERE line = :line AND state = {CLAIMED} AND owner = :member AND key IS NOT NULL{only}",
            {"line": line, "member": member, "positions": dumps(positions or [])},
        ).fetchone()
        return set(json.loads(row[0]))

    def forget(self, positions: str) -> None:
        """Delete those of these messages that are past their retention and in nobody's line."""
        self._execute(
            "DELETE FROM messages WHERE position IN (SELECT value FROM json_each(?)) AND position < ?"
            " AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.position = messages.position)",
            (positions, self.horizon),
        )

    def touch(self, line: int) -> None:
        """Have the members of this line woken after the commit."""
        route = self.routes.by_line.get(line)
        if route is not None:
            self.touched[line] = route.processes

    def release(self, line: int, member: int, positions: Sequence[int] | None) -> None:
        """Give back these deliveries of the member, or all (None)."""
        only = "" if positions is None else " AND position IN (SELECT value FROM json_each(:positions))"
        self._execute(
            f"UPDATE deliveries SET state = {READY}, due = 0, owner = NULL, redelivered = 1"
            f" WHERE line = :line AND state = {CLAIMED} AND owner = :member{only}",
            {"line": line, "member": member, "positions": dumps(positions or [])},
        )
        self.touch(line)

    def park(self, line: int, member: int, deliveries: Sequence[Delivery], now: float) -> None:
        """Put deliveries aside until each is due, as their next attempt."""
        rows = [
            [d.tag, now + d.delay, d.attempt + 1, None if d.failure is None else dumps(asdict(d.failure))]
            for d in deliveries
        ]
        self._execute(_PARK, (line, member, dumps(rows)))
        self.touch(line)

    def bury(self, line: int, member: int, deliveries: Sequence[Delivery]) -> None:
        """Copy to the dead letters what the member still owns, then settle it."""
        rows = [[d.tag, dumps(asdict(d.failure))] for d in deliveries if d.failure is not None]
        self._execute(_BURY, (line, member, dumps(rows)))
        self.settle(line, member, [d.tag for d in deliveries])
        self.touch(line)

    # -- processes --------------------------------------------------------------------------------

    def enter(self, token: str, pid: int, now: float) -> None:
        """Add this process; give back what members hold that nobody knows of any more."""
        self.process = self.added(
            "INSERT INTO processes (token, pid, seen) VALUES (?, ?, ?)",
            token,
            pid,
            int(now * 1000),
        )
        self._execute(
            f"UPDATE deliveries SET state = {SUSPECT}, due = 0, owner = NULL, attempt = attempt + 1, redelivered = 2"
            f" WHERE state = {CLAIMED} AND line IN (SELECT line FROM subscriptions)"
            " AND owner NOT IN (SELECT id FROM members)"
        )

    def exit(self) -> None:
        """Take this process out; its members have left."""
        self._execute("DELETE FROM processes WHERE id = ?", (self.process,))
        self.process = None

    # -- subscriptions ----------------------------------------------------------------------------

    def declared(self, subscription: Subscription) -> bool:
        """Whether it is there already, exactly so. Needs no transaction."""
        self.look()
        route = self.routes.by_name.get(subscription.name or "")
        return (
            route is not None
            and set(route.patterns) == set(subscription.patterns)
            and (None if route.filter is None else str(route.filter)) == subscription.filter
            and route.ordered == subscription.ordered
        )

    def declare(self, subscription: Subscription, process: int | None, now: float) -> Route:
        """Make it, or give it other rules; ``process`` owns it if it is ephemeral."""
        rules = (dumps(subscription.patterns), subscription.filter, subscription.ordered)
        route = self.routes.by_name.get(subscription.name) if subscription.name is not None else None
        if route is not None:
            self._execute(
                "UPDATE subscriptions SET patterns = ?, filter = ?, ordered = ? WHERE id = ?",
                (*rules, route.id),
            )
            if subscription.ordered and not route.ordered:
                self._execute(
                    "UPDATE deliveries SET key = (SELECT key FROM messages m WHERE m.position = deliveries.position)"
                    " WHERE line = ?",
                    (route.line,),
                )
            id = route.id
        else:
            id = self.added(
                "INSERT INTO subscriptions (line, namespace, name, patterns, filter, ordered, process, declared)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                self._new_line(),
                self.namespace,
                subscription.name,
                *rules,
                process if subscription.name is None else None,
                now,
            )
        self.changed()
        return self.routes.by_id[id]

    def _new_line(self) -> int:
        self._execute("UPDATE state SET value = value + 1 WHERE name = 'line'")
        line: int = self.one("SELECT value FROM state WHERE name = 'line'")
        return line

    def join(self, subscription: Subscription, process: int, now: float) -> tuple[int, Route]:
        """Enter a member; returns its number and its subscription, declared if it was not."""
        route = self.routes.by_name.get(subscription.name) if subscription.name is not None else None
        if route is None:
            route = self.declare(subscription, process, now)
        member = self.added(
            "INSERT INTO members (process, subscription, max_attempts) VALUES (?, ?, ?)",
            process,
            route.id,
            subscription.max_attempts,
        )
        self.changed()
        return member, self.routes.by_id[route.id]

    def leave(self, member: int, subscription: int) -> None:
        """Give back what the member holds, and take it out; an ephemeral subscription goes with it."""
        self._execute("DELETE FROM members WHERE id = ?", (member,))
        route = self.routes.by_id.get(subscription)
        if route is not None:
            self.release(route.line, member, None)
            if route.name is None:
                self._drop(route)
        self.changed()

    def delete(self, name: str) -> None:
        """Remove a subscription and all it holds."""
        route = self.routes.by_name.get(name)
        if route is not None:
            self._drop(route)
            self._execute("DELETE FROM dead WHERE subscription = ?", (route.id,))
            self.changed()

    def _drop(self, route: Route) -> None:
        self.touch(route.line)
        self._execute("DELETE FROM subscriptions WHERE id = ?", (route.id,))
        self._execute("DELETE FROM members WHERE subscription = ?", (route.id,))
        self.abandon(route.line)

    def abandon(self, line: int) -> None:
        """Leave a line's deliveries to the upkeep, and let it look again at the messages they held."""
        if self.one("SELECT 1 FROM deliveries WHERE line = ? LIMIT 1", line) is not None:
            self._execute("INSERT INTO dropped (line) VALUES (?)", (line,))

    def history(self, name: str, since: float, after: int = 0) -> tuple[list[int], int]:
        """The positions of what a subscription would get again, and the last position looked at.

        Arguments:
            since: seconds since the epoch, by the publishers' clocks.
            after: look at what comes after this position.
        """
        self.look()
        route = self.routes.by_name.get(name)
        chosen: list[int] = []
        position = after
        if route is None:
            return chosen, position
        only = Routes(0)
        only.add(route)
        message = Message("", None)
        while rows := json.loads(self.one(_HISTORY, self.namespace, since, position)):
            for position, topic, headers in rows:
                message.topic = topic
                message.headers = headers_of(headers)
                if only.lines(message):
                    chosen.append(position)
        return chosen, position

    def seek(self, name: str, positions: list[int], now: float) -> None:
        """Give a subscription these messages again, as far as they are still there, and nothing else."""
        route = self.routes.by_name.get(name)
        if route is None:
            return
        self.touch(route.line)
        line = self._new_line()
        self._execute("UPDATE subscriptions SET line = ? WHERE id = ?", (line, route.id))
        self.abandon(route.line)
        self._execute(
            "INSERT INTO deliveries (position, line, state, due, key, redelivered)"
            f" SELECT m.position, ?1, iif(m.due > ?2, {PARKED}, {READY}), iif(m.due > ?2, m.due, 0),"
            " iif(?3, m.key, NULL), 1"
            " FROM json_each(?4) j CROSS JOIN messages m ON m.position = j.value",
            (line, now, route.ordered, dumps(positions)),
        )
        self.changed()

    # -- numbers ------------------------------------------------------------------------------------

    def inspect(self, name: str) -> tuple[int, int, int, float | None] | None:
        """Waiting, in flight, dead, and when the oldest waiting was published; None: no such subscription."""
        self.look()
        route = self.routes.by_name.get(name)
        if route is None:
            return None
        waiting = in_flight = 0
        firsts: list[int] = []
        for state, count, first in self._execute(
            "SELECT state, count(*), min(position) FROM deliveries WHERE line = ? GROUP BY state",
            (route.line,),
        ):
            if state == CLAIMED:
                in_flight = count
            else:
                waiting += count
                firsts.append(first)
        dead = self.one("SELECT count(*) FROM dead WHERE subscription = ?", route.id)
        oldest = self.one(
            "SELECT min(CAST(published AS REAL)) FROM messages WHERE position IN (SELECT value FROM json_each(?))",
            dumps(firsts),
        )
        return waiting, in_flight, dead, oldest


def unpack(claim: Claim) -> list[tuple[list[Any], bytes]]:
    """The rows of a claim, each with its body; columns as in ``_METADATA``."""
    out: list[tuple[list[Any], bytes]] = []
    bodies = claim.bodies
    start = 0
    for row in json.loads(claim.metadata):
        end = start + row[1]
        out.append((row, bodies[start:end]))
        start = end
    return out


def failure_of(text: str | None) -> Failure | None:
    """A stored failure."""
    return None if text is None else failure_from(text)


def headers_of(text: str | None) -> dict[str, HeaderValue]:
    """Stored headers; what no header can be, another program has written, and it is left out."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    for value in found.values():
        if not isinstance(value, str | int | float):
            return {name: value for name, value in found.items() if isinstance(value, str | int | float)}
    return found


def _first(row: Sequence[Any]) -> int:
    position: int = row[0]
    return position


_DELIVER: Final = """
INSERT INTO deliveries (position, line, state, due)
SELECT ?1 + p.value, l.value, ?4, ?5 FROM json_each(?2) p CROSS JOIN json_each(?3) l"""

_DELIVER_ORDERED: Final = """
INSERT INTO deliveries (position, line, state, due, key)
SELECT m.position, l.value, ?4, ?5, m.key
FROM json_each(?2) p CROSS JOIN messages m ON m.position = ?1 + p.value CROSS JOIN json_each(?3) l"""

_PROBE: Final = f"""
SELECT (SELECT due FROM deliveries WHERE line = :line AND state = {PARKED} ORDER BY due LIMIT 1),
    (SELECT count(*) FROM (SELECT 1 FROM deliveries WHERE line = :line AND state = {READY} LIMIT :limit)),
    EXISTS (SELECT 1 FROM deliveries WHERE line = :line AND state = {SUSPECT})"""

_CHOSEN: Final = """
SELECT json_group_array(c.position), coalesce(sum(length(m.body)), 0) FROM ({}) c
CROSS JOIN messages m ON m.position = c.position"""

_CANDIDATES: Final = _CHOSEN.format(f"""
SELECT * FROM (SELECT position FROM deliveries WHERE line = :line AND state = {SUSPECT}
    ORDER BY due, position LIMIT :suspects)
UNION ALL
SELECT * FROM (SELECT position FROM deliveries WHERE line = :line AND state = {READY}
    ORDER BY due, position LIMIT :share)""")

_CANDIDATES_ORDERED: Final = _CHOSEN.format(f"""
SELECT * FROM (SELECT position FROM deliveries WHERE line = :line AND state = {SUSPECT} AND due = 0
    AND position = :first LIMIT :suspects)
UNION ALL
SELECT * FROM (SELECT position FROM deliveries WHERE line = :line AND state = {READY}
    AND (key IS NULL OR key NOT IN (SELECT value FROM json_each(:blocked))) ORDER BY due, position LIMIT :share)""")

CONTENT: Final = (
    "iif(typeof(m.body) = 'blob', length(m.body), length(CAST(m.body AS BLOB))), "
    + ", ".join(f"CAST(m.{name} AS TEXT)" for name in ("id", "topic", "key", "headers", "content_type"))
    + ", iif(m.published IS NULL, NULL, printf('%!.17g', m.published))"
)
"""What a message is, for `json_array`: whatever another program may have put into the columns, each is of its type."""

_METADATA: Final = f"""
SELECT json_group_array(json_array(m.position, {CONTENT}, max(1, CAST(d.attempt AS INTEGER)),
    CAST(d.redelivered AS INTEGER), CAST(d.failure AS TEXT), d.state))
FROM (SELECT value FROM json_each(?1) ORDER BY value) j
CROSS JOIN messages m ON m.position = j.value CROSS JOIN deliveries d ON d.position = j.value AND d.line = ?2"""

_BODIES: Final = """
SELECT CAST(group_concat(m.body, '') AS BLOB)
FROM (SELECT value FROM json_each(?1) ORDER BY value) j CROSS JOIN messages m ON m.position = j.value"""

_SETTLE: Final = f"""
DELETE FROM deliveries WHERE line = ?1 AND owner = ?2 AND state = {CLAIMED}
AND position IN (SELECT value FROM json_each(?3))"""

_PARK: Final = f"""
UPDATE deliveries SET state = {PARKED}, owner = NULL, redelivered = 1, due = json_extract(j.value, '$[1]'),
    attempt = json_extract(j.value, '$[2]'), failure = json_extract(j.value, '$[3]')
FROM json_each(?3) j
WHERE deliveries.position = json_extract(j.value, '$[0]') AND line = ?1 AND owner = ?2 AND state = {CLAIMED}"""

_BURY: Final = f"""
INSERT INTO dead (subscription, id, topic, key, headers, content_type, published, failure, body)
SELECT s.id, m.id, m.topic, m.key, m.headers, m.content_type, m.published, json_extract(j.value, '$[1]'), m.body
FROM json_each(?3) j
CROSS JOIN deliveries d ON d.position = json_extract(j.value, '$[0]') AND d.line = ?1
CROSS JOIN messages m ON m.position = d.position
CROSS JOIN subscriptions s ON s.line = ?1
WHERE d.owner = ?2 AND d.state = {CLAIMED}"""

_HISTORY: Final = """
SELECT json_group_array(json_array(position, CAST(topic AS TEXT), CAST(headers AS TEXT))) FROM (
    SELECT position, topic, headers FROM messages WHERE namespace = ?1 AND target IS NULL
    AND coalesce(published, 0) >= ?2 AND position > ?3 ORDER BY position LIMIT 5000)"""
