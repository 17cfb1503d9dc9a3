"""Clusters lose the way to their leader, the leader, a node for a while, each in turn; no message is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos import clusters, scenario


@pytest.mark.cluster
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in clusters.CLUSTERS]
)
def test_nothing_confirmed_is_lost_while_nodes_come_and_go(form: str, tmp_path: Path) -> None:
    result = clusters.run(form, tmp_path, seed=random.randrange(10**6))
    print(scenario.HEADER, result.row(), sep="\n")
    lost = {name: ids[:20] for name, ids in result.lost.items()}
    assert not result.lost_count, (
        f"lost {result.lost_count} of {result.published}, after {result.faults}: {lost}"
    )
    assert not result.misbooked, f"not booked once: {result.misbooked}, after {result.faults}"
    assert result.booked
    assert result.published > len(clusters.FAULTS) * clusters.LINES
    assert result.handled + result.dead >= 2 * result.published
    assert result.duplicates <= result.bound, str(result)
