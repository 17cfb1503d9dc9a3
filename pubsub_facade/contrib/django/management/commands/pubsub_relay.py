"""``manage.py pubsub_relay``: publish what was committed to the outbox."""

from __future__ import annotations

import asyncio
import logging
from argparse import ArgumentParser
from contextlib import AsyncExitStack
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import router

from pubsub_facade.cli.errors import code_of
from pubsub_facade.client import AsyncPubSub, set_by_signals
from pubsub_facade.contrib._service import answer_health
from pubsub_facade.contrib.django.clients import DEFAULT, client
from pubsub_facade.contrib.django.management.commands.runsubscribers import _log
from pubsub_facade.contrib.django.models import OutboxMessage, OutboxShard
from pubsub_facade.contrib.django.relaying import lag, store
from pubsub_facade.contrib.django.tables import check_tables, told_in_a_line
from pubsub_facade.contrib.outbox import Relay
from pubsub_facade.errors import PubSubError

log = logging.getLogger("pubsub_facade.outbox")


class Command(BaseCommand):
    """Run one relay; run as many as you like."""

    help = (
        "Publishes what was committed to the outbox, until SIGTERM or Ctrl-C; a later signal ends it at once. Any "
        "number may run at once. A broker or a database that is absent is waited for. Exit codes: 0 stopped or "
        "drained, 1 error, 2 wrong configuration, 3 refused by the broker."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--database", help="alias of the outbox's database")
        parser.add_argument("--alias", default=DEFAULT, help="of the PUBSUB setting")
        parser.add_argument("--lanes", type=int, default=2, help="batches under way at once")
        parser.add_argument("--batch", type=int, default=500, help="rows in one batch")
        parser.add_argument("--max-attempts", type=int, default=10, help="refusals until a row is set aside")
        parser.add_argument("--keep", type=float, default=0, help="seconds that sent rows are kept")
        parser.add_argument("--drain", action="store_true", help="publish what is due now, and end")
        parser.add_argument("--lag", action="store_true", help="say how far behind the outbox is, and end")
        parser.add_argument(
            "--health",
            metavar="[HOST:]PORT",
            help="answer health checks by HTTP: on loopback, unless HOST is given (in a container 0.0.0.0:8080)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        using = options["database"] or router.db_for_write(OutboxMessage)
        check_tables(using, OutboxMessage, OutboxShard)
        try:
            if options["lag"]:
                with told_in_a_line(using):
                    self.stdout.write(str(asyncio.run(lag(using))))
                return
            _log(options["verbosity"])
            backend = client(options["alias"]).settings.backend
            log.info("publishing the outbox of database %r to %s", using, backend)
            published = asyncio.run(self._relay(options))
        except PubSubError as error:
            raise CommandError(str(error), returncode=code_of(error)) from error
        if options["drain"]:
            self.stdout.write(f"published {published}")
        else:
            log.info("stopped; published %d from the outbox of database %r", published, using)

    async def _relay(self, options: dict[str, Any]) -> int:
        stop = asyncio.Event()
        async with AsyncExitStack() as stack:
            stack.enter_context(set_by_signals(stop))
            pubsub = await stack.enter_async_context(AsyncPubSub(client(options["alias"]).settings))
            relay = Relay(
                pubsub,
                store(options["database"], keep=bool(options["keep"])),
                lanes=options["lanes"],
                batch=options["batch"],
                max_attempts=options["max_attempts"],
                keep=options["keep"],
            )
            if options["health"] is not None:
                server = await answer_health(options["health"], lambda: relay.health())
                stack.callback(server.close)
            if options["drain"]:
                return await relay.drain(stop)
            await relay.run(stop)
            return relay.published
