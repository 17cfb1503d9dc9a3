"""The Django integration, from within a project; run by ``test_django.py`` in a process of its own per database."""

from __future__ import annotations

import asyncio
import io
import re
import threading
import time
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command
from django.core.management.commands import makemigrations
from django.db import connection, connections, transaction
from django.test import Client, TestCase, TransactionTestCase
from project.social.models import Count, Post, Profile

from pubsub_facade import AsyncPubSub, ConfigError, PubSub, TopicError
from pubsub_facade.backends.base import Backlog
from pubsub_facade.backends.memory import MemoryBackend
from pubsub_facade.contrib.django import (
    apublish,
    apublish_on_commit,
    client,
    publish,
    publish_many_on_commit,
    publish_on_commit,
    subscriber,
)
from pubsub_facade.contrib.django.checks import check
from pubsub_facade.contrib.django.models import InboxMark, OutboxMessage
from pubsub_facade.contrib.django.relaying import lag, store
from pubsub_facade.contrib.django.subscribing import _collected, subscribers_of
from pubsub_facade.contrib.django.test import capture, deliver, override
from pubsub_facade.contrib.outbox import Lag, Relay, prepare
from pubsub_facade.errors import AuthenticationFailed, UnsupportedFeature
from pubsub_facade.message import Message
from pubsub_facade.testing.hub import Published


class InATestCase(TestCase):
    """Nothing is ever committed here."""

    def test_what_is_published_at_once_and_by_the_outbox_is_captured(self) -> None:
        with capture() as published:
            publish("social.post.created", {"author": 1, "text": "at once"}, key="1")
            publish_on_commit("social.post.created", {"author": 1, "text": "on commit"}, headers={"n": 1})
            publish_many_on_commit([Message("a.b", 1), Message("a.b", b"\x00\xff")])
        assert [message.payload["text"] for message in published.on("social.#")] == ["at once", "on commit"]
        assert published.one("social.#", text="on commit").headers == {"n": 1}
        assert [message.payload for message in published.on("a.b")] == [1, b"\x00\xff"]

    def test_views_publish_and_handlers_are_delivered_to_in_the_test_s_own_transaction(self) -> None:
        with capture() as published:
            assert self.client.post("/outbox/", {"text": "again", "author": 7}).status_code == 200
            assert published.deliver() == 1
            assert published.topics == ["social.post.created", "social.counted"]
            assert published.deliver() == 0
        assert Count.objects.get(author=7).posts == 1
        assert InboxMark.objects.get().subscription == "analytics"

    def test_a_handler_with_exactly_once_has_its_effect_once(self) -> None:
        message = prepare(Message("social.post.created", {"author": 8, "text": "x"}, id="twin"))
        deliver(message)
        deliver(message)
        assert Count.objects.get(author=8).posts == 1

    def test_an_effect_whose_handler_raises_is_undone(self) -> None:
        with capture() as published, pytest.raises(RuntimeError), transaction.atomic():
            publish_on_commit("social.post.created", {"author": 9, "text": "fail"})
            published.deliver()
        assert not Count.objects.filter(author=9).exists()
        assert not InboxMark.objects.exists()

    def test_async_handlers_are_filtered_and_delivered_to(self) -> None:
        with capture() as published:
            publish("social.post.created", {"author": 1, "text": "x"}, headers={"lang": "en"})
            assert published.deliver() == 2

    def test_what_is_rolled_back_was_never_published(self) -> None:
        with capture() as published:
            self.client.post("/outbox/", {"text": "roll back"})
            assert not len(published)
            assert not Post.objects.exists()

    def test_model_changes_are_published(self) -> None:
        with capture() as published:
            profile = Profile.objects.create(name="Ada")
            profile.name = "Grace"
            profile.save()
            pk = profile.pk
            profile.delete()
        assert published.topics == [
            f"social.profile.{change}" for change in ("created", "updated", "deleted")
        ]
        assert published[0].payload == {"pk": pk, "name": "Ada"}
        assert published[0].key == str(pk)
        assert published[1].payload["name"] == "Grace"

    def test_a_message_that_cannot_be_sent_is_refused_when_it_is_written(self) -> None:
        with capture(), pytest.raises(TopicError):
            publish_on_commit("a..b", 1)
        assert not OutboxMessage.objects.exists()

    def test_override_points_every_alias_elsewhere_and_back(self) -> None:
        with override() as hub:
            assert hub is not None
            here = client()
            publish("a", 1)
        with override():
            assert client() is not here

    def test_pruning_deletes_old_marks_and_sent_rows(self) -> None:
        old = time.time() - 30 * 86400
        InboxMark.objects.bulk_create(
            [InboxMark(subscription="s", message_id=str(n), handled=old) for n in range(25)]
        )
        InboxMark.objects.create(subscription="s", message_id="new", handled=time.time())
        with capture():
            publish_on_commit("a", 1)
            publish_on_commit("a", 2)
        OutboxMessage.objects.filter(pk=OutboxMessage.objects.first().pk).update(state=3, due=old)  # type: ignore[union-attr]
        out = io.StringIO()
        call_command("pubsub_prune", "--batch", "10", stdout=out)
        assert out.getvalue() == "deleted 25 marks and 1 sent rows\n"
        assert InboxMark.objects.get().message_id == "new"
        assert OutboxMessage.objects.get().state == 0

    def test_the_migration_is_complete(self) -> None:
        call_command(makemigrations.Command(), "pubsub_facade", "--check", "--dry-run", stdout=io.StringIO())


class Committed(TransactionTestCase):
    """Real commits, a relay, and members on a memory hub."""

    def test_the_relay_publishes_what_was_committed(self) -> None:
        with override() as hub:
            assert hub is not None
            with transaction.atomic():
                publish_on_commit("a", "never")
                transaction.set_rollback(True)
            with transaction.atomic():
                for number in range(30):
                    publish_on_commit("a", number, key="k")
            assert asyncio.run(lag()).waiting == 30
            published = Published(hub)
            running = self._relay_to(hub)
            try:
                self._until(lambda: len(published) == 30)
                publish_on_commit("a", "woken")
                began = time.monotonic()
                self._until(lambda: len(published) == 31)
                assert time.monotonic() - began < 0.9
            finally:
                running()
            assert [message.payload for message in published][:30] == list(range(30))
            assert not OutboxMessage.objects.exists()

    def _relay_to(self, hub: Any) -> Any:
        stop: list[Any] = []
        ready = threading.Event()

        async def run() -> None:
            event = asyncio.Event()
            stop.append((asyncio.get_running_loop(), event))
            ready.set()
            async with AsyncPubSub(client().settings) as pubsub:
                await Relay(pubsub, store()).run(event)

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        ready.wait(10)

        def end() -> None:
            loop, event = stop[0]
            loop.call_soon_threadsafe(event.set)
            thread.join(20)
            assert not thread.is_alive()

        return end

    @staticmethod
    def _until(true: Any, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.01)

    def test_members_handle_with_the_database(self) -> None:
        with override() as hub:
            assert hub is not None
            members = PubSub(client().settings)
            members.include(subscribers_of())
            members.start()
            for number in range(10):
                publish("social.post.created", {"author": number % 2, "text": "x"}, id=f"p{number}")
                publish("social.post.created", {"author": number % 2, "text": "x"}, id=f"p{number}")
            hub.drain()
            members.close()
            assert sorted(Count.objects.values_list("author", "posts")) == [(0, 5), (1, 5)]
        for one in connections.all(initialized_only=True):
            one.close()

    def test_async_code_publishes_on_the_process_s_links(self) -> None:
        with override() as hub:
            assert hub is not None

            async def run() -> None:
                await asyncio.gather(*(apublish("a", number) for number in range(20)))
                await apublish_on_commit("b", 1)
                await sync_to_async(connections.close_all)()

            for _ in range(2):  # two event loops, one client
                asyncio.run(run())
            assert len(Published(hub)) == 40
            assert client()._client._supervisor.attempts == 1
        assert OutboxMessage.objects.count() == 2


class Admin(TestCase):
    """Who may see and do what."""

    def _user(self, *permissions: str) -> Client:
        user = User.objects.create_user(f"u{User.objects.count()}", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        browser = Client()
        browser.force_login(user)
        return browser

    def _set_aside(self) -> OutboxMessage:
        with capture():
            publish_on_commit("a.b", {"x": "<b>"}, key="k")
        OutboxMessage.objects.update(state=4, attempts=10, error="the broker said <no>")
        return OutboxMessage.objects.get()

    def test_the_outbox_is_read_only_and_its_actions_are_guarded(self) -> None:
        row = self._set_aside()
        where = "/admin/pubsub_facade/outboxmessage/"
        reader = self._user("view_outboxmessage")
        page = reader.get(where).content.decode()
        assert "the broker said &lt;no&gt;" in page
        assert "publish_again" not in page
        assert reader.get(f"{where}{row.pk}/change/").status_code == 200
        assert reader.get(f"{where}add/").status_code == 403
        reader.post(where, {"action": "discard", "_selected_action": [row.pk]})
        assert OutboxMessage.objects.get().state == 4
        self._user("view_outboxmessage", "retry_outboxmessage").post(
            where, {"action": "publish_again", "_selected_action": [row.pk]}
        )
        row = OutboxMessage.objects.get()
        assert (row.state, row.attempts, row.error) == (0, 0, "")
        keeper = self._user("view_outboxmessage", "discard_outboxmessage")
        keeper.post(where, {"action": "discard", "_selected_action": [row.pk]})
        assert OutboxMessage.objects.count() == 1  # it is to be published: not discarded
        OutboxMessage.objects.update(state=4)
        keeper.post(where, {"action": "discard", "_selected_action": [row.pk]})
        assert not OutboxMessage.objects.exists()

    def test_dead_letters_are_shown_replayed_and_purged_by_those_who_may(self) -> None:
        where = "/admin/pubsub_facade/deadletter/"
        with override() as hub:
            assert hub is not None
            self._make_dead_letters(hub)
            letters = client().dead_letters("notifications")
            ids = [letter.id for letter in letters]
            form = {"subscription": "default:notifications", "ids": ids[:1]}
            reader = self._user("view_deadletter")
            page = reader.get(f"{where}?subscription=default:notifications").content.decode()
            assert ids[0] in page
            assert "&lt;script&gt;" in page
            assert "Replay" not in page
            assert self._user().get(where).status_code == 403
            assert reader.post(f"{where}act/", {**form, "verb": "purge"}).status_code == 403
            assert letters.count() == 2
            keeper = self._user("view_deadletter", "replay_deadletter", "purge_deadletter")
            assert keeper.post(f"{where}act/", {**form, "verb": "replay"}).status_code == 302
            assert letters.count() == 1
            assert client().backlog("notifications").waiting == 1
            keeper.post(f"{where}act/", {**form, "ids": ids[1:], "verb": "purge"})
            assert letters.count() == 0
            assert keeper.get(f"{where}act/").status_code == 405

    def test_the_index_counts_the_dead_letters_of_each_subscription(self) -> None:
        reader = self._user("view_deadletter")
        with override() as hub:
            assert hub is not None
            self._make_dead_letters(hub)
            assert self._index(reader) == ["default:analytics (0)", "default:notifications (2)"]
            with patch.object(MemoryBackend, "inspect", AsyncMock(return_value=Backlog(0, 0, None, None))):
                assert self._index(reader) == ["default:analytics", "default:notifications"]
            refused = AsyncMock(side_effect=UnsupportedFeature("memory", "backlog", "set admin_url"))
            with patch.object(MemoryBackend, "inspect", refused):
                assert self._index(reader) == ["default:analytics", "default:notifications"]
            away = AsyncMock(side_effect=AuthenticationFailed("<refused>"))
            with patch.object(MemoryBackend, "inspect", away):
                assert self._index(reader) == ["default:analytics", "default:notifications"]
                assert away.await_count == 1  # it is not asked for the second one
                assert "default: &lt;refused&gt;" in self._page

    def _index(self, reader: Client) -> list[str]:
        """Each subscription as the page tells it."""
        self._page = reader.get("/admin/pubsub_facade/deadletter/").content.decode()
        return re.findall(r">(default:\w+(?: \(\d+\))?)", self._page.replace("</a>", ""))

    def _make_dead_letters(self, hub: Any) -> None:
        with PubSub(client().settings) as members:

            @members.subscriber("a", subscription="notifications", max_attempts=1)
            def fail(payload: str) -> None:
                raise ValueError(payload)

            members.start()
            publish("a", "<script>")
            publish("a", "two")
            hub.drain()
            deadline = time.monotonic() + 5
            while members.dead_letters("notifications").count() < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_checks_tell_what_is_wrong_without_a_broker(settings: Any) -> None:
    settings.PUBSUB = {"backend": "kafka", "kafka": {"bootstrap_servers": ["127.0.0.1:1"]}}
    assert check(None) == []
    settings.PUBSUB = {"backend": "rabbitmq", "rabbit": {}}
    (error,) = check(None)
    assert error.id == "pubsub_facade.E001"
    assert "PUBSUB" in error.msg
    assert "rabbitmq" in error.msg
    settings.PUBSUB = {"backend": "memory"}
    (warning,) = check(None)
    assert warning.id == "pubsub_facade.W001"
    settings.PUBSUB = {"default": {"backend": "sqlite"}, "other": "kafka://h:1"}
    subscriber("a", alias="elsewhere")(lambda payload: None)
    try:
        assert {found.id for found in check(None)} == {"pubsub_facade.E002"}
    finally:
        del _collected["elsewhere"]
    settings.PUBSUB = 5
    assert check(None)[0].id == "pubsub_facade.E001"


def test_an_async_handler_cannot_be_exactly_once() -> None:
    async def handle(payload: int) -> None: ...

    with pytest.raises(ConfigError, match="plain def"):
        subscriber("a", subscription="s", exactly_once=True)(handle)


def test_runsubscribers_lists_handlers() -> None:
    out = io.StringIO()
    call_command("runsubscribers", "--list", stdout=out)
    assert out.getvalue().splitlines() == [
        "analytics: social.post.* -> project.social.subscribers.count (concurrency 2, max_attempts 5)",
        "notifications: social.post.* -> project.social.subscribers.notify "
        "(concurrency 1, max_attempts 5, filter lang = 'en')",
    ]
    with pytest.raises(CommandError, match="there are analytics, notifications"):
        call_command("runsubscribers", "nonesuch", "--list")


def test_drain_and_reload_are_no_pair() -> None:
    with pytest.raises(CommandError, match=r"--drain ends .* --reload never ends"):
        call_command("runsubscribers", "--drain", "--reload")


@pytest.mark.django_db
def test_the_trigger_exists_on_postgresql() -> None:
    if connection.vendor != "postgresql":
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM pg_trigger WHERE tgname = 'pubsub_outbox_notify'")
        assert cursor.fetchone()[0] == 1


@pytest.mark.django_db(transaction=True)
def test_several_relays_publish_each_row_once_and_each_key_in_order() -> None:
    with override():
        publish_many_on_commit([Message("a", n, key=str(n % 3)) for n in range(100)])
        settings = client().settings

        async def drain() -> list[int]:
            async with AsyncPubSub(settings) as pubsub:
                return await asyncio.gather(*(Relay(pubsub, store(), batch=10).drain() for _ in range(3)))

        with client().subscribe("a", subscription="s") as stream:
            counts = asyncio.run(drain())
            received = []
            for _ in range(sum(counts)):
                delivery = stream.receive(5)
                received.append(delivery.payload)
                delivery.ack()
            with pytest.raises(TimeoutError):
                stream.receive(0.05)
        assert sorted(received) == list(range(100))
        for key in range(3):
            assert [number for number in received if number % 3 == key] == list(range(key, 100, 3))
        assert not OutboxMessage.objects.exists()
        assert asyncio.run(lag()) == Lag(0, 0, None)
