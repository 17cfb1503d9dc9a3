"""What `pubsub doctor` asks of the embedded file: is it whole, does it survive a power cut, is there room.

Looks through a connection of its own, which only reads; blocking, so it belongs on a thread.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from pubsub_facade.backends.base import Finding
from pubsub_facade.settings import SqliteSettings

ROOM: Final = 1 << 30  # bytes free, below which it is told
FULL: Final = 0.9  # of max_size, above which it is told
WHOLE: Final = 1 << 30  # bytes of a file up to which every page and index is checked
_NETWORK: Final = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs")


def examine(settings: SqliteSettings) -> list[Finding]:
    """All findings; the file is there. Raises sqlite3.Error where it cannot be read at all."""
    path = settings.path.absolute()
    with closing(
        sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=settings.busy_timeout)
    ) as file:
        return [
            *_journal(file),
            *_synchronous(settings),
            *_integrity(file, path),
            *_filesystem(path, mounts()),
            *_room(path, shutil.disk_usage(path.parent).free),
            *_limit(file, settings),
        ]


def _journal(file: sqlite3.Connection) -> Iterator[Finding]:
    mode = str(file.execute("PRAGMA journal_mode").fetchone()[0]).lower()
    if mode == "wal":
        yield Finding("ok", "journal_mode is wal")
    else:
        yield Finding(
            "problem",
            f"journal_mode is {mode}: readers and writers of several processes block each other",
            "use a filesystem with shared memory between processes (a local disk), and let no other program set it",
        )


def _synchronous(settings: SqliteSettings) -> Iterator[Finding]:
    if settings.synchronous == "full":
        yield Finding("ok", "synchronous is full: what was confirmed survives a power cut")
    else:
        yield Finding(
            "warning",
            f"synchronous is {settings.synchronous}: what was confirmed last may be gone after a power cut",
            'set sqlite.synchronous = "full"',
        )


def _integrity(file: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    check = "integrity_check" if path.stat().st_size <= WHOLE else "quick_check"
    rows = [str(row[0]) for row in file.execute(f"PRAGMA {check}(3)")]
    if rows == ["ok"]:
        yield Finding("ok", f"{check} finds the file whole")
    else:
        yield Finding(
            "problem",
            f"{check}: {'; '.join(rows)}",
            "stop all processes that use it, keep a copy, then restore a backup or run the sqlite3 shell's .recover",
        )


def mounts() -> list[tuple[str, str]]:
    """Mount point and filesystem type of each mount; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return []
    return [(fields[1].replace("\\040", " "), fields[2]) for fields in map(str.split, lines)]


def _filesystem(path: Path, mounted: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    real = os.path.realpath(path)
    over = [(point, kind) for point, kind in mounted if real.startswith(point.rstrip("/") + "/")]
    if not over:
        return
    point, kind = max(reversed(over), key=lambda mount: len(mount[0]))  # the last mounted there is on top
    if kind in _NETWORK:
        yield Finding(
            "problem",
            f"{path} is on a network filesystem ({kind} at {point}): its locks do not protect the file",
            "set sqlite.path to a local disk; for several machines use a broker",
        )
    else:
        yield Finding("ok", f"the file is on {kind}")


def _room(path: Path, free: int) -> Iterator[Finding]:
    if free < ROOM:
        yield Finding(
            "warning",
            f"{free / (1 << 20):.0f} MiB are free at {path.parent}: publishing fails when the disk is full",
            "free some space, or move sqlite.path",
        )
    else:
        yield Finding("ok", f"{free / (1 << 30):.1f} GiB are free")


def _limit(file: sqlite3.Connection, settings: SqliteSettings) -> Iterator[Finding]:
    if settings.max_size is None:
        return
    pages, spare, page = (
        int(file.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    share = (pages - spare) * page / settings.max_size
    if share > FULL:
        yield Finding(
            "warning",
            f"the file is at {share:.0%} of max_size: publishing fails when it is full",
            "raise sqlite.max_size, or lower sqlite.retention and sqlite.history",
        )
    else:
        yield Finding("ok", f"the file is at {share:.0%} of max_size")
