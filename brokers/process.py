"""A detached process that outlives the command which started it, and is found again by its pid file.

The pid file holds the pid with the start time the kernel gave it: a pid that was handed to somebody else
since is never signalled. Each process leads its own session, so that its children can be ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from brokers.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a pid unmistakable on this machine: its boot, and when in it the process started (ticks)."""

    pid: int
    started: int
    boot: str


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the state on; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def identify(pid: int) -> Identity | None:
    """The identity of a process; None where there is none of that pid."""
    fields = _stat(pid)
    return None if fields is None else Identity(pid, int(fields[19]), _boot_id())


def _has_ended(pid: int) -> bool:
    """Is the process only waiting for its parent to ask how it ended? Where that is us, we ask."""
    fields = _stat(pid)
    if fields is None or fields[0] not in "ZX":
        return fields is None
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True


@dataclass(frozen=True, slots=True)
class Host:
    """Where a process runs: its address, and the network namespace that has it; None is ours."""

    address: str = "127.0.0.1"
    namespace: str | None = None


LOOPBACK: Final = Host()


def _entrance(namespace: str, user: str | None) -> list[str]:
    """What runs the rest of a command line there, as the same process."""
    enter = ["nsenter", f"--net=/run/netns/{namespace}"]
    if user is not None:
        account = pwd.getpwnam(user)
        enter += [f"--setuid={account.pw_uid}", f"--setgid={account.pw_gid}"]
    return enter


class _Detached(subprocess.Popen[bytes]):
    """A child that is to outlive this object: letting go of it is no leak to warn of."""

    def __del__(self) -> None:
        pass


@dataclass(slots=True)
class Daemon:
    """One process by its pid file and log. ``user`` is whom it runs as when root starts it, on ``host``."""

    pid_file: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    host: Host = LOOPBACK

    def pid(self) -> int | None:
        """The pid while the process lives and is the one that was started here; else None."""
        try:
            known = Identity(**json.loads(self.pid_file.read_text()))
        except FileNotFoundError:
            return None
        return known.pid if identify(known.pid) == known and not _has_ended(known.pid) else None

    def start(self, command: Sequence[str]) -> None:
        """Run ``command`` unless the process runs. Standard output and error are appended to the log."""
        if self.pid() is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        user = self.user
        if self.host.namespace is not None:  # it takes root to enter one: who we are changes on the way
            command = [*_entrance(self.host.namespace, user), *command]
            user = None
        with self.log.open("ab") as log:
            child = _Detached(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.pid_file.parent,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )
        identity = identify(child.pid)
        if identity is not None:
            record = {"pid": identity.pid, "started": identity.started, "boot": identity.boot}
            self.pid_file.write_text(json.dumps(record))

    def signal(self, number: signal.Signals) -> bool:
        """Send ``number`` to the process and the rest of its process group; False where it does not run."""
        pid = self.pid()
        if pid is None:
            return False
        os.killpg(pid, number)
        return True

    def kill(self) -> None:
        """``kill -9``, and wait until it is gone."""
        if self.signal(signal.SIGKILL):
            wait_until(lambda: self.pid() is None, 10, f"the end of process {self.pid_file}")
        self.pid_file.unlink(missing_ok=True)

    def stop(self, grace: float) -> None:
        """Ask it to end and wait ``grace`` seconds for that; then ``kill -9``."""
        if self.signal(signal.SIGTERM):
            self.signal(signal.SIGCONT)  # a paused process would sleep through its SIGTERM
            try:
                wait_until(lambda: self.pid() is None, grace, f"the end of process {self.pid_file}")
            except TimeoutError:
                self.kill()
        self.pid_file.unlink(missing_ok=True)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)
