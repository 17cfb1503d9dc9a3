"""Handlers in Django: collected from the ``subscribers`` module of each installed application, run by
``manage.py runsubscribers``.

Around each message the database connections are looked after as around a request; one that was idle is tried first,
so that a restart of the database between messages costs none of them an attempt. With ``exactly_once`` the handler's
effect and the mark of the message commit in one transaction.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar, get_args, get_type_hints

from asgiref.sync import sync_to_async
from django.db import connections, reset_queries, router, transaction
from django.db.models import Model
from django.utils.module_loading import autodiscover_modules

from pubsub_facade.contrib._exactly_once import MARK_COLUMNS, MARK_UNIQUE, Effect, mark_id
from pubsub_facade.contrib._outbox_sql import ignoring
from pubsub_facade.contrib.django.clients import DEFAULT
from pubsub_facade.errors import ConfigError
from pubsub_facade.handler import Handler
from pubsub_facade.message import Delivery
from pubsub_facade.subscribers import DEFAULT_BACKOFF, Registration, Subscribers
from pubsub_facade.subscription import MAX_SUBSCRIPTION, Backoff, Subscription, patterns_of

Function = TypeVar("Function", bound=Callable[..., Any])

MODULE: Final = "subscribers"
LOOK: Final = 1.0  # s that a connection is idle until it is tried, and between looks at the async ORM's

_collected: dict[str, Subscribers] = {}


def autodiscover() -> None:
    """Import the ``subscribers`` module of each installed application that has one."""
    autodiscover_modules(MODULE)


def subscribers_of(alias: str = DEFAULT) -> Subscribers:
    """What was collected for an alias."""
    return _collected.setdefault(alias, Subscribers())


def subscriber(
    *patterns: str,
    subscription: str | None = None,
    ordered: bool = False,
    filter: str | None = None,
    concurrency: int = 1,
    max_attempts: int = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    exactly_once: bool | str = False,
    alias: str = DEFAULT,
) -> Callable[[Function], Function]:
    """Collect the decorated function as a handler, sync or async; it stays callable as it is.

    Arguments: as `Subscribers.subscriber`, and
        exactly_once: commit what the handler does to the database together with a mark of the message: a message
            that comes twice has its effect once. True, or a database alias. For a plain ``def``: async code has no
            transactions in Django.
        alias: of the ``PUBSUB`` setting.
    """
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ConfigError(f"concurrency {concurrency!r} is not a whole number of 1 or more")
    declared = Subscription(subscription, patterns_of(patterns), ordered, filter, max_attempts, backoff)

    def collect(function: Function) -> Function:
        handler = Handler(_in_django(function, declared, exactly_once, alias))
        subscribers_of(alias).add(Registration(handler, declared, concurrency))
        return function

    return collect


def _in_django(
    function: Callable[..., Any], declared: Subscription, exactly_once: bool | str, alias: str
) -> Callable[..., Any]:
    if exactly_once:
        _check_once(function, declared, exactly_once, alias)
    try:
        Handler(function)  # refuses what cannot be called, in its own words
    except ConfigError:
        _refuse_models(function)
        raise
    effect = Effect(function)
    if effect.is_async:
        return effect.dress(_async(effect))
    return effect.dress(_sync(effect, exactly_once, alias))


def _refuse_models(function: Callable[..., Any]) -> None:
    try:
        hints = get_type_hints(function)
    except Exception:  # an annotation is an expression: it can raise anything, and `Handler` has said so
        return
    for hint in (hint for name, hint in hints.items() if name != "return"):
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and issubclass(inner, Model):
                raise ConfigError(
                    f"handler {function.__qualname__} wants the Django model {inner.__name__}, which no message can "
                    "become: annotate a pydantic model, a dataclass or dict, and fetch the row by its key"
                )


def _check_once(
    function: Callable[..., Any], declared: Subscription, database: bool | str, alias: str
) -> None:
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"handler {function.__qualname__} is async, and has no transactions in Django: make it a plain def, or "
            "leave out exactly_once"
        )
    if isinstance(database, str) and database not in connections:
        raise ConfigError(
            f"handler {function.__qualname__}: exactly_once {database!r} is no database alias: DATABASES has "
            f"{', '.join(connections)}"
        )
    marked_as = _marked_as(declared.name or "", alias)
    if len(marked_as) > MAX_SUBSCRIPTION:
        raise ConfigError(
            f"handler {function.__qualname__}: {marked_as!r}, as which exactly_once marks messages, is over "
            f"{MAX_SUBSCRIPTION} characters: shorten the name of the alias or of the subscription"
        )


def _sync(effect: Effect, exactly_once: bool | str, alias: str) -> Callable[[Any, Delivery], None]:
    used = threading.local()

    def handle(payload: Any, delivery: Delivery) -> None:
        if time.monotonic() - getattr(used, "last", 0.0) > LOOK:
            _drop_lost()
        _refresh()
        try:
            if exactly_once:
                _once(effect, payload, delivery, exactly_once, alias)
            else:
                effect.call(payload, delivery)
        finally:
            _refresh()
            used.last = time.monotonic()

    handle.thread_ends = connections.close_all  # type: ignore[attr-defined]
    handle.exactly_once = exactly_once  # type: ignore[attr-defined]
    return handle


def _once(effect: Effect, payload: Any, delivery: Delivery, database: bool | str, alias: str) -> None:
    using = _database_of_marks(database)
    with transaction.atomic(using):
        if first(delivery, using, alias):
            effect.call(payload, delivery)


def _database_of_marks(exactly_once: bool | str) -> str:
    from pubsub_facade.contrib.django.models import InboxMark

    return exactly_once if isinstance(exactly_once, str) else router.db_for_write(InboxMark)


def databases_of_marks(registrations: Iterable[Registration]) -> set[str]:
    """The database aliases in which these handlers mark messages."""
    options = [getattr(each.handler.function, "exactly_once", False) for each in registrations]
    return {_database_of_marks(each) for each in options if each}


def _marked_as(subscription: str, alias: str) -> str:
    """A subscription's name in the inbox: those of two aliases are two, whatever their names are."""
    return subscription if alias == DEFAULT else f"{alias}:{subscription}"


def first(delivery: Delivery, using: str | None = None, alias: str = DEFAULT) -> bool:
    """Mark the message in the current transaction; False where it is marked already.

    What ``exactly_once`` does, for a handler that opens its transaction itself. A message without an id (a foreign
    one) cannot be told from its twin: True each time.

    Arguments:
        using: database alias; None: where the router writes marks.
        alias: of the ``PUBSUB`` setting: the handler's.
    """
    from pubsub_facade.contrib.django.models import InboxMark

    if not delivery.id:
        return True
    connection = connections[using or router.db_for_write(InboxMark)]
    table = connection.ops.quote_name(InboxMark._meta.db_table)
    sql = ignoring(connection.vendor, table, MARK_COLUMNS, MARK_UNIQUE)
    with connection.cursor() as cursor:
        mark = (_marked_as(delivery.subscription, alias), mark_id(delivery.id), time.time())
        cursor.execute(sql, mark)
        return bool(cursor.rowcount == 1)


def _async(effect: Effect) -> Callable[[Any, Delivery], Any]:
    orm = _AsyncConnections()

    async def handle(payload: Any, delivery: Delivery) -> None:
        if time.monotonic() - orm.used > LOOK:
            await sync_to_async(_drop_lost)()
        failed = True
        try:
            await effect.call(payload, delivery)
            failed = False
        finally:
            orm.used = time.monotonic()
            if failed:
                await sync_to_async(_refresh)()
            else:
                orm.refresh_soon()

    return handle


class _AsyncConnections:
    """The async ORM's connections, which live in a thread of its own: looked after once in `LOOK` seconds, not once a
    message, and once more after the last.
    """

    def __init__(self) -> None:
        self.used = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None  # that will look
        self._looking: asyncio.Task[None] | None = None

    def refresh_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            loop.call_later(LOOK, self._refresh)

    def _refresh(self) -> None:
        self._looking = asyncio.ensure_future(sync_to_async(_refresh)())
        self._loop = None


def _drop_lost() -> None:
    """Close the connections of this thread that do not answer; the next query makes new ones."""
    for connection in connections.all(initialized_only=True):
        if (
            connection.connection is not None
            and not connection.in_atomic_block
            and not connection.is_usable()
        ):
            connection.close()


def _refresh() -> None:
    """`close_old_connections`, but for those within a transaction: there the caller is a test, and it is the test's."""
    reset_queries()
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close_if_unusable_or_obsolete()
