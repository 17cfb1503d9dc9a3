"""``pubsub dead SUBSCRIPTION …``: the dead letters of one subscription, looked at, mended, replayed, purged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import click

from pubsub_facade.cli.errors import FAILED, PARTIAL, Failed
from pubsub_facade.cli.options import Options
from pubsub_facade.cli.output import (
    console,
    flush,
    headers_text,
    on_terminal,
    payload_of,
    payload_text,
    printable,
    record,
    table,
    time_text,
    write,
    write_json,
)
from pubsub_facade.cli.publish import Template, content_of, content_option, header_option
from pubsub_facade.cli.subscriptions import as_json_option, check_declared, confirm, yes_option
from pubsub_facade.message import HeaderValue, Message
from pubsub_facade.sync import SyncDeadLetters

SHORT: Final = 60  # characters of a payload or an error in the list


@click.group(invoke_without_command=True, short_help="Dead letters: list, show, edit, replay, purge.")
@click.argument("subscription")
@click.pass_context
def dead(ctx: click.Context, subscription: str) -> None:
    """List, show, edit, replay or purge the dead letters of SUBSCRIPTION.

    \b
    pubsub dead analytics list
    pubsub dead analytics replay --all
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_, as_json=False, limit=None)


def letters_of(ctx: click.Context) -> SyncDeadLetters:
    """The dead letters that the command line names; the client is closed when the command ends."""
    options = ctx.find_object(Options)
    assert options is not None
    assert ctx.parent is not None
    parent = ctx if "subscription" in ctx.params else ctx.parent
    client = ctx.with_resource(options.client())
    return client.dead_letters(parent.params["subscription"])


# -- looking ------------------------------------------------------------------------------------------


@dead.command("list")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The N oldest only.")
@as_json_option
@click.pass_context
def list_(ctx: click.Context, limit: int | None, as_json: bool) -> None:
    """List them, oldest first: id, topic, attempts, last failure and error."""
    letters = _oldest(letters_of(ctx), limit)
    if as_json:
        for letter in letters:
            write_json(described(letter))
    elif on_terminal():
        shown = table("id", "topic", "attempts", "last failure", "error")
        for letter in letters:
            shown.add_row(*_row(letter))
        console().print(shown if shown.row_count else "no dead letters")
    else:
        for letter in letters:
            write("\t".join(_row(letter)))
    flush()


def _oldest(letters: SyncDeadLetters, limit: int | None) -> Iterator[Message]:
    found = islice(letters, limit)
    first = next(found, None)
    if first is None:
        check_declared(letters._pubsub, letters.subscription)
        return
    yield first
    yield from found


def _row(letter: Message) -> tuple[str, ...]:
    failure = letter.failure
    facts = (
        ("-", "-", "-")
        if failure is None
        else (
            str(failure.attempts),
            time_text(failure.last_at),
            _short(f"{failure.error_type}: {failure.error}"),
        )
    )
    return printable(letter.id), printable(letter.topic), *facts


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= SHORT else f"{text[: SHORT - 1]}…"


def described(letter: Message) -> dict[str, Any]:
    """A dead letter for JSON: the message, and why it is here."""
    failure = letter.failure
    why = None
    if failure is not None:
        why = {
            "subscription": failure.subscription,
            "error_type": failure.error_type,
            "error": failure.error,
            "attempts": failure.attempts,
            "first_at": time_text(failure.first_at),
            "last_at": time_text(failure.last_at),
        }
    return {**record(letter), "failure": why}


@dead.command()
@click.argument("id_", metavar="ID")
@as_json_option
@click.pass_context
def show(ctx: click.Context, id_: str, as_json: bool) -> None:
    """Show one in full: the message as it was published, and each fact of its failure."""
    letter = _find(letters_of(ctx), id_)
    if as_json:
        write_json(described(letter))
        return
    facts = {
        "id": letter.id,
        "topic": letter.topic,
        "key": letter.key,
        "headers": headers_text(letter),
        "published": time_text(letter.timestamp),
        "content type": letter.content_type,
    }
    if letter.failure is not None:
        facts |= {
            "error": f"{letter.failure.error_type}: {letter.failure.error}",
            "attempts": str(letter.failure.attempts),
            "first failure": time_text(letter.failure.first_at),
            "last failure": time_text(letter.failure.last_at),
        }
    for name, value in facts.items():
        if value:
            write(f"{name + ':':15}{printable(value, chr(10))}")
    write("")
    write(_payload_for_people(letter))


def _payload_for_people(letter: Message) -> str:
    payload = payload_of(letter)
    if isinstance(payload, dict | list):
        return printable(json.dumps(payload, ensure_ascii=False, indent=2, default=str), "\n")
    return payload_text(payload, "\n\t")


def _find(letters: SyncDeadLetters, id: str) -> Message:
    for letter in letters:
        if letter.id == id:
            return letter
    check_declared(letters._pubsub, letters.subscription)
    raise Failed(
        FAILED, f"subscription {letters.subscription!r} has no dead letter {id!r}: list them to see the ids"
    )


# -- mending ------------------------------------------------------------------------------------------


@dead.command()
@click.argument("id_", metavar="ID")
@click.argument("payload", required=False)
@click.option(
    "--file", "-f", metavar="FILE", help="The new payload is this file's content; - is standard input."
)
@header_option
@content_option
@click.pass_context
def edit(
    ctx: click.Context,
    id_: str,
    payload: str | None,
    file: str | None,
    headers: dict[str, HeaderValue],
    content: str,
) -> None:
    """Replay one with another payload or more headers; id, key and the other headers stay.

    With neither, an editor opens on the payload.
    """
    if payload is not None and file is not None:
        raise click.UsageError("give PAYLOAD or --file, and not both")
    letters = letters_of(ctx)
    letter = _find(letters, id_)
    template = Template(letter.topic, content=content)
    changes: dict[str, Any] = {}
    if headers:
        changes["headers"] = {**letter.headers, **headers}
    if payload is not None:
        changes["payload"] = template.payload(payload.encode(), "text")
    elif file is not None:
        changes["payload"] = template.payload(content_of(file), "raw")
    elif not headers:
        changes["payload"] = template.payload(_edited(letter).encode(), "text")
    letters.edit(id_, **changes)
    write(f"replayed {id_}")


def _edited(letter: Message) -> str:
    if not sys.stdin.isatty():
        raise click.UsageError("nobody to edit it: give PAYLOAD, --file or --header")
    if isinstance(payload_of(letter), bytes):
        raise click.UsageError("the payload is bytes: give --file")
    text = click.edit(_payload_for_people(letter), extension=".json")
    if text is None:
        raise click.Abort
    return text.rstrip("\n")


@dead.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are there now.")
@click.pass_context
def replay(ctx: click.Context, ids: tuple[str, ...], everything: bool) -> None:
    """Hand them out again, to this subscription only, as a first attempt."""
    _check_choice(ids, everything)
    letters = letters_of(ctx)
    _tell("replayed", letters, ids, letters.replay(None if everything else ids))


@dead.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All that are there now.")
@yes_option
@click.pass_context
def purge(ctx: click.Context, ids: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Remove them for good."""
    _check_choice(ids, everything)
    what = "all dead letters" if everything else f"{len(set(ids))} dead letters"
    confirm(f"Remove {what} for good?", yes=yes)
    letters = letters_of(ctx)
    _tell("purged", letters, ids, letters.purge(None if everything else ids))


def _check_choice(ids: tuple[str, ...], everything: bool) -> None:
    if bool(ids) == everything:
        raise click.UsageError("give ids, or --all" + (", and not both" if ids else ""))


def _tell(done: str, letters: SyncDeadLetters, ids: tuple[str, ...], count: int) -> None:
    if not count:
        check_declared(letters._pubsub, letters.subscription)
    write(f"{done} {count}")
    missing = len(set(ids)) - count
    if ids and missing:
        raise Failed(
            PARTIAL if count else FAILED, f"{missing} of the ids are no dead letters of this subscription"
        )
