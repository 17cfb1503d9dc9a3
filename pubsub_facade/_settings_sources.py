"""Where settings come from: each source read once, its ``url`` taken apart, merged by precedence, and
each value's origin noted. Reads the environment and files; keeps nothing.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dotenv import dotenv_values
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsError

from pubsub_facade._settings_errors import nearest
from pubsub_facade.address import SecretUrl, mask, split_netloc
from pubsub_facade.errors import ConfigError

ORIGINS: Final = "origins"
PREFIX: Final = "pubsub_"
OUTSIDE: Final = frozenset({"config", "env_file", "secrets_dir"})
"""``PUBSUB_`` variables that say where settings are, and are none themselves."""

SECRETS_DIR: Final = "/run/secrets"
_KUBERNETES: Final = re.compile(r"service_(host|port)(_.*)?|port(_.*)?")  # set for a Service named "pubsub"

_origins: ContextVar[dict[str, str]] = ContextVar("origins", default={})  # noqa: B039 - never changed in place


def origin_of(key: str) -> str | None:
    """The source that gave dotted ``key`` when settings were last read in this context."""
    return _origins.get().get(key)


@dataclass
class Layer:
    """One source's values, as nested mappings.

    Arguments:
        values: by field.
        name: of the source, for people.
        spell: dotted key -> how it is written there.
    """

    values: dict[str, Any]
    name: str
    spell: Callable[[str], str] = str


class _Variables(EnvSettingsSource):
    """``PUBSUB_A__B=value`` pairs from anywhere: the environment, ``.env``, files named so."""

    def __init__(self, settings_cls: type[BaseSettings], variables: Mapping[str, str | None]) -> None:
        self._variables = {
            name.lower(): value
            for name, value in variables.items()
            if name.lower().startswith(PREFIX) and name.lower() != PREFIX + ORIGINS
        }
        super().__init__(settings_cls)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._variables


class Sources(PydanticBaseSettingsSource):
    """All sources as one: what pydantic-settings merges is merged already.

    Arguments:
        init: what code gave.
        split_url: takes a URL apart into settings.
    """

    CONFIG: Final = "config_file"

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        init: PydanticBaseSettingsSource,
        split_url: Callable[[str], dict[str, Any]],
    ) -> None:
        super().__init__(settings_cls)
        self._init = init
        self._split_url = split_url

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("all fields come at once from __call__")

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in reversed(self._layers()):
            _merge(values, layer.values)
            for key in _leaves(layer.values):
                origins[key] = f"{layer.name}: {layer.spell(key)}" if layer.spell(key) else layer.name
            self._expand(layer, values, origins)
        _origins.set(origins)
        values[ORIGINS] = origins
        return values

    def _layers(self) -> list[Layer]:
        """From the highest precedence to the lowest."""
        code = {name: _plain(value) for name, value in self._init().items()}
        config = code.pop(self.CONFIG, None)
        environment = {name.lower(): value for name, value in os.environ.items()}
        env_file = Path(environment.get("pubsub_env_file", ".env"))
        secrets = Path(environment.get("pubsub_secrets_dir", SECRETS_DIR))
        return [
            Layer(code, "code"),
            self._variables(dict(os.environ), "environment", str.upper),
            self._variables(dotenv_values(env_file) if env_file.is_file() else {}, str(env_file), str.upper),
            self._variables(_files_in(secrets), str(secrets), str.lower),
            _toml(
                Path(config or environment.get("pubsub_config", "")),
                named=bool(config or environment.get("pubsub_config")),
            ),
        ]

    def _variables(self, variables: Mapping[str, str | None], name: str, case: Callable[[str], str]) -> Layer:
        known = {field for field in self.settings_cls.model_fields if field != ORIGINS}
        for variable in variables:
            lower = variable.lower()
            if not lower.startswith(PREFIX):
                continue
            field = lower.removeprefix(PREFIX).partition("__")[0]
            if field not in known | OUTSIDE and not _KUBERNETES.fullmatch(field):
                hint = nearest(field, known)
                raise ConfigError(
                    f"{name}: {variable} is no setting"
                    + (
                        f": did you mean {case(PREFIX + hint)}?"
                        if hint
                        else f": known are {', '.join(sorted(known))}"
                    )
                )
        try:
            values = _Variables(self.settings_cls, variables)()
        except SettingsError as error:
            raise ConfigError(f"{name}: {error}: give JSON, or one variable per field with '__'") from None
        return Layer(values, name, lambda key: case(PREFIX + key.replace(".", "__")))

    def _expand(self, layer: Layer, values: dict[str, Any], origins: dict[str, str]) -> None:
        """Take this layer's URLs apart into ``values``: its user and password go with its hosts."""
        url = layer.values.get("url")
        if url is not None:
            text = _text(url)
            meant = self._split_url(text)
            named = layer.values.get("backend")
            if named is not None and named != meant["backend"]:
                raise ConfigError(
                    f"{layer.name}: backend {named!r} and url {mask(text)!r} disagree: give one of them"
                )
            if "url" not in meant:
                values.pop("url", None)
            _merge(values, meant)
            for key in _leaves(meant):
                origins[key] = f"{layer.name}: {layer.spell('url')}"
        for section in ("rabbitmq", "activemq"):
            fields = layer.values.get(section)
            if isinstance(fields, Mapping) and fields.get("url") is not None:
                user, password, _ = split_netloc(_text(fields["url"]).partition("://")[2].partition("/")[0])
                for name, value in (("username", user), ("password", password)):
                    if value is not None and name not in fields:
                        values[section][name] = value
                        origins[f"{section}.{name}"] = f"{layer.name}: {layer.spell(section + '.url')}"


def _text(value: Any) -> str:
    if isinstance(value, SecretUrl | SecretStr):
        return value.get_secret_value()
    if not isinstance(value, str):
        raise ConfigError(f"url {value!r} is of type {type(value).__name__}: give a str")
    return value


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        value = _plain(value)
        if isinstance(value, Mapping):
            inner = into.get(name)
            into[name] = dict(inner) if isinstance(inner, Mapping) else {}
            _merge(into[name], value)
        else:
            into[name] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        value = _plain(value)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _files_in(directory: Path) -> dict[str, str | None]:
    """Each ``pubsub_…`` file of a secrets directory as a variable; the last line break is not part of it."""
    if not directory.is_dir():
        return {}
    found: dict[str, str | None] = {}
    for path in sorted(directory.iterdir()):
        if path.name.lower().startswith(PREFIX) and path.is_file():
            try:
                found[path.name] = path.read_text().removesuffix("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"secret {str(path)!r} cannot be read: {error}") from error
    return found


def _toml(path: Path, *, named: bool) -> Layer:
    """The config file: the one named, else ``pubsub.toml`` here, else ``[tool.pubsub]`` here."""
    if not named:
        path = Path("pubsub.toml")
        if not path.is_file():
            path = Path("pyproject.toml")
            if not path.is_file():
                return Layer({}, "no file")
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be used: {error}") from error
    if path.name == "pyproject.toml":
        values = values.get("tool", {}).get("pubsub", {})
        if not isinstance(values, dict):
            raise ConfigError(f"config file {str(path)!r}: tool.pubsub is not a table")
    return Layer(values, str(path))
