"""The project with a second application, ``project.mail``, and what applications declare."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction
from django.db.models import F
from django.db.models.signals import post_delete, post_save
from django.test import TestCase, TransactionTestCase
from django.utils import translation
from django.utils.translation import gettext_lazy
from project.mail.models import Draft, Letter, Note
from project.social.models import Count, Post

from pubsub_facade import ConfigError, Message, MessageError, TopicError
from pubsub_facade.backends.memory import MemoryBackend
from pubsub_facade.contrib.django import (
    apublish,
    apublish_many,
    publish,
    publish_many,
    publish_model_changes,
    publish_on_commit,
    subscriber,
)
from pubsub_facade.contrib.django.checks import check
from pubsub_facade.contrib.django.models import OutboxMessage
from pubsub_facade.contrib.django.subscribing import _collected, subscribers_of
from pubsub_facade.contrib.django.test import capture, override


def listed(*names: str) -> list[str]:
    out = io.StringIO()
    call_command("runsubscribers", *names, "--list", stdout=out)
    return [line.partition(":")[0] for line in out.getvalue().splitlines()]


def test_the_handlers_of_each_installed_application_are_found() -> None:
    assert sorted(listed()) == ["analytics", "mail", "notifications"]
    assert listed("mail") == ["mail"]


class Committing(TransactionTestCase):
    """`capture` where transactions end."""

    def test_what_is_committed_is_captured_and_delivered_to_every_application(self) -> None:
        with capture() as published:
            with transaction.atomic():
                publish_on_commit("social.post.created", {"author": 1, "text": "committed"})
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                publish_on_commit("social.post.created", {"author": 1, "text": "rolled back"})
                raise ZeroDivisionError
            publish("social.post.created", {"author": 1, "text": "at once"})
            assert published.deliver() == 4
            assert published.deliver() == 0
            publish_on_commit("social.post.created", {"author": 1, "text": "later"})
            assert published.deliver() == 2
        publish_on_commit("social.post.created", {"author": 1, "text": "afterwards"})
        assert [message.payload["text"] for message in published] == ["committed", "at once", "later"]
        assert Count.objects.get().posts == 3
        assert sorted(note.text for note in Note.objects.all()) == ["at once", "committed", "later"]

    def test_the_next_test_captures_nothing_of_it(self) -> None:
        with capture() as published:
            assert len(published) == 0


@pytest.fixture
def unconnected() -> Iterator[None]:
    """`Draft` and `Letter` as they were."""
    kept = [(signal, list(signal.receivers)) for signal in (post_save, post_delete)]
    yield
    for signal, receivers in kept:
        signal.receivers = receivers
        signal.sender_receivers_cache.clear()


@pytest.mark.django_db
@pytest.mark.usefixtures("unconnected")
class TestModelChanges:
    """The options of `publish_model_changes`."""

    def test_payload_and_key_are_made_by_functions(self) -> None:
        publish_model_changes(
            Draft, "draft", payload=lambda draft: [draft.text, draft.pk], key=lambda draft: draft.text[0]
        )
        with capture() as published:
            draft = Draft.objects.create(text="hello")
            pk = draft.pk
            draft.delete()
        assert [(each.topic, each.payload, each.key) for each in published] == [
            ("draft.created", ["hello", pk], "h"),
            ("draft.deleted", ["hello", pk], "h"),
        ]

    def test_a_rollback_publishes_nothing(self) -> None:
        publish_model_changes(Draft, "draft")
        kept = Draft.objects.create(text="kept")
        with capture() as published:
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                Draft.objects.create(text="never")
                kept.text = "never"
                kept.save()
                kept.delete()
                raise ZeroDivisionError
            assert len(published) == 0
            Draft.objects.create(text="after all")
        assert [each.payload["text"] for each in published] == ["after all"]

    def test_what_a_fixture_loads_is_not_told(self, tmp_path: Any) -> None:
        publish_model_changes(Draft, "draft")
        file = tmp_path / "drafts.json"
        file.write_text('[{"model": "mail.draft", "pk": 7, "fields": {"text": "loaded"}}]')
        with capture() as published:
            call_command("loaddata", str(file), "-v0")
        assert Draft.objects.get(pk=7).text == "loaded"
        assert len(published) == 0

    def test_fields_of_every_kind_become_json(self) -> None:
        publish_model_changes(Letter, "letter")
        post = Post.objects.create(author=1, text="x")
        with capture() as published:
            letter = Letter.objects.create(
                about=post, data={"seen": [1, None]}, sent=datetime(2026, 1, 2, tzinfo=UTC)
            )
        assert published.one().payload == {
            "pk": letter.pk,
            "id": letter.pk,
            "about_id": post.pk,
            "data": {"seen": [1, None]},
            "stamp": base64.b64encode(b"\x00\xff").decode(),
            "attached": "attached.txt",
            "cost": "1.20",
            "sent": "2026-01-02T00:00:00Z",
            "copies": 1,
        }

    def test_a_relation_is_told_by_its_key_and_a_property_by_its_value(self) -> None:
        publish_model_changes(Letter, "letter", fields=["about", "total"])
        post = Post.objects.create(author=1, text="x")
        with capture() as published:
            letter = Letter.objects.create(about=post, cost=1.5, copies=2)
        assert published.one().payload == {"pk": letter.pk, "about": post.pk, "total": 3.0}

    def test_a_value_that_the_database_computes_is_told_as_it_is_stored(self) -> None:
        publish_model_changes(Letter, "letter", fields=["copies"])
        letter = Letter.objects.create(about=Post.objects.create(author=1, text="x"))
        with capture() as published:
            letter.copies = F("copies") + 1
            letter.save()
        assert published.one("letter.updated").payload == {"pk": letter.pk, "copies": 2}

    def test_a_property_without_a_json_form_is_named(self) -> None:
        publish_model_changes(Letter, "letter", fields=["envelope"])
        post = Post.objects.create(author=1, text="x")
        with capture(), pytest.raises(MessageError, match=r"Letter\.envelope of type object .*payload"):
            Letter.objects.create(about=post)

    def test_a_misspelled_field_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"'autor'.* Post .*did you mean 'author'\?"):
            publish_model_changes(Post, "post", fields=["autor"])
        with pytest.raises(ConfigError, match=r"'totl'.* Letter .*did you mean 'total'\?"):
            publish_model_changes(Letter, "letter", fields=["totl"])
        with pytest.raises(ConfigError, match=r"fields 'text' is a str.*\['text'\]"):
            publish_model_changes(Draft, "draft", fields="text")

    def test_what_cannot_be_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"'txet'.*Draft.*id, text; or give payload"):
            publish_model_changes(Draft, "draft", fields=["txet"])
        with pytest.raises(ConfigError, match=r"'letter_set'"):
            publish_model_changes(Post, "post", fields=["letter_set"])
        with pytest.raises(ConfigError, match="not both"):
            publish_model_changes(Draft, "draft", fields=["text"], payload=lambda draft: 1)
        with pytest.raises(TopicError):
            publish_model_changes(Draft, "a..b")
        with capture() as published:
            Draft.objects.create(text="not told")
        assert len(published) == 0


def test_a_handler_without_a_subscription_name_is_warned_of() -> None:
    @subscriber("social.post.*")
    def forgetful(payload: Any) -> None: ...

    try:
        (warning,) = [found for found in check(None) if found.id == "pubsub_facade.W002"]
    finally:
        registrations = subscribers_of().registrations
        assert registrations.pop().handler.name.endswith("forgetful")
    assert "forgetful" in warning.msg
    assert 'subscription="NAME"' in warning.hint
    assert not [found for found in check(None) if found.id == "pubsub_facade.W002"]


@pytest.fixture
def registrations() -> Iterator[None]:
    """The handlers are as they were at the end."""
    kept = list(subscribers_of().registrations)
    yield
    subscribers_of().registrations[:] = kept


def warnings(id: str) -> list[Any]:
    return [found for found in check(None) if found.id == f"pubsub_facade.{id}"]


@pytest.mark.usefixtures("registrations")
def test_two_functions_that_share_a_subscription_s_messages_are_warned_of() -> None:
    @subscriber("a", subscription="shared")
    def one(payload: Any) -> None: ...

    @subscriber("b", subscription="alone")
    def alone(payload: Any) -> None: ...

    subscriber("a", subscription="shared")(one)  # the same again: more hands, as wished
    assert warnings("W003") == []

    @subscriber("a", subscription="shared", exactly_once=True)
    def other(payload: Any) -> None: ...

    (warning,) = warnings("W003")
    assert "'shared'" in warning.msg
    assert f"{__name__}.test_two_functions" in warning.msg
    assert ".one" in warning.msg
    assert ".other" in warning.msg
    assert "each message goes to one of them" in warning.msg
    assert "subscription of its own" in warning.hint


@pytest.mark.usefixtures("registrations")
def test_settings_of_a_subscription_that_no_handler_has_are_warned_of(settings: Any) -> None:
    settings.PUBSUB = {
        "backend": "sqlite",
        "subscriptions": {
            "analytic": {"concurrency": 2},
            "mail": {"concurrency": 2},
            "xyz": {"max_attempts": 1},
            "ahead": {"topics": ["a"]},
        },
    }
    near, far = warnings("W004")
    assert "'analytic'" in near.msg
    assert near.hint == "did you mean 'analytics'?"
    assert "'xyz'" in far.msg
    assert far.hint == "handlers have analytics, mail, notifications"
    subscribers_of().registrations.clear()  # of a process that only publishes
    assert warnings("W004") == []


@pytest.mark.parametrize("hint", [Post, Post | None, list[Post]])
def test_a_django_model_as_payload_is_refused_with_the_remedy(hint: Any) -> None:
    def handle(post: Any) -> None: ...

    handle.__annotations__["post"] = hint
    with pytest.raises(
        ConfigError, match=r"handle wants the Django model Post.*pydantic model, a dataclass or dict"
    ):
        subscriber("a", subscription="s")(handle)


def test_an_annotation_that_cannot_be_read_is_told_in_its_own_words() -> None:
    def handle(post: NoSuchName) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigError, match=r"annotations of handler .*handle cannot be read"):
        subscriber("a", subscription="s")(handle)


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize("option", ["--list", "--drain"])
def test_no_handlers_are_told_with_where_they_were_sought(option: str) -> None:
    subscribers_of().registrations.clear()
    with pytest.raises(
        CommandError, match=r"no handlers: .*searched were project\.social, project\.mail$"
    ) as raised:
        call_command("runsubscribers", option)
    assert raised.value.returncode == 2
    with pytest.raises(CommandError, match="no handlers of alias 'audit'"):
        call_command("runsubscribers", option, "--alias", "audit")


def test_handlers_on_memory_are_told_that_nothing_reaches_them(settings: Any) -> None:
    settings.DEBUG = True
    told = io.StringIO()
    with override():
        call_command("runsubscribers", "notifications", "--drain", stderr=told)
    assert "'memory' stays within this process: nothing that other processes publish" in told.getvalue()


@dataclass
class Greeting:
    text: Any


@pytest.mark.django_db
def test_lazy_translations_are_published_as_text() -> None:
    lazy = gettext_lazy("Monday")
    payloads = [lazy, {"on": [lazy]}, Greeting(lazy)]
    wanted = ["Montag", {"on": ["Montag"]}, {"text": "Montag"}]

    async def run() -> None:
        with translation.override("de"):
            await apublish("async", payloads[1], headers={"n": 1}, key="k")
            await apublish_many([Message("async", b"\xff"), Message("async", lazy)])

    with translation.override("de"), capture() as published:
        for payload in payloads:
            publish("at.once", payload, key="k")
            publish_on_commit("on.commit", payload, id=f"id-{payloads.index(payload)}")
        publish_many(iter([Message("many", lazy), Message("many", b"\xff")]))
        asyncio.run(run())
        with pytest.raises(MessageError, match="payload of type list cannot become JSON"):
            publish("at.once", [lazy, object()])
        with pytest.raises(TopicError):
            publish("..", lazy)
    assert [message.payload for message in published.on("at.once")] == wanted
    assert [message.payload for message in published.on("on.commit")] == wanted
    assert [message.id for message in published.on("on.commit")] == ["id-0", "id-1", "id-2"]
    assert [message.payload for message in published.on("many")] == ["Montag", b"\xff"]
    assert [message.payload for message in published.on("async")] == [wanted[1], b"\xff", "Montag"]
    assert (published.on("async")[0].headers, published.on("async")[0].key) == ({"n": 1}, "k")


def test_required_subscribers_are_an_error_where_the_driver_cannot_tell(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PUBSUB = {"backend": "sqlite", "require_subscribers": True}
    assert check(None) == []

    whole = MemoryBackend.capabilities.fget
    assert whole is not None
    careless = property(lambda driver: replace(whole(driver), require_subscribers=False))
    monkeypatch.setattr(MemoryBackend, "capabilities", careless)
    settings.PUBSUB = {"backend": "memory", "require_subscribers": True}
    (error,) = check(None)
    assert error.id == "pubsub_facade.E001"
    assert "require_subscribers" in error.msg


class Untouched(TestCase):
    """The rest of the project is as it was."""

    def test_nothing_is_left(self) -> None:
        assert set(_collected) == {"default"}
        assert not OutboxMessage.objects.exists()
