"""``manage.py pubsub_prune``: delete old marks of the inbox and old sent rows of the outbox, a few at a time."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand
from django.db import router
from django.db.models import QuerySet

from pubsub_facade.contrib.django.models import InboxMark, OutboxMessage
from pubsub_facade.contrib.django.tables import check_tables, told_in_a_line


class Command(BaseCommand):
    """Run it now and then, as from cron."""

    help = (
        "Deletes inbox marks and sent outbox rows older than --days, in batches, so that nobody waits for it."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--days",
            type=float,
            default=14,
            help="age; a message that comes again after its mark is gone is handled again",
        )
        parser.add_argument("--batch", type=int, default=1000, help="rows deleted by one statement")
        parser.add_argument("--database", help="database alias")

    def handle(self, *args: Any, **options: Any) -> None:
        before = time.time() - options["days"] * 86400
        marks = InboxMark.objects.filter(handled__lt=before).order_by("handled")
        sent = OutboxMessage.objects.filter(state=OutboxMessage.State.SENT, due__lt=before).order_by("due")
        places = [options["database"] or router.db_for_write(rows.model) for rows in (marks, sent)]
        for using, rows in zip(places, (marks, sent), strict=True):
            check_tables(using, rows.model)
        counts = [
            _delete(rows.using(using), options["batch"])
            for using, rows in zip(places, (marks, sent), strict=True)
        ]
        self.stdout.write(f"deleted {counts[0]} marks and {counts[1]} sent rows")


def _delete(rows: QuerySet[Any], batch: int) -> int:
    total = 0
    with told_in_a_line(rows.db):
        while ids := list(rows.all().values_list("pk", flat=True)[:batch]):
            rows.model._base_manager.using(rows.db).filter(pk__in=ids).delete()
            total += len(ids)
    return total
