"""A user whom the broker lets in, and who may do nothing there, is told which right is missing, at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pubsub_facade import AsyncPubSub, AuthenticationFailed, PubSubError, SendFailed, Settings
from tests.integration.guarded import BARRED, BARRED_USER
from tests.integration.secured import Secured

PATIENCE = 15.0  # s, far below the 30 that publish would try again for


def barred(secured: Secured) -> AsyncPubSub:
    """A client of the user without rights."""
    tls = {"ca": secured.certificates.ca}
    if secured.name == "kafka":
        section: dict[str, Any] = {"username": BARRED_USER, "password": BARRED, "sasl_mechanism": "PLAIN"}
        return AsyncPubSub(Settings(**secured.settings(secured.sasl_port, tls, **section)))
    return AsyncPubSub(Settings(**secured.settings(secured.port, tls, username=BARRED_USER, password=BARRED)))


async def refused(client: AsyncPubSub, attempt: Callable[[AsyncPubSub], Awaitable[object]]) -> PubSubError:
    """The error that the attempt ends in, soon and without the password."""
    began = time.monotonic()
    async with client:
        with pytest.raises(PubSubError) as caught:
            await asyncio.wait_for(attempt(client), 2 * PATIENCE)
    assert time.monotonic() - began < PATIENCE
    assert BARRED not in str(caught.value)
    return caught.value


def names_a_right(text: str) -> bool:
    """Whether a text says that it is about what this user may do."""
    words = ("right", "access", "not authorized", "permission", "AuthorizationFailed", "security")
    return any(word.lower() in text.lower() for word in words)


async def test_publishing_without_the_right_is_refused_at_once(secured: Secured) -> None:
    error = await refused(barred(secured), lambda client: client.publish("tls.a", 1))
    assert isinstance(error, AuthenticationFailed | SendFailed), repr(error)
    assert names_a_right(str(error)), str(error)
    if isinstance(error, SendFailed):
        assert set(error.fates.values()) == {"not stored"}


async def test_declaring_without_the_right_is_refused_at_once(secured: Secured) -> None:
    error = await refused(barred(secured), lambda client: client.declare("tls.#", subscription="barred"))
    assert isinstance(error, AuthenticationFailed), repr(error)
    assert names_a_right(str(error)), str(error)


async def test_a_member_without_the_right_ends_with_the_reason(secured: Secured) -> None:
    """``pubsub run`` exits by it: waiting would not mend it."""
    client = barred(secured)
    client.subscriber("tls.#", subscription="barred")(_nothing)
    error = await refused(client, lambda client: client.serve(asyncio.Event(), 1))
    assert isinstance(error, AuthenticationFailed), repr(error)


def _nothing(payload: object) -> None:
    return
