"""``pubsub`` itself: the commands by name, each imported when it is used, and the options before them."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Final

import click

from pubsub_facade import __version__
from pubsub_facade._settings_errors import nearest
from pubsub_facade.cli.options import Options

COMMANDS: Final = {
    "publish": "publish",
    "tail": "tail",
    "run": "run",
    "config": "config",
    "ping": "subscriptions",
    "doctor": "doctor",
    "declare": "subscriptions",
    "delete": "subscriptions",
    "backlog": "subscriptions",
    "seek": "subscriptions",
    "dead": "dead",
}

RUNS_BY: Final = {"manage.py pubsub": "manage.py runsubscribers"}
"""Programs whose handlers are run by a command of its own."""

CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """The commands, in the order one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if name != "run" or ctx.command_path not in RUNS_BY]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        options = ctx.find_object(Options)
        if options is not None and cmd_name in options.commands:
            return options.commands[cmd_name]
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = getattr(import_module(f"pubsub_facade.cli.{module}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] == "run" and ctx.command_path in RUNS_BY:
            raise click.UsageError(
                f"{ctx.command_path} runs no handlers: use {RUNS_BY[ctx.command_path]}", ctx
            )
        if args and args[0] not in COMMANDS:
            hint = nearest(args[0], COMMANDS)
            known = f"did you mean {hint!r}?" if hint else f"known are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}: {known}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.option("--config", metavar="FILE", help="Config file, instead of pubsub.toml or pyproject.toml here.")
@click.option("--url", metavar="URL", help="Broker's address. With a password in it, use PUBSUB_URL instead.")
@click.option("--namespace", metavar="NAME", help="Prefix of every name on the broker.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the whole log.")
@click.version_option(__version__, "--version", message="pubsub-facade %(version)s")
@click.pass_obj
def cli(options: Options, config: str | None, url: str | None, namespace: str | None, debug: bool) -> None:
    """Publish, subscribe and look after subscriptions on whichever broker the settings name.

    Settings come from the options here, the environment (PUBSUB_…), .env, the secrets directory and
    pubsub.toml; `pubsub config show` says which is from where.
    """
    options.debug = debug
    options.config = config if config is not None else options.config
    given = {"url": url, "namespace": namespace}
    options.overrides.update({name: value for name, value in given.items() if value is not None})
    if debug or sys.stderr.isatty():
        options.log(logging.WARNING)
    else:
        logging.getLogger("pubsub_facade").addHandler(logging.NullHandler())
