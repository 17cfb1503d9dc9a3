"""Does a broker answer in its own protocol? One short handshake each, with no client library.

A port that accepts connections proves little: each of the four opens it before it can serve. These ask for
something only a broker that is ready can say.
"""

from __future__ import annotations

import socket
import struct

from brokers.process import LOOPBACK

_TIMEOUT = 2.0


def _connect(port: int, address: str = LOOPBACK.address) -> socket.socket:
    return socket.create_connection((address, port), timeout=_TIMEOUT)


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = link.recv(size - len(data))
        if not more:
            raise ConnectionError("closed in the middle of an answer")
        data += more
    return data


def amqp(port: int, address: str = LOOPBACK.address) -> bool:
    """AMQP 0-9-1: the protocol header is answered with Connection.Start (class 10, method 10)."""
    try:
        with _connect(port, address) as link:
            link.sendall(b"AMQP\x00\x00\x09\x01")
            return _exactly(link, 11)[7:] == struct.pack("!HH", 10, 10)
    except OSError:
        return False


def kafka(port: int, address: str = LOOPBACK.address) -> bool:
    """Kafka: a Metadata request (key 3, version 1, no topics) names a broker that is not fenced."""
    request = struct.pack("!hhih", 3, 1, 1, -1) + struct.pack("!i", 0)
    try:
        with _connect(port, address) as link:
            link.sendall(struct.pack("!i", len(request)) + request)
            answer = _exactly(link, struct.unpack("!i", _exactly(link, 4))[0])
    except OSError:
        return False
    brokers: int = struct.unpack("!i", answer[4:8])[0]
    return brokers > 0


def stomp(port: int, user: str, password: str) -> bool:
    """STOMP 1.2: a CONNECT with these credentials is answered with CONNECTED."""
    frame = f"CONNECT\naccept-version:1.2\nhost:localhost\nlogin:{user}\npasscode:{password}\n\n\0"
    try:
        with _connect(port) as link:
            link.sendall(frame.encode())
            return _exactly(link, 9) == b"CONNECTED"
    except OSError:
        return False


def erlang_nodes(port: int, address: str = LOOPBACK.address) -> list[str]:
    """The nodes registered at the Erlang port mapper (epmd) on ``port``; none where nothing listens."""
    try:
        with _connect(port, address) as link:
            link.sendall(b"\x00\x01n")
            answer = b"".join(iter(lambda: link.recv(4096), b""))
    except OSError:
        return []
    return [line.split()[1] for line in answer[4:].decode().splitlines() if line.startswith("name ")]
