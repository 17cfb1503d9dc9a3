"""On MySQL and MariaDB: marks whose ids differ only in case, accents or trailing blanks are different marks."""

from typing import Any, ClassVar

from django.db import migrations

TABLE = "pubsub_inbox"


def compare_exactly(apps: Any, schema_editor: Any) -> None:
    """Give the columns a collation that takes no two texts for equal; it is named otherwise on each."""
    connection = schema_editor.connection
    if connection.vendor != "mysql":
        return
    collation = "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
    text = f"CHARACTER SET utf8mb4 COLLATE {collation} NOT NULL"
    schema_editor.execute(
        f"ALTER TABLE {TABLE} MODIFY subscription varchar(100) {text}, MODIFY message_id varchar(200) {text}"
    )


class Migration(migrations.Migration):
    dependencies: ClassVar = [("pubsub_facade", "0001_initial")]

    operations: ClassVar = [
        # Not taken back: marks that are there may be twins to the old collation.
        migrations.RunPython(compare_exactly, migrations.RunPython.noop, atomic=False)
    ]
