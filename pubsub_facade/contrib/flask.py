"""Publish from Flask and handle in Flask: an extension for factories and for several applications in one process.

    pubsub = FlaskPubSub()

    def create_app() -> Flask:
        app = Flask(__name__)
        app.config["PUBSUB"] = "amqp://localhost"      # a URL, or a mapping of settings; else the usual places
        pubsub.init_app(app)
        return app

    @pubsub.subscriber("social.post.*", subscription="analytics")
    def count(post: Post) -> None: ...                 # within the application's context; flask pubsub run

Each application has a client of its own, ``app.extensions["pubsub"]``, with one set of links a process.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

import click
from flask import Flask, Response, current_app
from flask.cli import with_appcontext

from pubsub_facade.cli.errors import UNFINISHED, Failed, guarded
from pubsub_facade.cli.options import Options
from pubsub_facade.cli.root import cli
from pubsub_facade.client import GRACE
from pubsub_facade.contrib import _service
from pubsub_facade.contrib._exactly_once import Effect
from pubsub_facade.errors import ConfigError, ConnectionFailed, SendFailed
from pubsub_facade.handler import Handler
from pubsub_facade.message import Delivery, HeaderValue, Message
from pubsub_facade.settings import Settings
from pubsub_facade.subscribers import DEFAULT_BACKOFF, Registration, Subscribers
from pubsub_facade.subscription import Backoff, Subscription, patterns_of
from pubsub_facade.sync import PubSub

Function = TypeVar("Function", bound=Callable[..., Any])

NAME: Final = "pubsub"
CONFIG: Final = "PUBSUB"


class FlaskPubSub:
    """The extension.

    Arguments:
        app: an application that is there already; else `init_app`.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self._collected: list[tuple[Callable[..., Any], Subscription, int]] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Give ``app`` a client by ``app.config["PUBSUB"]``, and the command ``flask pubsub``.

        A request whose publish fails is answered by 503, unless the application handles the error. Raises
        ConfigError; connects to nothing yet.
        """
        if NAME in app.extensions:
            raise ConfigError(f"application {app.name!r} has an extension {NAME!r} already")
        app.extensions[NAME] = PubSub(load_settings(app.config.get(CONFIG)))
        for error in (SendFailed, ConnectionFailed):
            app.register_error_handler(error, _unavailable)
        app.cli.add_command(_command(self))

    @property
    def client(self) -> PubSub:
        """The client of the current application."""
        found: PubSub = current_app.extensions[NAME]
        return found

    # -- publish ----------------------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        id: str | None = None,
        delay: float = 0,
        timeout: float | None = None,
    ) -> Message:
        """Publish one message for the current application. Arguments and errors: `PubSub.publish`."""
        return self.client.publish(
            topic, payload, key=key, headers=headers, id=id, delay=delay, timeout=timeout
        )

    def publish_many(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Publish messages as one confirmed batch."""
        return self.client.publish_many(messages, timeout=timeout)

    async def apublish(
        self,
        topic: str,
        payload: Any,
        *,
        key: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        id: str | None = None,
        delay: float = 0,
        timeout: float | None = None,
    ) -> Message:
        """`publish` for an async view, on the same links."""
        message = Message(topic, payload, key=key, headers=headers, id=id, delay=delay)
        return (await _service.publish_from(self.client, [message], timeout))[0]

    # -- subscribe --------------------------------------------------------------------------------

    def subscriber(
        self,
        *patterns: str,
        subscription: str | None = None,
        ordered: bool = False,
        filter: str | None = None,
        concurrency: int = 1,
        max_attempts: int = 5,
        backoff: Backoff = DEFAULT_BACKOFF,
    ) -> Callable[[Function], Function]:
        """Collect the decorated function as a handler of every application. See `Subscribers.subscriber`."""
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ConfigError(f"concurrency {concurrency!r} is not a whole number of 1 or more")
        declared = Subscription(subscription, patterns_of(patterns), ordered, filter, max_attempts, backoff)

        def collect(function: Function) -> Function:
            Subscribers().add(
                Registration(Handler(function), declared, concurrency)
            )  # refuses what cannot work
            self._collected.append((function, declared, concurrency))
            return function

        return collect

    def subscribers(self, app: Flask) -> Subscribers:
        """The handlers, each within the context of ``app``: what `run` gives to its client."""
        found = Subscribers()
        for function, declared, concurrency in self._collected:
            found.add(Registration(Handler(_within(app, function)), declared, concurrency))
        return found

    def run(
        self,
        app: Flask,
        *,
        concurrency: int | None = None,
        grace: float = GRACE,
        drain: bool = False,
        health: str | None = None,
    ) -> int:
        """Handle for ``app`` until SIGTERM or SIGINT; returns how many messages were left unfinished.

        Arguments:
            concurrency: handlers at once for each subscriber, instead of what code and settings say.
            grace: seconds that handlers in hand get at the end.
            drain: end by itself once nothing waits.
            health: ``PORT`` or ``HOST:PORT`` that answers health checks.
        """
        pubsub: PubSub = app.extensions[NAME]
        subscribers = self.subscribers(app)
        if not subscribers.registrations:
            raise ConfigError(
                "no handlers: decorate some with @pubsub.subscriber(…), in a module that is imported"
            )
        if concurrency is not None:
            subscribers.registrations = [
                dataclasses.replace(each, concurrency=concurrency) for each in subscribers.registrations
            ]
            for name, tuning in list(pubsub.settings.subscriptions.items()):
                pubsub.settings.subscriptions[name] = tuning.model_copy(update={"concurrency": None})
        pubsub.include(subscribers)
        _service.run(pubsub, grace=grace, drain=drain, health=health)
        return pubsub.left


def load_settings(value: Any, config: str | None = None, **overrides: Any) -> Settings:
    """`Settings` from ``app.config["PUBSUB"]``, with overrides above it. Raises ConfigError."""
    if isinstance(value, Settings):
        return value
    if isinstance(value, str):
        value = {"url": value}
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(
            f"{CONFIG} is of type {type(value).__name__}: give a mapping of settings, a URL, or Settings"
        )
    try:
        return Settings.load(config, **{**(value or {}), **overrides})
    except ConfigError as error:
        raise ConfigError(str(error).replace("code: ", f"{CONFIG}: ")) from error.__cause__


def _unavailable(error: Exception) -> Response:
    """The broker did not take the message in time: the client may try again."""
    current_app.logger.error("a request could not publish: %s", error)
    return Response(
        "the message was not published; try again\n", 503, {"Retry-After": "5"}, mimetype="text/plain"
    )


def _within(app: Flask, function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler in a context of ``app`` of its own for each message, torn down as after a request."""
    effect = Effect(function)
    if effect.is_async:

        async def ahandle(payload: Any, delivery: Delivery) -> None:
            with app.app_context():
                await effect.call(payload, delivery)

        return effect.dress(ahandle)

    def handle(payload: Any, delivery: Delivery) -> None:
        with app.app_context():
            effect.call(payload, delivery)

    return effect.dress(handle)


def _command(extension: FlaskPubSub) -> click.Command:
    """``flask pubsub …``: the command line of the facade by the application's settings; ``run`` needs no MODULE."""

    @click.command("run")
    @click.option(
        "--grace", type=click.FloatRange(min=0), default=GRACE, show_default=True, metavar="SECONDS"
    )
    @click.option(
        "--concurrency",
        type=click.IntRange(min=1),
        metavar="N",
        help="Handlers at once, for each subscriber.",
    )
    @click.option("--drain", is_flag=True, help="End by itself once nothing waits.")
    @click.option("--health", metavar="[HOST:]PORT", help="Answer health checks by HTTP.")
    @click.pass_obj
    def run(options: Options, grace: float, concurrency: int | None, drain: bool, health: str | None) -> None:
        """Run the application's handlers until SIGTERM or Ctrl-C, then finish what is in hand."""
        import logging

        options.log(logging.INFO)
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        if options.config is not None or options.overrides:
            app.extensions[NAME] = options.client()
        left = extension.run(app, concurrency=concurrency, grace=grace, drain=drain, health=health)
        if left:
            raise Failed(UNFINISHED)  # the log has told, by subscription

    @click.command(
        NAME,
        short_help="Publish, tail, run handlers, look after subscriptions.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @with_appcontext
    def pubsub(arguments: tuple[str, ...]) -> None:
        """Everything after the command's name is for `pubsub_facade.cli`."""
        value = current_app.config.get(CONFIG)

        def load(config: str | None = None, **overrides: Any) -> Settings:
            return load_settings(value, config, **overrides)

        sys.exit(guarded(cli, arguments, Options(load=load, commands={"run": run}), f"flask {NAME}"))

    return pubsub
