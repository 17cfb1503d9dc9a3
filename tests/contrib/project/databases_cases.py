"""The project with a second database, ``other``, and a second alias of ``PUBSUB``, ``audit``."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from project.social.models import Count, Profile

from pubsub_facade import ConfigError, Message
from pubsub_facade.contrib.django import (
    apublish,
    apublish_many,
    apublish_on_commit,
    publish,
    publish_many,
    publish_many_on_commit,
    publish_on_commit,
    subscriber,
)
from pubsub_facade.contrib.django.models import InboxMark, OutboxMessage
from pubsub_facade.contrib.django.relaying import lag
from pubsub_facade.contrib.django.subscribing import _collected
from pubsub_facade.contrib.django.test import capture, deliver
from pubsub_facade.contrib.outbox import prepare
from pubsub_facade.testing.hub import Published, TestHub

ALIASES = ("default", "audit")

in_transactions = pytest.mark.django_db(databases=["default", "other"])
committed = pytest.mark.django_db(databases=["default", "other"], transaction=True)


@pytest.fixture
def hubs(settings: Any) -> Iterator[dict[str, Published]]:
    """What each alias published; each has a hub of its own."""
    there = {alias: TestHub(f"{alias}-{time.monotonic_ns()}") for alias in ALIASES}
    settings.PUBSUB = {alias: {"url": hub.url} for alias, hub in there.items()}
    yield {alias: Published(hub) for alias, hub in there.items()}
    for hub in there.values():
        hub.forget()


@pytest.fixture
def audited() -> Iterator[list[Any]]:
    """Payloads that a handler of the alias ``audit`` was given; its mark is on ``other``."""
    seen: list[Any] = []

    @subscriber("social.post.*", subscription="analytics", alias="audit", exactly_once="other")
    def audit(payload: Any) -> None:
        seen.append(payload)

    yield seen
    del _collected["audit"]


def topics(database: str) -> list[str]:
    return list(OutboxMessage.objects.using(database).order_by("id").values_list("topic", flat=True))


@committed
def test_the_outbox_is_written_in_the_transaction_of_its_database(hubs: dict[str, Published]) -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="other"):
        publish_on_commit("rolled.back", 1, using="other")
        publish_many_on_commit([Message("rolled.back", 2)], using="other")
        raise ZeroDivisionError
    assert topics("other") == []
    with transaction.atomic():
        with transaction.atomic(using="other"):
            publish_on_commit("a.one", 1, using="other")
            publish_many_on_commit([Message("a.two", 2), Message("a.three", 3)], using="other")
        transaction.set_rollback(True)
    assert topics("other") == ["a.one", "a.two", "a.three"]
    assert topics("default") == []


@committed
def test_async_code_writes_the_outbox_of_a_database(hubs: dict[str, Published]) -> None:
    async def write() -> None:
        await apublish_on_commit("a", 1, using="other")
        await sync_to_async(connections.close_all)()

    asyncio.run(write())
    assert (topics("other"), topics("default")) == (["a"], [])


@committed
def test_a_relay_publishes_the_outbox_of_a_database_by_an_alias(hubs: dict[str, Published]) -> None:
    publish_on_commit("from.default", 1)
    publish_on_commit("from.other", 2, using="other")
    publish_on_commit("from.other", 3, using="other")
    assert asyncio.run(lag()).waiting == 1
    assert asyncio.run(lag("other")).waiting == 2
    assert said("pubsub_relay", "--lag", "--database", "other").startswith("2 wait")
    arguments = ("--database", "other", "--alias", "audit", "--drain", "-v0")
    assert said("pubsub_relay", *arguments) == "published 2\n"
    assert [message.payload for message in hubs["audit"]] == [2, 3]
    assert len(hubs["default"]) == 0
    assert (topics("other"), topics("default")) == ([], ["from.default"])
    assert said("pubsub_relay", "--drain", "-v0") == "published 1\n"
    assert hubs["default"].topics == ["from.default"]
    assert len(hubs["audit"]) == 2


@in_transactions
def test_postgresql_wakes_the_relay_of_each_database() -> None:
    for database in ("default", "other"):
        connection = connections[database]
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SELECT COUNT(*) FROM pg_trigger WHERE tgname = 'pubsub_outbox_notify'")
                assert cursor.fetchone()[0] == 1


@in_transactions
def test_pruning_looks_at_one_database() -> None:
    old = time.time() - 30 * 86400
    for database in ("default", "other"):
        InboxMark.objects.using(database).create(subscription="s", message_id="m", handled=old)
        with capture():
            publish_on_commit("a", 1, using=database)
        OutboxMessage.objects.using(database).update(state=OutboxMessage.State.SENT, due=old)
    assert said("pubsub_prune", "--database", "other") == "deleted 1 marks and 1 sent rows\n"
    assert not InboxMark.objects.using("other").exists()
    assert topics("other") == []
    assert InboxMark.objects.using("default").count() == 1
    assert topics("default") == ["a"]


@in_transactions
@pytest.mark.parametrize("command", ["pubsub_relay", "pubsub_prune"])
def test_a_database_that_is_no_alias_is_told(command: str) -> None:
    with pytest.raises(
        CommandError, match="no database has the alias 'nonesuch': DATABASES has default, other"
    ):
        call_command(command, "--database", "nonesuch")


def said(*command: str) -> str:
    out = io.StringIO()
    call_command(*command, stdout=out)
    return out.getvalue()


@in_transactions
def test_exactly_once_on_a_database_commits_effect_and_mark_there() -> None:
    def count(payload: dict[str, Any]) -> None:
        counted, _ = Count.objects.using("other").get_or_create(author=payload["author"])
        counted.posts += 1
        counted.save()
        if payload["fail"]:
            raise RuntimeError("after the effect")

    subscriber("post", subscription="count", alias="audit", exactly_once="other")(count)
    try:
        with pytest.raises(RuntimeError):
            deliver(prepare(Message("post", {"author": 1, "fail": True}, id="one")), "audit")
        assert not Count.objects.using("other").exists()
        assert not InboxMark.objects.using("other").exists()
        for _ in range(2):
            assert deliver(prepare(Message("post", {"author": 1, "fail": False}, id="one")), "audit") == 1
    finally:
        del _collected["audit"]
    assert Count.objects.using("other").get().posts == 1
    assert InboxMark.objects.using("other").get().message_id == "one"
    assert not InboxMark.objects.using("default").exists()


def test_exactly_once_on_a_database_that_is_not_there_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ConfigError, match=r"exactly_once 'nonesuch' .*default, other"):
        subscriber("a", subscription="s", exactly_once="nonesuch")(lambda payload: None)


@in_transactions
def test_subscriptions_of_two_aliases_with_one_name_mark_apart() -> None:
    counts: list[str] = []

    def of(alias: str) -> None:
        subscriber("mark", subscription="same", alias=alias, exactly_once=True)(
            lambda payload: counts.append(alias)
        )

    of("audit")
    of("more")
    try:
        message = prepare(Message("mark", 1, id="one"))
        for alias in ("audit", "more", "audit", "more"):
            assert deliver(message, alias) == 1
    finally:
        del _collected["audit"], _collected["more"]
    assert counts == ["audit", "more"]


def test_a_mark_s_name_has_room_in_its_column() -> None:
    name = "s" * 100
    subscriber("a", subscription=name, alias="audit")(lambda payload: None)
    try:
        with pytest.raises(ConfigError, match=r"audit:s{100}.*100 characters"):
            subscriber("a", subscription=name, alias="audit", exactly_once=True)(lambda payload: None)
    finally:
        del _collected["audit"]


@in_transactions
def test_capture_looks_at_the_outbox_of_a_database(hubs: dict[str, Published], audited: list[Any]) -> None:
    with capture(using="other") as published:
        publish_on_commit("social.post.created", "other", using="other")
        publish_on_commit("social.post.created", "default")
        publish("social.post.created", "at once", alias="audit")
        assert published.deliver("audit") == 2
    assert sorted(message.payload for message in published) == ["at once", "other"]
    assert [len(there) for there in hubs.values()] == [0, 0]
    assert sorted(audited) == ["at once", "other"]


@in_transactions
def test_changes_of_a_model_are_told_on_the_database_that_was_written_to() -> None:
    with capture(using="other") as published:
        profile = Profile.objects.using("other").create(name="Ada")
        profile.name = "Grace"
        profile.save()
        profile.delete()
    assert published.topics == [f"social.profile.{change}" for change in ("created", "updated", "deleted")]
    assert topics("default") == []


def test_each_alias_publishes_to_its_own_broker(hubs: dict[str, Published]) -> None:
    publish("a", 1, alias="audit")
    publish_many([Message("a", 2)], alias="audit")

    async def run() -> None:
        await apublish("a", 3, alias="audit")
        await apublish_many([Message("a", 4)], alias="audit")

    asyncio.run(run())
    assert [message.payload for message in hubs["audit"]] == [1, 2, 3, 4]
    assert len(hubs["default"]) == 0
    publish("b", 5)
    assert hubs["default"].topics == ["b"]
    with pytest.raises(ConfigError, match="no alias 'nonesuch': it has default, audit"):
        publish("a", 1, alias="nonesuch")


def test_commands_take_an_alias(hubs: dict[str, Published], audited: list[Any]) -> None:
    listed = said("runsubscribers", "--list", "--alias", "audit")
    assert (
        listed.startswith("analytics: social.post.* -> project.databases_cases.audited") or "audit" in listed
    )
    assert len(listed.splitlines()) == 1
    call_command("pubsub", "publish", "social.post.created", "hello", alias="audit")
    assert [message.payload for message in hubs["audit"]] == ["hello"]
    assert len(hubs["default"]) == 0
    with pytest.raises(SystemExit, match="2"):
        call_command("pubsub", "publish", "a", "hello", alias="nonesuch")
