"""Contract 12 and 13: payloads and headers arrive as they were given, or are refused before sending."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from pubsub_facade.errors import MessageError, PayloadTooLarge
from pubsub_facade.message import Message
from pubsub_facade.testing.conformance._suite import Bench, Suite, nothing_more, receive, until

MiB = 1 << 20

PAYLOADS: tuple[Any, ...] = (
    b"",
    b"\0",
    bytes(range(256)),
    bytes(range(256)) * 257,
    b"\r\n\r\n\0\0\n",
    b"null",
    "",
    "größe 日本 \U0001f600 \0\n",
    "null",
    {"author": 42, "tags": ["a", None, True, 1.5], "größe": "日本"},
    [],
    {},
    None,
    True,
    0,
    -1.5,
    2**60,
    "x" * 100_000,
)

HEADERS: dict[str, Any] = {
    "str": "text",
    "empty": "",
    "space": " a b ",
    "non-ascii": "größe 日本 \U0001f600",
    "newline": "a\nb\r\nc\rd",
    "colon": ":a:b:",
    "backslash": "a\\nb\\c\\",
    "tab-nul": "a\tb\0c",
    "quote": "\"'`",
    "long": "x" * 5000,
    "number-like": "42",
    "bool-like": "true",
    "int": 42,
    "negative": -1,
    "zero": 0,
    "int64": 2**63 - 1,
    "big": 2**100,
    "float": 0.1,
    "float-whole": 3.0,
    "float-large": 1e300,
    "float-tiny": 5e-324,
    "inf": math.inf,
    "true": True,
    "false": False,
}

NAMES: tuple[str, ...] = (
    # names that a broker, a driver or JMS gives a meaning to
    "destination",
    "content-length",
    "content-type",
    "message-id",
    "subscription",
    "ack",
    "receipt",
    "receipt-id",
    "transaction",
    "selector",
    "id",
    "persistent",
    "priority",
    "expires",
    "timestamp",
    "correlation-id",
    "reply-to",
    "type",
    "redelivered",
    "delivery-mode",
    "delivery_mode",
    "app_id",
    "user_id",
    "x-death",
    "x-delivery-count",
    "x-first-death-queue",
    "x-delay",
    "x-match",
    "CC",
    "BCC",
    "JMSType",
    "JMSXGroupID",
    "JMSXDeliveryCount",
    "JMSCorrelationID",
    "AMQ_SCHEDULED_DELAY",
    "_AMQ_GROUP_ID",
    "_AMQ_SCHED_DELIVERY",
    "destination-type",
    "transformation",
    "browser",
    "key",
    "topic",
    "offset",
    "partition",
    "attempt",
    "headers",
    # names that are hard to write
    "X-Upper",
    "with space",
    "with:colon",
    "new\nline",
    "größe",
    "日本",
    "a.b",
    "a-b",
    "a_b",
    "1",
    "$",
    "n" * 200,
)


class Post(BaseModel):
    """What the typed handlers take."""

    author: int
    text: str = ""


@dataclass
class Like:
    """The same as a dataclass."""

    author: int
    post: str


class Payloads(Suite):
    """Every byte, every type, and nothing over the limit."""

    async def test_payloads_arrive_as_they_were_published(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            sent = await pubsub.publish_many(Message("social.post", payload) for payload in PAYLOADS)
            received = {d.id: d for d in await receive(stream, len(PAYLOADS))}
        for message, payload in zip(sent, PAYLOADS, strict=True):
            delivery = received[message.id]
            assert delivery.payload == payload
            assert type(delivery.payload) is type(payload)
            assert delivery.body == message.body
            assert delivery.content_type == message.content_type

    async def test_one_mebibyte_arrives(self, bench: Bench) -> None:
        pubsub = bench.client()
        body = bytes(range(256)) * (MiB // 256)
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish("social.post", body)
            (delivery,) = await receive(stream, 1)
            assert delivery.body == body

    async def test_the_largest_payload_arrives_and_one_byte_more_is_refused(self, bench: Bench) -> None:
        pubsub = bench.client()
        limit = bench.capabilities.max_payload
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            with pytest.raises(PayloadTooLarge, match=str(limit)):
                await pubsub.publish("social.post", bytes(limit + 1))
            with pytest.raises(PayloadTooLarge, match=str(limit)):
                await pubsub.publish_many(
                    [Message("social.post", "fine"), Message("social.post", bytes(limit + 1))]
                )
            largest = await pubsub.publish("social.post", bytes(limit))
            (delivery,) = await receive(stream, 1)
            assert (delivery.id, len(delivery.body)) == (largest.id, limit)
            await nothing_more(stream)

    async def test_models_and_dataclasses_are_json_and_validated(self, bench: Bench) -> None:
        got: list[object] = []

        async def posted(post: Post) -> None:
            got.append(post)

        async def liked(like: Like) -> None:
            got.append(like)

        pubsub = bench.client()
        pubsub.subscriber("social.post", subscription="posts")(posted)
        pubsub.subscriber("social.like", subscription="likes")(liked)
        await pubsub.start()
        post = await pubsub.publish("social.post", Post(author=42, text="größe"))
        await pubsub.publish("social.like", Like(7, "p1"))
        assert post.content_type == "application/json"
        await until(lambda: len(got) == 2, "both handled")
        assert Post(author=42, text="größe") in got
        assert Like(7, "p1") in got

    async def test_what_has_no_bytes_is_refused_before_anything_is_sent(self, bench: Bench) -> None:
        pubsub = bench.client()
        for payload in (object(), {"f": lambda: 1}, "\ud800"):
            with pytest.raises(MessageError):
                await pubsub.publish("social.post", payload)
        assert pubsub.state == "idle"

    async def test_headers_keep_their_value_and_type(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish("social.post", "x", headers=HEADERS)
            (delivery,) = await receive(stream, 1)
        got = delivery.headers
        assert dict(got) == HEADERS
        assert {name: type(got[name]) for name in HEADERS} == {
            name: type(value) for name, value in HEADERS.items()
        }

    async def test_a_header_that_is_no_number_and_a_negative_zero_arrive(self, bench: Bench) -> None:
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish("social.post", "x", headers={"nan": math.nan, "minus": -0.0})
            (delivery,) = await receive(stream, 1)
        assert math.isnan(float(delivery.headers["nan"]))
        assert math.copysign(1, float(delivery.headers["minus"])) == -1

    async def test_a_header_may_have_any_name(self, bench: Bench) -> None:
        """What the broker gives a meaning to is an ordinary header to the user, and changes nothing."""
        pubsub = bench.client()
        headers = {name: f"value of {name}" for name in NAMES}
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            sent = await pubsub.publish("social.post", "x", headers=headers, key="k")
            (delivery,) = await receive(stream, 1, ack=False)
            assert dict(delivery.headers) == headers
            assert (delivery.id, delivery.topic, delivery.key) == (sent.id, "social.post", "k")
            await delivery.retry(0)
            (again,) = await receive(stream, 1)
            assert dict(again.headers) == headers

    async def test_a_hundred_headers_arrive(self, bench: Bench) -> None:
        pubsub = bench.client()
        kinds: tuple[Any, ...] = ("text", 1, 1.5, True)
        headers = {f"header-{n}": kinds[n % 4] for n in range(100)}
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish("social.post", "x", headers=headers)
            (delivery,) = await receive(stream, 1)
            assert dict(delivery.headers) == headers

    async def test_keys_and_ids_may_be_any_text(self, bench: Bench) -> None:
        texts = ["k", "größe:日本\n", " ", "a" * 200, "\\", "\U0001f600", "0", "true", "a=b;c"]
        pubsub = bench.client()
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish_many(Message("social.post", text, key=text, id=text) for text in texts)
            long = await pubsub.publish("social.post", "long", key="k" * 1000)
            received = await receive(stream, len(texts) + 1)
        assert {(d.key, d.id) for d in received} == {*((text, text) for text in texts), ("k" * 1000, long.id)}

    async def test_what_a_message_cannot_be_is_refused_before_anything_is_sent(self, bench: Bench) -> None:
        pubsub = bench.client()
        bad: list[dict[str, Any]] = [
            {"headers": {"a": None}},
            {"headers": {"a": b"bytes"}},
            {"headers": {"a": [1]}},
            {"headers": {"": "empty"}},
            {"headers": {1: "number"}},
            {"headers": {"pubsub-id": "ours"}},
            {"headers": {"Pubsub-X": "ours"}},
            {"headers": {"a\0": "nul"}},
            {"headers": {"n" * 201: "long"}},
            {"headers": {"a": "\ud800"}},
            {"key": ""},
            {"key": 7},
            {"key": "k" * 1001},
            {"id": 7},
            {"id": "i" * 201},
            {"delay": -1},
            {"delay": "1"},
            {"timeout": 0},
        ]
        for arguments in bad:
            with pytest.raises(MessageError):
                await pubsub.publish("social.post", "x", **arguments)
        with pytest.raises(MessageError):
            await pubsub.publish_many(["no message"])  # type: ignore[list-item]
        assert await pubsub.publish_many([]) == []
        assert pubsub.state == "idle"
