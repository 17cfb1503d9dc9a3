"""``pubsub doctor``: what the broker's settings mean for reliability, and what to mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from pubsub_facade.backends.base import Finding
from pubsub_facade.cli.errors import FAILED, Failed
from pubsub_facade.cli.options import Options, pass_options
from pubsub_facade.cli.output import console, on_terminal, printable, table, write, write_json

STYLES: Final = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@click.command(short_help="Check what reliability needs of the broker.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array: level, what and mend of each finding.")
@pass_options
def doctor(options: Options, as_json: bool) -> None:
    """Look at the broker's settings and state, and say what would cost messages and how to mend it.

    A problem breaks a promise, a warning may at a price. The exit code is 1 where there is a problem.
    """
    with options.client() as client:
        found = client.diagnose()
        backend = client.settings.backend
    show(found, as_json=as_json)
    if not found and not as_json:
        write(f"{backend}: nothing to check")
    if any(finding.level == "problem" for finding in found):
        raise Failed(FAILED)


def show(found: Sequence[Finding], *, as_json: bool) -> None:
    """The findings: a table for people, a line each for a pipe."""
    if as_json:
        write_json([{"level": each.level, "what": each.what, "mend": each.mend} for each in found])
    elif found and on_terminal():
        shown = table("", "found", "mend")
        for each in found:
            shown.add_row(each.level, printable(each.what), printable(each.mend), style=STYLES[each.level])
        console().print(shown, soft_wrap=False)
    else:
        for each in found:
            write("\t".join([each.level, printable(each.what), printable(each.mend)]).rstrip("\t"))
