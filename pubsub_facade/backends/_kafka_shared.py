"""What all receivers of one backend share while it is open."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from pubsub_facade.backends._kafka_cluster import Cluster
from pubsub_facade.backends._kafka_names import Names
from pubsub_facade.backends._kafka_presence import Presence
from pubsub_facade.backends._kafka_producer import Producer
from pubsub_facade.backends._kafka_registry import Registry
from pubsub_facade.backends._kafka_topics import Topics


@dataclass(frozen=True)
class Shared:
    """The parts of an open backend.

    Arguments:
        session_timeout, rebalance_timeout: of every group, in seconds.
        numbers: for connections of a receiver's own.
        places: group -> member ids that could not leave when their link was lost.
    """

    cluster: Cluster
    producer: Producer
    topics: Topics
    registry: Registry
    presence: Presence
    names: Names
    session_timeout: float
    rebalance_timeout: float
    numbers: itertools.count[int]
    places: dict[str, list[str]]
