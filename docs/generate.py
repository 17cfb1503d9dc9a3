"""Writes the pages that are made from the code: ``python -m docs.generate``. A test compares them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from pubsub_facade.address import SecretUrl, Tls
from pubsub_facade.backends import create
from pubsub_facade.backends.base import Capabilities
from pubsub_facade.settings import Settings, SubscriptionSettings

ROOT: Final = Path(__file__).resolve().parent.parent
NOTE: Final = "<!-- Made by `python -m docs.generate`: edit the code, not this page. -->\n"

FORMS: Final[dict[str, dict[str, Any]]] = {
    "memory": {"backend": "memory"},
    "sqlite": {"backend": "sqlite"},
    "RabbitMQ": {"backend": "rabbitmq"},
    "Kafka": {"backend": "kafka"},
    "ActiveMQ Classic, durable": {"backend": "activemq"},
    "ActiveMQ Classic, virtual": {"backend": "activemq", "activemq": {"subscriptions": "virtual"}},
    "Artemis": {"backend": "activemq", "activemq": {"flavor": "artemis"}},
}


def pages() -> dict[str, str]:
    """Path from the root -> text of each generated page."""
    return {"docs/capabilities.md": capabilities(), "docs/settings.md": settings()}


# -- capabilities -------------------------------------------------------------------------------------


def capabilities() -> str:
    found = {form: create(Settings(**values)).capabilities for form, values in FORMS.items()}
    meanings = arguments_of(Capabilities)
    names = list(meanings)
    lines = [
        "# Capabilities\n",
        NOTE,
        "The contract's core is the same everywhere. What a backend cannot do beyond it is a capability that is",
        "false: asking for it raises `UnsupportedFeature` when the application starts, or before anything is sent.",
        "`PubSub().capabilities` is the same table in code; the conformance suite tests each cell.\n",
        "| | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for name in names:
        cells = [_cell(name, getattr(each, name)) for each in found.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "By the default settings. `[activemq] scheduler = false` takes `delay` from ActiveMQ Classic, `admin_url`\n"
        "gives it `backlog`.\n",
    ]
    lines += ["| capability | what it says |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in meanings.items()]
    return "\n".join(lines) + "\n"


def _cell(name: str, value: bool | int) -> str:
    if name == "max_payload":
        return f"{value / (1 << 20):g} MiB"
    return "yes" if value else "no"


# -- settings -----------------------------------------------------------------------------------------


def settings() -> str:
    lines = [
        "# All settings\n",
        NOTE,
        "Each can be given in code, in the environment (`PUBSUB_` and the name in capitals, sections divided by `__`),",
        "in `.env`, in the secrets directory or in TOML: see [configuration](configuration.md).\n",
        *_section(Settings),
    ]
    for name, field in Settings.model_fields.items():
        section = _model_of(field)
        if section is not None:
            lines += ["", f"## `[{name}]`\n", *_section(section)]
    lines += ["", "## `[subscriptions.NAME]`\n", *_section(SubscriptionSettings)]
    lines += ["", "## `[rabbitmq.tls]`, `[kafka.tls]`, `[activemq.tls]`\n", *_section(Tls)]
    return "\n".join(lines) + "\n"


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section(model: type[BaseModel]) -> Iterator[str]:
    meanings = arguments_of(model)
    yield "| setting | default | meaning |"
    yield "|---|---|---|"
    for name, field in model.model_fields.items():
        if field.exclude or _model_of(field) is not None:
            continue
        yield f"| `{name}` | {_default(field)} | {meanings[name]} |"


def _default(field: FieldInfo) -> str:
    value = field.get_default()
    if value is None:
        return ""
    if isinstance(value, Path | SecretUrl | SecretStr):
        value = str(value)
    return f"`{json.dumps(value)}`"


# -- docstrings ---------------------------------------------------------------------------------------


def arguments_of(documented: type) -> dict[str, str]:
    """Name -> text of each argument in the docstring of ``documented``; ``a, b: text`` is text of both."""
    text = inspect.getdoc(documented) or ""
    body = re.search(r"Arguments:\n(.*?)(?:\n\S|\Z)", text, re.DOTALL)
    assert body is not None, documented
    found: dict[str, str] = {}
    for line in inspect.cleandoc(body[1]).splitlines():
        named = re.match(r"((?:\w+, )*\w+): (.*)", line)
        if named:
            names = named[1].split(", ")
            found.update(dict.fromkeys(names, named[2]))
        elif line.strip():
            for name in names:
                found[name] += f" {line.strip()}"
    return {name: _markdown(text) for name, text in found.items()}


def _markdown(text: str) -> str:
    text = re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|").rstrip(".")
    return text[:1].upper() + text[1:] + "."


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
