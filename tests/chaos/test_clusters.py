"""Clusters lose a node or the way to it, and nodes the way to each other: no message is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from brokers.networks import Network
from tests.chaos import clusters, partitions, scenario


def _account(result: scenario.Result, faults: Sequence[clusters.Fault]) -> None:
    print(scenario.HEADER, result.row(), sep="\n")
    lost = {name: ids[:20] for name, ids in result.lost.items()}
    assert not result.lost_count, (
        f"lost {result.lost_count} of {result.published}, after {result.faults}: {lost}"
    )
    assert not result.misbooked, f"not booked once: {result.misbooked}, after {result.faults}"
    assert result.booked
    assert result.faults == [fault.__name__ for fault in faults]
    assert result.published > len(faults) * clusters.LINES
    assert result.handled + result.dead >= 2 * result.published
    assert result.duplicates <= result.bound, str(result)


@pytest.mark.cluster
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in clusters.CLUSTERS]
)
def test_nothing_confirmed_is_lost_while_nodes_come_and_go(form: str, tmp_path: Path) -> None:
    cluster = clusters.CLUSTERS[form](tmp_path, random.randrange(10**6))
    _account(clusters.run(cluster, clusters.FAULTS), clusters.FAULTS)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in partitions.FORMS]
)
def test_each_client_is_served_and_nothing_is_lost_while_nodes_do_not_reach_each_other(
    form: str, tmp_path: Path
) -> None:
    with Network(clusters.NODES).up() as network:  # fails where we may not make one; nothing is skipped
        cluster = clusters.CLUSTERS[form](tmp_path, random.randrange(10**6), network)
        _account(clusters.run(cluster, partitions.PARTITIONS), partitions.PARTITIONS)
