"""Whether the tables that a command needs are there, told in one line before it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from django.core.management.base import CommandError
from django.db import Error, connections
from django.db.models import Model


def check_tables(using: str, *models: type[Model]) -> None:
    """Raise CommandError where a model's table is not in the database ``using``.

    A database that does not answer is not judged: whoever uses it next waits for it, or says so.
    """
    if using not in connections:
        raise CommandError(
            f"no database has the alias {using!r}: DATABASES has {', '.join(connections)}", returncode=2
        )
    connection = connections[using]
    try:
        there = set(connection.introspection.table_names())
    except Error:
        return
    finally:
        if not connection.in_atomic_block:
            connection.close()
    for model in models:
        if model._meta.db_table not in there:
            at = "" if using == "default" else f" --database {using}"
            raise CommandError(
                f"table {model._meta.db_table} is not in database {using!r}: run python manage.py migrate{at}"
            )


@contextlib.contextmanager
def told_in_a_line(using: str) -> Iterator[None]:
    """What the database ``using`` raises becomes a CommandError."""
    try:
        yield
    except Error as error:
        raise CommandError(f"database {using!r}: {type(error).__name__}: {error}") from error
