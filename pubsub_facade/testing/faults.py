"""Faults on demand, for tests of what must survive them: a TCP proxy that misbehaves, and processes that die.

The proxy stands on loopback between a client and a broker and does one thing at a time: pass on, refuse,
stall, swallow, cut. It runs on a thread of its own, so that sync tests, async tests and other processes
can use it alike, and every change holds for open and new connections from the moment the call returns.

    with Proxy("127.0.0.1", 5672) as proxy:
        pubsub = PubSub(url=f"amqp://guest:guest@{proxy.host}:{proxy.port}/%2F")
        proxy.swallow()     # half-open: both sides believe that the link is there
        ...
        proxy.restore()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

Direction = Literal["up", "down", "both"]
"""``up``: from the client to the broker; ``down``: from the broker to the client."""

CHUNK: Final = 1 << 16
CALL_TIMEOUT: Final = 10.0  # s for the proxy's thread to carry out a call
LINGER: Final = 5.0  # s that one side may go on sending after the other has ended
TURNS_TO_SERVE: Final = 5  # of the loop, from an accept to `_serve`, which closes what was accepted
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER with zero seconds: close sends RST

T = TypeVar("T")


class _Flow:
    """What happens to the bytes of one direction."""

    def __init__(self) -> None:
        self.passing = asyncio.Event()
        self.passing.set()
        self.swallowing = False
        self.latency = 0.0  # s
        self.rate = 0.0  # bytes/s; 0: as fast as it goes
        self.cut_after: int | None = None  # bytes still passed on until the cut
        self.passed = 0  # bytes, over the proxy's life


class _Link:
    """One proxied connection."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.broker: asyncio.StreamWriter | None = None

    def reset(self) -> None:
        """Close both sides with RST: bytes under way are gone."""
        for writer in (self.client, self.broker):
            if writer is None:
                continue
            sock: socket.socket | None = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def close(self) -> None:
        """Close both sides; what was passed on still arrives."""
        for writer in (self.client, self.broker):
            if writer is not None:
                writer.close()


class Proxy:
    """A TCP proxy with faults on demand.

    Arguments:
        target_host, target_port: where connections go on to.
        host: loopback address to listen on.
        port: 0: any free one; `port` tells which.
    """

    def __init__(self, target_host: str, target_port: int, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.target = (target_host, target_port)
        self.host = host
        self.port = port
        self.accepted = 0
        """Connections accepted over the proxy's life."""
        self._flows: dict[str, _Flow] = {}
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen; returns when `port` accepts connections."""
        self._thread.start()
        self._call(self._start())
        return self

    def stop(self) -> None:
        """Cut everything and end the thread. Idempotent."""
        if self._loop.is_closed():
            return
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT)
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -- faults -----------------------------------------------------------------------------------

    def cut(self) -> int:
        """Reset every connection now; new ones are accepted. Returns how many there were."""
        return self._call(self._cut())

    def cut_after(self, size: int, direction: Direction = "up") -> None:
        """Reset a connection once ``size`` more bytes went in ``direction``: in the middle of a frame. Once."""

        def arm(flow: _Flow) -> None:
            flow.cut_after = size

        self._each(direction, arm)

    def refuse(self) -> None:
        """Reset every connection and refuse new ones, as a broker that is down, until `restore`."""
        self._call(self._refuse())

    def stall(self, direction: Direction = "both") -> None:
        """Stop reading, so that buffers fill up and senders block; nothing is lost after `restore`."""
        self._each(direction, lambda flow: flow.passing.clear())

    def swallow(self, direction: Direction = "both") -> None:
        """Half-open: take every byte and pass none on, silently, until `restore`, which cuts these links."""

        def hold(flow: _Flow) -> None:
            flow.swallowing = True

        self._each(direction, hold)

    def delay(self, seconds: float, direction: Direction = "both") -> None:
        """Pass each chunk on ``seconds`` later."""

        def slow(flow: _Flow) -> None:
            flow.latency = seconds

        self._each(direction, slow)

    def throttle(self, rate: float, direction: Direction = "both") -> None:
        """Pass on at most ``rate`` bytes a second per connection."""

        def slow(flow: _Flow) -> None:
            flow.rate = rate

        self._each(direction, slow)

    def restore(self) -> None:
        """Pass everything on again and accept connections. Links that bytes are missing from are cut."""
        self._call(self._restore())

    @property
    def connections(self) -> int:
        """Open connections now."""
        return len(self._links)

    def passed(self, direction: Literal["up", "down"]) -> int:
        """Bytes passed on in one direction, over the proxy's life."""
        return self._flows[direction].passed

    # -- on the thread's loop ---------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_TIMEOUT)

    def _each(self, direction: Direction, change: Callable[[_Flow], None]) -> None:
        async def run() -> None:
            for name in ("up", "down") if direction == "both" else (direction,):
                change(self._flows[name])

        self._call(run())

    async def _start(self) -> None:
        self._flows = {"up": _Flow(), "down": _Flow()}
        await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    async def _refuse(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            for sock in server.sockets:
                self._loop.remove_reader(sock.fileno())
            for _ in range(TURNS_TO_SERVE):
                await asyncio.sleep(0)
            server.close()
        await self._cut()

    async def _restore(self) -> None:
        swallowed = any(flow.swallowing for flow in self._flows.values())
        for flow in self._flows.values():
            flow.swallowing = False
            flow.latency = flow.rate = 0.0
            flow.cut_after = None
            flow.passing.set()
        if swallowed:
            await self._cut()
        if self._server is None:
            await self._listen()

    async def _stop(self) -> None:
        await self._refuse()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(writer)
        self._links.add(link)
        try:
            broker_reader, link.broker = await asyncio.open_connection(*self.target)
            pumps = [
                asyncio.create_task(self._pump(reader, link.broker, self._flows["up"], link)),
                asyncio.create_task(self._pump(broker_reader, writer, self._flows["down"], link)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            _, pending = await asyncio.wait(pumps, timeout=LINGER)
            for pump in pending:
                pump.cancel()
            await asyncio.wait(pumps)
        except OSError:  # the broker is not there: to the client it looks as if it had just died
            pass
        except asyncio.CancelledError:  # by `stop`; asyncio would log what such a task ends with
            pass
        finally:
            self._links.discard(link)
            link.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: _Flow, link: _Link
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await flow.passing.wait()
                if flow.latency:
                    await asyncio.sleep(flow.latency)
                if flow.swallowing:
                    continue
                if flow.rate:
                    await asyncio.sleep(len(chunk) / flow.rate)
                if flow.cut_after is not None:
                    chunk, rest = chunk[: flow.cut_after], chunk[flow.cut_after :]
                    flow.cut_after -= len(chunk)
                    if rest or not flow.cut_after:
                        flow.cut_after = None
                        writer.write(chunk)
                        await writer.drain()
                        flow.passed += len(chunk)
                        link.reset()
                        return
                writer.write(chunk)
                flow.passed += len(chunk)
                await writer.drain()
            await flow.passing.wait()
            if not flow.swallowing and writer.can_write_eof():
                writer.write_eof()


class Victim:
    """A process that a test may kill, stop and let go on; known by its id and its start time, never by name.

    Arguments:
        pid: of a process that the test itself started.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._born = _started(pid)
        if self._born is None:
            raise ProcessLookupError(f"no process {pid}")

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        return _started(self.pid) == self._born

    def kill(self) -> None:
        """``kill -9``: nothing of it is flushed or closed by itself. Returns when it is gone."""
        self._signal(signal.SIGKILL)
        wait_until(lambda: not self.alive, 10, f"process {self.pid} to end after SIGKILL")

    def pause(self) -> None:
        """SIGSTOP: its sockets stay open and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: asks it to drain and end."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _started(pid: int) -> str | None:
    """The start time of a running process, in clock ticks since boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll ``condition`` until it is true; TimeoutError naming ``what`` after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.01)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
