"""The databases that the outbox and the inbox are tested on: PostgreSQL and MariaDB from Debian's packages.

Each runs on a loopback port of its own in ``.brokers/{name}``, as an unprivileged user where root starts it, beside
any system service. ``python -m brokers.databases up|down [NAMES]``; tests bring up what they need by `up`. An
environment's ``DATABASES=postgresql`` leaves the others out by name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

from brokers import install, ports
from brokers.broker import STATE, BrokerError
from brokers.process import Daemon
from brokers.waiting import wait_until

LEFT_OUT: Final = "DATABASES"
NAME: Final = "pubsub"  # of the database, its user, and the user's password
READY: Final = 60.0


class Database(ABC):
    """One server in a directory of its own.

    Parameters:
        directory: holds its data, log, port and pid.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    account: ClassVar[str]
    port_wanted: ClassVar[int]

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or _directory(self.name)
        self.port = self._port()
        self.log = self.directory / f"{self.name}.log"
        user = self.account if os.geteuid() == 0 else None
        self.daemon = Daemon(self.directory / "daemon.pid", self.log, user=user)

    def _port(self) -> int:
        record = self.directory / "ports.json"
        if record.exists():
            return int(json.loads(record.read_text())["port"])
        return self.port_wanted if ports.is_free(self.port_wanted) else ports.free(1)[0]

    @property
    @abstractmethod
    def url(self) -> str:
        """The address for SQLAlchemy."""

    @abstractmethod
    def _found(self) -> bool:
        """Is the package there?"""

    @abstractmethod
    def _create(self) -> None:
        """Make an empty data directory."""

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What to run."""

    @abstractmethod
    def ready(self) -> bool:
        """Does it serve clients now?"""

    def running(self) -> bool:
        """Does the process live?"""
        return self.daemon.pid() is not None

    def start(self) -> None:
        """Install, create and start what is not yet; return once it serves."""
        if self.running():
            return
        if not self._found():
            install.apt([self.package])
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.daemon.user is not None:
            shutil.chown(self.directory, self.daemon.user, self.daemon.user)
        if not (self.directory / "created").exists():
            shutil.rmtree(self.directory / "data", ignore_errors=True)
            self._create()
            (self.directory / "created").touch()
        (self.directory / "ports.json").write_text(json.dumps({"port": self.port}))
        self.daemon.start(self._command())
        try:
            wait_until(lambda: not self.running() or self.ready(), READY, f"{self.name}'s readiness")
        except TimeoutError as error:
            raise self._failure(str(error)) from None
        if not self.running():
            raise self._failure(f"{self.name} ended while starting")

    def _failure(self, what: str) -> BrokerError:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else ["(no log)"]
        return BrokerError("\n".join([what, f"--- {self.log}", *lines[-30:]]))

    def _run(self, *command: str) -> None:
        user = self.daemon.user
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=self.directory,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            check=False,
        )
        if done.returncode != 0:
            raise BrokerError(f"{command[0]} failed\n{done.stdout}{done.stderr}")

    def stop(self, grace: float = 30) -> None:
        """An orderly shutdown within ``grace`` seconds, then ``kill -9``."""
        self.daemon.stop(grace)


class PostgreSQL(Database):
    """The newest version that is installed."""

    name = "postgresql"
    package = "postgresql"
    account = "postgres"
    port_wanted = 25432

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://{NAME}:{NAME}@127.0.0.1:{self.port}/{NAME}"

    def _tool(self, name: str) -> str:
        versions = sorted(
            Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3])
        )
        return str(versions[-1]) if versions else shutil.which(name) or ""

    def _found(self) -> bool:
        return bool(self._tool("initdb"))

    def _create(self) -> None:
        data = str(self.directory / "data")
        self._run(self._tool("initdb"), "-D", data, "-U", NAME, "-A", "trust", "-E", "UTF8", "--no-locale")
        command = f"CREATE DATABASE {NAME};\n"
        done = subprocess.run(
            [self._tool("postgres"), "--single", "-D", data, "postgres"],
            input=command,
            capture_output=True,
            text=True,
            cwd=self.directory,
            user=self.daemon.user,
            group=self.daemon.user,
            extra_groups=[] if self.daemon.user else None,
            check=False,
        )
        if done.returncode != 0:
            raise BrokerError(f"creating the database failed\n{done.stdout}{done.stderr}")

    def _command(self) -> Sequence[str]:
        options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"]
        return [
            self._tool("postgres"),
            "-D",
            str(self.directory / "data"),
            "-p",
            str(self.port),
            *(part for option in options for part in ("-c", option)),
        ]

    def ready(self) -> bool:
        tool = self._tool("pg_isready")
        done = subprocess.run([tool, "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False)
        return done.returncode == 0


class MariaDB(Database):
    """InnoDB with its defaults."""

    name = "mariadb"
    package = "mariadb-server"
    account = "mysql"
    port_wanted = 23306

    @property
    def url(self) -> str:
        return f"mysql+pymysql://{NAME}:{NAME}@127.0.0.1:{self.port}/{NAME}?charset=utf8mb4"

    def _found(self) -> bool:
        return shutil.which("mariadbd") is not None or Path("/usr/sbin/mariadbd").exists()

    def _create(self) -> None:
        data = f"--datadir={self.directory / 'data'}"
        self._run(
            "mariadb-install-db", "--no-defaults", data, "--skip-test-db",
            "--auth-root-authentication-method=normal",
        )  # fmt: skip
        (self.directory / "init.sql").write_text(
            f"CREATE DATABASE IF NOT EXISTS {NAME} CHARACTER SET utf8mb4;\n"
            f"CREATE USER IF NOT EXISTS '{NAME}'@'127.0.0.1' IDENTIFIED BY '{NAME}';\n"
            f"GRANT ALL ON *.* TO '{NAME}'@'127.0.0.1';\n"
        )

    def _command(self) -> Sequence[str]:
        return [
            shutil.which("mariadbd") or "/usr/sbin/mariadbd",
            "--no-defaults",
            f"--datadir={self.directory / 'data'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            f"--socket={self.directory / 'server.sock'}",
            f"--pid-file={self.directory / 'server.pid'}",
            f"--init-file={self.directory / 'init.sql'}",
        ]

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as link:
                link.settimeout(2)
                greeting = link.recv(64)
        except OSError:
            return False
        return len(greeting) > 5 and greeting[4] == 10  # the protocol version; 255 would be an error


DATABASES: Mapping[str, type[Database]] = {kind.name: kind for kind in (PostgreSQL, MariaDB)}


def _directory(name: str) -> Path:
    """In the checkout, or in the system's temporary folder where the server's user cannot reach the checkout."""
    wanted = STATE / name
    if os.geteuid() != 0 or all(folder.stat().st_mode & 0o001 for folder in STATE.parents):
        return wanted
    return Path(
        tempfile.gettempdir(), f"pubsub-{name}-{hashlib.sha256(str(STATE).encode()).hexdigest()[:12]}"
    )


def select(text: str | None) -> list[str]:
    """The databases of a comma-separated list: all where it is None, none where it is empty."""
    if text is None:
        return list(DATABASES)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in DATABASES]
    if unknown:
        raise BrokerError(f"no such database: {', '.join(unknown)} (there are {', '.join(DATABASES)})")
    return names


def left_out(name: str) -> bool:
    """Does the environment leave this one out by name?"""
    return name not in select(os.environ.get(LEFT_OUT))


@contextmanager
def _locked() -> Iterator[None]:
    STATE.mkdir(exist_ok=True)
    with (STATE / "databases.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(names: Sequence[str]) -> list[str]:
    """Bring these up; the names of those that were not. Safe to call from several processes at once."""
    started = []
    with _locked():
        for name in names:
            database = DATABASES[name]()
            if not database.running():
                database.start()
                started.append(name)
    return started


def down(names: Sequence[str]) -> None:
    """Stop those of these that were brought up here."""
    with _locked():
        for name in names:
            DATABASES[name]().stop()


def main(arguments: Sequence[str]) -> int:
    """``up`` or ``down``, and names; the exit code."""
    if not arguments or arguments[0] not in ("up", "down", "urls"):
        print("usage: python -m brokers.databases up|down|urls [NAME,...]", file=sys.stderr)
        return 2
    try:
        names = select(arguments[1] if len(arguments) > 1 else os.environ.get(LEFT_OUT))
        if arguments[0] == "down":
            down(names)
        elif arguments[0] == "up":
            up(names)
        for name in names:
            database = DATABASES[name]()
            print(f"{name}: {'up' if database.running() else 'down'}, {database.url}")
    except BrokerError as error:
        print(f"brokers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
