"""The tables of the outbox and the inbox; on PostgreSQL the trigger that wakes the relay."""

from typing import Any, ClassVar

from django.db import migrations, models

from pubsub_facade.contrib._outbox_sql import notify_statements, unnotify_statements

TABLE = "pubsub_outbox"


def add_trigger(apps: Any, schema_editor: Any) -> None:
    if schema_editor.connection.vendor == "postgresql":
        for statement in notify_statements(TABLE):
            schema_editor.execute(statement, params=None)


def drop_trigger(apps: Any, schema_editor: Any) -> None:
    if schema_editor.connection.vendor == "postgresql":
        for statement in unnotify_statements(TABLE):
            schema_editor.execute(statement, params=None)


class Migration(migrations.Migration):
    initial = True

    dependencies: ClassVar = []

    operations: ClassVar = [
        migrations.CreateModel(
            name="DeadLetter",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
            ],
            options={
                "verbose_name": "dead letter",
                "permissions": [
                    ("replay_deadletter", "Can replay dead letters"),
                    ("purge_deadletter", "Can purge dead letters"),
                ],
                "managed": False,
                "default_permissions": ("view",),
            },
        ),
        migrations.CreateModel(
            name="OutboxShard",
            fields=[
                ("shard", models.SmallIntegerField(primary_key=True, serialize=False)),
                ("owner", models.CharField(max_length=64)),
                ("leased_until", models.FloatField()),
            ],
            options={
                "db_table": "pubsub_outbox_shard",
            },
        ),
        migrations.CreateModel(
            name="InboxMark",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("subscription", models.CharField(max_length=100)),
                ("message_id", models.CharField(max_length=200)),
                ("handled", models.FloatField(db_index=True)),
            ],
            options={
                "db_table": "pubsub_inbox",
                "constraints": [
                    models.UniqueConstraint(fields=("subscription", "message_id"), name="pubsub_inbox_once")
                ],
            },
        ),
        migrations.CreateModel(
            name="OutboxMessage",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("shard", models.SmallIntegerField()),
                (
                    "state",
                    models.SmallIntegerField(
                        choices=[
                            (0, "pending"),
                            (1, "refused, waits to be tried again"),
                            (2, "delayed"),
                            (3, "sent"),
                            (4, "set aside"),
                        ]
                    ),
                ),
                ("attempts", models.IntegerField()),
                ("created", models.FloatField()),
                ("due", models.FloatField()),
                ("message_id", models.CharField(max_length=200)),
                ("topic", models.CharField(max_length=200)),
                ("message_key", models.CharField(max_length=1000, null=True)),
                ("headers", models.TextField(blank=True)),
                ("content_type", models.CharField(max_length=200, null=True)),
                ("body", models.BinaryField()),
                ("error", models.TextField(blank=True)),
            ],
            options={
                "verbose_name": "outbox message",
                "db_table": "pubsub_outbox",
                "permissions": [
                    ("retry_outboxmessage", "Can publish set aside outbox messages again"),
                    ("discard_outboxmessage", "Can discard outbox messages"),
                ],
                "indexes": [
                    models.Index(fields=["state", "id"], name="pubsub_outbox_state_id"),
                    models.Index(fields=["state", "due"], name="pubsub_outbox_state_due"),
                ],
            },
        ),
        migrations.RunPython(add_trigger, drop_trigger),
    ]
