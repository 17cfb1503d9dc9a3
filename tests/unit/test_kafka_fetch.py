"""A member on Kafka reads each partition from whoever leads it now, whoever it was that learned of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from pubsub_facade.backends._kafka_cluster import Cluster
from pubsub_facade.backends._kafka_fetch import Fetcher
from pubsub_facade.backends._kafka_partition import Partition
from pubsub_facade.backends._kafka_records import TP


class FakeCluster:
    """Leaders that tests move; fetch requests find nothing."""

    def __init__(self, leaders: dict[TP, int]) -> None:
        self.leaders = leaders
        self.version = 0
        self.asked: asyncio.Queue[int] = asyncio.Queue()

    def leader(self, tp: TP) -> int:
        return self.leaders[tp]

    async def call(self, node: int, request: Any, link: object) -> Any:
        self.asked.put_nowait(node)
        await asyncio.sleep(0.001)
        return SimpleNamespace(API_VERSION=4, topics=[])

    def drop(self, link: object) -> None:
        return


async def test_a_leader_that_somebody_else_learned_of_is_read_from() -> None:
    cluster = FakeCluster({("t", 0): 1})
    partition = SimpleNamespace(tp=("t", 0), topic_id=None, hungry=True, fetch_from=0, held=False)
    fetcher = Fetcher(cast(Cluster, cluster), ("fetch", 1), lambda _: None, lambda _: None, lambda _: None)
    fetcher.assign([cast(Partition, partition)])
    try:
        async with asyncio.timeout(5):
            assert await cluster.asked.get() == 1
            cluster.leaders = {("t", 0): 2}
            cluster.version += 1
            while await cluster.asked.get() != 2:
                pass
    finally:
        await fetcher.close()
