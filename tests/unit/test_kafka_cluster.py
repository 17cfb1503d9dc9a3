"""Whom the Kafka driver believes about leaders, where one broker is cut off from the others and answers as before."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.conn import CloseReason

from pubsub_facade import Settings
from pubsub_facade.backends._kafka_cluster import CONTROL, PRODUCE, Cluster, Link
from pubsub_facade.backends._kafka_wire import METADATA_IDS
from pubsub_facade.errors import ConnectionLost

CUT_OFF, WELL = 1, 2


class Brokers(Cluster):
    """Answers are made here: broker -> (leader, epoch) of the one partition of topic t; None: no answer."""

    def __init__(self, views: dict[int, tuple[int, int] | None]) -> None:
        super().__init__(Settings(backend="kafka").kafka, 1.0, {})
        self.views = views
        self.asked: list[int] = []
        self._brokers = {node: ("127.0.0.1", node) for node in views}

    async def call(
        self, node: int, request: Any, link: Link = ("control", 0), timeout: float | None = None
    ) -> Any:
        self.asked.append(node)
        view = self.views[node]
        if view is None:
            raise ConnectionLost("no answer")
        leader, epoch = view
        partition: tuple[Any, ...] = (0, 0, leader, epoch, [1, 2, 3], [1, 2, 3], [], {})
        return SimpleNamespace(
            API_VERSION=METADATA_IDS,
            brokers=[(each, "127.0.0.1", each, None, {}) for each in self.views],
            controller_id=leader,
            topics=[(0, "t", "id-of-t", False, [partition], -1, {})],
        )


async def test_a_broker_that_is_behind_the_others_is_not_believed() -> None:
    brokers = Brokers({CUT_OFF: (CUT_OFF, 3), WELL: (WELL, 4)})
    leaders = []
    for _ in range(20):
        brokers._doubted.clear()
        await brokers.refresh(None)
        leaders.append(brokers.leader(("t", 0)))
    assert leaders[-1] == WELL
    assert leaders == sorted(leaders), "once the new leader is known it stays"
    assert CUT_OFF in brokers.asked


async def test_the_next_refresh_asks_another_broker() -> None:
    brokers = Brokers({1: (1, 3), 2: (1, 3), 3: (1, 3)})
    for _ in range(20):
        await brokers.refresh(["t"])
    assert all(one != next_ for one, next_ in zip(brokers.asked, brokers.asked[1:], strict=False))


async def test_a_doubted_broker_is_asked_last_and_believed_where_no_other_answers() -> None:
    brokers = Brokers({CUT_OFF: (CUT_OFF, 3), WELL: (WELL, 4)})
    brokers.doubt(CUT_OFF)
    for _ in range(5):
        await brokers.refresh(None)
    assert set(brokers.asked) == {WELL}
    brokers.views[WELL] = None
    await brokers.refresh(None)
    assert brokers.leader(("t", 0)) == CUT_OFF


async def test_others_are_asked_for_a_coordinator_that_has_moved() -> None:
    brokers = Brokers({CUT_OFF: (CUT_OFF, 3), WELL: (WELL, 4)})
    brokers._coordinators["g"] = CUT_OFF
    brokers.coordinator_moved("g")
    assert brokers._nodes() == [WELL, CUT_OFF]


async def test_those_who_wait_for_a_broker_that_is_silent_wait_once() -> None:
    accepted = 0

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await reader.read()  # until the client gives up
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = Settings(backend="kafka", kafka={"bootstrap_servers": [f"127.0.0.1:{port}"]}).kafka
        cluster = Cluster(settings, 0.4, {})
        cluster._brokers = {1: ("127.0.0.1", port)}
        began = time.monotonic()
        ends = await asyncio.gather(*(cluster.refresh(None) for _ in range(3)), return_exceptions=True)
        took = time.monotonic() - began
        assert [type(end) for end in ends] == [ConnectionLost] * 3
        assert accepted == 1
        assert 0.4 <= took < 0.8
        with pytest.raises(ConnectionLost):
            await cluster.refresh(None)  # begun later: tries again
        assert accepted == 2
        await cluster.close()


class _Connection:
    """Never answers, as one whose other side has vanished."""

    _protocol = _writer = None

    def __init__(self) -> None:
        self.ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def connected(self) -> bool:
        return not self.ended.done()

    async def send(self, request: Any) -> Any:
        await self.ended
        raise AssertionError("ended without an error")

    def close(self, reason: CloseReason) -> asyncio.Future[Any]:
        if not self.ended.done():
            self.ended.set_exception(ConnectionResetError("ended"))
            self.ended.exception()
        return self.ended


async def test_silence_on_one_link_ends_all_links_to_that_broker() -> None:
    cluster = Cluster(Settings(backend="kafka").kafka, 1.0, {})
    links = {(node, link): _Connection() for node in (1, 2) for link in (CONTROL, PRODUCE)}
    cluster._links = dict(links)
    waiting = asyncio.create_task(cluster.call(1, None, PRODUCE))
    elsewhere = asyncio.create_task(cluster.call(2, None, PRODUCE))
    await asyncio.sleep(0)
    with pytest.raises(ConnectionLost):
        await cluster.call(1, None, CONTROL, timeout=0.05)
    async with asyncio.timeout(1):
        with pytest.raises(ConnectionLost):
            await waiting
    assert not elsewhere.done()
    assert all(connection.connected() == (node == 2) for (node, _), connection in links.items())
    elsewhere.cancel()
    await asyncio.wait([elsewhere])
