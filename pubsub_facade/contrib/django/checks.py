"""System checks: what is wrong with the settings and the handlers, told without contacting the broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig, apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register

from pubsub_facade.backends import create
from pubsub_facade.contrib.django.clients import aliases, settings_of
from pubsub_facade.contrib.django.subscribing import _collected, subscribers_of
from pubsub_facade.errors import PubSubError, UnsupportedFeature


@register(Tags.compatibility)
def check(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """E001 the settings; E002 handlers of an alias that is not there; W001 memory; W002 ephemeral handlers."""
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
    for registration in subscribers_of(alias).registrations:
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
