"""Which loopback ports a broker listens on: fixed ones by default, others where these are taken.

``PUBSUB_BROKERS_PORT_BASE=30000`` moves them all, so that two checkouts can run side by side. A chosen port is
written down beside the broker's data, and is kept over restarts.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "rabbitmq": {"amqp": 25672, "management": 25673, "dist": 25674, "epmd": 25675},
    "kafka": {"client": 29092, "controller": 29093},
    "activemq": {"stomp": 26613, "openwire": 26616, "jolokia": 26161},
    "artemis": {"stomp": 27613, "console": 27161},
}


def preferred(name: str) -> dict[str, int]:
    """The ports ``name`` takes when nothing else has them."""
    base = os.environ.get("PUBSUB_BROKERS_PORT_BASE")
    if not base:
        return dict(DEFAULTS[name])
    every = [(broker, port) for broker, ports in DEFAULTS.items() for port in ports]
    return {port: int(base) + at for at, (broker, port) in enumerate(every) if broker == name}


def is_free(port: int) -> bool:
    """Can a broker listen on it now?"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free(count: int) -> list[int]:
    """``count`` different ports nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def choose(name: str, directory: Path, wanted: Mapping[str, int] | None = None) -> dict[str, int]:
    """The ports of the broker in ``directory``: as ``wanted``, else as last time, else preferred, else free ones."""
    record = directory / "ports.json"
    if wanted is None and record.exists():
        known: dict[str, int] = json.loads(record.read_text())
        return known
    chosen = {**preferred(name), **(wanted or {})}
    taken = [port for port in chosen if port not in (wanted or {}) and not is_free(chosen[port])]
    chosen.update(zip(taken, free(len(taken)), strict=True))
    directory.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(chosen))
    return chosen
