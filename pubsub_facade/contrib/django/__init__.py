"""Publish from Django and handle in Django: put ``"pubsub_facade.contrib.django"`` into ``INSTALLED_APPS``.

    from pubsub_facade.contrib.django import publish, publish_on_commit, subscriber

Importable before the app registry is ready: nothing here imports a model until it is called.
"""

from pubsub_facade.contrib.django.clients import client
from pubsub_facade.contrib.django.publishing import (
    apublish,
    apublish_many,
    apublish_on_commit,
    publish,
    publish_many,
    publish_many_on_commit,
    publish_on_commit,
)
from pubsub_facade.contrib.django.signals import publish_model_changes
from pubsub_facade.contrib.django.subscribing import subscriber

__all__ = [
    "apublish",
    "apublish_many",
    "apublish_on_commit",
    "client",
    "publish",
    "publish_many",
    "publish_many_on_commit",
    "publish_model_changes",
    "publish_on_commit",
    "subscriber",
]
