"""A subscription that is deleted under a running member: one warning says so, and the member has it again."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from pubsub_facade import AsyncPubSub, Message, Settings
from pubsub_facade.testing.conformance import Inbox, eventually, until
from tests.conftest import broker_settings

FORMS: Final = (
    "sqlite",
    *(pytest.param(form, marks=pytest.mark.broker(form)) for form in ("rabbitmq", "kafka", "artemis")),
)
"""Classic refuses to delete what has an active member; what its console removes is in test_activemq_removed."""

MEMBER: Final = ": subscription audit: "
"""How a member's lines begin, after the backend."""


@pytest_asyncio.fixture(params=FORMS)
async def settings(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Settings]:
    namespace = f"deleted-{secrets.token_hex(4)}"
    if request.param == "sqlite":
        made = Settings(backend="sqlite", namespace=namespace, sqlite={"path": tmp_path / "deleted.db"})
    else:
        made = broker_settings(request.param)(namespace=namespace)
    yield made
    async with AsyncPubSub(made) as pubsub:
        await pubsub.delete("audit")


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("traffic", [False, True])
async def test_a_member_says_that_its_subscription_was_deleted_and_declares_it_again(
    settings: Settings, ordered: bool, traffic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        running, other, console = [await stack.enter_async_context(AsyncPubSub(settings)) for _ in range(3)]
        inbox = Inbox()
        running.subscriber("a.#", subscription="audit", ordered=ordered)(inbox)
        await running.start()
        await inbox.until_ids([(await other.publish("a.x", 0)).id])
        caplog.clear()
        background = asyncio.create_task(publish_on(other)) if traffic else None

        await console.delete("audit")

        await until(lambda: bool(warnings(caplog)), "a warning")
        if background is not None:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
        ids: set[str] = set()

        async def receives_again() -> bool:
            ids.add((await other.publish("a.x", 1)).id)
            return bool(ids & set(inbox.ids))

        await eventually(receives_again, "a message after the deletion")
        sent = await other.publish_many([Message("a.x", n) for n in range(50)])
        await inbox.until_ids(message.id for message in sent)
    lines = warnings(caplog)
    ours = [line for line in lines if MEMBER in line]
    assert all("was deleted" in line and "joining again" in line for line in ours), lines
    assert len(ours) == 1, lines


async def publish_on(pubsub: AsyncPubSub) -> None:
    while True:
        await pubsub.publish("a.x", -1)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
