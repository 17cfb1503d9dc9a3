"""``manage.py pubsub …``: the command line of the facade, by Django's settings."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from pubsub_facade.cli.errors import guarded
from pubsub_facade.cli.options import Options
from pubsub_facade.cli.root import cli
from pubsub_facade.contrib.django.clients import DEFAULT, client, settings_of


class Command(BaseCommand):
    """Everything after the command's name is for `pubsub_facade.cli`."""

    help = "Publish, tail, look after subscriptions and dead letters: as the command pubsub, by the PUBSUB setting."
    requires_system_checks: Any = ()

    def run_from_argv(self, argv: list[str]) -> None:
        arguments = argv[2:]
        alias = DEFAULT
        if len(arguments) > 1 and arguments[0] == "--alias":
            alias, arguments = arguments[1], arguments[2:]
        sys.exit(self._run(alias, arguments))

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--alias", default=DEFAULT)
        parser.add_argument("arguments", nargs="*")

    def handle(self, *args: Any, **options: Any) -> None:
        code = self._run(options["alias"], options["arguments"])
        if code:
            sys.exit(code)

    def _run(self, alias: str, arguments: list[str]) -> int:
        def load(config: str | None = None, **overrides: Any) -> Any:
            if config is None and not overrides:
                return client(alias).settings
            return settings_of(alias, config, **overrides)

        return guarded(cli, arguments, Options(load=load), "manage.py pubsub")
