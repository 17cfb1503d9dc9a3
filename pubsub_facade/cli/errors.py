"""What a command tells its caller when it fails: one line on standard error, and an exit code.

A traceback is for ``--debug`` only, and never shows the values of variables, which may be secret.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import click

from pubsub_facade.cli.options import Options
from pubsub_facade.cli.output import Hangup, printable
from pubsub_facade.errors import (
    AuthenticationFailed,
    ConfigError,
    FilterError,
    MessageError,
    PubSubError,
    TopicError,
    TopologyConflict,
    UnsupportedFeature,
)

OK: Final = 0
FAILED: Final = 1
"""The broker could not be reached, was lost, or refused; trying again may help."""
MISUSE: Final = 2
"""The command line, the settings, a topic, a filter or the broker's topology: trying again does not help."""
REFUSED: Final = 3
"""The broker refused the credentials or the right to do this."""
PARTIAL: Final = 4
"""Some messages were published or replayed, and some were not; standard error says which."""
UNFINISHED: Final = 5
"""``pubsub run`` ended, and some handlers had not returned within the grace time; their messages come again."""
INTERRUPTED: Final = 130
BEFORE: Final = frozenset({"--config", "--url", "--namespace", "--debug"})

HANGUP: Final = 141
"""Nobody reads our output any more: what a shell shows for SIGPIPE."""

_NoArguments: Final = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""A group without a command: its text is the help. Click 8.1 shows that by itself."""

_MISUSES: Final = (ConfigError, TopicError, FilterError, MessageError, UnsupportedFeature, TopologyConflict)


class Failed(Exception):
    """A command has told what failed, or says it by this text, and ends with this code.

    Arguments:
        code: the exit code.
        text: told on standard error; "": told already.
    """

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code


def say(text: str) -> None:
    """``pubsub: …`` as one line on standard error."""
    line = printable(" ".join(text.split()))
    try:
        print(f"pubsub: {line}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads it: the exit code still tells


def code_of(error: BaseException) -> int:
    """The exit code that an error means."""
    if isinstance(error, AuthenticationFailed):
        return REFUSED
    return MISUSE if isinstance(error, _MISUSES) else FAILED


def _misuse(error: click.UsageError) -> int:
    path = error.ctx.command_path if error.ctx is not None else "pubsub"
    say(f"{error.format_message().rstrip('.')} (see {path} --help)")
    return MISUSE


def guarded(
    command: click.Command, arguments: Sequence[str], options: Options | None = None, name: str = "pubsub"
) -> int:
    """Run ``command``; what it raises becomes a line and an exit code.

    Arguments:
        options: with settings of a framework; None: the usual ones.
        name: what the program is called.
    """
    options = options or Options()
    try:
        result = command.main(list(arguments), name, standalone_mode=False, obj=options)
        sys.stdout.flush()
        return result if isinstance(result, int) else OK
    except (Hangup, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes once more
        return HANGUP
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return INTERRUPTED
    except _NoArguments as error:
        click.echo(error.format_message(), err=True)
        return MISUSE
    except click.NoSuchOption as error:
        if error.option_name not in BEFORE:
            return _misuse(error)
        say(f"{error.option_name} stands before the command: {name} {error.option_name} …")
        return MISUSE
    except click.UsageError as error:
        return _misuse(error)
    except click.ClickException as error:
        say(error.format_message())
        return MISUSE
    except Failed as error:
        if str(error):
            say(str(error))
        return error.code
    except PubSubError as error:
        if options.debug:
            traceback.print_exception(error)
        say(str(error))
        return code_of(error)
    except Exception as error:
        if options.debug:
            traceback.print_exception(error)
        say(f"{type(error).__name__}: {error}" + ("" if options.debug else " (--debug shows where)"))
        return FAILED
