"""What is wrong with settings, in words: the key, where it came from, the value unless secret, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pubsub_facade.errors import ConfigError

_SECRET = ("url", "password", "key_password")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name most like ``name``, if any is."""
    found = difflib.get_close_matches(name, known, 1, 0.6)
    return found[0] if found else None


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """A ConfigError with one sentence for each thing that is wrong."""
    return ConfigError("; ".join(_sentence(detail, model) for detail in error.errors(include_url=False)))


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    from pubsub_facade._settings_sources import origin_of

    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    origin = origin_of(key)
    where = f" ({origin})" if origin else ""
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        hint = nearest(path[-1], known)
        known_names = ", ".join(sorted(known))
        return f"unknown setting {key!r}{where}: " + (
            f"did you mean {'.'.join([*path[:-1], hint])!r}?" if hint else f"known are {known_names}"
        )
    value = detail.get("input")
    shown = (
        "" if path[-1] in _SECRET or not isinstance(value, str | int | float | bool) else f" {value!r:.80}"
    )
    return f"setting {key!r}{shown}{where} is not usable: {detail['msg'].removeprefix('Value error, ')}"


def _fields_at(model: type[BaseModel], path: list[str]) -> set[str]:
    """The fields that the model holds at ``path``."""
    current: Any = model
    for name in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(name)
            current = None if field is None else field.annotation
        else:  # dict[str, Model]: any name
            current = next(iter(get_args(current)[1:]), None)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return {name for name, field in current.model_fields.items() if not field.exclude}
    return set()
