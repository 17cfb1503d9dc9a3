"""The statements behind the outbox and the inbox, once for every framework: plain SQL over two callables.

``%s`` stands for a value; whoever executes them translates it. Every statement is safe with any number of relays
at once. Owns which rows may be claimed, and in which order; opens and ends no transaction.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pubsub_facade.contrib.outbox import (
    COLUMNS,
    DELAYED,
    FAILED,
    PENDING,
    RETRY,
    SENT,
    SHARDS,
    SHARDS_AT_ONCE,
    Lag,
    Outcome,
    Row,
    row_of,
)

Query = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]
Change = Callable[[str, Sequence[Any]], int]

AT_ONCE: Final = 500  # values in one statement
MAX_HELD: Final = 500  # keys in trouble that a statement excludes; rows of further ones are excluded after it
_LOOSE: Final = ("mysql", "mariadb")  # compare text without regard to case, accents and trailing blanks


@dataclass(frozen=True, slots=True)
class Run:
    """How statements are executed: ``query`` returns rows, ``change`` how many rows it changed."""

    query: Query
    change: Change


@dataclass(slots=True)
class _Trouble:
    """Rows that were refused: which may go again now, and which keys wait for one that may not overtake."""

    due: list[int]
    shards: set[int]
    keys: list[str]


class OutboxSql:
    """Statements on one outbox.

    Arguments:
        table, shards: names of the two tables, quoted where they need it.
        skip_locked: whether the database has ``FOR UPDATE SKIP LOCKED``; without it shards are leased.
        insert_ignore: how the database spells an insert that leaves an existing row (see `ignoring`).
    """

    def __init__(self, table: str, shards: str, *, skip_locked: bool, vendor: str) -> None:
        self._table = table
        self._shards = shards
        self._vendor = vendor
        self.skip_locked = skip_locked

    def seed(self, run: Run) -> None:
        """Make the shards that are missing."""
        there = {int(row[0]) for row in run.query(f"SELECT shard FROM {self._shards}", ())}
        for shard in range(SHARDS):
            if shard not in there:
                run.change(
                    ignoring(self._vendor, self._shards, ("shard", "owner", "leased_until"), ("shard",)),
                    (shard, "", 0.0),
                )

    def with_work(self, run: Run, now: float) -> list[int]:
        """Some shards that have rows to publish; a look without locks, in a transaction of its own."""
        self._by_index(run)
        self._promote(run, now)
        trouble = self._trouble(run, now, None)
        held, values = self._not_held(trouble)
        rows = run.query(
            f"SELECT DISTINCT shard FROM (SELECT shard FROM {self._table} WHERE state = {PENDING}{held} "
            f"ORDER BY id LIMIT {4 * AT_ONCE}) AS head",
            values,
        )
        shards = sorted(trouble.shards | {int(row[0]) for row in rows})
        turn = random.randrange(len(shards)) if shards else 0
        return (shards[turn:] + shards[:turn])[:SHARDS_AT_ONCE]

    def _by_index(self, run: Run) -> None:
        """Let PostgreSQL read the head of the line by its index, until the transaction ends.

        A queue's statistics are wrong most of the time: from them it would read the whole line and sort it.
        """
        if self._vendor == "postgresql":
            off = ", ".join(
                f"set_config('enable_{how}', 'off', true)" for how in ("sort", "bitmapscan", "seqscan")
            )
            run.query(f"SELECT {off}", ())

    def _promote(self, run: Run, now: float) -> None:
        due = run.query(
            f"SELECT id FROM {self._table} WHERE state = {DELAYED} AND due <= %s ORDER BY due LIMIT {AT_ONCE}",
            (now,),
        )
        if due:
            ids = [int(row[0]) for row in due]
            run.change(
                f"UPDATE {self._table} SET state = {PENDING} WHERE state = {DELAYED} AND id IN ({_marks(ids)})",
                ids,
            )

    def lock(self, run: Run, shards: Sequence[int]) -> list[int]:
        """Hold these shards until the transaction ends; those that somebody else holds are left out."""
        rows = run.query(
            f"SELECT shard FROM {self._shards} WHERE shard IN ({_marks(shards)}) FOR UPDATE SKIP LOCKED",
            shards,
        )
        return [int(row[0]) for row in rows]

    def lease(self, run: Run, shards: Sequence[int], owner: str, now: float, until: float) -> list[int]:
        """Hold these shards until a time; must be the first statement of its transaction (SQLite)."""
        run.change(
            f"UPDATE {self._shards} SET owner = %s, leased_until = %s "
            f"WHERE shard IN ({_marks(shards)}) AND leased_until <= %s",
            (owner, until, *shards, now),
        )
        rows = run.query(
            f"SELECT shard FROM {self._shards} WHERE owner = %s AND leased_until = %s", (owner, until)
        )
        return [int(row[0]) for row in rows]

    def let_go(self, run: Run, owner: str) -> None:
        """End the leases of ``owner``."""
        run.change(f"UPDATE {self._shards} SET owner = '', leased_until = 0 WHERE owner = %s", (owner,))

    def fetch(self, run: Run, shards: Sequence[int], now: float, limit: int) -> list[Row]:
        """Due rows of held shards, by id: no row whose key has an earlier one in trouble."""
        self._by_index(run)
        trouble = self._trouble(run, now, shards)
        columns = ", ".join(COLUMNS)
        found: list[Sequence[Any]] = []
        if trouble.due:
            due = trouble.due[:limit]
            found += run.query(f"SELECT {columns} FROM {self._table} WHERE id IN ({_marks(due)})", due)
        held, values = self._not_held(trouble)
        found += run.query(
            f"SELECT {columns} FROM {self._table} WHERE state = {PENDING} AND shard IN ({_marks(shards)}){held} "
            f"ORDER BY id LIMIT {int(limit)}",
            (*shards, *values),
        )
        rows = [row_of(values) for values in found]
        if len(trouble.keys) > MAX_HELD:
            keys, due_ids = set(trouble.keys), set(trouble.due)
            rows = [row for row in rows if row.message.key not in keys or row.id in due_ids]
        return sorted(rows, key=lambda row: row.id)[:limit]

    def _trouble(self, run: Run, now: float, shards: Sequence[int] | None) -> _Trouble:
        where = "" if shards is None else f" AND shard IN ({_marks(shards)})"
        rows = run.query(
            f"SELECT id, shard, message_key, due FROM {self._table} WHERE state = {RETRY}{where} ORDER BY id",
            () if shards is None else shards,
        )
        trouble = _Trouble([], set(), [])
        seen: set[str] = set()
        for id, shard, key, due in rows:
            if key is not None and key in seen:
                continue  # behind an earlier one of its key
            if key is not None:
                seen.add(key)
            if due <= now:
                trouble.due.append(int(id))
                trouble.shards.add(int(shard))
        trouble.keys = list(seen)
        return trouble

    def _not_held(self, trouble: _Trouble) -> tuple[str, Sequence[Any]]:
        keys = trouble.keys[:MAX_HELD]
        if not keys:
            return "", ()
        key = "message_key"
        if self._vendor in _LOOSE:
            key, keys = f"HEX(CONVERT({key} USING utf8mb4))", [key.encode().hex().upper() for key in keys]
        return f" AND (message_key IS NULL OR {key} NOT IN ({_marks(keys)}))", keys

    def settle(self, run: Run, outcome: Outcome, now: float, *, keep: bool) -> None:
        """Write what became of rows."""
        for start in range(0, len(outcome.sent), AT_ONCE):
            ids = outcome.sent[start : start + AT_ONCE]
            if keep:
                run.change(
                    f"UPDATE {self._table} SET state = {SENT}, due = %s, error = '' WHERE id IN ({_marks(ids)})",
                    (now, *ids),
                )
            else:
                run.change(f"DELETE FROM {self._table} WHERE id IN ({_marks(ids)})", ids)
        for id, due, error in outcome.retry:
            run.change(
                f"UPDATE {self._table} SET state = {RETRY}, attempts = attempts + 1, due = %s, error = %s "
                "WHERE id = %s",
                (due, error, id),
            )
        for id, error in outcome.failed:
            run.change(
                f"UPDATE {self._table} SET state = {FAILED}, attempts = attempts + 1, due = %s, error = %s "
                "WHERE id = %s",
                (now, error, id),
            )

    def next_due(self, run: Run) -> float | None:
        """When the next row that waits for a time is due."""
        dues = [
            run.query(f"SELECT MIN(due) FROM {self._table} WHERE state = {state}", ())[0][0]
            for state in (RETRY, DELAYED)
        ]
        return min((float(due) for due in dues if due is not None), default=None)

    def lag(self, run: Run, now: float) -> Lag:
        """How far behind."""
        counts = dict.fromkeys((PENDING, RETRY, DELAYED, FAILED), 0)
        for state, count in run.query(
            f"SELECT state, COUNT(*) FROM {self._table} WHERE state <> {SENT} GROUP BY state", ()
        ):
            counts[int(state)] = int(count)
        oldest = run.query(
            f"SELECT MIN(due) FROM {self._table} WHERE state IN ({PENDING}, {RETRY}) AND due <= %s", (now,)
        )[0][0]
        return Lag(
            counts[PENDING] + counts[RETRY] + counts[DELAYED],
            counts[FAILED],
            None if oldest is None else max(0.0, now - float(oldest)),
        )

    def prune(self, run: Run, before: float, limit: int) -> int:
        """Delete some sent rows."""
        rows = run.query(
            f"SELECT id FROM {self._table} WHERE state = {SENT} AND due < %s ORDER BY due LIMIT {int(limit)}",
            (before,),
        )
        ids = [int(row[0]) for row in rows]
        return run.change(f"DELETE FROM {self._table} WHERE id IN ({_marks(ids)})", ids) if ids else 0


def ignoring(vendor: str, table: str, columns: Sequence[str], unique: Sequence[str]) -> str:
    """An insert of one row, which counts as 1 row changed; where the unique columns are taken, as another number.

    On MySQL and MariaDB a row that is there has its last column, a number, raised by a thousandth, so that 2 rows
    count as changed: a row that stays as it is would count as 0 or as 1, as the driver asks. ``INSERT IGNORE`` is
    no way, since it makes warnings of other errors: a row that the database refuses would pass for one that is there.
    """
    names, values = ", ".join(columns), _marks(columns)
    if vendor in _LOOSE:
        last = columns[-1]
        return (
            f"INSERT INTO {table} ({names}) VALUES ({values}) "
            f"ON DUPLICATE KEY UPDATE {last} = {table}.{last} + 0.001"
        )
    return f"INSERT INTO {table} ({names}) VALUES ({values}) ON CONFLICT ({', '.join(unique)}) DO NOTHING"


def notify_statements(table: str) -> list[str]:
    """PostgreSQL: a trigger that notifies once a statement, at commit; the payload is empty, so twins merge."""
    return [
        f'CREATE OR REPLACE FUNCTION "{table}_notify"() RETURNS trigger LANGUAGE plpgsql AS '
        f"$$BEGIN PERFORM pg_notify('{table}', ''); RETURN NULL; END$$",
        f'CREATE TRIGGER "{table}_notify" AFTER INSERT ON "{table}" '
        f'FOR EACH STATEMENT EXECUTE FUNCTION "{table}_notify"()',
    ]


def unnotify_statements(table: str) -> list[str]:
    """What takes `notify_statements` back."""
    return [
        f'DROP TRIGGER IF EXISTS "{table}_notify" ON "{table}"',
        f'DROP FUNCTION IF EXISTS "{table}_notify"()',
    ]


def _marks(values: Sequence[Any]) -> str:
    return ", ".join(["%s"] * len(values))
