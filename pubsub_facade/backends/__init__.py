"""The drivers, each imported when first asked for: a missing extra costs nothing and says what to install."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Final

from pubsub_facade._settings_errors import nearest
from pubsub_facade.backends.base import Backend
from pubsub_facade.errors import ConfigError
from pubsub_facade.settings import Settings

ENTRY_POINTS: Final = "pubsub_facade.backends"

_BUILT_IN: Final = {
    "memory": ("memory", "MemoryBackend", None),
    "sqlite": ("sqlite", "SqliteBackend", None),
    "rabbitmq": ("rabbitmq", "RabbitmqBackend", "rabbitmq"),
    "kafka": ("kafka", "KafkaBackend", "kafka"),
    "activemq": ("activemq", "ActivemqBackend", "activemq"),
}

FLAVORS: Final = {"artemis": "artemis is backend 'activemq' with flavor 'artemis'"}


def create(settings: Settings) -> Backend:
    """The backend that ``settings.backend`` names, not yet connected.

    Raises ConfigError for an unknown name and for a driver whose extra is not installed.
    """
    return backend_class(settings.backend)(settings)


def backend_class(name: str) -> type[Backend]:
    """The driver class called ``name``: built in, or registered under the entry point group."""
    if name in _BUILT_IN:
        module, attribute, extra = _BUILT_IN[name]
        try:
            found = getattr(import_module(f"pubsub_facade.backends.{module}"), attribute)
        except ImportError as error:
            if extra is None or (error.name or "").startswith("pubsub_facade"):
                raise
            raise ConfigError(
                f"backend {name!r} needs {error.name!r}, which is not installed: "
                f'pip install "pubsub-facade[{extra}]"'
            ) from error
    else:
        entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
        if name not in entries:
            known = sorted({*_BUILT_IN, *entries})
            hint = nearest(name, known)
            raise ConfigError(
                f"unknown backend {name!r}: "
                + (f"{FLAVORS[name]}; " if name in FLAVORS else f"did you mean {hint!r}? " if hint else "")
                + f"known are {', '.join(known)}"
            )
        found = entries[name].load()
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(f"backend {name!r} is registered as {found!r}, which is not a Backend class")
    return found


def known_backends() -> list[str]:
    """Names of all backends, built in and registered."""
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})
