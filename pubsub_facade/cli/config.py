"""``pubsub config``: the settings in force, each with where it came from, no secret shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
from pydantic import BaseModel, Secret, SecretStr

from pubsub_facade._settings_errors import masked
from pubsub_facade.address import MASK
from pubsub_facade.cli.options import Options, pass_options
from pubsub_facade.cli.output import console, on_terminal, printable, table, write, write_json
from pubsub_facade.settings import Settings

SECTIONS: Final = frozenset({"memory", "sqlite", "rabbitmq", "kafka", "activemq"})
DEFAULT: Final = "default"


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command()
@click.option("--all", "everything", is_flag=True, help="The sections of other backends too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: key to value and origin.")
@pass_options
def show(options: Options, everything: bool, as_json: bool) -> None:
    """Show each setting and where its value came from; secrets are masked, files are absolute.

    Sections of backends that are not in force are left out unless something in them was set.
    """
    settings = options.settings()
    rows = [row for row in described(settings) if everything or _matters(row, settings.backend)]
    if as_json:
        write_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
    elif on_terminal():
        shown = table("setting", "value", "from")
        for key, value, origin in rows:
            shown.add_row(
                printable(key),
                printable(_text(value)),
                printable(origin),
                style="dim" if origin == DEFAULT else "",
            )
        console().print(shown)
    else:
        for key, value, origin in rows:
            write(f"{printable(key)} = {printable(_text(value))}  # {printable(origin)}")


Row = tuple[str, Any, str]  # dotted key, value as JSON has it and masked, origin


def described(settings: Settings) -> list[Row]:
    """Each setting, dotted, in the order of the models."""
    rows: list[Row] = []
    for key, value in _leaves(settings):
        origin = settings.origins.get(key, DEFAULT)
        if origin.startswith("code: "):
            origin = f"command line: --{origin.removeprefix('code: ')}"
        rows.append((key, value, origin))
    return rows


def _matters(row: Row, backend: str) -> bool:
    section = row[0].partition(".")[0]
    return section not in SECTIONS or section == backend or row[2] != DEFAULT


def _leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in type(model).model_fields.items():
        if not field.exclude:
            yield from _flat(f"{prefix}{name}", getattr(model, name))


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        yield from _leaves(value, f"{key}.")
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, _plain(key, value)


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Secret):
        return str(value)
    return masked(value, key.rpartition(".")[2]) if key.startswith("options.") else value


def _text(value: Any) -> str:
    """As TOML has it; what is not set has no form there."""
    return "(not set)" if value is None else json.dumps(value, ensure_ascii=False)
