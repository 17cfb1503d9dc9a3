"""Which loopback ports a broker listens on: fixed ones by default, others where these are taken.

``BROKERS_PORT_BASE=30000`` moves them all, so that two checkouts can run side by side. A chosen
port is written down beside the broker's data, and is kept over restarts.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Mapping
from pathlib import Path

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "rabbitmq": {"amqp": 25672, "management": 25673, "dist": 25674, "epmd": 25675},
    "kafka": {"client": 29092, "controller": 29093},
    "activemq": {"stomp": 26613, "openwire": 26616, "jolokia": 26161},
    "artemis": {"stomp": 27613, "console": 27161},
}

_BASE = "BROKERS_PORT_BASE"
_FREE = range(10_000, 20_000)


def preferred(name: str) -> dict[str, int]:
    """The ports ``name`` takes when nothing else has them."""
    base = os.environ.get(_BASE)
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
    """``count`` different ports nobody listens on.

    Below the range from which the kernel takes the ports of outgoing connections: a client could otherwise
    sit on the port of a broker that is down for a moment.
    """
    fixed = {port for ports in DEFAULTS.values() for port in ports.values()}
    found: list[int] = []
    for port in random.sample(_FREE, len(_FREE)):
        if len(found) == count:
            return found
        if port not in fixed and is_free(port):
            found.append(port)
    raise OSError(f"fewer than {count} ports are free between {_FREE.start} and {_FREE.stop}")


def recorded(directory: Path) -> dict[str, int]:
    """The ports of the broker in ``directory`` when it was last used; empty where it never was."""
    try:
        known: dict[str, int] = json.loads((directory / "ports.json").read_text())
    except FileNotFoundError:
        return {}
    return known


def for_instance(name: str, directory: Path, wanted: Mapping[str, int] | None = None) -> dict[str, int]:
    """The ports of a broker of a test's own in ``directory``: as wanted, else as last time, else free ones."""
    chosen = {**recorded(directory), **(wanted or {})}
    missing = [port for port in DEFAULTS[name] if port not in chosen]
    chosen.update(zip(missing, free(len(missing)), strict=True))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ports.json").write_text(json.dumps(chosen))
    return chosen


def for_shared(name: str, directory: Path) -> dict[str, int]:
    """The ports to start the checkout's shared broker on: as last time, else preferred, free ones where taken."""
    known = recorded(directory)
    if known and not os.environ.get(_BASE) and all(map(is_free, known.values())):
        return known
    chosen = preferred(name)
    taken = [port for port, number in chosen.items() if not is_free(number)]
    return {**chosen, **dict(zip(taken, free(len(taken)), strict=True))}
