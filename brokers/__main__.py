"""``python -m brokers``: the command line that the Makefile, CI and people use. Needs nothing but Python."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from brokers import install, shared
from brokers.broker import BrokerError

_NAMES = "a comma-separated list (default: $BROKERS, else all; an empty list is none)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m brokers", description="Real brokers on loopback ports.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, about in (
        ("install", "install what the brokers lack"),
        ("up", "bring brokers up; those that are up are left"),
        ("down", "stop the brokers that were brought up here"),
        ("status", "say which are up"),
    ):
        verbs.add_parser(verb, help=about).add_argument("names", nargs="?", help=_NAMES)
    for verb, about in (
        ("restart", "an orderly shutdown, and up again on the same ports and data"),
        ("kill", "kill -9"),
        ("pause", "SIGSTOP: it keeps its connections and answers nothing"),
        ("resume", "SIGCONT"),
    ):
        verbs.add_parser(verb, help=about).add_argument("name")
    run = verbs.add_parser(
        "run", help="run a command with brokers up, then stop those that were not up before"
    )
    run.add_argument("names", help=_NAMES)
    run.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    return parser


def _run_with(names: Sequence[str], command: Sequence[str]) -> int:
    """The exit code of ``command``, run with these brokers up; those it brought up are down afterwards."""
    signal.signal(signal.SIGTERM, _interrupt)
    before = {name for name, state in shared.status(names) if state != "down"}
    try:
        shared.up(names)
        return _await(command)
    except KeyboardInterrupt:
        return 130
    finally:
        shared.down([name for name in names if name not in before])


def _await(command: Sequence[str]) -> int:
    """The exit code of ``command``, which is left the time to clean up when we are told to end.

    A terminal's SIGINT reaches it without us; SIGTERM reaches us only, and is passed on as the SIGINT that
    test runners clean up after. Where SIGINT was ignored (a shell's background job), it no longer is.
    """
    signal.signal(signal.SIGINT, lambda number, frame: None)
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(signal.SIGINT))
    code = child.wait()
    return code if code >= 0 else 128 - code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _one(verb: str, name: str) -> None:
    (selected,) = shared.select(name)
    broker = shared.native(selected)
    if not broker.running() and verb != "restart":
        raise BrokerError(f"{selected} does not run natively here")
    actions = {
        "restart": broker.restart,
        "kill": broker.kill,
        "pause": broker.pause,
        "resume": broker.resume,
    }
    actions[verb]()


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.verb in ("restart", "kill", "pause", "resume"):
            _one(given.verb, given.name)
            return 0
        wish = os.environ.get("BROKERS")
        names = shared.select(given.names if given.names is not None else wish)
        if wish is not None and given.verb in ("up", "run"):
            shared.left_out(names)
        if given.verb == "run":
            return _run_with(names, given.command[given.command[:1] == ["--"] :])
        if given.verb == "install":
            install.ensure(names)
        elif given.verb == "up":
            shared.up(names)
        elif given.verb == "down":
            shared.down(names)
        else:
            for name, state in shared.status(names):
                print(f"{name}: {state}")
    except BrokerError as error:
        print(f"brokers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
