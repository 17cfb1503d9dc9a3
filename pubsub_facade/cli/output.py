"""What goes to standard output, and how: for people on a terminal, plain lines in a pipe, JSON on demand.

What came in a message is never trusted: control characters are shown, not sent to the terminal.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pubsub_facade.errors import DecodeError
from pubsub_facade.message import Message

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

ONE_LINE: Final = 100  # characters of JSON that a terminal still gets on one line


class Hangup(Exception):
    """Nobody reads our output any more."""


def printable(text: str, keep: str = "") -> str:
    """``text`` with control characters, and those that turn the direction of writing, as escapes.

    Arguments:
        keep: characters that pass.
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(
        character, f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
    )


def on_terminal() -> bool:
    """Whether a person looks at standard output."""
    return sys.stdout.isatty()


def write(line: str) -> None:
    """One line to standard output, not flushed. Raises Hangup."""
    try:
        sys.stdout.write(line + "\n")
    except BrokenPipeError:
        raise Hangup from None


def flush() -> None:
    """Send what was written. Raises Hangup."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise Hangup from None


def write_json(value: Any) -> None:
    """One line of JSON to standard output, not flushed."""
    write(json.dumps(value, ensure_ascii=False, default=str).replace("\u2028", "\\u2028"))


def console() -> Console:
    """Rich's console on standard output."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


def table(*columns: str) -> Table:
    """An empty table with these columns, for `console().print`."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=number == 0)
    return made


def time_text(timestamp: float | None) -> str:
    """UTC, to the millisecond; "-" where it is not known."""
    if timestamp is None:
        return "-"
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age_text(seconds: float) -> str:
    """``90`` as ``1m30s``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    text = "".join(f"{number}{unit}" for number, unit in parts if number)
    return text or f"{seconds:.1f}s"


# -- messages -----------------------------------------------------------------------------------------


def payload_of(message: Message) -> Any:
    """The payload by content type; the bytes where it does not decode."""
    try:
        return message.payload
    except DecodeError:
        return message.body


def record(message: Message) -> dict[str, Any]:
    """A message for JSON: what ``pubsub publish`` reads from a line."""
    payload = payload_of(message)
    fields: dict[str, Any] = {"topic": message.topic, "id": message.id}
    if message.key is not None:
        fields["key"] = message.key
    fields["headers"] = dict(message.headers)
    if isinstance(payload, bytes):
        fields["base64"] = base64.b64encode(payload).decode()
    else:
        fields["payload"] = payload
    fields["content_type"] = message.content_type
    fields["published_at"] = None if message.timestamp is None else time_text(message.timestamp)
    return fields


def payload_text(payload: Any, keep: str = "") -> str:
    """A payload on one line: text as it is, bytes as Python writes them, anything else as JSON."""
    if isinstance(payload, str):
        return printable(payload, keep)
    if isinstance(payload, bytes):
        return repr(payload)
    return printable(json.dumps(payload, ensure_ascii=False, default=str), keep)


def headers_text(message: Message) -> str:
    """``name=value`` for each header, strings in quotes."""
    return " ".join(
        f"{printable(name)}={json.dumps(value, ensure_ascii=False)}"
        for name, value in message.headers.items()
    )


def plain_line(message: Message) -> str:
    """Time, topic, key and payload, separated by tabs."""
    return "\t".join(
        (
            time_text(message.timestamp),
            printable(message.topic),
            "-" if message.key is None else printable(message.key),
            payload_text(payload_of(message)),
        )
    )


def _clock(timestamp: float | None) -> str:
    if timestamp is None:
        return "-"
    local = datetime.fromtimestamp(timestamp)  # noqa: DTZ006 - a person's own clock
    return local.isoformat(sep=" ", timespec="milliseconds")[11:]


def pretty(message: Message) -> Any:
    """A message for a terminal: one line of facts, the payload below."""
    from rich.highlighter import JSONHighlighter
    from rich.text import Text

    facts = Text()
    facts.append(_clock(message.timestamp), "dim").append("  ").append(printable(message.topic), "bold cyan")
    if message.key is not None:
        facts.append("  key ", "dim").append(printable(message.key), "yellow")
    if message.headers:
        facts.append("  ").append(printable(headers_text(message)), "green")
    facts.append("  ").append(printable(message.id), "dim")
    payload = payload_of(message)
    if isinstance(payload, dict | list):
        text = json.dumps(payload, ensure_ascii=False, default=str)
        if len(text) > ONE_LINE:
            text = json.dumps(payload, ensure_ascii=False, indent=2, default=str)
        body = JSONHighlighter()(Text(printable(text, "\n")))
    else:
        body = Text(payload_text(payload, "\n\t"))
    indented = Text("\n").join(Text("  ").append_text(line) for line in body.split("\n", allow_blank=True))
    return Text("\n").join([facts, indented])
