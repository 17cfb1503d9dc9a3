"""What a user puts into a message stays in it: no text of theirs is a frame, a command or a field of ours.

Names that steer one broker are in that broker's tests; here is what is hostile in the syntax of any protocol.
"""

from __future__ import annotations

import uuid

import pytest

from pubsub_facade import AsyncPubSub, HeaderValue, Message, MessageError
from tests.conftest import broker_settings

FORMS = ["rabbitmq", "kafka", "activemq", "activemq-virtual", "artemis"]
DEADLINE = 20.0  # s

FRAME = "x\n\n\0SEND\ndestination:/topic/stolen\nreceipt:1\n\nbody\0\n"
AMQP_END = "\xce\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x28"  # as text: an end of frame, then a method
HOSTILE: dict[str, HeaderValue] = {
    "frame": FRAME,
    "end": AMQP_END,
    "nul": "a\0b",
    "lines": "a\r\nb\nc\r",
    "a:b\nc": "name with a line end",
    "content-length": 0,
    "x-death": "[]",
    "x-delivery-count": -1,
    "destination": "/queue/stolen",
    "receipt": "1",
    "transaction": "t",
    "subscription": "0",
    "ack": "0",
    "AMQ_SCHEDULED_DELAY": 3_600_000,
    "_AMQ_SCHED_DELIVERY": 1 << 60,
}
TEXT = "k:\n\\n\r\n\\\u2028SEND\n\nx"


@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS])
async def test_hostile_text_arrives_as_text_and_changes_nothing_else(form: str) -> None:
    settings = broker_settings(form)(namespace=f"inject-{uuid.uuid4().hex[:8]}")
    first = Message("a.b", FRAME, key=TEXT, id=f"id:{TEXT}", headers=HOSTILE)
    async with AsyncPubSub(settings) as pubsub:
        try:
            async with pubsub.subscribe("#", subscription="all", max_attempts=2) as stream:
                await pubsub.publish_many([first, Message("a.c", b"after", id="after")])
                for attempt in (1, 2):  # as published, and as the copy that a retry makes
                    found = {}
                    while f"id:{TEXT}" not in found or (attempt == 1 and "after" not in found):
                        delivery = await stream.receive(DEADLINE)
                        found[delivery.id] = delivery
                    hostile = found[f"id:{TEXT}"]
                    assert (hostile.topic, hostile.payload, hostile.key) == ("a.b", FRAME, TEXT)
                    assert dict(hostile.headers) == HOSTILE
                    assert hostile.attempt == attempt
                    if attempt == 1:
                        after = found["after"]
                        assert (after.topic, after.body, dict(after.headers)) == ("a.c", b"after", {})
                        await after.ack()
                        await hostile.retry(0)
                    else:
                        await hostile.reject(FRAME)
                (letter,) = [each async for each in pubsub.dead_letters("all")]
                assert (letter.id, letter.topic, letter.key) == (f"id:{TEXT}", "a.b", TEXT)
                assert dict(letter.headers) == HOSTILE
                assert letter.failure is not None
                assert (letter.failure.error, letter.failure.attempts) == (FRAME, 2)
        finally:
            await pubsub.delete("all")


@pytest.mark.parametrize("name", ["pubsub-id", "pubsub-topic", "Pubsub-Attempt", "PUBSUB-h-x", "nul\0name"])
async def test_no_header_of_a_user_is_in_the_facade_s_namespace(name: str) -> None:
    async with AsyncPubSub(backend="memory") as pubsub:
        with pytest.raises(MessageError, match="header"):
            await pubsub.publish("a.b", 1, headers={name: "x"})
