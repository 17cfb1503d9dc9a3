"""A client that already exists, pointed at another broker for the length of a ``with``: what applications need
whose client was made when their module was imported. Its handlers and everybody's references stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from pubsub_facade.client import AsyncPubSub
from pubsub_facade.settings import Settings
from pubsub_facade.sync import PubSub

Client = TypeVar("Client", PubSub, AsyncPubSub)


@contextmanager
def override(client: Client, settings: Settings) -> Iterator[Client]:
    """Point ``client`` at the broker of ``settings``; on leaving it is as it was before.

    A `PubSub` is closed on leaving. An `AsyncPubSub` belongs to its loop: close it there, within the ``with``.
    """
    before = dict(client.__dict__)
    twin = type(client)(settings)
    target = client._client if isinstance(client, PubSub) else client
    handlers = target.subscribers
    if isinstance(twin, PubSub):
        twin._client.subscribers = handlers
    else:
        twin.subscribers = handlers
    client.__dict__.clear()
    client.__dict__.update(twin.__dict__)
    try:
        yield client
    finally:
        if isinstance(client, PubSub):
            client.close()
        client.__dict__.clear()
        client.__dict__.update(before)
