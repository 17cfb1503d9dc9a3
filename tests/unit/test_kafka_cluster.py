"""Whom the Kafka driver believes about leaders, where one broker is cut off from the others and answers as before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pubsub_facade import Settings
from pubsub_facade.backends._kafka_cluster import Cluster, Link
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
