"""The Django application: its name, its checks, and the handlers of every installed application."""

from __future__ import annotations

from django.apps import AppConfig


class PubSubConfig(AppConfig):
    """``"pubsub_facade.contrib.django"`` in ``INSTALLED_APPS``."""

    name = "pubsub_facade.contrib.django"
    label = "pubsub_facade"
    verbose_name = "Publish/subscribe"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from pubsub_facade.contrib.django import checks as checks
        from pubsub_facade.contrib.django.subscribing import autodiscover

        autodiscover()
