"""The admin's view of the outbox and of the dead letters: read-only, but for actions that a permission guards."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse

from pubsub_facade.contrib.django.clients import aliases, client
from pubsub_facade.contrib.django.models import DeadLetter, OutboxMessage
from pubsub_facade.contrib.django.subscribing import subscribers_of
from pubsub_facade.errors import PubSubError, UnsupportedFeature
from pubsub_facade.sync import SyncDeadLetters

SHOWN: Final = 100  # dead letters on one page
APP: Final = "pubsub_facade"


if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:
    ModelAdmin = admin.ModelAdmin


class ReadOnly(ModelAdmin):
    """Nothing is added, changed or deleted by a form."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(OutboxMessage)
class OutboxAdmin(ReadOnly):
    """The outbox; what was set aside can be published again or discarded."""

    list_display = ("topic", "message_id", "message_key", "state", "attempts", "created_at", "error")
    list_filter = ("state",)
    search_fields = ("topic", "message_id", "message_key")
    fields = (
        "topic", "message_id", "message_key", "headers", "content_type", "payload", "state", "attempts", "created_at",
        "error",
    )  # fmt: skip
    actions = ("publish_again", "discard")
    ordering = ("-id",)
    show_full_result_count = False

    def has_retry_permission(self, request: HttpRequest) -> bool:
        """Who may use `publish_again`."""
        return _may(request, "retry_outboxmessage")

    def has_discard_permission(self, request: HttpRequest) -> bool:
        """Who may use `discard`."""
        return _may(request, "discard_outboxmessage")

    @admin.action(description="Publish again (those set aside)", permissions=["retry"])
    def publish_again(self, request: HttpRequest, rows: QuerySet[OutboxMessage]) -> None:
        """Back to the relay, with all attempts before them."""
        states = (OutboxMessage.State.FAILED, OutboxMessage.State.RETRY)
        count = rows.filter(state__in=states).update(
            state=OutboxMessage.State.PENDING, attempts=0, due=time.time(), error=""
        )
        self.message_user(request, f"{count} will be published again.", messages.SUCCESS)

    @admin.action(description="Discard for good (those set aside)", permissions=["discard"])
    def discard(self, request: HttpRequest, rows: QuerySet[OutboxMessage]) -> None:
        """Delete what was set aside; anything else stays."""
        count, _ = rows.filter(state=OutboxMessage.State.FAILED).delete()
        self.message_user(request, f"{count} discarded.", messages.SUCCESS)


@admin.register(DeadLetter)
class DeadLetterAdmin(ReadOnly):
    """The dead letters of the subscriptions that this project's handlers and settings name, as the broker has them."""

    def get_urls(self) -> list[Any]:
        act = self.admin_site.admin_view(self.act)
        return [path("act/", act, name=f"{APP}_deadletter_act"), *super().get_urls()]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        """All subscriptions with their counts, and the oldest dead letters of the chosen one."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        chosen = request.GET.get("subscription", "")
        alias, _, name = chosen.partition(":")
        shown: list[Any] = []
        subscriptions = dict.fromkeys(_subscriptions(), "")
        trouble = ""
        try:
            if chosen:
                for letter in _letters(alias, name):
                    shown.append(letter)
                    if len(shown) == SHOWN:
                        break
            else:
                subscriptions, trouble = _counted(subscriptions)
        except PubSubError as error:
            trouble = str(error)
        context = {
            **self.admin_site.each_context(request),
            "title": "Dead letters",
            "subscriptions": subscriptions,
            "chosen": chosen,
            "letters": shown,
            "limit": SHOWN,
            "trouble": trouble,
            "may_replay": _may(request, "replay_deadletter"),
            "may_purge": _may(request, "purge_deadletter"),
        }
        return TemplateResponse(request, "admin/pubsub_facade/dead_letters.html", context)

    def act(self, request: HttpRequest) -> HttpResponse:
        """Replay or purge the chosen dead letters."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        chosen = request.POST.get("subscription", "")
        verb = request.POST.get("verb", "")
        if verb not in ("replay", "purge") or not _may(request, f"{verb}_deadletter"):
            raise PermissionDenied
        if chosen not in _subscriptions():
            raise PermissionDenied
        alias, _, name = chosen.partition(":")
        ids: Sequence[str] = request.POST.getlist("ids")
        try:
            letters = _letters(alias, name)
            count = (letters.replay(ids) if verb == "replay" else letters.purge(ids)) if ids else 0
            said = "replayed" if verb == "replay" else "purged"
            self.message_user(request, f"{count} {said}.", messages.SUCCESS if count else messages.WARNING)
        except PubSubError as error:
            self.message_user(request, str(error), messages.ERROR)
        where = reverse(f"admin:{APP}_deadletter_changelist")
        return HttpResponseRedirect(f"{where}?subscription={chosen}")


def _letters(alias: str, name: str) -> SyncDeadLetters:
    return client(alias).dead_letters(name)


def _subscriptions() -> list[str]:
    """``alias:name`` of each subscription that handlers or settings name."""
    found: set[str] = set()
    for alias in aliases():
        names = {each.subscription.name for each in subscribers_of(alias).registrations}
        try:
            names |= set(client(alias).settings.subscriptions)
        except PubSubError:
            continue  # the system checks tell what is wrong with it
        found |= {f"{alias}:{name}" for name in names if name}
    return sorted(found)


def _counted(subscriptions: Iterable[str]) -> tuple[dict[str, str], str]:
    """``alias:name`` -> how many dead letters it has, or nothing where the backend cannot tell; and what went wrong.

    An alias whose broker did not answer once is not asked again: the page would wait for each of its subscriptions.
    """
    counts = dict.fromkeys(subscriptions, "")
    trouble: dict[str, str] = {}
    for each in counts:
        alias, _, name = each.partition(":")
        if alias in trouble:
            continue
        try:
            dead = client(alias).backlog(name).dead
        except UnsupportedFeature:
            continue
        except PubSubError as error:
            trouble[alias] = f"{alias}: {error}"
        else:
            counts[each] = "" if dead is None else str(dead)
    return counts, "; ".join(trouble.values())


def _may(request: HttpRequest, permission: str) -> bool:
    user: Any = request.user
    return bool(user.has_perm(f"{APP}.{permission}"))
