"""What every process does now and then for the whole file, in steps of a few milliseconds.

Shows that it lives, frees what the dead had in hand, publishes what other programs put into the inbox,
deletes what has outlived its retention or belongs to nobody, gives space back. Each step is a short
transaction of its own: nobody who publishes waits for long.
"""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any, Final

from pubsub_facade.backends._sqlite_routes import Outgoing
from pubsub_facade.backends._sqlite_schema import CLAIMED, SUSPECT
from pubsub_facade.backends._sqlite_store import Reaped, Store
from pubsub_facade.backends._sqlite_wakeup import Pipes
from pubsub_facade.message import NO_HEADERS, RESERVED_PREFIX, HeaderValue, Message, new_id
from pubsub_facade.settings import SqliteSettings

STEP: Final = 1000  # rows deleted in one transaction
VACUUM: Final = 500  # pages given back in one transaction
SPARE: Final = 4096  # free pages that are kept for reuse
LOOK: Final = 0.5  # s between looks
LOOK_WITHOUT_PIPES: Final = 0.02


class Upkeep:
    """One process's share of it.

    Arguments:
        pipes: how to tell whether the others live.
    """

    def __init__(self, settings: SqliteSettings, pipes: Pipes) -> None:
        self.pause = LOOK if pipes.reading is not None else LOOK_WITHOUT_PIPES
        self.more = False  # the last step left something to do
        self._settings = settings
        self._pipes = pipes
        self._beat = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # process -> what it last said, and when we saw that
        self._version: int | None = None

    def others_wrote(self, store: Store) -> bool:
        """Whether another process committed since the last call."""
        version = store.one("PRAGMA data_version")
        changed: bool = version != self._version
        self._version = version
        return changed

    def step(self, store: Store, wall: float) -> None:
        """One round; what became claimable is in ``store.touched``. Raises sqlite3.Error, Reaped.

        Arguments:
            wall: seconds since the epoch.
        """
        self.more = False
        self._heartbeat(store, wall)
        store.look()
        row = store.connection.execute(_LOOK, (store.namespace, store.horizon)).fetchone()
        processes, inbox, dropped, oldest = row
        for process, token, seen in json.loads(processes):
            if process != store.process and self._is_dead(process, token, seen):
                self._transact(store, self._reap, process, token, seen)
        if inbox:
            self._transact(store, self._take_in, wall)
        if dropped:
            self._transact(store, self._clear)
        if oldest is not None and (oldest < wall - self._settings.retention or self._too_many(store)):
            self._transact(store, self._age, wall)
        if not self.more:
            self._give_back(store)

    def make_room(self, store: Store) -> bool:
        """Delete settled messages before their time, because the file is full; whether there were any."""
        deleted = 0

        def forget(store: Store) -> None:
            nonlocal deleted
            deleted = self._advance(store, store.last + 1)

        self._transact(store, forget)
        return deleted > 0

    def _transact(self, store: Store, work: Any, *arguments: Any) -> None:
        touched = dict(store.touched)
        store.begin()
        try:
            work(store, *arguments)
            store.commit()
        except BaseException:
            store.rollback()
            raise
        finally:
            store.touched.update(touched)

    # -- the living and the dead ------------------------------------------------------------------

    def _heartbeat(self, store: Store, wall: float) -> None:
        now = time.monotonic()
        if now - self._beat < self._settings.lease / 3:
            return
        self._beat = now
        beat = store.connection.execute(
            "UPDATE processes SET seen = ? WHERE id = ?", (int(wall * 1000), store.process)
        )
        if beat.rowcount == 0:
            raise Reaped

    def _is_dead(self, process: int, token: str, seen: int) -> bool:
        """By its pipe; else by its silence, measured on our own clock: wall clocks jump."""
        if self._pipes.alive(token) is False:
            return True
        now = time.monotonic()
        known = self._seen.get(process)
        if known is None or known[0] != seen:
            self._seen[process] = (seen, now)
            return False
        return now - known[1] > self._settings.lease

    def _reap(self, store: Store, process: int, token: str, seen: int) -> None:
        """Free what it had in hand, as the next attempt; its ephemeral subscriptions go."""
        if store.one("SELECT seen FROM processes WHERE id = ?", process) != seen:
            return
        execute = store.connection.execute
        execute(_FREE, (process,))
        for route in list(store.routes.by_line.values()):
            if token in route.processes:
                store.touch(route.line)
        execute("INSERT INTO dropped SELECT line FROM subscriptions WHERE process = ?", (process,))
        execute("DELETE FROM subscriptions WHERE process = ?", (process,))
        execute("DELETE FROM members WHERE process = ?", (process,))
        execute("DELETE FROM processes WHERE id = ?", (process,))
        store.changed()
        self._pipes.remove(token)
        self._seen.pop(process, None)

    # -- other programs ---------------------------------------------------------------------------

    def _take_in(self, store: Store, wall: float) -> None:
        rows = store.connection.execute(
            "SELECT number, topic, body, key, headers, content_type, id FROM inbox WHERE namespace = ?"
            " ORDER BY number LIMIT 100",
            (store.namespace,),
        ).fetchall()
        messages = [_foreign(row, wall) for row in rows]
        if messages:
            outgoing = Outgoing(messages, wall)
            outgoing.route(store.routes, wall, required=False)
            store.insert(outgoing, wall)
            numbers = json.dumps([row[0] for row in rows])
            store.connection.execute(
                "DELETE FROM inbox WHERE number IN (SELECT value FROM json_each(?))", (numbers,)
            )
        self.more = self.more or len(rows) == 100

    # -- what nobody needs ------------------------------------------------------------------------

    def _clear(self, store: Store) -> None:
        """Delete some deliveries of a subscription that is gone."""
        line = store.one("SELECT min(line) FROM dropped")
        positions = store.one(
            "SELECT json_group_array(position) FROM (SELECT position FROM deliveries WHERE line = ? LIMIT ?)",
            line,
            STEP,
        )
        execute = store.connection.execute
        if positions == "[]":
            execute("DELETE FROM dropped WHERE line = ?", (line,))
        else:
            execute(
                "DELETE FROM deliveries WHERE line = ? AND position IN (SELECT value FROM json_each(?))",
                (line, positions),
            )
            store.forget(positions)
        self.more = True

    def _too_many(self, store: Store) -> bool:
        return store.last - store.horizon >= self._settings.history + STEP

    def _age(self, store: Store, wall: float) -> None:
        """Move the horizon over what has outlived its retention, and delete what is in nobody's line."""
        horizon = store.one(
            "SELECT max(position) + 1 FROM (SELECT position, stored FROM messages WHERE position >= ?"
            " ORDER BY position LIMIT ?) WHERE stored < ? OR position <= ?",
            store.horizon,
            STEP,
            wall - self._settings.retention,
            store.last - self._settings.history,
        )
        if horizon is not None:
            self.more = horizon - store.horizon >= STEP or self.more
            self._advance(store, horizon)

    @staticmethod
    def _advance(store: Store, horizon: int) -> int:
        """Delete what is below the new horizon and in nobody's line; returns how many."""
        deleted = store.connection.execute(
            "DELETE FROM messages WHERE position >= ? AND position < ?"
            " AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.position = messages.position)",
            (store.horizon, horizon),
        )
        store.connection.execute("UPDATE state SET value = ? WHERE name = 'horizon'", (horizon,))
        return deleted.rowcount

    def _give_back(self, store: Store) -> None:
        """Shrink the file a little, where much of it is free."""
        free = store.one("PRAGMA freelist_count")
        if free > SPARE and free * 4 > store.one("PRAGMA page_count"):
            # One call into SQLite for all pages; executescript, as execute would stop after the first.
            store.connection.executescript(f"PRAGMA incremental_vacuum({VACUUM})")
            self.more = True


def _foreign(row: tuple[Any, ...], wall: float) -> Message:
    """What another program put into the inbox; what makes no sense is left out, the body never."""
    _, topic, body, key, headers, content_type, id = row
    message = Message(
        _text(topic) or "",
        None,
        key=_text(key),
        headers=_foreign_headers(headers),
        id=_text(id) or new_id(wall),
    )
    message.body = body if isinstance(body, bytes) else str(body).encode("utf-8", "replace")
    message.content_type = _text(content_type)
    message.timestamp = wall
    return message


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return None if value is None else str(value).replace("\0", "")


def _foreign_headers(text: Any) -> dict[str, HeaderValue]:
    try:
        found = json.loads(text) if text is not None else NO_HEADERS
    except (ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str | int | float) and not name.lower().startswith(RESERVED_PREFIX)
    }


def is_full(error: sqlite3.Error) -> bool:
    """Whether the file or its disk has no room."""
    return (int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF) == sqlite3.SQLITE_FULL


_LOOK: Final = """
SELECT (SELECT json_group_array(json_array(id, token, seen)) FROM processes),
    EXISTS (SELECT 1 FROM inbox WHERE namespace = ?1), EXISTS (SELECT 1 FROM dropped),
    (SELECT stored FROM messages WHERE position >= ?2 ORDER BY position LIMIT 1)"""

# Nobody knows which of several killed their process. So this alone does not take a delivery above max_attempts, where
# it would become a dead letter unhandled: that takes a second death, as the one suspect that its member held.
_FREE: Final = f"""
UPDATE deliveries SET state = {SUSPECT}, due = 0, owner = NULL, redelivered = 2, attempt = iif(redelivered = 2,
    attempt + 1,
    max(attempt, min(attempt + 1, (SELECT max_attempts FROM members WHERE id = deliveries.owner))))
WHERE state = {CLAIMED} AND owner IN (SELECT id FROM members WHERE process = ?1)
AND line IN (SELECT s.line FROM members m JOIN subscriptions s ON s.id = m.subscription WHERE m.process = ?1)"""
