"""Publish from Django: at once with the broker's confirm, or on commit by the outbox, from sync and async code.

`publish_on_commit` writes a row in the transaction of the caller's own data: a relay publishes it once that is
committed (``manage.py pubsub_relay``), whatever happens to this process or to the broker meanwhile. Lazy translations
in a payload are published as text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.utils.functional import Promise
from pydantic_core import PydanticSerializationError, from_json, to_json

from pubsub_facade.contrib._service import publish_from
from pubsub_facade.contrib.django.clients import DEFAULT, client
from pubsub_facade.contrib.outbox import columns_of, prepare
from pubsub_facade.errors import MessageError
from pubsub_facade.message import HeaderValue, Message

if TYPE_CHECKING:
    from pubsub_facade.contrib.django.models import OutboxMessage


def publish(
    topic: str,
    payload: Any,
    *,
    key: str | None = None,
    headers: Mapping[str, HeaderValue] | None = None,
    id: str | None = None,
    delay: float = 0,
    timeout: float | None = None,
    alias: str = DEFAULT,
) -> Message:
    """Publish one message now; returns once the broker has confirmed it. Arguments and errors: `PubSub.publish`.

    Not a part of any database transaction: what must not be lost, nor be told of a rolled back change, goes by
    `publish_on_commit`.

    Arguments:
        alias: of the ``PUBSUB`` setting.
    """
    message = Message(topic, payload, key=key, headers=headers, id=id, delay=delay)
    return publish_many([message], timeout=timeout, alias=alias)[0]


def publish_many(
    messages: Iterable[Message], *, timeout: float | None = None, alias: str = DEFAULT
) -> list[Message]:
    """Publish messages as one confirmed batch."""
    return _saying(partial(client(alias).publish_many, timeout=timeout), messages)


async def apublish(
    topic: str,
    payload: Any,
    *,
    key: str | None = None,
    headers: Mapping[str, HeaderValue] | None = None,
    id: str | None = None,
    delay: float = 0,
    timeout: float | None = None,
    alias: str = DEFAULT,
) -> Message:
    """`publish` from async code, on the same links of this process."""
    message = Message(topic, payload, key=key, headers=headers, id=id, delay=delay)
    return (await apublish_many([message], timeout=timeout, alias=alias))[0]


async def apublish_many(
    messages: Iterable[Message], *, timeout: float | None = None, alias: str = DEFAULT
) -> list[Message]:
    """`publish_many` from async code."""
    messages = list(messages)
    try:
        return await publish_from(client(alias), messages, timeout)
    except MessageError as error:
        return await publish_from(client(alias), _said(messages, error), timeout)


def publish_on_commit(
    topic: str,
    payload: Any,
    *,
    key: str | None = None,
    headers: Mapping[str, HeaderValue] | None = None,
    id: str | None = None,
    delay: float = 0,
    using: str | None = None,
) -> Message:
    """Write one message to the outbox, in the current transaction; it is published once that is committed.

    Arguments: as `publish`; ``delay`` works on every backend. Raises as that does before sending.
        using: database alias of the transaction; None: where the router writes the outbox.
    """
    message = Message(topic, payload, key=key, headers=headers, id=id, delay=delay)
    return publish_many_on_commit([message], using=using)[0]


def publish_many_on_commit(messages: Iterable[Message], *, using: str | None = None) -> list[Message]:
    """Write messages to the outbox, in the current transaction, by as few statements as can be."""
    from pubsub_facade.contrib.django.models import OutboxMessage

    prepared, rows = _rows(messages)
    if rows:
        OutboxMessage.objects.using(using).bulk_create(rows, batch_size=500)
    return prepared


async def apublish_on_commit(
    topic: str,
    payload: Any,
    *,
    key: str | None = None,
    headers: Mapping[str, HeaderValue] | None = None,
    id: str | None = None,
    delay: float = 0,
    using: str | None = None,
) -> Message:
    """`publish_on_commit` from async code, which has no transactions: the row is committed on return."""
    message: Message = await sync_to_async(publish_on_commit)(
        topic, payload, key=key, headers=headers, id=id, delay=delay, using=using
    )
    return message


def _rows(messages: Iterable[Message]) -> tuple[list[Message], list[OutboxMessage]]:
    from pubsub_facade.contrib.django.models import OutboxMessage

    limit = client().capabilities.max_payload
    prepared = _saying(lambda given: [prepare(message, max_payload=limit) for message in given], messages)
    now = time.time()
    return prepared, [OutboxMessage(**columns_of(message, now)) for message in prepared]


def _saying(use: Callable[[list[Message]], list[Message]], messages: Iterable[Message]) -> list[Message]:
    """``use(messages)``; where they cannot be encoded, again with their lazy translations as text."""
    given = list(messages)
    try:
        return use(given)
    except MessageError as error:
        return use(_said(given, error))


def _said(messages: list[Message], error: MessageError) -> list[Message]:
    """``messages``, lazy translations in their payloads as text in the active language; ``error`` if there are none."""
    found = False

    def text(value: Any) -> str:
        nonlocal found
        if not isinstance(value, Promise):
            raise error
        found = True
        return str(value)

    said = []
    for message in messages:
        payload = message.payload
        if not isinstance(payload, bytes | str | bytearray | memoryview):
            try:
                payload = from_json(to_json(payload, fallback=text))
            except (PydanticSerializationError, RecursionError, ValueError, TypeError):
                raise error from None
        said.append(
            Message(
                message.topic,
                payload,
                key=message.key,
                headers=message.headers,
                id=message.id,
                delay=message.delay,
            )
        )
    if not found:
        raise error
    return said
