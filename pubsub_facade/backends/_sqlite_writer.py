"""The one thread in which a process uses the file: what queued while a transaction ran is the next one.

Owns the connection and the order of operations. Everything that waits is one transaction (group commit);
if that fails for want of room or because of one operation, each is tried alone, so that only the guilty
one fails. Results go back to the loop once for each transaction. Across a fork no connection is open:
SQLite forbids it, and its own record of who holds which lock would be copied into the child.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from pubsub_facade.backends._sqlite_operations import Call, Operation, resolver
from pubsub_facade.backends._sqlite_schema import (
    corrupt,
    is_busy,
    open_database,
    open_error,
    primary_code,
    show,
)
from pubsub_facade.backends._sqlite_store import Reaped, Store
from pubsub_facade.backends._sqlite_upkeep import Upkeep, is_full
from pubsub_facade.backends._sqlite_wakeup import Pipes
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.settings import Settings

log = logging.getLogger("pubsub_facade")

LARGEST: Final = 64  # operations in one transaction
PATIENCE: Final = 0.005  # s between tries for another process's lock, at most
LAST: Final = 2.0  # s that the thread has to end
IDLE: Final = 10.0  # s between looks whether the loop is still there, once the file cannot be used


@dataclass(slots=True)
class _Outcome:
    """What one round has to tell the loop."""

    results: list[tuple[Operation, Any]] = field(default_factory=list)
    touched: set[int] = field(default_factory=set)
    look: bool = False  # another process wrote: a wake may have been lost
    error: PubSubError | None = None  # the file cannot be used any more


class Writer:
    """The thread and its queue.

    Arguments:
        tell: called on the loop with the lines in which something became claimable; None: look everywhere.
        lost: called on the loop when the file cannot be used any more.
    """

    def __init__(
        self,
        settings: Settings,
        tell: Callable[[set[int] | None], None],
        lost: Callable[[PubSubError], None],
    ) -> None:
        path = settings.sqlite.path.absolute()  # also after the process has changed its directory
        self.process = 0
        self.pipes = Pipes(path)
        self._settings = settings
        self._sqlite = settings.sqlite.model_copy(update={"path": path})
        self._tell = tell
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Operation | None] = SimpleQueue()
        self._store: Store | None = None
        self._identity: tuple[int, int] = (0, 0)
        self._durable = True
        self._upkeep: Upkeep | None = None
        self._next_upkeep = 0.0
        self._stopping = False
        self._abandoned = False  # nobody will call `stop`
        self._broken: PubSubError | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self.guard = threading.Lock()  # held while SQLite is in use
        self.thread = threading.Thread(target=self._run, name="pubsub-sqlite", daemon=True)

    async def open(self) -> None:
        """Open the file and enter this process. Raises ConfigError or ConnectionFailed."""
        with _forking:
            _writers.add(self)
        self.thread.start()
        try:
            await self._opened
        except asyncio.CancelledError:
            self._abandoned = True
            self._queue.put(None)
            raise

    def submit(self, operation: Operation) -> None:
        """Have it done; on the loop. Once the thread was told to end it is refused, or nobody would answer."""
        if self._stopping:
            operation.done(ConnectionLost(f"sqlite: {self._name} was closed"))
        else:
            self._queue.put(operation)

    async def call(self, function: Callable[[Store], Any], *, transaction: bool) -> Any:
        """Run ``function(store)`` in the thread. Raises what it raises, or ConnectionLost."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self.submit(Call(function, transaction=transaction, done=resolver(future)))
        return await future

    async def leave(self) -> None:
        """Tell the other processes, by the file, that this one is going."""
        await self.call(Store.exit, transaction=True)

    async def stop(self, *, left: bool) -> None:
        """Finish what is in the queue and end the thread, without waiting for it where it is stuck.

        Arguments:
            left: `leave` was done; else the pipe's file stays, by which the others see that nobody reads it.
        """
        self._stopping = True
        self._queue.put(None)
        try:
            await asyncio.wait_for(self._ended, LAST)
        except TimeoutError:
            log.warning("sqlite: %s is still locked by another process: left without telling", self._name)
        if left:
            self.pipes.close()
        else:
            self.pipes.forget_descriptors()

    @property
    def path(self) -> Path:
        """The file, absolute since this was made."""
        return self._sqlite.path

    @property
    def _name(self) -> str:
        return show(self._sqlite.path)

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        # Nobody reading a pipe is an error of that write, whatever the application does about SIGPIPE.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
        try:
            with self.guard:
                self._enter()
        except BaseException as error:
            self._disconnect()
            self.pipes.close()
            if isinstance(error, sqlite3.Error):
                raised: BaseException = open_error(self._sqlite.path, error)
                raised.__cause__ = error
                error = raised
            self._post(_resolve, self._opened, error)
            return
        self._post(_resolve, self._opened, None)
        ended = False
        while not ended and not self._loop.is_closed():
            operations, ended = self._take()
            outcome = _Outcome()
            with self.guard:
                self._round(operations, outcome)
            if outcome.results or outcome.touched or outcome.look or outcome.error is not None:
                self._post(self._finish, outcome)
        with self.guard:
            self._disconnect()
            if self._abandoned or not ended:  # let the others see that nobody is here
                self.pipes.forget_descriptors()
        self._post(_resolve, self._ended, None)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("sqlite: the loop has ended before its results came")

    def _take(self) -> tuple[list[Operation], bool]:
        """Wait for operations, at most until the next upkeep; and whether these are the last ones."""
        operations: list[Operation] = []
        get = self._queue.get
        try:
            pause = IDLE if self._broken is not None else self._next_upkeep - time.monotonic()
            operation = get(timeout=max(0.0, pause))
            while operation is not None:
                operations.append(operation)
                if len(operations) >= LARGEST:
                    return operations, False
                operation = get(block=False)
        except Empty:
            return operations, False
        return operations, True

    def _finish(self, outcome: _Outcome) -> None:
        """On the loop: everybody is told."""
        if outcome.error is not None:
            self._lost(outcome.error)
        for operation, result in outcome.results:
            operation.done(result)
        if outcome.look:
            self._tell(None)
        elif outcome.touched:
            self._tell(outcome.touched)

    # -- the connection ---------------------------------------------------------------------------

    def _enter(self) -> None:
        store = self._connect()
        self.pipes.open()
        now = time.time()
        self._transact(store, lambda: store.enter(self.pipes.token, os.getpid(), now), durable=False)
        assert store.process is not None
        self.process = store.process
        self._upkeep = Upkeep(self._sqlite, self.pipes)

    def _connect(self) -> Store:
        if self._store is None:
            settings = self._settings
            deadline = time.monotonic() + min(self._sqlite.busy_timeout, settings.connect_timeout)
            connection = open_database(self._sqlite, deadline)
            self._store = Store(connection, settings.namespace)
            self._store.process = self.process or None
            self._durable = True
            found = self._sqlite.path.stat()
            self._identity = (found.st_dev, found.st_ino)
        return self._store

    def _disconnect(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            try:
                store.connection.close()
            except sqlite3.Error as error:
                log.debug("sqlite: while closing %s: %s", self._name, error)

    def before_fork(self) -> None:
        """Called with the guard held."""
        self._disconnect()

    # -- rounds -----------------------------------------------------------------------------------

    def _round(self, operations: list[Operation], outcome: _Outcome) -> None:
        if self._broken is not None:
            outcome.results += [(operation, self._broken) for operation in operations]
            return
        try:
            store = self._connect()
            start = 0
            for end, operation in enumerate((*operations, None)):
                if operation is None or isinstance(operation, Call):
                    if start < end:
                        self._group(store, operations[start:end], outcome)
                    if isinstance(operation, Call):
                        self._call(store, operation, outcome)
                    start = end + 1
            self._keep_up(store, outcome)
        except Exception as error:
            if not isinstance(error, sqlite3.Error | Reaped | PubSubError):
                log.exception("sqlite: fault while using %s", self._name)
            self._broken = outcome.error = self._gone(error)
            done = {id(operation) for operation, _ in outcome.results}
            outcome.results += [(each, outcome.error) for each in operations if id(each) not in done]

    def _gone(self, error: Exception) -> PubSubError:
        self._disconnect()
        if isinstance(error, PubSubError):
            return error
        if isinstance(error, Reaped):
            lost: PubSubError = ConnectionLost(
                f"sqlite: another process took this one for dead after {self._sqlite.lease:g} s of silence: "
                "what was in hand goes to others"
            )
        elif isinstance(error, sqlite3.Error) and is_busy(error):
            lost = ConnectionLost(
                f"sqlite: {self._name} was locked by another process for {self._sqlite.busy_timeout:g} s"
            )
        elif isinstance(error, sqlite3.Error) and primary_code(error) in (
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        ):
            lost = corrupt(self._sqlite.path, error)
        else:
            lost = ConnectionLost(f"sqlite: {self._name} cannot be used: {error}")
        lost.__cause__ = error
        return lost

    def _keep_up(self, store: Store, outcome: _Outcome) -> None:
        now = time.monotonic()
        upkeep = self._upkeep
        assert upkeep is not None
        if self._stopping or (now < self._next_upkeep and not upkeep.more):
            return
        try:
            if now >= self._next_upkeep:
                outcome.look = upkeep.others_wrote(store)
            store.touched.clear()
            upkeep.step(store, time.time())
            self._wake(store, outcome)
        except sqlite3.OperationalError as error:
            if not is_busy(error) and not is_full(error):
                raise
        self._next_upkeep = now + (0.001 if upkeep.more else upkeep.pause)

    def _call(self, store: Store, call: Call, outcome: _Outcome) -> None:
        result: Any = None

        def run() -> None:
            nonlocal result
            result = call.run(store, time.time())

        try:
            if call.transaction:
                self._transact(store, run, durable=True)
                self._wake(store, outcome)
            else:
                self._patiently(run)
        except sqlite3.Error as error:
            if not is_full(error):
                raise
            result = call.refusal(self._no_room(error))
        except PubSubError as error:
            if isinstance(error, ConnectionLost):
                raise
            result = error
        outcome.results.append((call, result))

    def _group(self, store: Store, group: list[Operation], outcome: _Outcome) -> None:
        """One transaction for all; if it fails for one of them, one for each."""
        try:
            results = self._attempt(store, group)
        except (sqlite3.Error, OverflowError) as error:
            if isinstance(error, sqlite3.Error) and is_full(error) and self._make_room(store):
                self._group_again(store, group, outcome)
            elif not _is_fault_of_one(error):
                raise
            elif len(group) > 1:
                for operation in group:
                    self._group(store, [operation], outcome)
            else:
                outcome.results.append((group[0], self._refusal(group[0], error)))
        else:
            self._wake(store, outcome)
            outcome.results += zip(group, results, strict=True)

    def _group_again(self, store: Store, group: list[Operation], outcome: _Outcome) -> None:
        for operation in group:
            try:
                results = self._attempt(store, [operation])
            except (sqlite3.Error, OverflowError) as error:
                if not _is_fault_of_one(error):
                    raise
                outcome.results.append((operation, self._refusal(operation, error)))
            else:
                self._wake(store, outcome)
                outcome.results.append((operation, results[0]))

    def _make_room(self, store: Store) -> bool:
        assert self._upkeep is not None
        try:
            return self._upkeep.make_room(store)
        except sqlite3.OperationalError as error:
            log.debug("sqlite: no room could be made in %s: %s", self._name, error)
            return False

    def _no_room(self, error: Exception) -> str:
        limit = self._sqlite.max_size
        return (
            f"sqlite: no room in {self._name} ({error}): "
            + (f"raise sqlite.max_size (now {limit} bytes), " if limit is not None else "free disk space, ")
            + "or let the subscriptions catch up"
        )

    def _refusal(self, operation: Operation, error: Exception) -> PubSubError:
        full = isinstance(error, sqlite3.Error) and is_full(error)
        refusal = operation.refusal(
            self._no_room(error) if full else f"sqlite: {self._name} refused: {error}"
        )
        refusal.__cause__ = error
        return refusal

    # -- one transaction --------------------------------------------------------------------------

    def _attempt(self, store: Store, group: list[Operation]) -> list[Any]:
        wall = time.time()
        found = self._without_transaction(store, group, wall)
        if found is not None:
            return found
        results: list[Any] = []
        routes = store.routes
        for operation in group:
            operation.prepare(routes, wall)

        def work() -> None:
            if store.routes is not routes:
                for operation in group:
                    operation.prepare(store.routes, wall)
            results.extend([operation.run(store, wall) for operation in group])

        self._transact(store, work, durable=any(operation.durable for operation in group))
        return results

    def _without_transaction(self, store: Store, group: list[Operation], wall: float) -> list[Any] | None:
        """The results, if these are members that ask in vain: then no lock is taken."""
        if any(operation.durable for operation in group):
            return None
        self._patiently(store.look)
        results: list[Any] = []
        for operation in group:
            result = operation.idle(store, wall)
            if result is None:
                return None
            results.append(result)
        return results

    def _transact(self, store: Store, work: Callable[[], None], *, durable: bool) -> None:
        """Only what must outlive a power cut waits for the disk: of a lost ack, the message comes again."""
        if durable != self._durable and self._sqlite.synchronous == "full":
            store.connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        try:
            self._patiently(store.begin)
            work()
            if durable:
                self._check_identity()
            store.commit()
        except BaseException:
            store.rollback()
            raise

    def _patiently(self, step: Callable[[], None]) -> None:
        """Try until other processes let go of the file, for at most ``busy_timeout``."""
        pause = 0.0002
        end = 0.0
        while True:
            try:
                step()
                return
            except sqlite3.OperationalError as error:
                now = time.monotonic()
                end = end or now + self._sqlite.busy_timeout
                if not is_busy(error) or now >= end or self._stopping:
                    raise
            time.sleep(pause)
            pause = min(pause * 1.5, PATIENCE)

    def _check_identity(self) -> None:
        """A file removed or replaced under us would take messages that nobody ever reads."""
        path = self._sqlite.path
        try:
            found = path.stat()
            same = (found.st_dev, found.st_ino) == self._identity
        except OSError:
            same = False
        if not same:
            raise ConnectionLost(f"sqlite: {self._name} was removed or replaced while it was in use")

    def _wake(self, store: Store, outcome: _Outcome) -> None:
        """Tell the other processes at once, and the members here with the results."""
        touched = store.touched
        if not touched:
            return
        outcome.touched.update(touched)
        others: dict[str, list[int]] = {}
        for line, tokens in touched.items():
            for token in tokens:
                if token != self.pipes.token:
                    others.setdefault(token, []).append(line)
        for token, lines in others.items():
            self.pipes.wake(token, lines)
        touched.clear()


def _resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    resolver(future)(error)


def _is_fault_of_one(error: Exception) -> bool:
    """Whether others in the transaction could succeed without it."""
    if not isinstance(error, sqlite3.Error) or isinstance(
        error, sqlite3.DataError | sqlite3.ProgrammingError
    ):
        return True
    return primary_code(error) in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_CONSTRAINT,
    )


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Writer] = []


def _before_fork() -> None:
    _forking.acquire()
    for writer in list(_writers):
        writer.guard.acquire()
        _held.append(writer)
        writer.before_fork()


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().guard.release()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    _forking = threading.Lock()
    while _held:
        _held.pop().pipes.forget_descriptors()
    _writers.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
