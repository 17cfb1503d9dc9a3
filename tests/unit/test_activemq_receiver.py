"""A member on ActiveMQ that leaves while it joins keeps nothing that others need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pubsub_facade import ConnectionLost, Settings
from pubsub_facade.backends._activemq_forms import Durable
from pubsub_facade.backends._activemq_receiver import ActivemqReceiver, Home
from pubsub_facade.backends._activemq_record import Record
from pubsub_facade.backends._activemq_wire import MessageCodec
from pubsub_facade.backends._stomp import ClientBusy, Frame
from pubsub_facade.subscription import Definition, Subscription


class FakeLink:
    """Arguments: ``slow``: part of a destination whose SUBSCRIBE lets everybody else go first."""

    on_messages: Callable[[list[Frame]], None]

    def __init__(self, slow: str = "none") -> None:
        self.lost = None
        self.closed = False
        self._slow = slow

    async def close(self) -> None:
        self.closed = True

    async def ask(self, command: str, headers: dict[str, Any]) -> None:
        """Whoever listens to notices gets one at once."""
        if headers["destination"].endswith("$notice"):
            notice = ({"subscription": headers["id"]}, b"audit")
            asyncio.get_running_loop().call_soon(self.on_messages, [notice])
        await let_others_go(self._slow in headers["destination"])


async def let_others_go(really: bool) -> None:
    for _ in range(50 if really else 0):
        await asyncio.sleep(0)


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


@pytest.mark.parametrize("slow", ["$retry", "a.*", "b.>"])
async def test_a_notice_that_comes_while_joining_does_not_lock_the_member_out(slow: str) -> None:
    """Joining and what a notice begins want a link for each place, and a client-id has one at a time."""
    held: set[str | None] = set()
    subscription = Subscription("audit", ("a.*", "b.#"))
    record = Record(Definition.first(subscription, 0.0), ("a.*", "b.#"), ())

    async def connect(client_id: str | None) -> FakeLink:
        if client_id in held:
            raise ClientBusy("already connected")
        held.add(client_id)
        await let_others_go(True)
        return FakeLink(slow)

    async def read(name: str) -> Record:
        return record

    form = Durable(Settings(backend="activemq"))
    home = SimpleNamespace(
        session=SimpleNamespace(
            connect=connect, subscribe=lambda link, headers: link.ask("SUBSCRIBE", headers)
        ),
        form=form,
        codec=MessageCodec(),
        record=read,
        due_lines=lambda _: "x",
        unmended={},
    )
    receiver = ActivemqReceiver(cast(Home, home), subscription, 10, lambda _: None)
    await asyncio.wait_for(receiver.join(), 5)
    if receiver._renewing is not None:
        await asyncio.wait_for(asyncio.shield(receiver._renewing), 5)
    await receiver.close()
    assert held == {form.client_id("audit", cover) for cover in record.places}
