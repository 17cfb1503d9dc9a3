"""What is cancelled ends, even where an error takes the place of the cancellation."""

from __future__ import annotations

import asyncio

import pytest

from pubsub_facade import _tasks


async def test_a_task_that_tries_again_after_errors_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tasks, "AGAIN", 0.05)
    tries = 0

    async def tries_for_ever() -> None:
        nonlocal tries
        while True:
            tries += 1
            try:
                try:
                    await asyncio.Event().wait()
                finally:
                    if tries == 1:
                        raise ConnectionResetError("the link is lost during the cleanup")
            except OSError:
                continue

    async def ends() -> None:
        return

    stubborn, over = asyncio.create_task(tries_for_ever()), asyncio.create_task(ends())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await _tasks.cancel(stubborn, over)
    assert tries == 2
    assert stubborn.cancelled()
    assert over.done()
    assert not over.cancelled()
