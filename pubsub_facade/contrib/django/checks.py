"""System checks: what is wrong with the settings and the handlers, told without contacting the broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig, apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register

from pubsub_facade._settings_errors import nearest
from pubsub_facade.backends import create
from pubsub_facade.contrib.django.clients import aliases, settings_of
from pubsub_facade.contrib.django.subscribing import _collected, subscribers_of
from pubsub_facade.errors import PubSubError, UnsupportedFeature
from pubsub_facade.settings import Settings
from pubsub_facade.subscribers import Registration


@register(Tags.compatibility)
def check(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """E001 the settings; E002 handlers of an alias that is not there; W001 memory; W002 ephemeral handlers; W003 two
    handlers of one subscription; W004 settings of a subscription that no handler has.
    """
    if app_configs is not None and apps.get_app_config("pubsub_facade") not in app_configs:
        return []
    found: list[CheckMessage] = []
    for alias in aliases():
        found += _check_alias(alias)
    for alias in _collected:
        if alias not in aliases() and subscribers_of(alias).registrations:
            names = ", ".join(each.handler.name for each in subscribers_of(alias).registrations)
            found.append(
                Error(
                    f"handlers of alias {alias!r}, which the PUBSUB setting does not have: {names}",
                    hint=f"it has {', '.join(aliases())}",
                    id="pubsub_facade.E002",
                )
            )
    return found


def _check_alias(alias: str) -> list[CheckMessage]:
    try:
        settings = settings_of(alias)
        capabilities = create(settings).capabilities
        if settings.require_subscribers and not capabilities.require_subscribers:
            raise UnsupportedFeature(settings.backend, "require_subscribers", "leave it out")
    except PubSubError as error:
        return [Error(f"PUBSUB[{alias!r}]: {error}", id="pubsub_facade.E001")]
    found: list[CheckMessage] = []
    if not capabilities.shared and not django_settings.DEBUG:
        found.append(
            Warning(
                f"PUBSUB[{alias!r}]: backend {settings.backend!r} stays within one process: what the web server "
                "publishes never reaches runsubscribers",
                hint="choose sqlite on one machine, or a broker",
                id="pubsub_facade.W001",
            )
        )
    registrations = subscribers_of(alias).registrations
    found += _shared(registrations)
    found += _unused(alias, settings, registrations)
    for registration in registrations:
        if registration.subscription.name is None:
            found.append(
                Warning(
                    f"handler {registration.handler.name} has no subscription name: it misses what is published "
                    "while runsubscribers does not run",
                    hint='give it one: @subscriber(..., subscription="NAME")',
                    id="pubsub_facade.W002",
                )
            )
    return found


def _shared(registrations: Sequence[Registration]) -> list[CheckMessage]:
    """Functions that were meant to get each message, and get some."""
    functions: dict[str, dict[str, None]] = {}
    for each in registrations:
        if each.subscription.name is not None:
            path = f"{each.handler.function.__module__}.{each.handler.name}"
            functions.setdefault(each.subscription.name, {})[path] = None
    return [
        Warning(
            f"subscription {name!r} has {len(paths)} handlers, {' and '.join(paths)}: each message goes to one of them",
            hint="give each a subscription of its own, for each to get every message; or call both from one handler",
            id="pubsub_facade.W003",
        )
        for name, paths in functions.items()
        if len(paths) > 1
    ]


def _unused(alias: str, settings: Settings, registrations: Sequence[Registration]) -> list[CheckMessage]:
    """Settings that tune nothing; with ``topics`` they make a subscription ahead of its handler."""
    known = sorted({each.subscription.name for each in registrations if each.subscription.name})
    found: list[CheckMessage] = []
    for name, tuning in settings.subscriptions.items():
        if known and name not in known and tuning.topics is None:
            meant = nearest(name, known)
            found.append(
                Warning(
                    f"PUBSUB[{alias!r}]: subscriptions has {name!r}, and no handler has that subscription",
                    hint=f"did you mean {meant!r}?" if meant else f"handlers have {', '.join(known)}",
                    id="pubsub_facade.W004",
                )
            )
    return found
