"""``manage.py runsubscribers``: the handlers of all installed applications, as one process."""

from __future__ import annotations

import dataclasses
import logging
import sys
from argparse import ArgumentParser
from typing import Any

from django.apps import apps
from django.core.management.base import BaseCommand, CommandError

from pubsub_facade.cli.errors import UNFINISHED, code_of
from pubsub_facade.client import GRACE
from pubsub_facade.contrib import _service
from pubsub_facade.contrib.django.clients import DEFAULT, client
from pubsub_facade.contrib.django.models import InboxMark
from pubsub_facade.contrib.django.reloading import run_with_reloader
from pubsub_facade.contrib.django.subscribing import databases_of_marks, subscribers_of
from pubsub_facade.contrib.django.tables import check_tables
from pubsub_facade.errors import PubSubError
from pubsub_facade.subscribers import Registration, Subscribers


class Command(BaseCommand):
    """Run handlers until SIGTERM or Ctrl-C, then finish what is in hand."""

    help = (
        "Runs the handlers of the subscribers modules of all installed applications. A broker that is absent is "
        "waited for. Exit codes: 0 drained, 1 error, 2 wrong usage or configuration, 3 refused by the broker, "
        "5 the grace time ended before the handlers did."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "names", nargs="*", metavar="SUBSCRIPTION", help="only these subscriptions (default: all)"
        )
        parser.add_argument("--alias", default=DEFAULT, help="of the PUBSUB setting")
        parser.add_argument("--concurrency", type=int, help="handlers at once, for each subscription")
        parser.add_argument(
            "--grace", type=float, default=GRACE, help="seconds that handlers in hand get at the end"
        )
        parser.add_argument("--drain", action="store_true", help="end by itself once nothing waits")
        parser.add_argument(
            "--health",
            metavar="[HOST:]PORT",
            help="answer health checks by HTTP: on loopback, unless HOST is given (in a container 0.0.0.0:8080)",
        )
        parser.add_argument("--list", action="store_true", help="list the handlers, and run none")
        parser.add_argument(
            "--reload", action="store_true", help="start again when code changes (development)"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["drain"] and options["reload"]:
            raise CommandError(
                "--drain ends once nothing waits, and --reload never ends: give one of them", returncode=2
            )
        chosen = _chosen(subscribers_of(options["alias"]).registrations, options["names"])
        if not chosen:
            raise CommandError(_no_handlers(options["alias"]), returncode=2)
        if options["list"]:
            for registration in chosen:
                self.stdout.write(_described(registration))
            return
        if options["concurrency"] is not None:
            if options["concurrency"] < 1:
                raise CommandError("--concurrency is 1 or more", returncode=2)
            chosen = [dataclasses.replace(each, concurrency=options["concurrency"]) for each in chosen]
        _log(options["verbosity"])
        if options["reload"]:
            run_with_reloader(self._run, chosen, options)
        else:
            self._run(chosen, options)

    def _run(self, chosen: list[Registration], options: dict[str, Any]) -> None:
        for using in sorted(databases_of_marks(chosen)):
            check_tables(using, InboxMark)
        try:
            pubsub = client(options["alias"])
            if not pubsub.capabilities.shared:
                self.stderr.write(
                    f"backend {pubsub.settings.backend!r} stays within this process: nothing that other processes "
                    "publish reaches these handlers; choose sqlite on one machine, or a broker"
                )
            if options["concurrency"] is not None:
                for name, tuning in list(pubsub.settings.subscriptions.items()):
                    pubsub.settings.subscriptions[name] = tuning.model_copy(update={"concurrency": None})
            pubsub.include(_of(chosen))
            _service.run(pubsub, grace=options["grace"], drain=options["drain"], health=options["health"])
        except PubSubError as error:
            raise CommandError(str(error), returncode=code_of(error)) from error
        if pubsub.left:
            sys.exit(UNFINISHED)  # the log has told, by subscription


def _of(registrations: list[Registration]) -> Subscribers:
    subscribers = Subscribers()
    subscribers.registrations = registrations
    return subscribers


def _chosen(registrations: list[Registration], names: list[str]) -> list[Registration]:
    known = {each.subscription.name for each in registrations}
    unknown = [name for name in names if name not in known]
    if unknown:
        there = ", ".join(sorted(name for name in known if name)) or "none"
        raise CommandError(f"no handler has subscription {unknown[0]!r}: there are {there}", returncode=2)
    return [each for each in registrations if not names or each.subscription.name in names]


def _no_handlers(alias: str) -> str:
    own = [
        each.name
        for each in apps.get_app_configs()
        if not each.name.startswith(("django.", "pubsub_facade."))
    ]
    of_alias = "" if alias == DEFAULT else f" of alias {alias!r}"
    return (
        f"no handlers{of_alias}: write some in the subscribers.py of an installed application; searched were "
        f"{', '.join(own) or 'none but those of Django'}"
    )


def _described(registration: Registration) -> str:
    subscription = registration.subscription
    facts = [f"concurrency {registration.concurrency}", f"max_attempts {subscription.max_attempts}"]
    if subscription.ordered:
        facts.insert(0, "ordered")
    if subscription.filter:
        facts.append(f"filter {subscription.filter}")
    function = registration.handler.function
    return (
        f"{subscription.name or '(ephemeral)'}: {' '.join(subscription.patterns)} -> "
        f"{function.__module__}.{registration.handler.name} ({', '.join(facts)})"
    )


def _log(verbosity: int) -> None:
    """The package's log on standard error, unless the LOGGING setting has set it up."""
    logger = logging.getLogger("pubsub_facade")
    if verbosity > 0 and not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
