"""What is wrong with settings, in words: the key, where it came from, the value unless secret, the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pubsub_facade.address import MASK, mask
from pubsub_facade.errors import ConfigError

_SECRET: Final = re.compile(r"(^|_)url$|passw|secret|token|credential|(^|_)key$", re.IGNORECASE)

_SECTION_WANTED: Final = frozenset({"model_type", "model_attributes_type", "dict_type", "mapping_type"})


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds what no text may show."""
    return _SECRET.search(name) is not None


def masked(values: Any, name: str = "") -> Any:
    """``values`` with what a secret's name stands for, and passwords in URLs, replaced by ``***``."""
    if isinstance(values, Mapping):
        return {key: masked(value, str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [masked(value, name) for value in values]
    if values is not None and is_secret(name) and not name.lower().endswith("url"):
        return MASK
    return mask(values) if isinstance(values, str) and "://" in values else values


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name most like ``name``, if any is."""
    found = difflib.get_close_matches(name, known, 1, 0.6)
    return found[0] if found else None


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """A ConfigError with one sentence for each thing that is wrong."""
    return ConfigError("; ".join(_sentence(detail, model) for detail in error.errors(include_url=False)))


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    from pubsub_facade._settings_sources import origin_of

    path = [str(part) for part in detail["loc"] if part != "[key]"]
    key = ".".join(path) or "(all)"
    origin = origin_of(key)
    where = f" ({origin})" if origin else ""
    if detail["type"] == "extra_forbidden":
        known = known_at(model, path[:-1])
        hint = nearest(path[-1], known)
        return f"unknown setting {key!r}{where}: " + (
            f"did you mean {'.'.join([*path[:-1], hint])!r}?"
            if hint
            else f"known are {', '.join(sorted(known))}"
        )
    value = detail.get("input")
    shown = (
        f" {_shorten(mask(str(value)))!r}"
        if isinstance(value, str | int | float) and not any(map(is_secret, path))
        else ""
    )
    if detail["type"] in _SECTION_WANTED:
        return f"setting {key!r}{shown}{where} is a section: give its fields, as {key}.FIELD"
    return f"setting {key!r}{shown}{where} is not usable: {detail['msg'].removeprefix('Value error, ')}"


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def known_at(model: type[BaseModel], path: list[str]) -> set[str]:
    """The fields that the model holds at ``path``; none where a single value stands there."""
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


def meant_by(variable: str, model: type[BaseModel]) -> str | None:
    """The dotted setting that a misspelled variable (without prefix) most likely means."""
    spelled = {key.replace(".", "__"): key for key in _keys(model)}
    found = nearest(variable, spelled)
    return spelled[found] if found else None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
