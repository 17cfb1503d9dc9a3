"""Waiting for something to become true, with a deadline and a name for what did not come."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], bool], timeout: float, what: str) -> None:
    """Ask ``true`` every 50 ms for at most ``timeout`` seconds; TimeoutError names ``what`` was awaited."""
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {timeout:g} s")
        time.sleep(0.05)
