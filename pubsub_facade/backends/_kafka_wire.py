"""The two requests that tell topics apart by id (KIP-516), which aiokafka does not speak yet: Metadata 10, Fetch 13.

A topic that was deleted and made again has another id and the same name. An id is text here, as Kafka's own
tools show it; None where a broker knows none (before Kafka 2.8). Whoever sends these to an older broker sends
what aiokafka has for it.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator
from io import BytesIO
from typing import Any, Final

from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
)

METADATA_IDS: Final = 10  # the first version of Metadata with ids
FETCH_IDS: Final = 13  # the first version of Fetch by id

_NONE: Final = bytes(16)


class TopicId(AbstractType[str | None]):  # type: ignore[misc]
    """16 bytes, as text; all zero: None."""

    @classmethod
    def encode(cls, value: str | None) -> bytes:
        return _NONE if value is None else base64.urlsafe_b64decode(value + "==")

    @classmethod
    def decode(cls, data: BytesIO) -> str | None:
        found = data.read(len(_NONE))
        return None if found == _NONE else base64.urlsafe_b64encode(found).decode().rstrip("=")


def same(id: str | None, other: str | None) -> bool:
    """Whether these may be of one topic: nobody can tell where one is not known."""
    return id is None or other is None or id == other


# -- Metadata -----------------------------------------------------------------------------------------


class _MetadataResponse10(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = METADATA_IDS
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString()),
                ("topic_id", TopicId),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class _MetadataRequest10(RequestStruct):  # type: ignore[misc]
    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = METADATA_IDS
    RESPONSE_TYPE = _MetadataResponse10
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", TopicId), ("topic", CompactString()), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class Metadata(MetadataRequest):  # type: ignore[misc]
    """Asks for brokers and for topics (None: all), with ids where the broker knows them. Creates no topic."""

    def __init__(self, names: Collection[str] | None) -> None:
        super().__init__(None if names is None else list(names), False)

    def prepare(self, versions: dict[int, tuple[int, int]]) -> Any:
        if versions.get(self.API_KEY, (0, 0))[1] < METADATA_IDS:
            return super().prepare(versions)
        rows: Any = None if self._topics is None else [(None, name, {}) for name in self._topics]
        return _MetadataRequest10(rows, False, False, False, {})


def topics_of(response: Any) -> Iterator[tuple[int, str, str | None, bool, list[tuple[Any, ...]]]]:
    """Of each topic in an answer: error, name, id, whether it is Kafka's own, partitions (error, number, leader…)."""
    for code, name, *rest in response.topics:
        if response.API_VERSION >= METADATA_IDS:
            id, internal, partitions, *_ = rest
            yield code, name, id, internal, partitions
        else:
            internal, partitions = rest
            yield code, name, None, internal, partitions


# -- Fetch --------------------------------------------------------------------------------------------


class _FetchResponse13(Response):  # type: ignore[misc]
    API_KEY = 1
    API_VERSION = FETCH_IDS
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("session_id", Int32),
        (
            "topics",
            CompactArray(
                ("topic_id", TopicId),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error_code", Int16),
                        ("highwater_offset", Int64),
                        ("last_stable_offset", Int64),
                        ("log_start_offset", Int64),
                        (
                            "aborted_transactions",
                            CompactArray(
                                ("producer_id", Int64), ("first_offset", Int64), ("tags", TaggedFields)
                            ),
                        ),
                        ("preferred_read_replica", Int32),
                        ("message_set", CompactBytes),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class FetchRequest13(RequestStruct):  # type: ignore[misc]
    """A fetch by id: a broker whose log is another topic's refuses it, whatever the offset."""

    FLEXIBLE_VERSION = True
    API_KEY = 1
    API_VERSION = FETCH_IDS
    RESPONSE_TYPE = _FetchResponse13
    SCHEMA = Schema(
        ("replica_id", Int32),
        ("max_wait_time", Int32),
        ("min_bytes", Int32),
        ("max_bytes", Int32),
        ("isolation_level", Int8),
        ("session_id", Int32),
        ("session_epoch", Int32),
        (
            "topics",
            CompactArray(
                ("topic_id", TopicId),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("current_leader_epoch", Int32),
                        ("fetch_offset", Int64),
                        ("last_fetched_epoch", Int32),
                        ("log_start_offset", Int64),
                        ("max_bytes", Int32),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        (
            "forgotten_topics_data",
            CompactArray(("topic_id", TopicId), ("partitions", CompactArray(Int32)), ("tags", TaggedFields)),
        ),
        ("rack_id", CompactString()),
        ("tags", TaggedFields),
    )
