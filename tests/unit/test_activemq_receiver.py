"""A member on ActiveMQ that leaves while it joins keeps nothing that others need."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pubsub_facade import ConnectionLost, Settings
from pubsub_facade.backends._activemq_forms import Durable
from pubsub_facade.backends._activemq_receiver import ActivemqReceiver, Home
from pubsub_facade.backends._activemq_record import Record
from pubsub_facade.subscription import Definition, Subscription


class FakeLink:
    def __init__(self) -> None:
        self.lost = None
        self.closed = False

    async def close(self) -> None:
        self.closed = True

    async def ask(self, command: str, headers: dict[str, Any]) -> None:
        return


async def test_a_link_that_is_made_while_its_member_leaves_is_closed() -> None:
    """A link holds the client-id of its subscription: left open, it would lock out every other member."""
    link, asked, answered = FakeLink(), asyncio.Event(), asyncio.Event()

    async def connect(client_id: str | None) -> FakeLink:
        asked.set()
        await answered.wait()
        return link

    subscription = Subscription("audit", ("social.#",))
    record = Record(Definition.first(subscription, 0.0), ("social.#",))

    async def read(name: str) -> Record:
        return record

    home = SimpleNamespace(
        session=SimpleNamespace(connect=connect),
        form=Durable(Settings(backend="activemq")),
        codec=None,
        record=read,
    )
    receiver = ActivemqReceiver(cast(Home, home), subscription, 10, lambda _: None)
    joining = asyncio.ensure_future(receiver.join())
    await asyncio.wait_for(asked.wait(), 5)
    await receiver.close()
    answered.set()
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(joining, 5)
    assert link.closed
