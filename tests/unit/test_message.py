"""Messages, deliveries, ids."""

from __future__ import annotations

import pickle
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from pubsub_facade import Delivery, Message, MessageError, Reject, Retry, TopicError
from pubsub_facade.errors import PublishTimeout, SendFailed, UnsupportedFeature
from pubsub_facade.message import new_id

RECEIVER: Any = None


def test_ids_are_uuids_of_version_7_in_order_and_never_twice() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == 10_000
    assert sorted(ids) == ids
    for id in ids[::1000]:
        assert len(id) == 36
        assert id[14] == "7"
        assert id[19] in "89ab"
    ms = int(ids[-1][:8] + ids[-1][9:13], 16)
    assert abs(ms / 1000 - time.time()) < 60


def test_ids_stay_in_order_when_the_clock_goes_back() -> None:
    now = time.time() + 3600
    first = new_id(now)
    second = new_id(now - 100)
    assert second > first
    many = [new_id(now) for _ in range(5000)]
    assert sorted(many) == many


def test_a_message_is_checked_as_a_whole() -> None:
    Message("a.b", 1, key="k", headers={"a": "b", "c": 1, "d": 1.5, "e": True}, id="x", delay=1).check()
    with pytest.raises(TopicError):
        Message("a b", 1).check()
    for arguments in (
        {"key": ""},
        {"headers": {"a": None}},
        {"id": 0},
        {"delay": True},
        {"delay": float("nan")},
    ):
        with pytest.raises(MessageError):
            Message("a", 1, **arguments).check()


def test_a_repr_shows_no_payload() -> None:
    message = Message("a.b", "a secret")
    message.body = b"a secret"
    assert "secret" not in repr(message)
    assert "a.b" in repr(message)


def test_published_at_is_the_time_in_utc() -> None:
    message = Message("a", 1)
    assert message.published_at is None
    message.timestamp = 1700000000.5
    assert message.published_at == datetime(2023, 11, 14, 22, 13, 20, 500000, UTC)


def test_a_payload_is_decoded_once_and_only_when_read() -> None:
    delivery = Delivery(RECEIVER, 1, "s", "a", b'{"a": [1]}', content_type="application/json")
    assert delivery.payload == {"a": [1]}
    assert delivery.payload is delivery.payload


async def test_a_delivery_without_an_owner_settles_nothing() -> None:
    delivery = Delivery(RECEIVER, 1, "s", "a", b"")
    await delivery.ack()
    await delivery.retry()
    await delivery.reject("x")
    await delivery.release()
    assert not delivery.settled


def test_a_later_attempt_was_handed_out_before() -> None:
    assert not Delivery(RECEIVER, 1, "s", "a", b"").redelivered
    assert Delivery(RECEIVER, 1, "s", "a", b"", attempt=2).redelivered
    assert Delivery(RECEIVER, 1, "s", "a", b"", redelivered=True).redelivered


def test_errors_travel_between_processes() -> None:
    for error in (
        SendFailed("text", {"a": "unknown"}),
        PublishTimeout("text", {"a": "not stored"}),
        UnsupportedFeature("kafka", "delay", "publish later"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_retry_and_reject_say_what_they_want() -> None:
    assert Retry().after is None
    assert Retry(2.5).after == 2.5
    assert "2.5" in str(Retry(2.5))
    assert Reject("no").reason == "no"
