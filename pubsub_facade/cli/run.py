"""``pubsub run``: find the application's client, start a member for each of its handlers, drain on a signal.

The client's own ``run`` does the work; this file finds it, tunes it by the command line, and turns how it
ended into an exit code.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import os
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from pubsub_facade.cli.errors import MISUSE, UNFINISHED, Failed
from pubsub_facade.cli.options import Options, pass_options
from pubsub_facade.client import GRACE, AsyncPubSub
from pubsub_facade.subscribers import Subscribers
from pubsub_facade.sync import PubSub

log = logging.getLogger("pubsub_facade")

Client = PubSub | AsyncPubSub


@click.command(short_help="Run an application's handlers.")
@click.argument("application", metavar="MODULE:OBJECT")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=GRACE,
    show_default=True,
    metavar="SECONDS",
    help="What handlers in hand get at the end.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Handlers at once, for each subscriber; instead of what code and settings say.",
)
@pass_options
def run(options: Options, application: str, grace: float, concurrency: int | None) -> None:
    """Run the handlers of OBJECT in MODULE until SIGTERM or Ctrl-C, then finish what is in hand.

    OBJECT is a PubSub or AsyncPubSub, a Subscribers, or a function that returns one; it may be left out where the
    module has only one. MODULE is looked for in the working directory first. A broker that is absent is
    waited for. A second signal ends at once: what was not handled comes again.

    \b
    Exit codes: 0 drained, 1 error, 2 wrong usage or configuration, 3 refused by the broker,
    5 the grace time ended before the handlers did.
    """
    options.to_environment()
    found = find(application)
    options.log(logging.INFO)
    if inspect.iscoroutinefunction(found) or not isinstance(found, PubSub | AsyncPubSub | Subscribers):
        found = called(application, found)
    if inspect.isawaitable(found):
        client: Client = asyncio.run(_run_awaited(options, application, found, grace, concurrency))
    else:
        client = tuned(options, application, found, concurrency)
        asyncio.run(client.run(grace)) if isinstance(client, AsyncPubSub) else client.run(grace)
    if client.left:
        raise Failed(UNFINISHED)  # the log has told, by subscription
    log.info("drained")


async def _run_awaited(
    options: Options, application: str, making: Any, grace: float, concurrency: int | None
) -> AsyncPubSub:
    client = tuned(options, application, await making, concurrency)
    if not isinstance(client, AsyncPubSub):
        raise Failed(
            MISUSE,
            f"{application} is async and returns a PubSub: return an AsyncPubSub, or make it a plain def",
        )
    await client.run(grace)
    return client


def find(application: str) -> Any:
    """What ``MODULE:OBJECT`` names. Raises Failed in words that say what was looked for and where."""
    module_name, colon, path = application.partition(":")
    sys.path.insert(0, os.getcwd())
    module = _imported(module_name)
    if not colon:
        return _only_client(module_name, module)
    found: Any = module
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise Failed(MISUSE, f"module {module_name!r} has no {path!r}: {_offered(module)}") from None
    return found


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise Failed(
                MISUSE, f"no module {error.name!r} in {os.getcwd()} or on sys.path: write MODULE:OBJECT"
            ) from error
        raise Failed(MISUSE, f"importing {name!r}: {error}{_place(error)}") from error
    except (ValueError, TypeError) as error:
        if not name or name.startswith("."):
            raise Failed(
                MISUSE, f"{name!r} is no module's name: write MODULE:OBJECT, as app:pubsub"
            ) from error
        raise Failed(MISUSE, f"importing {name!r}: {type(error).__name__}: {error}{_place(error)}") from error
    except Exception as error:  # whatever the application's own code raises
        raise Failed(MISUSE, f"importing {name!r}: {type(error).__name__}: {error}{_place(error)}") from error


def _place(error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    return f" ({os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""


def _clients(module: Any) -> dict[str, Client]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, PubSub | AsyncPubSub)}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _offered(module: Any) -> str:
    names = [f"{module.__name__}:{name}" for name in _clients(module)]
    return f"it has {', '.join(names)}" if names else "it has no PubSub or AsyncPubSub"


def _only_client(name: str, module: Any) -> Client:
    clients = list({id(client): client for client in _clients(module).values()}.values())
    if len(clients) != 1:
        raise Failed(MISUSE, f"which object of {name!r}? {_offered(module)}")
    return clients[0]


def called(application: str, factory: Any) -> Any:
    """What the function makes. Raises Failed where it is none, or cannot be called without arguments."""
    if not callable(factory):
        raise Failed(
            MISUSE,
            f"{application} is {type(factory).__name__}: give a PubSub, an AsyncPubSub, a Subscribers, "
            "or a function that returns one",
        )
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError) as error:
        raise Failed(MISUSE, f"{application} cannot be called without arguments: {error}") from None
    return factory()


def tuned(options: Options, application: str, found: Any, concurrency: int | None) -> Client:
    """The client, with what the command line says above all. Raises Failed for what cannot run."""
    if isinstance(found, Subscribers):
        client: Client = AsyncPubSub(options.settings())
        client.include(found)
    elif isinstance(found, PubSub | AsyncPubSub):
        client = found
    else:
        raise Failed(
            MISUSE, f"{application} returned {type(found).__name__}: return a PubSub or an AsyncPubSub"
        )
    registrations = client.subscribers.registrations
    if not registrations:
        raise Failed(
            MISUSE,
            f"{application} has no handlers: decorate some with @{application.rpartition(':')[2]}.subscriber(…)",
        )
    if concurrency is not None:
        registrations[:] = [dataclasses.replace(each, concurrency=concurrency) for each in registrations]
        client.settings.subscriptions.update(
            {
                name: tuning.model_copy(update={"concurrency": None})
                for name, tuning in client.settings.subscriptions.items()
            }
        )
    return client
