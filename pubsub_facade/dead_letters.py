"""The dead letters of one subscription: look at them, replay them, drop them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Final

from pubsub_facade.codec import decode, encode
from pubsub_facade.errors import DecodeError, PubSubError
from pubsub_facade.message import HeaderValue, Message, check_headers
from pubsub_facade.supervisor import Supervisor

BATCH: Final = 200  # dead letters replayed by one round trip

_UNCHANGED: Final = object()


class DeadLetters:
    """What `AsyncPubSub.dead_letters` returns. Iterating yields each as a `Message` whose ``failure`` is set.

    ``payload`` is decoded by content type; where it does not decode, which may be why it is here, it is
    the bytes. Nothing is removed by looking.
    """

    def __init__(self, supervisor: Supervisor, subscription: str) -> None:
        self._supervisor = supervisor
        self.subscription = subscription

    async def __aiter__(self) -> AsyncIterator[Message]:
        backend = await self._supervisor.open()
        async for letter in backend.dead(self.subscription):
            try:
                letter.payload = decode(letter.body, letter.content_type)
            except DecodeError:
                letter.payload = letter.body
            yield letter

    async def count(self) -> int:
        """How many there are."""
        backlog = await self._supervisor.run(lambda backend: backend.inspect(self.subscription))
        if backlog.dead is not None:
            return backlog.dead
        return sum([1 async for _ in self])

    async def replay(self, ids: Collection[str] | None = None) -> int:
        """Hand them out again, to this subscription only, as attempt 1; returns how many.

        Arguments:
            ids: message ids; None: all that are there now.
        """
        wanted = None if ids is None else set(ids)
        chosen = [letter async for letter in self if wanted is None or letter.id in wanted]
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            await self._resend(batch)
            await self.purge([letter.id for letter in batch])
        return len(chosen)

    async def edit(
        self,
        id: str,
        payload: Any = _UNCHANGED,
        *,
        headers: Mapping[str, HeaderValue] | None = None,
    ) -> None:
        """Replay one dead letter with another payload or other headers; its id and key stay.

        Raises PubSubError where there is none with this id.
        """
        async for letter in self:
            if letter.id == id:
                break
        else:
            raise PubSubError(
                f"subscription {self.subscription!r} has no dead letter {id!r}: list them to see the ids"
            )
        if payload is not _UNCHANGED:
            letter.body, letter.content_type = encode(payload)
        if headers is not None:
            check_headers(headers)
            letter.headers = dict(headers)
        await self._resend([letter])
        await self.purge([id])

    async def purge(self, ids: Collection[str] | None = None) -> int:
        """Remove them for good; returns how many.

        Arguments:
            ids: message ids; None: all.
        """
        return await self._supervisor.run(lambda backend: backend.discard(self.subscription, ids))

    async def _resend(self, letters: list[Message]) -> None:
        for letter in letters:
            letter.failure = None
            letter.attempt = 1
        await self._supervisor.run(lambda backend: backend.resend(self.subscription, letters))
