"""What the frameworks' commands share: run a client's members as a service, and publish from any event loop.

A service runs until a signal, or until its subscriptions are drained, and can answer health checks meanwhile. Its
health is what the members say now: nothing is remembered from better days.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

from pubsub_facade.client import GRACE, AsyncPubSub
from pubsub_facade.errors import ConfigError, PubSubError
from pubsub_facade.message import Message
from pubsub_facade.sync import PubSub, _loop_thread

log = logging.getLogger("pubsub_facade")

LOOK: Final = 0.1  # s between looks at whether all is drained
QUIET: Final = 2.0  # s without work that mean drained, where the broker does not tell how much waits

Report = Callable[[], tuple[bool, Mapping[str, Any]]]


def health_of(client: AsyncPubSub) -> tuple[bool, dict[str, Any]]:
    """Whether every member of ``client`` is connected and receiving now, and the facts."""
    members = {
        registration.subscription.label or "(ephemeral)": False
        for registration in client.subscribers.registrations
    }
    members |= {
        consumer.subscription.label or "(ephemeral)": consumer.receiving for consumer, _ in client._members
    }
    healthy = client.state == "connected" and all(members.values())
    return healthy, {"state": client.state, "members": members}


async def answer_health(address: str, report: Report) -> asyncio.Server:
    """Answer every HTTP request by 200 or 503 and the report as JSON.

    Arguments:
        address: ``PORT`` on loopback, or ``HOST:PORT``.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"health address {address!r} is none: give PORT, or HOST:PORT as 0.0.0.0:8080")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(5):
                await reader.readuntil(b"\r\n\r\n")
            healthy, facts = report()
            body = json.dumps({"healthy": healthy, **facts}).encode()
            status = "200 OK" if healthy else "503 Service Unavailable"
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or asked nonsense: there is nobody to answer
        finally:
            writer.close()

    try:
        return await asyncio.start_server(answer, host or "127.0.0.1", int(port))
    except OSError as error:
        raise ConfigError(f"health address {address!r} cannot be used: {error.strerror or error}") from error


async def serve(
    client: AsyncPubSub,
    stop: asyncio.Event,
    *,
    grace: float = GRACE,
    drain: bool = False,
    health: str | None = None,
) -> None:
    """Run the members of ``client`` until ``stop`` is set; its end closes the client.

    Arguments:
        grace: seconds that handlers in hand get at the end.
        drain: end by itself once nothing waits for any of them.
        health: address that answers health checks.
    """
    async with AsyncExitStack() as stack:
        if health is not None:
            server = await answer_health(health, lambda: health_of(client))
            stack.callback(server.close)
        if drain:
            watch = asyncio.create_task(_stop_when_drained(client, stop))
            stack.callback(watch.cancel)
        await client.serve(stop, grace)


async def _stop_when_drained(client: AsyncPubSub, stop: asyncio.Event) -> None:
    quiet_since = 0.0
    loop = asyncio.get_running_loop()
    while not stop.is_set():
        await asyncio.sleep(LOOK)
        expected = len(client.subscribers.registrations)
        busy = len(client._members) < expected or any(
            consumer._out or len(consumer._lanes) for consumer, _ in client._members
        )
        if not busy:
            try:
                waiting = await _waiting(client)
            except PubSubError as error:
                log.info("cannot see whether all is drained, looking again: %s", error)
                waiting = 1
            if waiting == 0:
                stop.set()
                return
            busy = waiting is not None
        if busy or not quiet_since:
            quiet_since = loop.time()
        elif loop.time() - quiet_since > QUIET:
            stop.set()


async def _waiting(client: AsyncPubSub) -> int | None:
    """How many messages wait or are in flight in all named subscriptions; None where the broker does not tell."""
    total = 0
    for consumer, _ in client._members:
        if consumer.subscription.name is not None:
            backlog = await client.backlog(consumer.subscription.name)
            if backlog.waiting is None:
                return None
            total += backlog.waiting + (backlog.in_flight or 0)
    return total


def run(pubsub: PubSub, *, grace: float = GRACE, drain: bool = False, health: str | None = None) -> None:
    """`serve` for a `PubSub`, until SIGTERM or SIGINT; a later signal ends the process at once."""
    client = pubsub._here()
    _loop_thread().attend(lambda stop: serve(client, stop, grace=grace, drain=drain, health=health))


async def publish_from(
    pubsub: PubSub, messages: Iterable[Message], timeout: float | None = None
) -> list[Message]:
    """Publish on the links of ``pubsub`` from whichever event loop this runs on, and await the confirm.

    What an async view needs: its loop may live for one request only, the process's links do not.
    """
    client = pubsub._here()
    prepared = [client.prepare(message) for message in messages]
    if not prepared:
        return prepared
    loop = asyncio.get_running_loop()
    thread = _loop_thread()
    future: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def done(error: BaseException | None) -> None:
        if thread.loop is loop:
            settle(error)
            return
        try:
            loop.call_soon_threadsafe(settle, error)
        except RuntimeError:  # that loop has ended, and nobody waits on it any more
            log.info("the outcome of a publish came too late for its event loop: %s", error or "confirmed")

    thread.submit(client, prepared, client.timeout(timeout), done)
    await future
    return prepared
