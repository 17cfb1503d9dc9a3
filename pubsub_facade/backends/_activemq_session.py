"""The links of one ActiveMQ backend: the main one, to publish and to ask, and those it makes for members.

Owns nothing of what is on the broker; `_activemq_forms` says what to send, this sends it and hands answers back.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from pubsub_facade.backends._activemq_wire import Letter
from pubsub_facade.backends._stomp import BrokerRefused, Frame, Link, control
from pubsub_facade.errors import AuthenticationFailed, ConnectionFailed, ConnectionLost, PubSubError
from pubsub_facade.settings import Settings

GONE: Final = ("AMQ229017", "AMQ229067")  # a queue that somebody has deleted meanwhile
DENIED: Final = "does not have permission"
STOPPING: Final = "Broker is not started"  # in what Artemis refuses while it starts or stops
UNTOLD: Final = "AMQ339016"  # Artemis does not say why it refuses a subscription
ANSWER: Final = 30.0  # s that the broker may take for an administrative answer

Box = asyncio.Queue[Frame | ConnectionLost]
"""What one subscription of the main link received."""


async def store(link: Link, letters: Sequence[Letter]) -> None:
    """Send; returns when the broker has stored all of them, which it does together or not at all.

    All is written before the first wait: calls in order keep their order. Raises BrokerRefused, ConnectionLost.
    """
    id, future = link.receipt(batch=True)
    if len(letters) == 1:
        link.write(letters[0].frame(f"receipt:{id}\n"))
    else:
        transaction = f"transaction:{id}\n"
        link.write(
            b"".join(
                [
                    f"BEGIN\n{transaction}\n\0".encode(),
                    *[letter.frame(transaction) for letter in letters],
                    f"COMMIT\n{transaction}receipt:{id}\n\n\0".encode(),
                ]
            )
        )
    await link.answer(id, future)


class Session:
    """One backend's connection, open or not."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._main: Link | None = None
        self._boxes: dict[str, Callable[[Frame | ConnectionLost], None]] = {}
        self._ids = itertools.count(1)
        self._name = uuid.uuid4().hex
        self._requests: dict[str, asyncio.Future[Frame]] = {}
        self._manager: tuple[Link, asyncio.Task[None]] | None = None

    @property
    def main(self) -> Link:
        """The main link. Raises ConnectionLost where there is none."""
        if self._main is None:
            raise ConnectionLost("activemq: not open")
        if self._main.lost is not None:
            raise ConnectionLost(str(self._main.lost)) from self._main.lost.__cause__
        return self._main

    async def open(self) -> None:
        """Connect the main link. Raises ConnectionFailed, AuthenticationFailed."""
        await self.close()
        self._boxes.clear()
        link = await self.connect()
        link.on_messages = self._received
        link.on_lost = self._lost
        self._main = link

    async def close(self) -> None:
        """Leave. Idempotent; never raises."""
        link, self._main = self._main, None
        if link is not None:
            await link.close()

    async def connect(self, client_id: str | None = None) -> Link:
        """A further link, which the caller closes. Raises ConnectionFailed and its kinds, ClientBusy too."""
        try:
            return await self._connect(client_id)
        except ConnectionFailed as error:
            # Classic, where a client-id is taken, now and then closes the link before it has said so.
            if client_id is None or not isinstance(error.__cause__, ConnectionLost):
                raise
            return await self._connect(client_id)

    async def _connect(self, client_id: str | None) -> Link:
        section = self._settings.activemq
        return await Link.connect(
            section.address, section.tls, section.heartbeat, self._settings.connect_timeout, client_id
        )

    async def subscribe(self, link: Link, headers: Mapping[str, str]) -> None:
        """SUBSCRIBE. Raises AuthenticationFailed for want of a right, BrokerRefused, ConnectionLost."""
        try:
            await link.ask("SUBSCRIBE", headers)
        except ConnectionLost as error:
            if UNTOLD not in str(error):
                raise
            place = headers["destination"]
            await self._find_missing_right(place)
            raise ConnectionLost(f"{error} to {place}: the broker's log says why") from error

    async def _find_missing_right(self, place: str) -> None:
        """Artemis says which right is missing only where an address has yet to be made: so subscribe to such a one."""
        with suppress(ConnectionLost, BrokerRefused):
            try:
                link = await self.connect()
            except AuthenticationFailed:
                raise
            except ConnectionFailed:
                return
            try:
                fresh = f"{place.partition('::')[0]}.{uuid.uuid4().hex}"
                await link.ask(
                    "SUBSCRIBE", {"destination": fresh, "id": "1", "subscription-type": "MULTICAST"}
                )
            except AuthenticationFailed as error:
                raise AuthenticationFailed(f"activemq: no subscribing to address {place}: {error}") from error
            finally:
                await link.close()

    def _received(self, frames: list[Frame]) -> None:
        for frame in frames:
            box = self._boxes.get(frame[0].get("subscription", ""))
            if box is not None:
                box(frame)

    def _lost(self, error: ConnectionLost) -> None:
        for box in list(self._boxes.values()):
            box(error)

    @asynccontextmanager
    async def subscribed(self, headers: Mapping[str, str]) -> AsyncIterator[Box]:
        """A subscription of the main link, for the time of the block; see `next_of`."""
        link = self.main
        id = f"box-{next(self._ids)}"
        box: Box = asyncio.Queue()
        self._boxes[id] = box.put_nowait
        made = True
        try:
            try:
                await self.subscribe(link, {**headers, "id": id})
            except (BrokerRefused, AuthenticationFailed):
                made = False
                raise
            yield box
        finally:
            self._boxes.pop(id, None)
            if made and link.lost is None:
                receipt, future = link.receipt()
                link.write(control("UNSUBSCRIBE", {"id": id, "receipt": receipt}))
                with suppress(ConnectionLost):  # it ends the subscription too, and hides no other error
                    await link.answer(receipt, future)

    # -- Artemis: management by messages ----------------------------------------------------------

    async def manage(self, resource: str, operation: str, *arguments: Any, reply_to: str) -> Any:
        """Call an operation of Artemis' management (its manual, "Management via messages"); its result.

        Arguments:
            reply_to: a multicast address for answers, which all clients of the namespace may share.

        Raises PubSubError with the broker's text where it fails, AuthenticationFailed where the user has no
        right to; ConnectionLost where waiting mends it.
        """
        link = self.main
        if self._manager is None or self._manager[0] is not link:
            self._manager = link, asyncio.get_running_loop().create_task(self._listen(link, reply_to))
        await asyncio.shield(self._manager[1])
        id = f"{self._name}-{next(self._ids)}"
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._requests[id] = future
        try:
            async with asyncio.timeout(ANSWER):
                await link.ask(
                    "SEND",
                    {
                        "destination": "activemq.management",
                        "_AMQ_ResourceName": resource,
                        "_AMQ_OperationName": operation,
                        "reply-to": reply_to,
                        "correlation-id": id,
                    },
                    json.dumps(list(arguments)).encode(),
                )
                headers, body = await future
        except TimeoutError as error:
            raise ConnectionLost(
                f"activemq: no answer to {operation} of {resource} within {ANSWER:g} s"
            ) from error
        finally:
            del self._requests[id]
        result = json.loads(body) if body else None
        if isinstance(result, list):
            result = result[0] if result else None
        if headers.get("_AMQ_OperationSucceeded") != "true":
            text = str(result)
            if any(sign in text for sign in (STOPPING, *GONE)):
                raise ConnectionLost(f"activemq: {operation} of {resource}: {text}")
            refusal = f"activemq: Artemis refused {operation} of {resource}: {text}"
            if DENIED in text:
                raise AuthenticationFailed(f"{refusal}: grant the user this permission")
            raise PubSubError(refusal)
        return result

    async def _listen(self, link: Link, reply_to: str) -> None:
        id = f"box-{next(self._ids)}"
        self._boxes[id] = self._answered
        headers = {"destination": reply_to, "id": id, "ack": "auto", "subscription-type": "MULTICAST"}
        await self.subscribe(link, headers)

    def _answered(self, frame: Frame | ConnectionLost) -> None:
        if isinstance(frame, ConnectionLost):
            for future in self._requests.values():
                if not future.done():
                    future.set_exception(frame)
                    future.exception()  # retrieved: who asked may have failed at its SEND already
            return
        waiting = self._requests.get(frame[0].get("correlation-id", ""))  # others' answers come here too
        if waiting is not None and not waiting.done():
            waiting.set_result(frame)


async def next_of(box: Box) -> Frame:
    """The next frame of a box. Raises ConnectionLost."""
    frame = await box.get()
    if isinstance(frame, ConnectionLost):
        raise frame
    return frame
