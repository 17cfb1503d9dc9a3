"""A node that beats, and confirms and answers nothing, as one does that is cut off from its cluster.

The node is played here: it shakes hands, takes everything, and answers as far as it is let.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pika import frame, spec

from pubsub_facade import Message, Settings
from pubsub_facade.address import Tls
from pubsub_facade.backends import _rabbitmq_confirms as confirming
from pubsub_facade.backends._rabbitmq_confirms import Confirms, Outgoing
from pubsub_facade.backends._rabbitmq_link import PATIENCE, Link, connect
from pubsub_facade.backends.rabbitmq import RabbitmqBackend
from pubsub_facade.errors import ConnectionLost

_ANSWERS: dict[type, Any] = {
    spec.Connection.StartOk: lambda: spec.Connection.Tune(2047, 131072, 1),
    spec.Connection.Open: spec.Connection.OpenOk,
    spec.Connection.Close: spec.Connection.CloseOk,
    spec.Channel.Open: spec.Channel.OpenOk,
    spec.Channel.Close: spec.Channel.CloseOk,
    spec.Exchange.Declare: spec.Exchange.DeclareOk,
    spec.Confirm.Select: spec.Confirm.SelectOk,
}


class Node:
    """Speaks AMQP on a port of its own, and counts who came."""

    def __init__(self) -> None:
        self.connections = 0
        self.answers = True
        self.verdict: Any = spec.Basic.Ack
        self.delay = 0.0  # s until the verdict on a message
        self._server: asyncio.Server | None = None

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[int]:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with self._server:
            yield self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(8)
            able = {"capabilities": {"publisher_confirms": True, "basic.nack": True}}
            start = spec.Connection.Start(server_properties=able, mechanisms=b"PLAIN", locales=b"en_US")
            writer.write(frame.Method(0, start).marshal())
            beat = asyncio.create_task(self._beat(writer))
            tags: dict[int, int] = {}
            try:
                while True:
                    head = await reader.readexactly(7)
                    rest = await reader.readexactly(int.from_bytes(head[3:7]) + 1)
                    await self._take(frame.decode_frame(head + rest)[1], writer, tags)
            finally:
                beat.cancel()
        writer.close()

    async def _beat(self, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(frame.Heartbeat().marshal())
            await asyncio.sleep(0.2)

    async def _take(self, came: Any, writer: asyncio.StreamWriter, tags: dict[int, int]) -> None:
        if not self.answers:
            return
        if isinstance(came, frame.Method):
            answer = _ANSWERS.get(type(came.method))
            if answer is not None:
                writer.write(frame.Method(came.channel_number, answer()).marshal())
        elif isinstance(came, frame.Header):
            tag = tags[came.channel_number] = tags.get(came.channel_number, 0) + 1
            await asyncio.sleep(self.delay)
            writer.write(frame.Method(came.channel_number, self.verdict(tag)).marshal())


@contextlib.asynccontextmanager
async def linked(node: Node) -> AsyncIterator[Link]:
    async with node.up() as port:
        settings = Settings(backend="rabbitmq", rabbitmq={"url": f"amqp://127.0.0.1:{port}"})
        link = await connect(
            "127.0.0.1", port, settings.rabbitmq.address, Tls(), heartbeat=1, timeout=5, name="test"
        )
        assert link.patience == PATIENCE
        link.patience = 0.5
        yield link
        await link.leave()


def message(id: str = "1") -> Outgoing:
    return Outgoing(id, "", "q", b"\0\0", b"x", mandatory=False)


async def test_a_link_on_which_nothing_is_confirmed_is_lost_though_it_beats() -> None:
    node = Node()
    async with linked(node) as link:
        confirms = await Confirms.open(link)
        await confirms.write([message()])
        node.answers = False
        begin = time.monotonic()
        with pytest.raises(ConnectionLost, match="cut off"):
            await asyncio.wait_for(confirms.write([message("2")]), 5)
        assert 0.5 <= time.monotonic() - begin < 2
        assert link.given_up


async def test_a_link_on_which_a_call_has_no_answer_is_lost_though_it_beats() -> None:
    node = Node()
    async with linked(node) as link:
        node.answers = False
        with pytest.raises(ConnectionLost, match="cut off"):
            await asyncio.wait_for(link.open_channel(), 5)


async def test_a_link_lives_while_some_of_many_are_confirmed_or_nothing_is_asked() -> None:
    node = Node()
    async with linked(node) as link:
        confirms = await Confirms.open(link)
        node.delay = 0.2
        outcome = await asyncio.wait_for(confirms.write([message(str(n)) for n in range(8)]), 5)
        assert not outcome.fates
        await asyncio.sleep(3 * link.patience)  # nothing is to happen
        assert link.error is None


async def test_a_refusal_that_took_long_is_a_lost_link_and_a_quick_one_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(confirming, "SLOW", 0.3)
    node = Node()
    node.verdict = spec.Basic.Nack
    async with linked(node) as link:
        confirms = await Confirms.open(link)
        outcome = await asyncio.wait_for(confirms.write([message("full")]), 5)
        assert outcome.fates == {"full": "unknown"}
        node.delay = 0.4
        with pytest.raises(ConnectionLost, match="cut off"):
            await asyncio.wait_for(confirms.write([message()]), 5)


async def test_the_next_address_is_tried_first_after_a_lost_link() -> None:
    first, second = Node(), Node()
    async with first.up() as one, second.up() as two:
        url = f"amqp://127.0.0.1:{one},127.0.0.1:{two}"
        backend = RabbitmqBackend(Settings(backend="rabbitmq", rabbitmq={"url": url, "heartbeat": 1}))
        await backend.open()
        link = backend._out
        assert link is not None
        link.patience = 0.5
        first.answers = False
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(backend.send([Message("a", 1)]), 5)
        await backend.close()
        await backend.open()
        assert (first.connections, second.connections) == (1, 1)
        assert backend._out is not None
        await backend.send([Message("a", 1)])
        await backend.close()
        await backend.open()
        assert (first.connections, second.connections) == (1, 2), "an end of our own is none of the node's"
        await backend.close()


async def test_link_after_link_without_an_answer_waits_longer() -> None:
    node = Node()
    async with node.up() as port:
        url = f"amqp://127.0.0.1:{port}"
        backend = RabbitmqBackend(Settings(backend="rabbitmq", rabbitmq={"url": url, "heartbeat": 1}))
        patience = []
        for _ in range(2):
            node.answers = True
            await backend.open()
            link = backend._out
            assert link is not None
            patience.append(link.patience)
            link.give_up("nothing confirmed")
            await link.ended
            await backend.close()
        assert patience == [PATIENCE, 2 * PATIENCE]
