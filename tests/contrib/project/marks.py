"""The inbox in Django, from within a project; run by ``test_django_inbox.py`` in a process of its own per database."""

from __future__ import annotations

import time

from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.test import TestCase, TransactionTestCase
from project.social.models import Count

from pubsub_facade.contrib.django.models import InboxMark
from pubsub_facade.contrib.django.subscribing import first
from pubsub_facade.contrib.django.test import deliver
from pubsub_facade.contrib.outbox import prepare
from pubsub_facade.message import Delivery, Message

ALIKE = (
    *("ab", "aB", "AB"),  # by case
    *("áb", "a\u0301b", "ａｂ"),  # by accent, by composition, by width
    *("ab ", "ab  ", "ab\t"),  # by what is trailing
    *("🙂", "🙃", "straße", "strasse"),
)
"""Ids that one or another collation takes for the same."""


def deliver_twice(ids: tuple[str, ...], author: int) -> None:
    for _ in range(2):
        for id in ids:
            deliver(prepare(Message("social.post.created", {"author": author, "text": "x"}, id=id)))


class Marks(TestCase):
    def test_ids_that_are_almost_the_same_each_have_their_effect(self) -> None:
        deliver_twice(ALIKE, author=1)
        assert Count.objects.get(author=1).posts == len(ALIKE)
        assert set(InboxMark.objects.values_list("message_id", flat=True)) == set(ALIKE)
        assert InboxMark.objects.filter(message_id="aB").count() == 1

    def test_an_id_that_only_foreign_clients_send_is_not_taken_for_another(self) -> None:
        for end in "xy":
            foreign = Delivery(None, 0, "s", "a", b"", id="x" * 200 + end)  # type: ignore[arg-type]
            assert first(foreign)
            assert not first(foreign)


class Migrations(TransactionTestCase):
    def test_a_table_that_is_there_compares_exactly_from_then_on(self) -> None:
        executor = MigrationExecutor(connection)
        executor.migrate([("pubsub_facade", "0001_initial")])
        InboxMark.objects.create(subscription="analytics", message_id="ab", handled=time.time())
        executor = MigrationExecutor(connection)
        executor.migrate(executor.loader.graph.leaf_nodes("pubsub_facade"))
        deliver_twice(ALIKE, author=2)
        assert Count.objects.get(author=2).posts == len(ALIKE) - 1
