"""Model changes as events, by opt-in: each save and delete writes a row to the outbox, in its own transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db.models import Model
from django.db.models.signals import post_delete, post_save

from pubsub_facade.contrib.django.publishing import publish_on_commit
from pubsub_facade.errors import ConfigError
from pubsub_facade.topics import check_topic


def publish_model_changes(
    model: type[Model],
    topic: str,
    *,
    fields: Sequence[str] | None = None,
    payload: Callable[[Any], Any] | None = None,
    key: Callable[[Any], str] | None = None,
) -> None:
    """From now on publish ``{topic}.created``, ``.updated`` and ``.deleted`` for each change of ``model``.

    Call it in ``AppConfig.ready``. By the outbox, on the database that was written to: a rolled back change is never
    told. Changes that send no signal (``update``, ``bulk_create``, raw SQL) are not seen.

    Arguments:
        model: whose changes.
        topic: the words before the change.
        fields: names of the fields in the payload, beside the primary key ``pk``; None: all concrete ones, which
            tells every receiver all of them.
        payload: makes the payload of an instance, instead of ``fields``.
        key: makes the key; None: the primary key.
    """
    check_topic(f"{topic}.created")
    if fields is not None and payload is not None:
        raise ConfigError("give fields, or payload, and not both")
    chosen = [field.attname for field in model._meta.concrete_fields] if fields is None else list(fields)
    encoder = DjangoJSONEncoder()

    def plain(value: Any) -> Any:
        return value if isinstance(value, str | int | float | bool | None) else encoder.default(value)

    def described(instance: Any) -> Any:
        if payload is not None:
            return payload(instance)
        return {"pk": plain(instance.pk)} | {name: plain(getattr(instance, name)) for name in chosen}

    def tell(change: str, instance: Any, using: str) -> None:
        message_key = key(instance) if key is not None else str(instance.pk)
        publish_on_commit(f"{topic}.{change}", described(instance), key=message_key, using=using)

    def saved(sender: Any, instance: Any, created: bool, raw: bool, using: str, **kwargs: Any) -> None:
        if not raw:  # loaded from a fixture
            tell("created" if created else "updated", instance, using)

    def deleted(sender: Any, instance: Any, using: str, **kwargs: Any) -> None:
        tell("deleted", instance, using)

    uid = f"pubsub-{topic}"
    post_save.connect(saved, sender=model, weak=False, dispatch_uid=uid)
    post_delete.connect(deleted, sender=model, weak=False, dispatch_uid=uid)
