"""``pubsub ping``, ``declare``, ``delete``, ``backlog`` and ``seek``: one call of the API each."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import click

from pubsub_facade.backends.base import Backlog
from pubsub_facade.cli.errors import MISUSE, Failed
from pubsub_facade.cli.options import Options, pass_options
from pubsub_facade.cli.output import age_text, console, flush, on_terminal, table, write, write_json
from pubsub_facade.sync import PubSub

as_json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if a person agrees, or ``--yes`` was given; a script must say it. Raises Abort, UsageError."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nobody to ask: say --yes")
    click.confirm(question, abort=True, err=True)


def missing(client: PubSub, subscriptions: Sequence[str]) -> Failed:
    """The error for subscriptions that are not there."""
    names = ", ".join(repr(name) for name in subscriptions)
    return Failed(
        MISUSE,
        f"no subscription {names} in namespace {client.settings.namespace!r} on {client.settings.backend}: "
        f"check the name and the namespace, or make it by `pubsub declare {subscriptions[0]} PATTERN`",
    )


def check_declared(client: PubSub, subscription: str) -> None:
    """Raise Failed where there is no such subscription."""
    if not client.backlog(subscription).declared:
        raise missing(client, [subscription])


@click.command(short_help="Ask the broker for an answer.")
@pass_options
def ping(options: Options) -> None:
    """Connect to the broker, make one round trip, and say how long it took."""
    with options.client() as client:
        began = time.perf_counter()
        client.ping()  # connects
        connected = time.perf_counter()
        client.ping()
        ended = time.perf_counter()
    write(
        f"{client.settings.backend}: answered in {(ended - connected) * 1e3:.1f} ms "
        f"(connected in {(connected - began) * 1e3:.1f} ms)"
    )


@click.command(short_help="Make a subscription exist.")
@click.argument("subscription")
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@click.option("--ordered", is_flag=True, help="Keep the order of each key.")
@click.option("--filter", "filter_", metavar="FILTER", help="Only messages whose headers it selects.")
@pass_options
def declare(
    options: Options, subscription: str, patterns: tuple[str, ...], ordered: bool, filter_: str | None
) -> None:
    """Make SUBSCRIPTION exist: from now on it keeps what is published on topics that match PATTERN.

    Declaring it again with other patterns or another filter changes it; what already waits stays.
    """
    with options.client() as client:
        client.declare(*patterns, subscription=subscription, ordered=ordered, filter=filter_)
    write(f"declared {subscription}: {' '.join(patterns)}")


@click.command(short_help="Remove a subscription and all it holds.")
@click.argument("subscription")
@yes_option
@pass_options
def delete(options: Options, subscription: str, yes: bool) -> None:
    """Remove SUBSCRIPTION and all it holds on the broker: what waits, retries, dead letters."""
    confirm(f"Delete subscription {subscription!r} and all it holds?", yes=yes)
    with options.client() as client:
        client.delete(subscription)
    write(f"deleted {subscription}")


@click.command(short_help="Show what waits, is in flight and is dead.")
@click.argument("subscriptions", nargs=-1, required=True, metavar="SUBSCRIPTION...")
@as_json_option
@pass_options
def backlog(options: Options, subscriptions: tuple[str, ...], as_json: bool) -> None:
    """Show how many messages wait, are in flight and are dead, and how old the oldest is.

    "?" is what the broker does not tell. A subscription that is not there is an error.
    """
    with options.client() as client:
        asked = {name: client.backlog(name) for name in subscriptions}
    found = {name: each for name, each in asked.items() if each.declared}
    if as_json:
        write_json({name: _fields(each) for name, each in found.items()})
    elif found and on_terminal():
        shown = table("subscription", "waiting", "in flight", "dead", "oldest")
        for name, each in found.items():
            shown.add_row(
                name, _count(each.waiting), _count(each.in_flight), _count(each.dead), _age(each.oldest)
            )
        console().print(shown)
    else:
        for name, each in found.items():
            write(
                f"{name}\twaiting={_count(each.waiting)}\tin_flight={_count(each.in_flight)}"
                f"\tdead={_count(each.dead)}\toldest={_age(each.oldest)}"
            )
    flush()
    if len(found) < len(asked):
        raise missing(client, [name for name in asked if name not in found])


def _fields(backlog: Backlog) -> dict[str, Any]:
    return {
        "waiting": backlog.waiting,
        "in_flight": backlog.in_flight,
        "dead": backlog.dead,
        "oldest": backlog.oldest,
    }


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else age_text(seconds)


@click.command(short_help="Move a subscription in its history.")
@click.argument("subscription")
@click.argument("to", metavar="beginning|end|TIME")
@yes_option
@pass_options
def seek(options: Options, subscription: str, to: str, yes: bool) -> None:
    """Move SUBSCRIPTION in its history: it gets again all from TIME on, or skips what waits.

    TIME is ISO 8601, as 2025-06-01T12:00:00Z; without a zone it is this machine's. Members should not be
    running. Only on backends that keep history.
    """
    position = parse_position(to)
    confirm(f"Move subscription {subscription!r} to {to}?", yes=yes)
    with options.client() as client:
        client.seek(subscription, position)
        check_declared(client, subscription)
    write(f"moved {subscription} to {position if isinstance(position, str) else position.isoformat()}")


def parse_position(text: str) -> datetime | Literal["beginning", "end"]:
    """Where to seek to; UsageError for what is no time."""
    if text == "beginning" or text == "end":
        return text  # type: ignore[return-value]
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise click.UsageError(
            f"{text!r} is no place to seek to: give beginning, end, or a time as 2025-06-01T12:00:00Z"
        ) from None
