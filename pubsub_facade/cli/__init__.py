"""The command ``pubsub``: everything an operator or a shell script wants of a broker, by the settings in force.

One file a command group, imported when asked for, so that ``pubsub --version`` stays quick. Nothing here
knows a broker: each command is a few calls of the public API.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code (see `pubsub_facade.cli.errors`)."""
    from pubsub_facade.cli.errors import guarded
    from pubsub_facade.cli.root import cli

    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    given = [os.fsencode(argument).decode(errors="surrogateescape") for argument in sys.argv[1:]]
    sys.exit(guarded(cli, given if arguments is None else list(arguments)))
