"""How processes on one file wake each other, and see that one has died: a named pipe each.

A process reads its own pipe in a directory beside the file; the others write the numbers of the lines in
which something became claimable. The kernel closes the pipe with the process, however it ended, so that
"nobody reads it" is the proof of death. A wake may be lost, is never waited for and never fails a
transaction: every process also looks by itself now and then.
"""

from __future__ import annotations

import errno
import os
import struct
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

FULL: Final = 16384  # bytes read at once from which on some may not have fitted


class Pipes:
    """This process's pipe, and those of the others as far as they were written to.

    Arguments:
        database: the file that the processes share.
    """

    def __init__(self, database: Path) -> None:
        self.directory = database.absolute().with_name(database.name + "-members")
        self.token = uuid.uuid4().hex
        self.reading: int | None = None
        self._own: int | None = None  # our own writing end: without it the pipe would read as ended
        self._others: dict[str, int] = {}

    def open(self) -> None:
        """Make this process's pipe; where the file system has none, `reading` stays None."""
        path = self.directory / self.token
        try:
            self.directory.mkdir(exist_ok=True)
            os.mkfifo(path)
            self.reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self._own = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except (OSError, AttributeError, NotImplementedError):
            self.close()

    def close(self) -> None:
        """Remove the pipe, and the directory after the last one. Never raises."""
        self.forget_descriptors()
        for remove, path in ((os.unlink, self.directory / self.token), (os.rmdir, self.directory)):
            try:
                remove(path)
            except OSError:
                pass

    def forget_descriptors(self) -> None:
        """Close all ends, as a forked child must: its parent's pipe would seem read when nobody reads it."""
        for descriptor in (self.reading, self._own, *self._others.values()):
            if descriptor is not None:
                os.close(descriptor)
        self.reading = self._own = None
        self._others.clear()

    def drain(self) -> Collection[int] | None:
        """The lines that others named since the last call; None: some may be missing, look at all."""
        if self.reading is None:
            return ()
        try:
            data = os.read(self.reading, 65536)
        except BlockingIOError:
            return ()
        if len(data) >= FULL:
            return None
        return {line for (line,) in struct.iter_unpack("<q", data[: len(data) & ~7])}

    def wake(self, token: str, lines: Sequence[int]) -> None:
        """Tell another process; what cannot be told is left to its own looking."""
        try:
            writing = self._others.get(token)
            if writing is None:
                writing = self._others[token] = self._open(token)
            os.write(writing, struct.pack(f"<{len(lines)}q", *lines))
        except BlockingIOError:
            pass  # its pipe is full: it is woken already
        except OSError:
            self.forget(token)

    def forget(self, token: str) -> None:
        """Another process has left."""
        writing = self._others.pop(token, None)
        if writing is not None:
            os.close(writing)

    def alive(self, token: str) -> bool | None:
        """Whether that process is there; None where its pipe cannot tell."""
        try:
            os.close(self._open(token))
        except OSError as error:
            return False if error.errno == errno.ENXIO else None
        return True

    def remove(self, token: str) -> None:
        """Clear away the pipe of a process that has died."""
        self.forget(token)
        try:
            (self.directory / token).unlink()
        except OSError:
            pass

    def _open(self, token: str) -> int:
        return os.open(self.directory / token, os.O_WRONLY | os.O_NONBLOCK)
