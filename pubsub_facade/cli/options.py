"""The options before the command: which settings are in force, for every command alike."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import click

from pubsub_facade.errors import ConfigError
from pubsub_facade.settings import Settings
from pubsub_facade.sync import PubSub

LOG_FORMAT: Final = "%(asctime)s %(levelname)-7s %(message)s"


@dataclass
class Options:
    """What the command line said before the command. A framework may bring settings of its own by ``load``.

    Arguments:
        load: settings from a config file (or None) and overrides.
        config: the config file; None: the usual places.
        overrides: fields of `Settings` given on the command line.
        debug: tracebacks, and the log from level DEBUG on.
        commands: a framework's own, instead of ours of that name.
    """

    load: Callable[..., Settings] = Settings.load
    config: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    debug: bool = False
    commands: Mapping[str, click.Command] = field(default_factory=dict)
    _handler: logging.Handler | None = field(default=None, init=False, repr=False)  # made by `log`

    def settings(self) -> Settings:
        """The settings in force. Raises ConfigError."""
        try:
            return self.load(self.config, **self.overrides)
        except ConfigError as error:
            text = str(error)
            for name in self.overrides:
                text = text.replace(f"code: {name}", f"command line: --{name}")
            raise ConfigError(text) from error.__cause__

    def client(self) -> PubSub:
        """A client by the settings in force; the caller closes it."""
        return PubSub(self.settings())

    def to_environment(self) -> None:
        """Let clients that are made by imported code see what the command line said."""
        if self.config is not None:
            os.environ["PUBSUB_CONFIG"] = self.config
        if "url" in self.overrides:
            os.environ.pop("PUBSUB_BACKEND", None)
        for name, value in self.overrides.items():
            os.environ[f"PUBSUB_{name.upper()}"] = value

    def log(self, level: int) -> None:
        """Send the log to standard error from ``level`` on, unless the program has set it up already."""
        root = logging.getLogger()
        if not root.handlers:
            logging.basicConfig(format=LOG_FORMAT, stream=sys.stderr)
            self._handler = root.handlers[0]
        if self._handler in root.handlers:
            root.setLevel(logging.DEBUG if self.debug else level)
            logging.getLogger("asyncio").setLevel(max(level, logging.INFO))


pass_options = click.make_pass_decorator(Options)
