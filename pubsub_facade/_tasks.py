"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any, Final

AGAIN: Final = 5.0  # s that what a task does while it is cancelled may take


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return once all have ended.

    Again after `AGAIN`: an error that is raised while a cancellation passes by (a link that is lost during the
    cleanup, say) takes its place, and whoever tries again after such errors would never end.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN)
