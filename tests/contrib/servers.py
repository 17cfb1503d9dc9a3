"""Real web servers for the tests: started, loaded by a real HTTP client, and their connections counted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from pubsub_facade.testing.faults import free_port, wait_until

from .conftest import ROOT

HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """What a process of the tests needs, and nothing of the settings around them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PUBSUB_", "PYTEST_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "PYTHONWARNINGS": "default",
        **more,
    }


# A kept connection that a server closes as idle while its client writes to it is an error of HTTP, not of ours.
_PATIENT = ("--keep-alive", "60")
COMMANDS: Mapping[str, Sequence[str]] = {
    "gunicorn-sync": ("gunicorn", "-w", "2", "--preload", "-b", "127.0.0.1:{port}"),
    "gunicorn-gthread": ("gunicorn", "-w", "2", "--threads", "8", *_PATIENT, "-b", "127.0.0.1:{port}"),
    "gunicorn-preload": (
        "gunicorn",
        "-w",
        "2",
        "--threads",
        "8",
        "--preload",
        *_PATIENT,
        "-b",
        "127.0.0.1:{port}",
    ),
    "uvicorn": (
        "uvicorn",
        "--workers",
        "2",
        "--log-level",
        "warning",
        "--timeout-keep-alive",
        "60",
        "--port",
        "{port}",
    ),
    "runserver": ("django", "runserver", "--noreload", "127.0.0.1:{port}"),
}


class Server:
    """One server with its workers, as a context manager.

    Arguments:
        kind: of `COMMANDS`.
        application: what it serves; "" for runserver.
        variables: its environment.
        folder: its working directory, with its log.
    """

    def __init__(self, kind: str, application: str, variables: Mapping[str, str], folder: Path) -> None:
        self.port = free_port()
        command = [part.format(port=self.port) for part in COMMANDS[kind]]
        self._command = [sys.executable, "-m", *command, *([application] if application else [])]
        self._variables = dict(variables)
        self._folder = folder
        self.log = folder / "server.log"
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, 40, f"an answer of {self._command}; see {self.log}")
        return self

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        try:
            httpx.get(self.url + "/nothing", timeout=5)
        except httpx.HTTPError:
            return False
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(5)
            raise

    def reload(self) -> None:
        """HUP: new workers, the old ones finish what they have."""
        self._process.send_signal(signal.SIGHUP)

    def connections_to(self, port: int) -> dict[int, int]:
        """How many established connections each process of the server has to a port: pid -> count."""
        inodes = _inodes_to(port)
        found: dict[int, int] = {}
        for pid in _session(self._process.pid):
            count = sum(inode in inodes for inode in _sockets(pid))
            if count:
                found[pid] = count
        return found


def _session(leader: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) == leader:
            pids.append(int(stat.parent.name))
    return pids


def _sockets(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.append(target[8:-1])
    return found


def _inodes_to(port: int) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "01" and int(fields[2].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


class Load:
    """What a load of requests brought: ids of accepted messages, statuses, the longest wait in seconds."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.statuses: Counter[int | str] = Counter()
        self.longest = 0.0


def fire(url: str, count: int, *, at_once: int = 16, timeout: float = 20) -> Load:
    """Post ``count`` forms, ``at_once`` under way at a time."""
    load = Load()

    async def run() -> None:
        numbers = iter(range(count))
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        async with httpx.AsyncClient(limits=limits, timeout=timeout) as client:

            async def one() -> None:
                for number in numbers:
                    began = time.monotonic()
                    try:
                        answer = await client.post(url, data={"text": str(number)})
                    except httpx.HTTPError as error:
                        load.statuses[type(error).__name__] += 1
                        continue
                    load.longest = max(load.longest, time.monotonic() - began)
                    load.statuses[answer.status_code] += 1
                    if answer.is_success:
                        load.ids.append(answer.json()["id"])

            await asyncio.gather(*(one() for _ in range(at_once)))

    asyncio.run(run())
    return load
