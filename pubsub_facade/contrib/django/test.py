"""What Django tests need: the clients on a memory hub, and what was published, directly or by the outbox.

    class PostTests(TestCase):
        def test_it(self):
            with capture() as published:
                self.client.post("/posts/", {"text": "hello"})
                published.deliver()      # runs the handlers here, in this test's transaction
            published.one("social.post.created", text="hello")

Works in `TestCase`, where nothing is ever committed, and in `TransactionTestCase`. No relay, no thread.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from asgiref.sync import async_to_sync
from django.db import router

from pubsub_facade.contrib.django import clients
from pubsub_facade.contrib.django.clients import DEFAULT, aliases
from pubsub_facade.contrib.django.subscribing import subscribers_of
from pubsub_facade.filters import Filter
from pubsub_facade.message import Delivery, Message
from pubsub_facade.settings import Settings
from pubsub_facade.sync import PubSub
from pubsub_facade.testing.hub import Published, TestHub
from pubsub_facade.topics import PatternSet
from pubsub_facade.workers import blocking


@contextmanager
def override(settings: Settings | None = None) -> Iterator[TestHub | None]:
    """Point the clients of all aliases at ``settings``, or at a memory hub of its own, which is what it yields; then
    back. Each alias but the default one has a namespace of its own there.
    """
    hub = None if settings is not None else TestHub(f"test-{uuid.uuid4().hex}")
    if hub is not None:
        settings = hub.settings(backend="memory", namespace="alias")
    assert settings is not None
    before = dict(clients._clients)
    clients._clients.clear()
    for number, alias in enumerate(aliases()):
        namespace = f"{settings.namespace}-{number}" if number else settings.namespace
        clients._clients[alias] = PubSub(settings.model_copy(update={"namespace": namespace}))
    try:
        yield hub
    finally:
        clients.close_all()
        clients._clients.update(before)
        if hub is not None:
            hub.forget()


class Captured(Published):
    """What was published within `capture`: at once, and by the outbox in the order it was written."""

    def __init__(self, hub: TestHub, using: str | None) -> None:
        from pubsub_facade.contrib.django.models import OutboxMessage

        super().__init__(hub)
        self._using = using or router.db_for_write(OutboxMessage)
        self._seen = self._last_row()
        self._delivered: set[str] = set()
        self._kept: list[Message] | None = None

    def _last_row(self) -> int:
        from pubsub_facade.contrib.django.models import OutboxMessage

        row = OutboxMessage.objects.using(self._using).order_by("-id").values_list("id", flat=True).first()
        return row or 0

    def _outbox(self) -> list[Message]:
        from pubsub_facade.contrib.django.models import OutboxMessage
        from pubsub_facade.contrib.outbox import COLUMNS, row_of

        rows = OutboxMessage.objects.using(self._using).filter(id__gt=self._seen).order_by("id")
        found = []
        for values in rows.values_list(*COLUMNS, "created"):
            message = row_of(values[:-1]).message
            message.timestamp = values[-1]
            found.append(message)
        return found

    def _stored(self) -> list[Message]:
        return self._kept if self._kept is not None else [*super()._stored(), *self._outbox()]

    def freeze(self) -> None:
        """What is published from now on is no part of it."""
        self._kept = self._stored()

    def deliver(self, alias: str = DEFAULT) -> int:
        """Hand each message not delivered yet to the handlers that want it, here and now; how many calls.

        What a handler raises is raised. What handlers publish is delivered too.
        """
        calls = 0
        while fresh := [message for message in self._messages() if message.id not in self._delivered]:
            for message in fresh:
                self._delivered.add(message.id)
                calls += deliver(message, alias)
        return calls


@contextmanager
def capture(using: str | None = None) -> Iterator[Captured]:
    """Publish into memory for the length of the ``with``, and see what was published.

    Arguments:
        using: database alias of the outbox that is looked at.
    """
    with ExitStack() as stack:
        hub = stack.enter_context(override())
        assert hub is not None
        captured = Captured(hub, using)
        stack.callback(captured.freeze)
        yield captured


def deliver(message: Message, alias: str = DEFAULT) -> int:
    """Call every handler that wants ``message``, in this thread; how many. What one raises is raised."""
    calls = 0
    for registration in subscribers_of(alias).registrations:
        subscription = registration.subscription
        wanted = PatternSet(subscription.patterns).matches(message.topic)
        if not wanted or (
            subscription.filter and not Filter.parse(subscription.filter).matches(message.headers)
        ):
            continue
        calls += 1
        handler = registration.handler
        delivery = _delivery(message, subscription.label)
        payload = None if handler.decode is None else handler.decode(message.body, message.content_type)
        if handler.is_async:
            async_to_sync(handler.call)(payload, delivery)
        else:
            handler.call(payload, blocking(delivery))
    return calls


def _delivery(message: Message, subscription: str) -> Delivery:
    receiver: Any = None
    return Delivery(
        receiver,
        None,
        subscription,
        message.topic,
        message.body,
        key=message.key,
        headers=message.headers,
        id=message.id,
        content_type=message.content_type,
        timestamp=message.timestamp,
    )
