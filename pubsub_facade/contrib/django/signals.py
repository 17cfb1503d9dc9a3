"""Model changes as events, by opt-in: each save and delete writes a row to the outbox, in its own transaction."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from django.core.serializers.json import DjangoJSONEncoder
from django.db.models import Field, Model
from django.db.models.signals import post_delete, post_save
from django.utils.functional import cached_property

from pubsub_facade._settings_errors import nearest
from pubsub_facade.contrib.django.publishing import publish_on_commit
from pubsub_facade.errors import ConfigError, MessageError
from pubsub_facade.topics import check_topic

_encoder: Final = DjangoJSONEncoder()


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
        fields: names of the fields (a relation is told by its key) and properties in the payload, beside the primary
            key ``pk``; None: all concrete fields, which tells every receiver all of them.
        payload: makes the payload of an instance, instead of ``fields``.
        key: makes the key; None: the primary key.
    """
    check_topic(f"{topic}.created")
    if fields is not None and payload is not None:
        raise ConfigError("give fields, or payload, and not both")
    chosen = _values_of(model, fields)

    def described(instance: Any, using: str) -> Any:
        if payload is not None:
            return payload(instance)
        return {name: value(instance, using) for name, value in chosen.items()}

    def tell(change: str, instance: Any, using: str) -> None:
        message_key = key(instance) if key is not None else str(instance.pk)
        publish_on_commit(f"{topic}.{change}", described(instance, using), key=message_key, using=using)

    def saved(sender: Any, instance: Any, created: bool, raw: bool, using: str, **kwargs: Any) -> None:
        if not raw:  # loaded from a fixture
            tell("created" if created else "updated", instance, using)

    def deleted(sender: Any, instance: Any, using: str, **kwargs: Any) -> None:
        tell("deleted", instance, using)

    uid = f"pubsub-{topic}"
    post_save.connect(saved, sender=model, weak=False, dispatch_uid=uid)
    post_delete.connect(deleted, sender=model, weak=False, dispatch_uid=uid)


def _values_of(model: type[Model], names: Sequence[str] | None) -> dict[str, Callable[[Any, str], Any]]:
    """Name in the payload -> its plain value of (instance, database alias)."""
    pk = model._meta.pk
    assert pk is not None
    if names is None:
        return {"pk": _of_field(pk)} | {
            field.attname: _of_field(field) for field in model._meta.concrete_fields
        }
    if isinstance(names, str):
        raise ConfigError(f"fields {names!r} is a str: give a list, as [{names!r}]")
    return {"pk": _of_field(pk)} | {name: _named(model, name) for name in names}


def _named(model: type[Model], name: str) -> Callable[[Any, str], Any]:
    fields = {field.name: field for field in model._meta.concrete_fields}
    by_attribute = {field.attname: field for field in model._meta.concrete_fields}
    field = fields.get(name, by_attribute.get(name))
    if field is not None:
        return _of_field(field)
    if not _is_property(model, name):
        meant = nearest(name, {*fields, *(each for each in dir(model) if _is_property(model, each))})
        raise ConfigError(
            f"fields: {name!r} is neither a field of {model.__name__} with one value nor a property: "
            f"{f'did you mean {meant!r}? ' if meant else ''}it has {', '.join(fields)}; or give payload, a function "
            "of the instance"
        )

    def value(instance: Any, using: str) -> Any:
        found = getattr(instance, name)
        try:
            return _plain(found)
        except TypeError as error:
            raise MessageError(
                f"{model.__name__}.{name} of type {type(found).__name__} cannot become JSON: {error}; give payload, a "
                "function of the instance"
            ) from error

    return value


def _is_property(model: type[Model], name: str) -> bool:
    return isinstance(
        inspect.getattr_static(model, name, None), property | cached_property | functools.cached_property
    )


def _of_field(field: Field[Any, Any]) -> Callable[[Any, str], Any]:
    def value(instance: Any, using: str) -> Any:
        found = getattr(instance, field.attname)
        if hasattr(found, "resolve_expression"):  # as F("count") + 1: only the database knows
            rows = type(instance)._base_manager.using(using).filter(pk=instance.pk)
            found = rows.values_list(field.attname, flat=True).first()
        try:
            return _plain(found)
        except TypeError:
            return field.value_to_string(instance)

    return value


def _plain(value: Any) -> Any:
    """What JSON has; TypeError where there is no usual form."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict | list | tuple):
        return json.loads(_encoder.encode(value))
    return _encoder.default(value)
