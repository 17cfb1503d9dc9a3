"""``pubsub publish``: one message from the command line or a file, or many as JSON Lines.

Lines go out as they come, as many at once as have arrived: a slow producer's line does not wait for the
next one. What cannot be published is told by its line number, and the exit code says so.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from pubsub_facade.cli.errors import FAILED, PARTIAL, Failed, code_of, say
from pubsub_facade.cli.options import Options, pass_options
from pubsub_facade.cli.output import write
from pubsub_facade.errors import (
    Closed,
    ConnectionFailed,
    MessageError,
    PublishTimeout,
    PubSubError,
    SendFailed,
)
from pubsub_facade.message import HeaderValue, Message, new_id
from pubsub_facade.sync import PubSub

CHUNK: Final = 1 << 18  # bytes read at once
BATCH: Final = 1000  # messages confirmed together at most
TOLD: Final = 20  # complaints about single lines, until only their number is told
FIELDS: Final = frozenset(
    {"topic", "payload", "base64", "key", "headers", "id", "delay", "content_type", "published_at"}
)


def headers_of(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, HeaderValue]:
    """The headers that all ``--header`` options stand for; a later one wins."""
    headers: dict[str, HeaderValue] = {}
    for text in given:
        try:
            headers.update(parse_header(text))
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return headers


def parse_header(text: str) -> dict[str, HeaderValue]:
    """``name=text``, ``name:int=3`` (int, float, bool, str) or a JSON object; ValueError for anything else."""
    if text.startswith("{"):
        found = json.loads(text)
        assert isinstance(found, dict)
        return found
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{text!r} is no header: write name=text, name:int=3, or a JSON object")
    outer, _, kind = name.rpartition(":")
    if outer and kind in _KINDS:
        name = outer
    else:
        kind = "str"
    try:
        return {name: _KINDS[kind](value)}
    except (ValueError, KeyError):
        raise ValueError(f"header {name!r}: {value!r} is no {kind}") from None


header_option = click.option(
    "--header",
    "-H",
    "headers",
    multiple=True,
    metavar="NAME=VALUE",
    callback=headers_of,
    help="A header; NAME:int=3 gives it a type (int, float, bool), a JSON object gives several. Repeatable.",
)
content_option = click.option(
    "--content",
    type=click.Choice(["auto", "json", "text", "raw"]),
    default="auto",
    show_default=True,
    help="What the payload is; auto: JSON if it parses, else text (argument) or bytes (file).",
)


_KINDS: Final[dict[str, Callable[[str], HeaderValue]]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
}


@dataclass
class Template:
    """What the options say of every message.

    Arguments:
        topic: None: each line names its own.
        content: how payload text is meant: ``auto``, ``json``, ``text`` or ``raw``.
    """

    topic: str | None
    key: str | None = None
    headers: dict[str, HeaderValue] = field(default_factory=dict)
    delay: float = 0
    content: str = "auto"

    def message(self, payload: Any, **fields: Any) -> Message:
        """A message with an id of its own, so that its fate can be told."""
        headers = {**self.headers, **fields.get("headers", {})}
        topic = fields.get("topic") or self.topic or ""
        key, delay = fields.get("key", self.key), fields.get("delay", self.delay)
        return Message(topic, payload, key=key, headers=headers, id=fields.get("id") or new_id(), delay=delay)

    def payload(self, data: bytes, default: str) -> Any:
        """What the bytes of an argument, a file or a line mean.

        Arguments:
            default: what ``auto`` makes of bytes that are no JSON: ``text`` or ``raw``.

        Raises MessageError.
        """
        if self.content == "raw":
            return data
        if self.content in ("json", "auto"):
            try:
                return json.loads(data)
            except ValueError as error:
                if self.content == "json":
                    raise MessageError(f"payload is not JSON: {error}") from None
        if self.content == "auto" and default == "raw":
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise MessageError(f"payload is not UTF-8 text: {error.reason} at byte {error.start}") from None

    def from_line(self, line: bytes) -> Message:
        """The message that a line of JSON Lines stands for. Raises MessageError."""
        if self.topic is not None:
            return self.message(self.payload(line, "text") if self.content != "auto" else _json(line))
        record = _json(line)
        if not isinstance(record, dict) or not isinstance(record.get("topic"), str):
            raise MessageError(
                'no object with a "topic": give TOPIC on the command line, or one in each line'
            )
        unknown = sorted(record.keys() - FIELDS)
        if unknown:
            raise MessageError(f"unknown field {unknown[0]!r}: known are {', '.join(sorted(FIELDS))}")
        if ("payload" in record) == ("base64" in record):
            raise MessageError('give either "payload" or "base64"')
        if not isinstance(record.get("headers", {}), Mapping):
            raise MessageError('"headers" is not an object')
        return self.message(
            _payload_of(record), **{name: value for name, value in record.items() if value is not None}
        )


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None


def _payload_of(record: dict[str, Any]) -> Any:
    encoded = record.pop("base64", None)
    if encoded is None:
        return record.pop("payload")
    try:
        return base64.b64decode(encoded, validate=True)
    except (ValueError, TypeError) as error:
        raise MessageError(f'"base64" is not base64: {error}') from None


@click.command(short_help="Publish one message, or many as JSON Lines.")
@click.argument("topic", required=False)
@click.argument("payload", required=False)
@click.option(
    "--file", "-f", metavar="FILE", help="Publish this file's content as one message; - is standard input."
)
@click.option("--key", "-k", metavar="KEY", help="What order is kept by.")
@header_option
@click.option("--id", "id_", metavar="ID", help="The message's id; else a UUIDv7 is made.")
@click.option(
    "--delay", type=float, default=0.0, metavar="SECONDS", help="Deliver that much later at the earliest."
)
@click.option(
    "--timeout", type=float, metavar="SECONDS", help="Wait that long for the broker; else publish_timeout."
)
@content_option
@pass_options
def publish(
    options: Options,
    topic: str | None,
    payload: str | None,
    file: str | None,
    key: str | None,
    headers: dict[str, HeaderValue],
    id_: str | None,
    delay: float,
    timeout: float | None,
    content: str,
) -> None:
    """Publish PAYLOAD on TOPIC, and print the message's id once the broker has confirmed it.

    Without PAYLOAD and --file, standard input is read as JSON Lines: with TOPIC each line is a payload;
    without it each line is an object with "topic" and "payload", and "key", "headers", "id", "delay" where
    wanted. `pubsub tail --json` writes such lines.

    \b
    pubsub publish social.post.created '{"author": 42, "text": "hello"}' --key 42 -H lang=en
    pubsub publish photos.uploaded --file photo.jpg --content raw
    pubsub publish social.post.created < posts.jsonl
    """
    template = Template(topic, key, headers, delay, content)
    if payload is not None and file is not None:
        raise click.UsageError("give PAYLOAD or --file, and not both")
    if payload is None and file is None:
        if id_ is not None:
            raise click.UsageError("--id is for one message: give each line an id of its own")
        if sys.stdin.isatty():
            raise click.UsageError("give PAYLOAD, --file, or JSON Lines on standard input")
        with options.client() as client:
            Lines(client, template, timeout).publish()
        return
    if topic is None:
        raise click.UsageError("give TOPIC")
    if payload is not None:
        meant = template.payload(os.fsencode(payload) if _surrogates(payload) else payload.encode(), "text")
    else:
        meant = template.payload(content_of(file or ""), "raw")
    with options.client() as client:
        done = client.publish(topic, meant, key=key, headers=headers, id=id_, delay=delay, timeout=timeout)
    write(done.id)


def _surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def content_of(file: str) -> bytes:
    """What a file holds, or standard input for ``-``. Raises UsageError."""
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise click.UsageError(f"--file {file!r} cannot be read: {error.strerror}") from None


# -- JSON Lines ---------------------------------------------------------------------------------------


def batches(descriptor: int) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines of ``descriptor``, as many at once as are there; empty ones are left out."""
    number, rest = 0, b""
    while chunk := os.read(descriptor, CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        found: list[tuple[int, bytes]] = []
        for line in lines:
            number += 1
            if line.strip():
                found.append((number, line))
        for start in range(0, len(found), BATCH):
            yield found[start : start + BATCH]
    if rest.strip():
        yield [(number + 1, rest)]


class Lines:
    """Publishes standard input line by line and keeps the account.

    Arguments:
        timeout: seconds for each batch; None: by the settings.
    """

    def __init__(self, client: PubSub, template: Template, timeout: float | None) -> None:
        self._client = client
        self._template = template
        self._timeout = timeout
        self._last = 0  # the last line read
        self._published = 0
        self._refused = 0

    def publish(self) -> None:
        """Until the end of standard input. Raises Failed unless every line was published."""
        descriptor = sys.stdin.fileno()
        try:
            with _progress(descriptor) as advance:
                for lines in batches(descriptor):
                    self._last = lines[-1][0]
                    self._batch(lines)
                    advance(len(lines), sum(len(line) + 1 for _, line in lines))
        except KeyboardInterrupt:
            say(f"interrupted: {self._published} published; what came up to line {self._last} may be too")
            raise
        if self._refused:
            what = f"{self._refused} of {self._published + self._refused} lines were not published"
            raise Failed(PARTIAL if self._published else FAILED, what)
        write(f"{self._published} published")

    def _batch(self, lines: list[tuple[int, bytes]]) -> None:
        messages: list[Message] = []
        numbers: dict[str, int] = {}
        for number, line in lines:
            try:
                message = self._client.prepare(self._template.from_line(line))
            except PubSubError as error:
                self._refuse(number, str(error))
                continue
            messages.append(message)
            numbers[message.id] = number
        if not messages:
            return
        try:
            self._client.publish_many(messages, timeout=self._timeout)
        except SendFailed as error:
            self._failed(error, numbers, len(messages))
        except (ConnectionFailed, Closed) as error:
            self._stop(f"lines from {numbers[messages[0].id]} on were not sent", error)
        else:
            self._published += len(messages)

    def _failed(self, error: SendFailed, numbers: dict[str, int], count: int) -> None:
        for fate in ("not stored", "unknown"):
            lines = [numbers[id] for id, known in error.fates.items() if known == fate and id in numbers]
            if lines:
                told = "not stored" if fate == "not stored" else "perhaps stored"
                say(f"{ranges(lines)}: {told}: {error}")
        self._published += count - len(error.fates)
        self._refused += len(error.fates)
        if isinstance(error, PublishTimeout) or isinstance(error.__cause__, Closed | ConnectionFailed):
            self._stop(f"lines after {self._last} were not read", error)

    def _stop(self, what: str, error: PubSubError) -> None:
        say(str(error)) if not isinstance(error, SendFailed) else None
        raise Failed(PARTIAL if self._published else code_of(error), f"{self._published} published; {what}")

    def _refuse(self, number: int, why: str) -> None:
        self._refused += 1
        if self._refused <= TOLD:
            say(f"line {number}: {why}")
        if self._refused == TOLD:
            say("further lines that cannot be published are only counted")


def ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``lines 1-3, 7``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"line {text}" if len(numbers) == 1 else f"lines {text}"


@contextmanager
def _progress(descriptor: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal; of bytes where the input's size is known."""
    if not sys.stderr.isatty():
        yield lambda messages, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    status = os.fstat(descriptor)
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    with Progress(
        TextColumn("{task.fields[count]} messages"),
        BarColumn(),
        TaskProgressColumn(show_speed=False),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("publish", total=total, count=0, rate="")
        done = 0

        def advance(messages: int, size: int) -> None:
            nonlocal done
            done += messages
            elapsed = progress.tasks[0].elapsed or 0
            rate = f"{done / elapsed:,.0f}/s" if elapsed > 0.5 else ""
            progress.update(task, advance=size, count=f"{done:,}", rate=rate)

        yield advance
