"""Where settings come from: each source read once, its ``url`` taken apart, merged by precedence, and
each value's origin noted. Reads the environment and files; keeps nothing.

An address brings its user and password along: one given by a higher source drops those that came inside
a lower source's address, so that no password goes to a host it was not meant for. What a source gives
in fields of its own (``password`` beside ``url``) is not part of an address and stays.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dotenv import dotenv_values
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from pubsub_facade._settings_errors import known_at, meant_by
from pubsub_facade.address import SecretUrl, mask, split_netloc, url_parts
from pubsub_facade.errors import ConfigError

ORIGINS: Final = "origins"
PREFIX: Final = "pubsub_"
OUTSIDE: Final = frozenset({"config", "env_file", "secrets_dir"})
"""``PUBSUB_`` variables that say where settings are, and are none themselves."""

ENV_FILE: Final = ".env"
SECRETS_DIR: Final = "/run/secrets"
_ADDRESSES: Final = {"rabbitmq": "url", "activemq": "url", "kafka": "bootstrap_servers"}
_READS_URL: Final = frozenset({"sqlite", *_ADDRESSES})  # a URL becomes fields of these sections
_KUBERNETES: Final = re.compile(r"service_(host|port)(_.*)?|port(_.*)?")  # set for a Service named "pubsub"

_origins: ContextVar[dict[str, str]] = ContextVar("origins", default={})  # noqa: B039 - never changed in place


def origin_of(key: str) -> str | None:
    """The source that gave dotted ``key`` when settings were last read in this context.

    Where that is not known by itself: the source of what it holds, else of what holds it.
    """
    origins = _origins.get()
    while key not in origins:
        inner = next((origin for name, origin in origins.items() if name.startswith(f"{key}.")), None)
        if inner is not None or "." not in key:
            return inner
        key = key.rpartition(".")[0]
    return origins[key]


@dataclass
class Layer:
    """One source's values, as nested mappings.

    Arguments:
        values: by field.
        name: of the source, for people.
        spelled: dotted key -> how it is written there, where that differs.
    """

    values: dict[str, Any]
    name: str
    spelled: dict[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Source and spelling of dotted ``key``."""
        return f"{self.name}: {self.spelled.get(key, key)}"


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
        self._values: dict[str, Any] = {}
        self._found: dict[str, str] = {}  # origins
        self._by_url: dict[str, set[str]] = {}  # section -> its fields, dotted, that came inside an address

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("all fields come at once from __call__")

    def __call__(self) -> dict[str, Any]:
        self._values, self._found, self._by_url = {}, {}, {}
        for layer in reversed(self._layers()):
            if ORIGINS in layer.values:
                raise ConfigError(f"unknown setting {ORIGINS!r} ({layer.name})")
            self._add(layer)
        self._drop_idle_url()
        _origins.set(self._found)
        return {**self._values, ORIGINS: self._found}

    def _layers(self) -> list[Layer]:
        """From the highest precedence to the lowest."""
        code = {name: _plain(value) for name, value in self._init().items()}
        named_file = code.pop(self.CONFIG, None)
        environment = dict(os.environ)
        env_file = _outside("env_file", environment)
        dotenv = _dotenv(Path(env_file or ENV_FILE), named=bool(env_file))
        secrets = _outside("secrets_dir", environment, dotenv)
        config = named_file or _outside("config", environment, dotenv)
        return [
            Layer(code, "code"),
            self._variables(environment, "environment", str.upper),
            self._variables(dotenv, env_file or ENV_FILE, str.upper),
            self._variables(
                _files_in(Path(secrets or SECRETS_DIR), named=bool(secrets)),
                secrets or SECRETS_DIR,
                str.lower,
            ),
            _toml(Path(config or ""), named=bool(config)),
        ]

    # -- variables: the environment, .env, files named so -------------------------------------------

    def _variables(
        self, variables: Mapping[str, str | None], source: str, case: Callable[[str], str]
    ) -> Layer:
        """``PUBSUB_A__B=value`` pairs as nested mappings; what is no setting is an error."""
        layer = Layer({}, source)
        found = [
            (name.lower().removeprefix(PREFIX).split("__"), name, text)
            for name, text in variables.items()
            if name.lower().startswith(PREFIX) and text is not None
        ]
        for path, name, text in sorted(found, key=lambda each: len(each[0])):
            if path[0] in OUTSIDE or (path[0] not in self._known and _KUBERNETES.fullmatch(path[0])):
                continue
            self._check_name(path, f"{source}: {name}", case)
            value = self._value(path, text, f"{source}: {name}")
            place = layer.values
            for word in path[:-1]:
                if not isinstance(place.get(word), dict):
                    place[word] = {}
                place = place[word]
            if isinstance(value, Mapping) and isinstance(place.get(path[-1]), dict):
                _merge(place[path[-1]], value)
            else:
                place[path[-1]] = value
            for key in _leaves({".".join(path): value}):
                layer.spelled[key] = name
        return layer

    @property
    def _known(self) -> set[str]:
        return known_at(self.settings_cls, [])

    def _check_name(self, path: list[str], where: str, case: Callable[[str], str]) -> None:
        if path[0] not in self._known:
            meant = meant_by("__".join(path), self.settings_cls)
            hint = (
                f"did you mean {case(PREFIX + meant.replace('.', '__'))}?"
                if meant
                else f"known are {', '.join(sorted(self._known))}"
            )
            raise ConfigError(f"{where} is no setting: {hint}")
        if len(path) > 1 and not self._holds_fields(path[:1]):
            raise ConfigError(
                f"{where} is no setting: {path[0]!r} is one value, write {case(PREFIX + path[0])}"
            )

    def _holds_fields(self, path: list[str]) -> bool:
        return path == ["options"] or path == ["subscriptions"] or bool(known_at(self.settings_cls, path))

    def _value(self, path: list[str], text: str, where: str) -> Any:
        """``text``, or what it says as JSON where a whole section stands."""
        if path == ["options"] or (path[0] != "options" and self._holds_fields(path)):
            try:
                value = json.loads(text)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where} stands for a section: give a JSON object, or one variable for each field, "
                    f"as {where.rpartition(' ')[2]}__FIELD"
                )
            return value
        return text

    # -- merging ------------------------------------------------------------------------------------

    def _add(self, layer: Layer) -> None:
        """Put ``layer`` above what is there."""
        fields = dict(layer.values)
        url = fields.pop("url", None)
        if url is not None:
            self._add_url(layer, _text(url))
        for section, name in _ADDRESSES.items():
            given = fields.get(section)
            if isinstance(given, Mapping) and given.get(name) is not None:
                self._add_address(layer, section, name, given)
        _merge(self._values, fields)
        for key in _leaves(fields):
            self._found[key] = layer.origin(key)
            section, _, rest = key.partition(".")
            self._by_url.get(section, set()).discard(rest)

    def _add_url(self, layer: Layer, text: str) -> None:
        """A URL of its own, ``url = …``: it names the backend and fields of that backend's section."""
        try:
            meant = self._split_url(text)
        except ConfigError as error:
            raise ConfigError(f"{error} ({layer.origin('url')})") from None
        section = meant["backend"]
        named = layer.values.get("backend")
        if named is not None and named != section:
            if {named, section} & {"memory", *_READS_URL}:
                raise ConfigError(
                    f"{layer.name}: backend {named!r} and url {mask(text)!r} disagree: give one of them"
                )
            meant["backend"] = named  # a registered driver that takes URLs of other names
        given = layer.values.get(section)
        address = _ADDRESSES.get(section, "path")
        if isinstance(given, Mapping) and given.get(address) is not None:
            raise ConfigError(
                f"{layer.name}: url {mask(text)!r} and {section}.{address} are two addresses: give one of them"
            )
        self._forget(section)
        self._values.pop("url", None)
        _merge(self._values, meant)
        for key in _leaves(meant):
            self._found[key] = layer.origin("url")
        inner = meant.get(section)
        self._by_url[section] = set(_leaves(inner)) if isinstance(inner, Mapping) else set()

    def _add_address(self, layer: Layer, section: str, name: str, given: Mapping[str, Any]) -> None:
        """The address of one section: user and password in it count unless given beside it."""
        self._forget(section)
        if name != "url" or not isinstance(given[name], str | SecretUrl | SecretStr):
            return  # what it is instead is the validator's to say
        user, password, _ = split_netloc(url_parts(_text(given[name])).netloc)
        for field_name, value in (("username", user), ("password", password)):
            if value is not None and field_name not in given:
                _merge(self._values, {section: {field_name: value}})
                self._found[f"{section}.{field_name}"] = layer.origin(f"{section}.{name}")
                self._by_url.setdefault(section, set()).add(field_name)

    def _forget(self, section: str) -> None:
        """Drop what came inside a lower source's address: another address takes its place."""
        for key in self._by_url.pop(section, set()):
            place = self._values[section]
            *outer, last = key.split(".")
            for word in outer:
                place = place[word]
            place.pop(last, None)
            self._found.pop(f"{section}.{key}", None)

    def _drop_idle_url(self) -> None:
        """A URL for another backend than the one in force says nothing."""
        backend = self._values.get("backend", "sqlite")
        url = self._values.get("url")
        if url is not None and (
            backend in _READS_URL or (backend == "memory" and not _text(url).startswith("memory:"))
        ):
            self._values.pop("url", None)
            self._found.pop("url", None)


def _text(value: Any) -> str:
    if isinstance(value, SecretUrl | SecretStr):
        return value.get_secret_value()
    if not isinstance(value, str):
        raise ConfigError(f"url is of type {type(value).__name__}: give a str")
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


# -- files --------------------------------------------------------------------------------------------


def _outside(name: str, *sources: Mapping[str, str | None]) -> str | None:
    """``PUBSUB_CONFIG`` and its like, from the first source that has it; empty is not given."""
    for source in sources:
        for variable, text in source.items():
            if text and variable.lower() == PREFIX + name:
                return text
    return None


def named_config() -> str | None:
    """The config file that ``PUBSUB_CONFIG`` names, in the environment or in ``.env``."""
    environment = dict(os.environ)
    env_file = _outside("env_file", environment)
    return _outside("config", environment, _dotenv(Path(env_file or ENV_FILE), named=bool(env_file)))


def _dotenv(path: Path, *, named: bool) -> dict[str, str | None]:
    if not named and not path.is_file():
        return {}
    if not path.is_file():
        raise ConfigError(f"PUBSUB_ENV_FILE {str(path)!r} is not a file: name one that exists, or unset it")
    try:
        return dotenv_values(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env file {str(path)!r} cannot be read: {error}") from error


def _files_in(directory: Path, *, named: bool) -> dict[str, str | None]:
    """Each ``pubsub_…`` file of a secrets directory as a variable; the last line break is not part of it."""
    if not directory.is_dir():
        if named:
            raise ConfigError(
                f"PUBSUB_SECRETS_DIR {str(directory)!r} is not a directory: name one that exists, or unset it"
            )
        return {}
    found: dict[str, str | None] = {}
    try:
        for path in sorted(directory.iterdir()):
            if path.name.lower().startswith(PREFIX) and path.is_file():
                found[path.name] = path.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"secrets in {str(directory)!r} cannot be read: {_reason(error)}") from error
    return found


def _reason(error: OSError | UnicodeDecodeError) -> str:
    """Why, without the bytes."""
    return str(error) if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"


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
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be used: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be used: {_reason(error)}") from error
    if path.name == "pyproject.toml":
        values = values.get("tool", {}).get("pubsub", {})
        if not isinstance(values, dict):
            raise ConfigError(f"config file {str(path)!r}: tool.pubsub is not a table")
    return Layer(values, str(path))
