"""A network of the tests' own, whose nodes can be kept from reaching each other while we reach all of them.

Each host is a network namespace on one bridge. To cut the way from one host to another, the sender is given
a link address that nobody has: packets vanish silently, in that direction alone, and no connection is told.
Needs root. What is made here carries the pid of its maker, and goes with it, at the latest when the next is made.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from brokers.broker import BrokerError
from brokers.install import apt
from brokers.process import Host

NOBODY: Final = "02:00:00:00:00:00"  # a link address; those of the hosts are drawn by the kernel
_NAME: Final = re.compile(r"\bps(\d+)(?:-\d+)?\b")


class Network:
    """Some hosts that reach each other, and are reached from here.

    Arguments:
        count: of hosts.
    """

    def __init__(self, count: int) -> None:
        self._bridge = f"ps{os.getpid()}"
        prefix = f"198.18.{random.randrange(256)}"  # for tests of networks (RFC 2544)
        self._here = f"{prefix}.1"
        self.hosts = [Host(f"{prefix}.{number + 10}", f"{self._bridge}-{number}") for number in range(count)]

    @contextmanager
    def up(self) -> Iterator[Network]:
        """Made, and removed afterwards. BrokerError where we may not, naming what is missing."""
        if os.geteuid() != 0:
            raise BrokerError("network namespaces are needed, and only root may make them: run it as root")
        if shutil.which("ip") is None:
            apt(["iproute2"])
        _remove_leftovers()
        try:
            self._make()
            yield self
        finally:
            for host in self.hosts:
                _ip("netns", "del", str(host.namespace), may_fail=True)
                _ip("link", "del", str(host.namespace), may_fail=True)
            _ip("link", "del", self._bridge, may_fail=True)

    def _make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{self._here}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self.hosts:
            name = str(host.namespace)
            _ip("netns", "add", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", self._bridge, "up")
            _ip("-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    @contextmanager
    def silenced(self, sender: Host, receivers: Sequence[Host]) -> Iterator[None]:
        """Meanwhile nothing that ``sender`` sends reaches them; what they send reaches it."""
        at = ("-n", str(sender.namespace), "neighbour")
        try:
            for receiver in receivers:
                _ip(*at, "replace", receiver.address, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0")
            yield
        finally:
            for receiver in receivers:
                _ip(*at, "del", receiver.address, "dev", "eth0")

    @contextmanager
    def parted(self, one: Host, others: Sequence[Host]) -> Iterator[None]:
        """Meanwhile nothing goes between ``one`` and the others, either way."""
        with ExitStack() as cuts:
            cuts.enter_context(self.silenced(one, others))
            for other in others:
                cuts.enter_context(self.silenced(other, [one]))
            yield


def _remove_leftovers() -> None:
    """Networks whose maker has ended without removing them."""
    for command in (("netns", "list"), ("-o", "link")):
        for name in {found[0] for found in _NAME.finditer(_ip(*command))}:
            pid = int(_NAME.fullmatch(name)[1])  # type: ignore[index]
            if not Path(f"/proc/{pid}").exists():
                kind = "netns" if command[0] == "netns" else "link"
                _ip(kind, "del", name, may_fail=True)


def _ip(*arguments: str, may_fail: bool = False) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0 and not may_fail:
        raise BrokerError(
            f"ip {' '.join(arguments)}: {done.stderr.strip()}: are network namespaces allowed here?"
        )
    return done.stdout
