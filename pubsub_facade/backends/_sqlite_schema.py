"""The database file: its tables, and opening it only if it is ours and can be used.

Owns the schema and its version (``PRAGMA application_id`` and ``user_version``). What no waiting can mend
(another program's file, a newer version, no right to write) is a ConfigError that names the file and the
fix; everything else is a ConnectionFailed and may be tried again. Must never change a file that is not ours.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
import warnings
from pathlib import Path
from typing import Final

from pubsub_facade.errors import ConfigError, ConnectionFailed, PubSubError
from pubsub_facade.settings import SqliteSettings

APPLICATION_ID: Final = 0x70756273  # "pubs"
VERSION: Final = 1
OLDEST_SQLITE: Final = (3, 33, 0)  # UPDATE ... FROM

if (
    (3, 12) <= sys.version_info < (3, 12, 4)
):  # these took numbered placeholders for named ones, and complained
    warnings.filterwarnings("ignore", r"Binding \d+ \('\?\d+'\) is a named parameter", DeprecationWarning)

READY, SUSPECT, PARKED, CLAIMED = range(4)
"""States of a delivery; a suspect is one that was in hand when a process died."""

SCHEMA: Final = f"""
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO state VALUES ('generation', 0), ('horizon', 0), ('line', 0);
CREATE TABLE subscriptions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    line INTEGER NOT NULL UNIQUE,      -- whose deliveries are its own; a seek gives it a new one
    namespace TEXT NOT NULL,
    name TEXT,                         -- NULL: ephemeral
    patterns TEXT NOT NULL,            -- JSON array
    filter TEXT,
    ordered INTEGER NOT NULL,
    process INTEGER,                   -- whose ephemeral one it is
    declared REAL NOT NULL,
    UNIQUE (namespace, name)
);
CREATE TABLE messages (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    topic TEXT NOT NULL,
    key TEXT,
    headers TEXT,                      -- JSON object
    content_type TEXT,
    published REAL,                    -- seconds since the epoch, by the publisher's clock
    stored REAL NOT NULL,
    due REAL,                          -- published with a delay: not before
    target INTEGER,                    -- a dead letter replayed to this subscription only
    body BLOB NOT NULL
);
CREATE TABLE deliveries (
    position INTEGER NOT NULL,
    line INTEGER NOT NULL,
    state INTEGER NOT NULL DEFAULT {READY},  -- {READY} ready, {SUSPECT} suspect, {PARKED} parked, {CLAIMED} claimed
    due REAL NOT NULL DEFAULT 0,       -- parked: not before
    owner INTEGER,                     -- claimed: by this member
    attempt INTEGER NOT NULL DEFAULT 1,
    redelivered INTEGER NOT NULL DEFAULT 0,  -- 1: handed out before, 2: by a process that died
    failure TEXT,                      -- JSON
    key TEXT,                          -- of ordered subscriptions only
    PRIMARY KEY (position, line)
) WITHOUT ROWID;
CREATE INDEX deliveries_line ON deliveries (line, state, due, position, key);
CREATE TABLE dead (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription INTEGER NOT NULL,
    id TEXT NOT NULL,
    topic TEXT NOT NULL,
    key TEXT,
    headers TEXT,
    content_type TEXT,
    published REAL,
    failure TEXT NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX dead_subscription ON dead (subscription);
CREATE INDEX dead_id ON dead (subscription, id);
CREATE TABLE processes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL,               -- its pipe in the directory beside the file
    pid INTEGER NOT NULL,
    seen INTEGER NOT NULL              -- its last sign of life, milliseconds since the epoch
);
CREATE TABLE members (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    process INTEGER NOT NULL,
    subscription INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL
);
CREATE TABLE dropped (                 -- their deliveries are deleted little by little
    line INTEGER PRIMARY KEY
);
CREATE TABLE inbox (                   -- for other programs: what is inserted here is published
    number INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    body BLOB NOT NULL,
    key TEXT,
    headers TEXT,
    content_type TEXT,
    id TEXT,
    namespace TEXT NOT NULL DEFAULT 'pubsub'
);
CREATE VIEW backlog AS
    SELECT s.namespace, s.name, count(d.position) AS unsettled,
        coalesce(sum(d.state = {CLAIMED}), 0) AS in_flight, coalesce(sum(d.state = {PARKED}), 0) AS parked,
        (SELECT count(*) FROM dead WHERE dead.subscription = s.id) AS dead
    FROM subscriptions s LEFT JOIN deliveries d ON d.line = s.line GROUP BY s.id;
"""


def open_database(settings: SqliteSettings, deadline: float) -> sqlite3.Connection:
    """A connection to the settings' file, made ours if it is new and empty.

    Arguments:
        deadline: of `time.monotonic`, until when to wait for another process that has it locked.

    Raises ConfigError or ConnectionFailed.
    """
    path = settings.path
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ConfigError(
            f"sqlite: SQLite {sqlite3.sqlite_version} is too old for {show(path)}: "
            f"{'.'.join(map(str, OLDEST_SQLITE))} or newer is needed; use a newer Python, or another backend"
        )
    _check_place(path)
    try:
        connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        connection.text_factory = _text  # sqlite3's own raises on what is no UTF-8
    except sqlite3.Error as error:
        raise open_error(path, error) from error
    try:
        while True:
            try:
                _prepare(connection, settings)
                return connection
            except sqlite3.OperationalError as error:
                if not is_busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.005)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise open_error(path, error) from error
        raise


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def show(path: Path) -> str:
    """The file, for errors: absolute, so that a wrong working directory is seen."""
    return repr(str(path.absolute()))


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection holds a lock that will go away."""
    return primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, 0 where there is none."""
    return int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def _check_place(path: Path) -> None:
    """Say what is wrong with the place before SQLite says "unable to open database file".

    The file itself is never opened here: closing it would drop the locks that another connection of this
    process holds on it (sqlite.org, "How To Corrupt An SQLite Database File", section 2.2).
    """
    directory = path.absolute().parent
    if not directory.is_dir():
        raise ConfigError(
            f"sqlite: {show(path)} cannot be made: there is no directory {str(directory)!r}; create it, "
            "or set sqlite.path"
        )
    if path.is_dir():
        raise ConfigError(f"sqlite: {show(path)} is a directory: set sqlite.path to a file in it")
    for place in (path, directory):
        if place.exists() and not os.access(place, os.R_OK | os.W_OK):
            raise ConfigError(
                f"sqlite: {show(path)} is read-only here: grant the right to write to it and to its directory, "
                "or set sqlite.path"
            )


def _prepare(connection: sqlite3.Connection, settings: SqliteSettings) -> None:
    connection.execute("BEGIN")  # one snapshot: another process may be creating the schema right now
    try:
        ours = _is_ours(connection, settings.path)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    if not ours:
        _create(connection, settings.path)
    for pragma in (
        "journal_mode = WAL",
        f"synchronous = {settings.synchronous}",
        "cache_size = -16000",
        "temp_store = MEMORY",
        "journal_size_limit = 67108864",
        "trusted_schema = OFF",
    ):
        connection.execute(f"PRAGMA {pragma}")
    if settings.max_size is not None:
        page = int(connection.execute("PRAGMA page_size").fetchone()[0])
        connection.execute(f"PRAGMA max_page_count = {max(1, settings.max_size // page)}")


def _check_json(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("SELECT count(*) FROM json_each('[]')").fetchone()
    except sqlite3.OperationalError as error:
        if "no such" not in str(error):
            raise
        raise ConfigError(
            f"sqlite: this SQLite {sqlite3.sqlite_version} was built without its JSON functions: use a newer Python, "
            "or another backend"
        ) from error


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """False for a new, empty database; ConfigError for another program's or a newer version's."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == APPLICATION_ID:
        if version == VERSION:
            return True
        raise ConfigError(
            f"sqlite: {show(path)} has schema version {version}, and this pubsub_facade knows version {VERSION}: "
            + ("upgrade the package, or " if version > VERSION else "")
            + "set sqlite.path to another file"
        )
    if application or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise ConfigError(
            f"sqlite: {show(path)} is another program's database (application_id {application}): "
            "set sqlite.path to a file of its own"
        )
    return False


def _create(connection: sqlite3.Connection, path: Path) -> None:
    """Write the schema, unless another process does so first; whole or not at all."""
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not _is_ours(connection, path):
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def open_error(path: Path, error: sqlite3.Error) -> PubSubError:
    """What an error while opening the file means: ConfigError where trying again does not mend it."""
    code = primary_code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigError(f"sqlite: {show(path)} is not a SQLite database: set sqlite.path to another file")
    if code == sqlite3.SQLITE_CORRUPT:
        return corrupt(path, error)
    forbidden = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
    if code in forbidden or (code == sqlite3.SQLITE_CANTOPEN and _can_open_files(path)):
        return ConfigError(
            f"sqlite: {show(path)} cannot be opened for writing: {error}; grant the right, or set sqlite.path"
        )
    if is_busy(error):
        return ConnectionFailed(f"sqlite: {show(path)} is locked by another process: {error}")
    return ConnectionFailed(f"sqlite: {show(path)} cannot be opened: {error}")


def _can_open_files(path: Path) -> bool:
    """Whether it was not for want of file descriptors, which will be free again."""
    try:
        os.close(os.open(path.absolute().parent, os.O_RDONLY))
    except OSError:
        return False
    return True


def corrupt(path: Path, error: BaseException) -> ConfigError:
    """The error for a damaged file: trying again does not mend it."""
    return ConfigError(
        f"sqlite: {show(path)} is damaged: {error}; stop all processes that use it, keep a copy, then restore a backup "
        "or run the sqlite3 shell's .recover into a new file"
    )
