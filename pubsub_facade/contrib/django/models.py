"""The tables of the outbox and the inbox, as `pubsub_facade.contrib._outbox_sql` speaks to them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from django.apps import apps
from django.db import models

from pubsub_facade.codec import decode
from pubsub_facade.contrib.outbox import DELAYED, FAILED, PENDING, RETRY, SENT
from pubsub_facade.errors import ConfigError, DecodeError

if not apps.is_installed("pubsub_facade.contrib.django"):
    raise ConfigError('add "pubsub_facade.contrib.django" to INSTALLED_APPS: its tables are part of it')


class OutboxMessage(models.Model):
    """One message to be published; written by `publish_on_commit`, settled by the relay."""

    class State(models.IntegerChoices):
        """What a row waits for."""

        PENDING = PENDING, "pending"
        RETRY = RETRY, "refused, waits to be tried again"
        DELAYED = DELAYED, "delayed"
        SENT = SENT, "sent"
        FAILED = FAILED, "set aside"

    shard: models.SmallIntegerField[int, int] = models.SmallIntegerField()
    state: models.SmallIntegerField[int, int] = models.SmallIntegerField(choices=State.choices)
    attempts: models.IntegerField[int, int] = models.IntegerField()
    created: models.FloatField[float, float] = models.FloatField()
    due: models.FloatField[float, float] = models.FloatField()
    message_id: models.CharField[str, str] = models.CharField(max_length=200)
    topic: models.CharField[str, str] = models.CharField(max_length=200)
    message_key: models.CharField[str | None, str | None] = models.CharField(max_length=1000, null=True)
    headers: models.TextField[str, str] = models.TextField(blank=True)
    content_type: models.CharField[str | None, str | None] = models.CharField(max_length=200, null=True)
    body: models.BinaryField[bytes, bytes] = models.BinaryField()
    error: models.TextField[str, str] = models.TextField(blank=True)

    class Meta:
        db_table = "pubsub_outbox"
        verbose_name = "outbox message"
        indexes: ClassVar = [
            models.Index(fields=["state", "id"], name="pubsub_outbox_state_id"),
            models.Index(fields=["state", "due"], name="pubsub_outbox_state_due"),
        ]
        permissions: ClassVar = [
            ("retry_outboxmessage", "Can publish set aside outbox messages again"),
            ("discard_outboxmessage", "Can discard outbox messages"),
        ]

    def __str__(self) -> str:
        return f"{self.message_id} on {self.topic}"

    @property
    def payload(self) -> Any:
        """The decoded body; the bytes where it does not decode."""
        try:
            return decode(bytes(self.body), self.content_type)
        except DecodeError:
            return bytes(self.body)

    @property
    def created_at(self) -> datetime:
        """When the row was written."""
        return datetime.fromtimestamp(self.created, UTC)


class OutboxShard(models.Model):
    """What relays hold, so that one at a time publishes a key."""

    shard: models.SmallIntegerField[int, int] = models.SmallIntegerField(primary_key=True)
    owner: models.CharField[str, str] = models.CharField(max_length=64)
    leased_until: models.FloatField[float, float] = models.FloatField()

    class Meta:
        db_table = "pubsub_outbox_shard"

    def __str__(self) -> str:
        return f"shard {self.shard}"


class InboxMark(models.Model):
    """A message that a subscription has handled, committed with the effect."""

    subscription: models.CharField[str, str] = models.CharField(max_length=100)
    message_id: models.CharField[str, str] = models.CharField(max_length=200)
    handled: models.FloatField[float, float] = models.FloatField(db_index=True)

    class Meta:
        db_table = "pubsub_inbox"
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["subscription", "message_id"], name="pubsub_inbox_once")
        ]

    def __str__(self) -> str:
        return f"{self.message_id} by {self.subscription}"


class DeadLetter(models.Model):
    """No table: what the admin shows of the broker's dead letters, and the permissions for it."""

    class Meta:
        managed = False
        verbose_name = "dead letter"
        default_permissions = ("view",)
        permissions: ClassVar = [
            ("replay_deadletter", "Can replay dead letters"),
            ("purge_deadletter", "Can purge dead letters"),
        ]

    def __str__(self) -> str:
        return "dead letter"
