"""The command line of a broker that runs on a Java virtual machine: a small heap on IPv4 loopback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brokers.broker import STATE

LIBRARIES = STATE / "lib"
OPTIONS = (
    "-Xms128m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-Djava.net.preferIPv4Stack=true",
    "-Djava.awt.headless=true",
)


def command(libraries: str, main: str, *arguments: str, options: Sequence[str] = ()) -> list[str]:
    """Run class ``main`` with the jars of ``.brokers/lib/{libraries}`` on the class path."""
    return ["java", *OPTIONS, *options, "-cp", f"{LIBRARIES / libraries}/*", main, *arguments]


def log4j(directory: Path) -> str:
    """The option that points log4j at our console configuration."""
    return f"-Dlog4j2.configurationFile={directory / 'log4j2.properties'}"
