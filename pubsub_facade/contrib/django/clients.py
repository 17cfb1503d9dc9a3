"""The clients of this process, one for each alias of the ``PUBSUB`` setting, made at first use and kept.

``PUBSUB`` is a mapping of `Settings` fields, or a URL, or a mapping of aliases (one is ``"default"``) to these;
without it the usual places say: the environment, and a config file: the one that ``PUBSUB_CONFIG`` names, else
``pubsub.toml`` in the current folder, else in ``BASE_DIR``. The embedded file of a relative path is in ``BASE_DIR``,
unless that path comes from the environment or a file: one project is one broker, from whichever folder it is run.

While tests run the clients are on memory, as Django's e-mail is: a test that forgot about messages sends none.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from django.conf import settings as django_settings
from django.core.signals import setting_changed
from django.dispatch import receiver

from pubsub_facade._settings_errors import known_at, nearest
from pubsub_facade._settings_sources import named_config
from pubsub_facade.address import SecretUrl
from pubsub_facade.errors import ConfigError
from pubsub_facade.settings import CONFIG_FILE, Settings
from pubsub_facade.sync import PubSub

SETTING: Final = "PUBSUB"
DEFAULT: Final = "default"

REAL_IN_TESTS: Final = "PUBSUB_REAL_IN_TESTS"
"""Django setting: the aliases whose clients stay on their broker in tests."""

_clients: dict[str, PubSub] = {}
_overrides = 0  # of the PUBSUB setting that are in force now, by a test
_lock = threading.Lock()


def aliases() -> list[str]:
    """All aliases, the default one first."""
    return list(_by_alias())


def _by_alias() -> dict[str, Any]:
    value = getattr(django_settings, SETTING, None)
    if isinstance(value, Mapping) and DEFAULT in value:
        return {DEFAULT: value[DEFAULT], **value}
    return {DEFAULT: value}


def settings_of(alias: str = DEFAULT, config: str | None = None, **overrides: Any) -> Settings:
    """The settings of an alias, read anew; see `load_settings`. Raises ConfigError, naming the setting."""
    values = _by_alias()
    if alias not in values:
        _check_default(values[DEFAULT])
        raise ConfigError(f"{SETTING} has no alias {alias!r}: it has {', '.join(values)}")
    return load_settings(values[alias], config, **overrides)


def load_settings(value: Any, config: str | None = None, **overrides: Any) -> Settings:
    """`Settings` from one value of the ``PUBSUB`` setting, with overrides above it."""
    if isinstance(value, str):
        value = {"url": value}
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(
            f"{SETTING} is of type {type(value).__name__}: give a mapping of settings, a URL, or aliases"
        )
    _check_default(value)
    if config is None and named_config() is None and not Path(CONFIG_FILE).is_file():
        there = Path(str(getattr(django_settings, "BASE_DIR", ".")), CONFIG_FILE)
        config = str(there) if there.is_file() else None
    try:
        settings = Settings.load(config, **{**(value or {}), **overrides})
    except ConfigError as error:
        raise ConfigError(str(error).replace("code: ", f"{SETTING}: ")) from error.__cause__
    for key, origin in settings.origins.items():
        source, _, name = origin.partition(": ")
        if source == "code" and name.partition(".")[0] not in overrides:
            settings.origins[key] = f"{SETTING}: {name}"
    return _in_base_dir(settings)


def _check_default(value: Any) -> None:
    known = known_at(Settings, [])
    if isinstance(value, Mapping) and value and not any(nearest(str(name), known) for name in value):
        raise ConfigError(f"{SETTING}: aliases need a {DEFAULT!r}: it has {', '.join(map(str, value))}")


def _in_base_dir(settings: Settings) -> Settings:
    """With the embedded file in ``BASE_DIR`` where Django's settings, or the default, name it by a relative path."""
    base = getattr(django_settings, "BASE_DIR", None)
    path = settings.sqlite.path
    origin = settings.origins.get("sqlite.path", "default")
    ours = origin == "default" or origin.startswith(f"{SETTING}: ")
    if settings.backend != "sqlite" or base is None or path.is_absolute() or not ours:
        return settings
    settings.origins["sqlite.path"] = f"{origin}, in BASE_DIR"
    sqlite = settings.sqlite.model_copy(update={"path": Path(str(base)) / path})
    return settings.model_copy(update={"sqlite": sqlite})


def client(alias: str = DEFAULT) -> PubSub:
    """This process's client of an alias; after a fork its child has links of its own. Never close it."""
    found = _clients.get(alias)
    if found is None:
        with _lock:
            found = _clients.get(alias)
            if found is None:
                found = _clients[alias] = PubSub(_in_tests(settings_of(alias), alias))
    return found


def close_all(grace: float = 5.0) -> None:
    """Close the clients made so far; the next use makes new ones."""
    with _lock:
        closing = list(_clients.values())
        _clients.clear()
    for one in closing:
        one.close(grace)


def _in_tests(settings: Settings, alias: str) -> Settings:
    """On memory while Django's test environment is active, unless the test or the alias asks for what is set."""
    if settings.backend == "memory" or _overrides or not _testing() or alias in _real_in_tests():
        return settings
    url = SecretUrl(f"memory://django-tests-{alias}")
    return settings.model_copy(update={"backend": "memory", "url": url, "require_subscribers": False})


def _testing() -> bool:
    """Whether ``setup_test_environment`` has run. Django tells nobody, but keeps what it replaced until its end."""
    there = sys.modules.get("django.test.utils")
    return there is not None and hasattr(there._TestState, "saved_data")


def _real_in_tests() -> Collection[str]:
    named = getattr(django_settings, REAL_IN_TESTS, ())
    wrong = [named] if isinstance(named, str) else [alias for alias in named if alias not in _by_alias()]
    if wrong:
        raise ConfigError(
            f"{REAL_IN_TESTS}: {wrong[0]!r}: give a list of aliases, of {', '.join(_by_alias())}"
        )
    return set(named)


@receiver(setting_changed)
def _forget(*, setting: str, enter: bool, **kwargs: Any) -> None:
    global _overrides
    if setting == SETTING:
        _overrides = max(0, _overrides + (1 if enter else -1))  # one may have begun before this was imported
    if setting in (SETTING, REAL_IN_TESTS):
        close_all()
