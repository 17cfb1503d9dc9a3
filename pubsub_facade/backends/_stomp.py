"""One STOMP 1.2 link on the event loop: frames in batches both ways, receipts, heartbeats. No thread.

stomp.py reads and writes the control frames; its connection is not used, because it calls a listener for
each frame on a thread of its own and locks each send. The two frames made per message, SEND and MESSAGE,
are coded here: stomp.py's parser takes 40 us for one, ours 4. A link is dead once it is lost: whoever
waits on it gets ConnectionLost, and it is never reused.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

os.environ.setdefault("STOMP_SKIP_HOSTNAME_SCAN", "1")  # stomp.py asks the DNS for our own name when imported

from stomp import utils

from pubsub_facade.address import Address, Tls, show_host
from pubsub_facade.backends import _tls_advice
from pubsub_facade.errors import AuthenticationFailed, ConnectionFailed, ConnectionLost, PubSubError

Frame = tuple[dict[str, str], bytes]
"""Headers and body of a MESSAGE."""

CLOSE_TIMEOUT: Final = 2.0  # s to say goodbye
MAX_TEXT: Final = 400  # characters kept of what a broker says
MAX_BUFFER: Final = 1 << 20  # bytes written and not on their way: `drain` waits above it

_BETWEEN: Final = frozenset(b"\r\n\0")  # what may stand between frames
_ESCAPED: Final = re.compile(r"\\.")
_UNESCAPES: Final = {"\\c": ":", "\\n": "\n", "\\r": "\r", "\\\\": "\\"}
_BUSY: Final = "already connected from"
_DENIED: Final = ("password is invalid", "Security Error", "not authorized", "does not have permission")

_REFUSED_MESSAGE: Final = re.compile(r"(AMQ339011 Error sending message) .*? address=([^,\]]+)", re.DOTALL)

_REFUSED_ACK: Final = "AMQ339018"

_CLOSED_CONSUMER: Final = re.compile(r"consumer with ID .*?QueueImpl\[name=([^,]+),", re.DOTALL)


class BrokerRefused(PubSubError):
    """The broker answered with ERROR; the text is the broker's.

    Arguments:
        sure: the ERROR names this frame; False: it names none, and this batch was the next to be answered.
    """

    def __init__(self, text: str, *, sure: bool) -> None:
        super().__init__(text)
        self.sure = sure

    @property
    def denied(self) -> bool:
        """Whether it is a matter of rights, which waiting does not mend."""
        return any(sign in str(self) for sign in _DENIED)


class ClientBusy(ConnectionFailed):
    """Another connection holds this client-id (ActiveMQ Classic: the active member of a subscription)."""


def escape(text: str) -> str:
    """A header name or value as STOMP 1.2 writes it."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace(":", "\\c")


def control(command: str, headers: Mapping[str, Any], body: bytes = b"") -> bytes:
    """Any frame that is not made per message, encoded."""
    escaped = {escape(name): escape(str(value)) for name, value in headers.items()}
    return b"".join(utils.convert_frame(utils.Frame(command, escaped, body)))


def send_frame(lines: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A SEND frame.

    Arguments:
        lines: encoded header lines, with their ends.
        headers: further ones, not encoded.
    """
    text = "".join([f"{name}:{value}\n" for name, value in headers.items()])
    count = len(headers)
    if text.count(":") != count or text.count("\n") != count or "\\" in text or "\r" in text:
        text = "".join([f"{escape(name)}:{escape(value)}\n" for name, value in headers.items()])
    return f"SEND\n{lines}{text}content-length:{len(body)}\n\n".encode() + body + b"\0"


def ack_frames(ids: Iterable[str]) -> bytes:
    """ACK frames for values of ``ack`` headers."""
    return "".join([f"ACK\nid:{escape(id)}\n\n\0" for id in ids]).encode()


def unescape(text: str) -> str:
    """What `escape` was given; sequences that STOMP 1.2 does not know stay as they are."""
    if "\\\\" in text:
        return _ESCAPED.sub(lambda match: _UNESCAPES.get(match[0], match[0]), text)
    return text.replace("\\c", ":").replace("\\n", "\n").replace("\\r", "\r")


def _headers(lines: list[str]) -> dict[str, str]:
    """Header lines of a MESSAGE as a dict; the first of twins counts (STOMP 1.2)."""
    headers: dict[str, str] = {}
    for line in reversed(lines):
        name, _, value = line.partition(":")
        if "\\" in line:
            headers[unescape(name)] = unescape(value)
        else:
            headers[name] = value
    return headers


class Parser:
    """Bytes as they come -> frames. Pure.

    A frame whose length is known is not looked at again before it is complete: a body of 100 MiB costs no
    more per byte than one of 100.
    """

    __slots__ = ("_buffer", "_needed")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = 1

    def feed(self, data: bytes) -> list[tuple[str, dict[str, str], bytes]]:
        """Add ``data``; returns the frames that are complete now: command, headers, body."""
        if self._buffer or self._needed > 1:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        frames: list[tuple[str, dict[str, str], bytes]] = []
        start, end = 0, len(data)
        self._needed = 1
        while True:
            while start < end and data[start] in _BETWEEN:
                start += 1
            head = data.find(b"\n\n", start)
            if head < 0:
                break
            command, *lines = data[start:head].decode("utf-8", "replace").split("\n")
            headers = _headers(lines)
            body = head + 2
            length = headers.get("content-length")
            if length is not None and length.isdigit():
                stop = body + int(length)
                if stop >= end:
                    self._needed = stop + 1 - start
                    break
            else:
                stop = data.find(b"\0", body)
                if stop < 0:
                    break
            frames.append((command, headers, data[body:stop]))
            start = stop + 1
        if start < end:
            self._buffer += data[start:]
        return frames


class Link(asyncio.Protocol):
    """One connection to the broker. Made by `connect`.

    Arguments:
        address: shown in errors, as ``host:port``.
        heartbeat: seconds of silence until it is given up; beats go out three times as often.
    """

    def __init__(self, address: str, heartbeat: float) -> None:
        self.address = address
        self.server = ""
        self.on_messages: Callable[[list[Frame]], None] = _ignore
        self.on_lost: Callable[[ConnectionLost], None] = _ignore
        self._heartbeat = heartbeat
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = Parser()
        self._receipts: dict[str, asyncio.Future[None]] = {}
        self._batches: dict[str, None] = {}  # those of the receipts that confirm messages, oldest first
        self._sequence = 0
        self._connected: asyncio.Future[dict[str, str]] = self._loop.create_future()
        self._writable: asyncio.Future[None] | None = None
        self._quick_ack: Callable[[], None] | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._read_at = self._wrote_at = time.monotonic()
        self._silence = 0.0
        self._last_error = ""
        self.lost: ConnectionLost | None = None

    # -- connecting -------------------------------------------------------------------------------

    @classmethod
    async def connect(
        cls, address: Address, tls: Tls, heartbeat: float, timeout: float, client_id: str | None = None
    ) -> Link:
        """A link to the first host that takes us.

        Arguments:
            timeout: seconds for each host.
            client_id: identity of a durable subscriber.

        Raises ConnectionFailed, AuthenticationFailed, ClientBusy.
        """
        context = tls.context() if address.secure else None
        failed: list[str] = []
        cause: BaseException | None = None
        for host, port in address.hosts:
            name = show_host(host, port)
            try:
                async with asyncio.timeout(timeout):
                    return await cls._connect(host, port, context, tls, heartbeat, address, client_id)
            except (AuthenticationFailed, ClientBusy):
                raise
            except (OSError, TimeoutError, ConnectionLost, ConnectionFailed) as error:
                failed.append(f"{name}: {_reason(error, timeout, secure=context is not None)}")
                cause = error
        raise ConnectionFailed(f"cannot connect to ActiveMQ: {'; '.join(failed)}") from cause

    @classmethod
    async def _connect(
        cls,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        tls: Tls,
        heartbeat: float,
        address: Address,
        client_id: str | None,
    ) -> Link:
        loop = asyncio.get_running_loop()
        server_name = None if context is None else tls.hostname or host
        _, link = await loop.create_connection(
            lambda: cls(show_host(host, port), heartbeat),
            host,
            port,
            ssl=context,
            server_hostname=server_name,
        )
        try:
            await link._greet(host, address, client_id)
        except BaseException:
            link.abort()
            raise
        return link

    async def _greet(self, host: str, address: Address, client_id: str | None) -> None:
        promised, wanted = int(self._heartbeat * 1000), max(1, int(self._heartbeat * 1000 / 3))
        headers: dict[str, object] = {
            "accept-version": "1.2",
            "host": host,
            "heart-beat": f"{promised},{wanted}",
        }
        if client_id is not None:
            headers["client-id"] = client_id
        if address.username is not None:
            headers["login"] = address.username
            headers["passcode"] = address.secret or ""
        # CONNECT alone is not escaped (STOMP 1.2, "Value Encoding"); settings hold no line ends
        lines = {name: str(value).replace("\n", "").replace("\r", "") for name, value in headers.items()}
        self.write(b"".join(utils.convert_frame(utils.Frame("CONNECT", lines))))
        connected = await self._connected
        self.server = connected.get("server", "")
        theirs, ours = (int(part) for part in connected.get("heart-beat", "0,0").split(","))
        self._silence = self._heartbeat if theirs else 0.0
        if theirs or ours:
            self._watch()

    # -- heartbeats -------------------------------------------------------------------------------

    def _watch(self) -> None:
        now = time.monotonic()
        if self._silence and now - self._read_at >= self._silence:
            self._fail(f"no sign of life from the broker for {now - self._read_at:.1f} s")
            return
        pause = self._heartbeat / 6
        if now - self._wrote_at >= pause:
            self.write(b"\n")
        self._beat = self._loop.call_later(pause, self._watch)

    # -- writing ----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Hand bytes of whole frames over; nothing happens on a lost link."""
        if self._transport is not None and self.lost is None:
            self._wrote_at = time.monotonic()
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait while too much is written and not on its way."""
        if self._writable is not None:
            await asyncio.shield(self._writable)
        if self.lost is not None:
            raise self._gone()

    def receipt(self, *, batch: bool = False) -> tuple[str, asyncio.Future[None]]:
        """A new receipt id, and the future of the broker's answer: BrokerRefused where it is ERROR.

        Arguments:
            batch: it confirms messages, of which those without a receipt of their own may be refused.
        """
        self._sequence += 1
        id = str(self._sequence)
        future: asyncio.Future[None] = self._loop.create_future()
        if self.lost is not None:
            _fail(future, self._gone())
        else:
            self._receipts[id] = future
            if batch:
                self._batches[id] = None
        return id, future

    async def ask(self, command: str, headers: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a control frame and wait for its receipt.

        Raises BrokerRefused, AuthenticationFailed where this user lacks a right, ConnectionLost.
        """
        id, future = self.receipt()
        self.write(control(command, {**headers, "receipt": id}, body))
        try:
            await self.answer(id, future)
        except BrokerRefused as error:
            if error.denied:
                raise AuthenticationFailed(
                    f"ActiveMQ at {self.address}: {error}: grant the user this right"
                ) from error
            raise

    async def answer(self, id: str, future: asyncio.Future[None]) -> None:
        """Wait for a receipt; if the wait is cancelled nobody misses the answer."""
        try:
            await future
        finally:
            self._receipts.pop(id, None)
            self._batches.pop(id, None)

    # -- reading ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(MAX_BUFFER)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_QUICKACK"):
            # Classic writes small frames one by one and Nagle's algorithm holds the second one back until we
            # acknowledge the first: 40 ms for each answer of two frames. The kernel forgets this option.
            self._quick_ack = partial(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self._quick_ack()

    def data_received(self, data: bytes) -> None:
        self._read_at = time.monotonic()
        if self._quick_ack is not None:
            self._quick_ack()
        messages: list[Frame] = []
        for command, headers, body in self._parser.feed(data):
            if command == "MESSAGE":
                messages.append((headers, body))
            elif command == "RECEIPT":
                future = self._receipts.get(headers.get("receipt-id", ""))
                if future is not None and not future.done():
                    future.set_result(None)
            elif command == "ERROR":
                self._on_error(headers, body)
            elif command == "CONNECTED" and not self._connected.done():
                self._connected.set_result(headers)
        if messages:
            self.on_messages(messages)

    def _on_error(self, headers: Mapping[str, str], body: bytes) -> None:
        text = _short(headers.get("message") or body.decode("utf-8", "replace").partition("\n")[0])
        if not self._connected.done():
            self._connected.set_exception(self._refusal(text))
            return
        named = self._receipts.get(headers.get("receipt-id", ""))
        if named is not None:
            _fail(named, BrokerRefused(text, sure=True))
            return
        # Answers come in order, so it is about something sent before the next receipt. Artemis may go on to
        # commit a transaction without the message it refused: its RECEIPT must not count.
        self._last_error = text
        refused = BrokerRefused(text, sure=False)
        for id, future in self._receipts.items():
            # A right that is missing: Artemis ends the link, and it would be asked for again and again.
            if not future.done() and (id in self._batches or refused.denied):
                _fail(future, refused)
                break

    def _refusal(self, text: str) -> ConnectionFailed:
        if _BUSY in text:
            return ClientBusy(text)
        if any(sign in text for sign in _DENIED):
            return AuthenticationFailed(
                f"ActiveMQ at {self.address} refused the credentials: {text}: check username and password"
            )
        return ConnectionFailed(f"ActiveMQ at {self.address} refused the connection: {text}")

    # -- the end ----------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(self._last_error or str(error or "closed by the broker"), error)

    def _gone(self) -> ConnectionLost:
        assert self.lost is not None
        error = ConnectionLost(str(self.lost))
        error.__cause__ = self.lost.__cause__
        return error

    def _fail(self, why: str, cause: BaseException | None = None) -> None:
        if self.lost is not None:
            return
        self.lost = ConnectionLost(f"ActiveMQ at {self.address}: {why}")
        self.lost.__cause__ = cause
        if self._beat is not None:
            self._beat.cancel()
        if self._transport is not None:
            self._transport.abort()
        if not self._connected.done():
            self._connected.set_exception(self._gone())
        self._connected.exception()  # retrieved: nobody may wait for it any more
        for future in self._receipts.values():
            _fail(future, self._gone())
        self.resume_writing()
        self.on_lost(self.lost)

    async def close(self) -> None:
        """Say goodbye, so that all that was written arrives, and leave. Bounded; never raises."""
        if self.lost is None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self.ask("DISCONNECT", {})
            except (TimeoutError, PubSubError):
                pass
        self.abort()

    def abort(self) -> None:
        """Leave without a word."""
        self._fail("closed by us")


def _reason(error: BaseException, timeout: float, *, secure: bool) -> str:
    """Why a host could not be connected to, and what to look at."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s: {_tls_advice.of_silence('activemq', secure=secure)}"
    advice = _tls_advice.of_error(error, "activemq")
    if not advice and isinstance(error, ConnectionLost):
        advice = _tls_advice.of_silence("activemq", secure=secure)
    return f"{error}: {advice or 'is it running, with STOMP on this port?'}"


def _short(text: str) -> str:
    """What a broker says. Artemis shows objects whole, and the message that it refuses; only its log says why."""
    closed = _CLOSED_CONSUMER.match(text)
    if closed is not None:
        return f"queue {closed[1][:MAX_TEXT]} was deleted on the broker, or our consumer of it closed there"
    if text.startswith(_REFUSED_ACK):
        return f"{text[:MAX_TEXT]}: its queue was deleted on the broker, or our consumer of it closed there"
    shown = _REFUSED_MESSAGE.match(text)
    if shown is None:
        return text[:MAX_TEXT]
    why = "this user lacks the permission SEND, or the address is full"
    return f"{shown[1]} to address {shown[2][:MAX_TEXT]}: {why}; the broker's log says which"


def _ignore(_: object) -> None:
    return


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    """Answer with an error, and call it retrieved: whoever asked may have been cancelled before it waits."""
    if not future.done():
        future.set_exception(error)
        future.exception()
