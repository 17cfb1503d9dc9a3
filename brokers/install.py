"""Installs what a native broker needs on Debian or Ubuntu, where it is absent: packages by apt, jars by Maven.

Needs root or sudo only while a package is missing. Never lets Debian start a system service for us.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from brokers.broker import BrokerError
from brokers.java import LIBRARIES

_MAVEN = Path(__file__).resolve().parent / "maven"
_POLICY = Path("/usr/sbin/policy-rc.d")
_KNOWN_BY = {  # a Debian package, and the command that shows it is there
    "rabbitmq-server": "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "amqp-tools": "amqp-publish",
    "kcat": "kcat",
    "maven": "mvn",
    "default-jre-headless": "java",
}
_JAVA = 17
_PACKAGES = {
    "rabbitmq": ("rabbitmq-server", "amqp-tools"),
    "kafka": ("kcat", "default-jre-headless"),
    "activemq": ("default-jre-headless",),
    "artemis": ("default-jre-headless",),
}
_GOALS = {
    "kafka": "dependency:copy-dependencies",
    "activemq": "dependency:copy-dependencies",
    "artemis": "dependency:unpack-dependencies",
}


def ensure(names: Sequence[str]) -> None:
    """Install what these brokers lack; BrokerError says what could not be."""
    stale = [name for name in names if name in _GOALS and not _has_libraries(name)]
    packages = {package for name in names for package in _PACKAGES[name]} | ({"maven"} if stale else set())
    missing = sorted(package for package in packages if shutil.which(_KNOWN_BY[package]) is None)
    if missing:
        apt(missing)
    if "default-jre-headless" in packages:
        _check_java()
    for name in stale:
        _maven(name)


def _check_java() -> None:
    """Kafka's and Classic's classes are compiled for Java 17."""
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < _JAVA:
        raise BrokerError(
            f"Java {_JAVA} or newer is needed (openjdk-{_JAVA}-jre-headless); java -version: {said}"
        )


def _fingerprint(name: str) -> str:
    return hashlib.sha256((_MAVEN / name / "pom.xml").read_bytes()).hexdigest()


def _has_libraries(name: str) -> bool:
    stamp = LIBRARIES / name / "pom.sha256"
    return stamp.exists() and stamp.read_text() == _fingerprint(name)


def _maven(name: str) -> None:
    """The jars (or the unpacked tarball) that the broker's pom names, into ``.brokers/lib/{name}``."""
    print(f"{name}: fetching its jars with Maven", flush=True)
    target = LIBRARIES / name
    shutil.rmtree(target, ignore_errors=True)
    pom = _MAVEN / name / "pom.xml"
    into = [f"-DoutputDirectory={target}", f"-DmarkersDirectory={target / 'markers'}"]
    _run(["mvn", "-q", "-B", "-f", str(pom), _GOALS[name], *into])
    (target / "pom.sha256").write_text(_fingerprint(name))


def apt(packages: Sequence[str]) -> None:
    """``apt-get install``, with sudo where we are not root."""
    print(f"installing {', '.join(packages)} with apt-get", flush=True)
    if shutil.which("apt-get") is None:
        raise BrokerError(f"install these yourself, there is no apt-get here: {', '.join(packages)}")
    sudo = _sudo(packages)
    with _no_services(sudo):
        environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
        _run([*sudo, "apt-get", "update", "-q"])
        _run([*sudo, *environment, "apt-get", "install", "-q", "-y", "--no-install-recommends", *packages])


def _sudo(packages: Sequence[str]) -> list[str]:
    if os.geteuid() == 0:
        return []
    sudo = ["sudo"] if sys.stdin.isatty() else ["sudo", "-n"]
    if shutil.which("sudo") is None or subprocess.run([*sudo, "true"], check=False).returncode != 0:
        raise BrokerError(f"as root: apt-get install {' '.join(packages)} (not root here, and sudo refuses)")
    return sudo


@contextmanager
def _no_services(sudo: Sequence[str]) -> Iterator[None]:
    """While packages are installed, a policy that keeps them from starting their services."""
    if _POLICY.exists():
        yield
        return
    script = f"printf '#!/bin/sh\\nexit 101\\n' > {_POLICY} && chmod 755 {_POLICY}"
    _run([*sudo, "sh", "-c", script])
    try:
        yield
    finally:
        _run([*sudo, "rm", "-f", str(_POLICY)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BrokerError(f"{' '.join(command)} failed ({done.returncode})\n{tail}")
