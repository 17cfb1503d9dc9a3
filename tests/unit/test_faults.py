"""The fault kit does what it says, and nothing when it is not asked to."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pubsub_facade.testing.faults import Proxy, Victim, wait_until


class Echo:
    """A server that sends back what it gets, and keeps what it got."""

    def __init__(self) -> None:
        self.received = b""
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            while True:
                try:
                    data = connection.recv(1 << 16)
                    if not data:
                        return
                    self.received += data
                    connection.sendall(data)
                except OSError:
                    return

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.port) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    connection = socket.create_connection((proxy.host, proxy.port), timeout=5)
    connection.sendall(b"hello")
    assert connection.recv(5) == b"hello"
    return connection


def test_it_passes_everything_on_until_told_otherwise(proxy: Proxy, echo: Echo) -> None:
    payload = bytes(range(256)) * 4096
    with connect(proxy) as connection:
        threading.Thread(target=connection.sendall, args=(payload,), daemon=True).start()
        got = b""
        while len(got) < len(payload):
            got += connection.recv(1 << 16)
        assert got == payload
    wait_until(lambda: proxy.connections == 0, 5, "the link to end with its client")
    assert (proxy.accepted, proxy.passed("up"), proxy.passed("down")) == (
        1,
        len(payload) + 5,
        len(payload) + 5,
    )


def test_a_client_that_ends_leaves_nothing_behind_on_the_way(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"goodbye")
    wait_until(lambda: echo.received == b"hellogoodbye", 5, "the last words to arrive")


def test_cut_resets_each_connection_and_accepts_new_ones(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as two:
        assert proxy.cut() == 2
        for connection in (one, two):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    connect(proxy).close()


def test_refuse_is_a_broker_that_is_down_until_restore(proxy: Proxy) -> None:
    connection = connect(proxy)
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        connection.recv(1)
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), timeout=5)
    proxy.restore()
    connect(proxy).close()


def test_stopping_closes_the_connections_it_has_just_accepted(echo: Echo) -> None:
    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always", ResourceWarning)
        for _ in range(20):
            proxy = Proxy("127.0.0.1", echo.port).start()
            clients = [socket.socket() for _ in range(5)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex((proxy.host, proxy.port))
            proxy.stop()
            for client in clients:
                client.close()
        gc.collect()
    assert not unclosed


def test_stall_holds_bytes_back_and_loses_none(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        proxy.stall("up")
        connection.sendall(b"late")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(4)
        assert echo.received == b"hello"
        proxy.restore()
        connection.settimeout(5)
        assert connection.recv(4) == b"late"


def test_swallow_is_a_half_open_link_and_restore_cuts_it(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        proxy.swallow()
        for _ in range(100):
            connection.sendall(b"x" * 10_000)
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert echo.received == b"hello"
        proxy.restore()
        connection.settimeout(5)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    connect(proxy).close()


def test_swallowing_down_lets_the_broker_hear_and_not_answer(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        proxy.swallow("down")
        connection.sendall(b"heard")
        wait_until(lambda: echo.received == b"helloheard", 5, "the broker to hear")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_cut_after_passes_exactly_so_many_bytes(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as connection:
        proxy.cut_after(3)
        connection.sendall(b"frame")
        with pytest.raises(ConnectionResetError):
            while connection.recv(1):
                pass
    assert proxy.passed("up") == 5 + 3
    connect(proxy).close()


def test_delay_and_throttle_slow_down(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        proxy.delay(0.1)
        begin = time.monotonic()
        connection.sendall(b"x")
        connection.recv(1)
        assert time.monotonic() - begin >= 0.2
        proxy.restore()
        proxy.throttle(10_000, "up")
        begin = time.monotonic()
        connection.sendall(b"x" * 5000)
        got = 0
        while got < 5000:
            got += len(connection.recv(5000))
        assert time.monotonic() - begin >= 0.4


def test_a_victim_is_one_process_and_not_its_number() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        victim = Victim(process.pid)
        assert victim.alive
        stat = Path(f"/proc/{process.pid}/stat")
        victim.pause()
        wait_until(lambda: stat.read_text().split()[2] == "T", 5, "it to stop")
        victim.resume()
        victim.kill()
        assert not victim.alive
        victim.kill()
        with pytest.raises(ProcessLookupError):
            Victim(process.pid)
    finally:
        process.kill()
        process.wait()
