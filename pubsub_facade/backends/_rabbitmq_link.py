"""One connection to RabbitMQ on the facade's loop: opened, watched, closed; its channels; errors in our words.

pika does the handshake, TLS and every call that has an answer. Frames that come and go per message take
the short way: written together once per turn of the loop, and read straight into the `Sink` of their
channel. Neither reconnects nor retries: what dies tells those who wait, and stays dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple, Protocol

import pika
from pika import exceptions, frame
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils import connection_workflow
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport as AsyncPlaintextTransport

from pubsub_facade.address import Address, Tls, show_host
from pubsub_facade.backends import _rabbitmq_frames as frames
from pubsub_facade.backends import _tls_advice
from pubsub_facade.errors import AuthenticationFailed, ConnectionFailed, ConnectionLost, PubSubError

CLOSE_TIMEOUT: Final = 2.0  # s for a link to end in good order before it is cut
PATIENCE: Final = 10.0  # s for an answer at least: a node may look 7 s for one that does not answer
RECEIVE_BYTES: Final = 1 << 16  # read from the socket at once

NOT_FOUND: Final = 404  # reply codes of AMQP
LOCKED: Final = 405
MISMATCH: Final = 406

_UNROUTED: Final = frozenset({frames.DELIVER, frames.GET_OK, frames.RETURN})
_frame_start: Final = struct.Struct(">BHL").unpack_from
_method_id: Final = struct.Struct(">L").unpack_from
_confirmation: Final = struct.Struct(">QB").unpack_from
_body_size: Final = struct.Struct(">Q").unpack_from

logging.getLogger("pika").addHandler(logging.NullHandler())
if logging.getLogger("pika").level == logging.NOTSET:
    # It logs each attempt to connect several times over, as errors; the supervisor tells it once.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


class ChannelClosed(ConnectionLost):
    """The broker closed one channel and not the link.

    Arguments:
        code: AMQP's reply code, as 404.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Sink(Protocol):
    """Who takes the frames of one channel that come per message. Must not raise."""

    def content(self, content: frames.Content) -> None: ...
    def confirmed(self, tag: int, multiple: bool, stored: bool) -> None: ...
    def empty(self) -> None: ...


class Link(AsyncioConnection):  # type: ignore[misc] # pika has no types
    """One connection. Made by `connect`.

    Arguments:
        parameters: pika's.
        title: for errors: what is connected to what, without the password.
        opened: gets the link, or the error.
    """

    _frame_buffer: bytes

    def __init__(
        self, parameters: pika.ConnectionParameters, title: str, opened: asyncio.Future[Link]
    ) -> None:
        self.title = title
        self.blocked = False  # by a memory or disk alarm: what is published waits
        self.left = False  # by us
        self.given_up = False  # because nothing was answered
        self.begun = self.heard = asyncio.get_running_loop().time()  # and when something came last
        self.patience = max(2.0 * parameters.heartbeat, PATIENCE)
        """Seconds that an answer may take. A node that is cut off from its cluster beats on, and answers nothing."""
        self.unanswered: list[Callable[[], float | None]] = []
        """Each tells since when (loop time) somebody waits for an answer; None: nobody does."""
        self.error: ConnectionLost | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_lost: list[Callable[[ConnectionLost], None]] = []
        self._sinks: dict[int, Sink] = {}
        self._rest = b""
        self._partial: dict[int, list[Any]] = {}
        self._outgoing: list[bytes] = []
        self._facade_loop = asyncio.get_running_loop()
        self._waited_from = 0.0  # (loop time) what was asked before may have waited for the end of an alarm
        self._watch: asyncio.TimerHandle | None = None
        super().__init__(
            parameters,
            on_open_callback=lambda _: self._on_opened(opened),
            on_open_error_callback=lambda _, error: self._on_refused(opened, error),
            on_close_callback=lambda _, error: self._on_ended(error),
            custom_ioloop=self._facade_loop,
        )

    # -- life -------------------------------------------------------------------------------------

    def _on_opened(self, opened: asyncio.Future[Link]) -> None:
        with contextlib.suppress(AttributeError):  # only speed is lost where pika names it otherwise
            self._transport._MAX_RECV_BYTES = RECEIVE_BYTES
            self._transport._MAX_CONSUME_BYTES = 1  # one read a turn, and none that finds nothing
        self.add_on_connection_blocked_callback(lambda *_: self._block(True))
        self.add_on_connection_unblocked_callback(lambda *_: self._block(False))
        self._arm()
        if not opened.done():
            opened.set_result(self)

    def _on_refused(self, opened: asyncio.Future[Link], error: BaseException) -> None:
        self._finish(error)
        if not opened.done():
            opened.set_exception(error)

    def _on_ended(self, error: BaseException) -> None:
        self._finish(error)

    def _finish(self, cause: BaseException) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self.error is None:
            self.error = ConnectionLost(f"{self.title}: {_say(cause)}")
            self.error.__cause__ = cause
        if not self.ended.done():
            self.ended.set_result(None)
        self._sinks.clear()
        for listener in self.on_lost:
            listener(self.error)
        self.on_lost.clear()

    def _block(self, blocked: bool) -> None:
        self.blocked = blocked
        self._waited_from = self._facade_loop.time()

    def _arm(self) -> None:
        """Watch for silence: pika's own check takes up to twice as long, plus ten seconds."""
        self._watch = self._facade_loop.call_later(self.params.heartbeat / 4, self._listen, False)

    def _listen(self, again: bool) -> None:
        if self.is_closed:
            return
        now = self._facade_loop.time()
        silence = now - self.heard
        waited = 0.0 if self.blocked else now - self._asked(now)
        if silence <= self.params.heartbeat and waited <= self.patience:
            self._arm()
        elif again and silence > self.params.heartbeat:
            self._cut_short(f"no sign of life for {silence:.1f} s (heartbeat)")
        elif again:
            self.give_up(f"it beats, but has answered nothing for {waited:.1f} s")
        else:  # this loop may have been busy all the time: let it read first
            self._watch = self._facade_loop.call_later(0.1, self._listen, True)

    def give_up(self, why: str) -> None:
        """End it at once: its node lives, and does not reach those that it needs."""
        self.given_up = True
        self._cut_short(f"{why}: is this node cut off from the others?")

    def _cut_short(self, why: str) -> None:
        if not self.is_closed:
            self._terminate_stream(exceptions.AMQPHeartbeatTimeout(why))

    def _asked(self, now: float) -> float:
        """Since when the oldest question waits for its answer (loop time)."""
        waiting = [since for each in self.unanswered if (since := each()) is not None]
        return max(min(waiting, default=now), self._waited_from)

    async def leave(self) -> None:
        """Close in good order, or cut after `CLOSE_TIMEOUT`. Idempotent; never raises."""
        self.left = True
        try:
            if self.is_open:
                self.close()
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.shield(self.ended)
        except (TimeoutError, exceptions.AMQPError):
            self.cut()

    def cut(self) -> None:
        """End at once, without a word to the broker."""
        with contextlib.suppress(Exception):  # whatever state pika is in, the link is over for us
            if not self.is_closed:
                self._terminate_stream(exceptions.ConnectionClosedByClient(320, "cut"))
        self._finish(exceptions.ConnectionClosedByClient(320, "cut"))

    # -- frames -----------------------------------------------------------------------------------

    def write(self, data: list[bytes]) -> None:
        """Send frames; all that is written in one turn of the loop leaves together."""
        if not self._outgoing:
            self._facade_loop.call_soon(self._flush)
        self._outgoing += data

    def _adapter_emit_data(self, data: bytes) -> None:
        if not self._outgoing:
            self._facade_loop.call_soon(self._flush)
        self._outgoing.append(data)

    def _adapter_disconnect_stream(self) -> None:
        self._flush()
        super()._adapter_disconnect_stream()

    def _flush(self) -> None:
        if self._outgoing:
            data = b"".join(self._outgoing)
            self._outgoing.clear()
            if self._transport is not None:
                data = self._send_now(data)
                if data:
                    self._transport.write(data)

    def _send_now(self, data: bytes) -> bytes:
        """What of ``data`` the socket did not take at once: pika waits for it first, two system calls and a turn."""
        transport = self._transport
        try:
            if type(transport) is not AsyncPlaintextTransport or transport._tx_buffers:
                return data
            if transport._state != transport._STATE_ACTIVE:
                return data
            return data[transport._sock.send(data) :]
        except (OSError, AttributeError):  # full, or at its end: pika's to tell
            return data

    def _on_data_available(self, data_in: bytes) -> None:
        self.heard = self._facade_loop.time()
        if not self._opened:
            super()._on_data_available(data_in)
            return
        if self._frame_buffer:
            self._rest, self._frame_buffer = self._frame_buffer, b""
        data = self._rest + data_in if self._rest else data_in
        at = 0
        last = len(data) - frames.OVERHEAD
        while at <= last:
            kind, channel, size = _frame_start(data, at)
            end = at + 7 + size
            if end >= len(data):
                break
            if data[end] != frames.FRAME_END:
                raise exceptions.InvalidFrameError("no end where the frame ends")
            if kind == frames.FRAME_METHOD:
                self._take_method(channel, data, at, end)
            elif kind == frames.FRAME_HEADER:
                self._take_header(channel, data[at + 7 : end])
            elif kind == frames.FRAME_BODY:
                self._take_body(channel, data[at + 7 : end])
            at = end + 1
        self._rest = data[at:]
        self.bytes_received += at

    def _take_method(self, channel: int, data: bytes, at: int, end: int) -> None:
        (method,) = _method_id(data, at + 7)
        if method in _UNROUTED:
            self._partial[channel] = [frames.read_method(data[at + 7 : end]), b"", 0, []]
        elif method == frames.ACK or method == frames.NACK:
            sink = self._sinks.get(channel)
            if sink is not None:
                tag, bits = _confirmation(data, at + 11)
                sink.confirmed(tag, bits & 1 == 1, method == frames.ACK)
        elif method == frames.GET_EMPTY:
            sink = self._sinks.get(channel)
            if sink is not None:
                sink.empty()
        else:
            self._process_frame(frame.decode_frame(data[at : end + 1])[1])

    def _take_header(self, channel: int, payload: bytes) -> None:
        partial = self._partial[channel]
        (partial[2],) = _body_size(payload, 4)
        partial[1] = payload[12:]
        if not partial[2]:
            self._whole(channel, partial, b"")

    def _take_body(self, channel: int, part: bytes) -> None:
        partial = self._partial[channel]
        partial[2] -= len(part)
        if partial[2]:
            partial[3].append(part)
        else:
            self._whole(channel, partial, b"".join((*partial[3], part)) if partial[3] else part)

    def _whole(self, channel: int, partial: list[Any], body: bytes) -> None:
        del self._partial[channel]
        sink = self._sinks.get(channel)
        if sink is not None:
            method, consumer, tag, redelivered, routing_key = partial[0]
            properties = partial[1]
            sink.content(frames.Content(method, consumer, tag, redelivered, routing_key, properties, body))

    # -- channels ---------------------------------------------------------------------------------

    async def open_channel(self) -> Channel:
        """A new channel. Raises ConnectionLost."""
        if self.error is not None or not self.is_open:
            raise self.error or ConnectionLost(f"{self.title}: is closing")
        channel = Channel(self)
        await channel.opened()
        return channel

    @contextlib.asynccontextmanager
    async def brief_channel(self) -> AsyncIterator[Channel]:
        """A channel for some calls."""
        channel = await self.open_channel()
        try:
            yield channel
        finally:
            await channel.close()

    def attach(self, channel: int, sink: Sink) -> None:
        """From now on the frames of ``channel`` that come per message go to ``sink``."""
        self._sinks[channel] = sink

    def detach(self, channel: int) -> None:
        self._sinks.pop(channel, None)
        self._partial.pop(channel, None)


class _Wait(NamedTuple):
    """Since when (loop time) an answer is awaited, and to which of pika's calls."""

    since: float
    call: str


class Channel:
    """One channel of a link: pika's calls, awaited. Dead once `error` is set."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.error: PubSubError | None = None
        self.on_closed: list[Callable[[PubSubError], None]] = []
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[asyncio.Future[Any], _Wait] = {}  # the oldest first
        self._opened = self.future()
        link.unanswered.append(self._since)
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.pika = link.channel(on_open_callback=self._on_opened)
        self.number: int = self.pika.channel_number
        self.pika.add_on_close_callback(self._on_closed)

    def future(self, call: str = "") -> asyncio.Future[Any]:
        """For an answer that comes on this channel: it fails with it, and the link is given up where none comes.

        Arguments:
            call: of pika's that is answered; "": none.
        """
        future = self._loop.create_future()
        self._waiting[future] = _Wait(self._loop.time(), call)
        future.add_done_callback(lambda done: self._waiting.pop(done, None))
        return future

    def _since(self) -> float | None:
        return next((wait.since for wait in self._waiting.values()), None)

    def _on_opened(self, _: Any) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    async def opened(self) -> None:
        """Return once the broker has opened it."""
        await self._opened

    def _on_closed(self, _: Any, reason: BaseException) -> None:
        self.link.detach(self.number)
        self.link.unanswered.remove(self._since)
        self.error = self._explain(reason)
        if not self._closed.done():
            self._closed.set_result(None)
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(self.error)
        for listener in self.on_closed:
            listener(self.error)
        self.on_closed.clear()

    def _explain(self, reason: BaseException) -> PubSubError:
        error: PubSubError
        if isinstance(reason, exceptions.ChannelClosedByBroker):
            text = f"{self.link.title}: {reason.reply_text}"
            if reason.reply_code == 403:
                asked = next((wait.call for wait in self._waiting.values() if wait.call), "")
                right = _missing(asked, reason.reply_text)
                error = AuthenticationFailed(
                    f"{text}: grant the right to {right} (rabbitmqctl set_permissions)"
                )
            else:
                error = ChannelClosed(text, reason.reply_code)
        else:
            error = ConnectionLost(f"{self.link.title}: {_say(reason)}")
        error.__cause__ = reason
        return error

    async def call(self, start: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make one of pika's calls on this channel and return the method of its answer.

        Raises ChannelClosed where the broker refused it, ConnectionLost, AuthenticationFailed.
        """
        if self.error is not None:
            raise self.error
        future = self.future(start.__name__)

        def answered(answer: Any) -> None:
            if not future.done():
                future.set_result(answer.method)

        try:
            start(*args, callback=answered, **kwargs)
        except (exceptions.ChannelWrongStateError, exceptions.ConnectionWrongStateError) as error:
            future.cancel()
            raise ConnectionLost(f"{self.link.title}: {_say(error)}") from error
        return await future

    async def close(self) -> None:
        """Close it; what is unsettled on it goes back. Idempotent; never raises."""
        if self.error is None and self.link.error is None:
            with contextlib.suppress(exceptions.AMQPError):
                if self.pika.is_open:
                    self.pika.close()
                    self._waiting[self._closed] = _Wait(self._loop.time(), "")
                await asyncio.shield(self._closed)


_RIGHTS: Final = {
    "queue_bind": ("read", "write"),
    "queue_unbind": ("read", "write"),
    "exchange_bind": ("read or write", ""),
    "exchange_unbind": ("read or write", ""),
    "basic_consume": ("", "read"),
    "queue_purge": ("", "read"),
    "": ("write", "read"),  # a message was published, or asked for
}
"""pika's name of a call -> the right it needs on an exchange and on a queue, where that is not to configure."""


def _missing(call: str, text: str) -> str:
    """The right that was missing, which older brokers do not tell."""
    exchange, queue = _RIGHTS.get(call, ("configure", "configure"))
    return exchange if "access to exchange" in text else queue


def unused(*_: object) -> None:
    """pika wants a listener for deliveries and confirms, which do not pass through it here."""


async def connect(
    host: str,
    port: int,
    address: Address,
    tls: Tls,
    *,
    heartbeat: int,
    timeout: float,
    name: str,
) -> Link:
    """Open a link to one host.

    Arguments:
        heartbeat: s of silence until the link is given up.
        timeout: s for the attempt.
        name: shown in the broker's list of connections.

    Raises ConnectionFailed or AuthenticationFailed, naming the address and the user.
    """
    username = address.username or "guest"
    title = f"rabbitmq at {show_host(host, port)}"
    context = tls.context() if address.secure or tls.wanted else None
    parameters = pika.ConnectionParameters(
        host=host,
        port=port,
        virtual_host=address.path or "/",
        credentials=pika.PlainCredentials(username, "guest" if address.secret is None else address.secret),
        heartbeat=heartbeat,
        connection_attempts=1,
        socket_timeout=timeout,
        stack_timeout=timeout,
        blocked_connection_timeout=None,
        client_properties={"connection_name": name},
        ssl_options=None if context is None else pika.SSLOptions(context, tls.hostname or host),
    )
    opened: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    link = Link(parameters, title, opened)
    try:
        async with asyncio.timeout(timeout):
            return await opened
    except TimeoutError as error:
        link.cut()
        raise ConnectionFailed(f"{title}: no answer within {timeout:g} s") from error
    except asyncio.CancelledError:
        link.cut()
        raise
    except Exception as error:
        raise _refusal(error, title, username, address.path or "/", secure=context is not None) from error


def _refusal(
    error: BaseException, title: str, username: str, vhost: str, *, secure: bool
) -> ConnectionFailed:
    root = _root(error)
    text = _say(root)
    if isinstance(root, exceptions.AuthenticationError | exceptions.ProbableAuthenticationError):
        return AuthenticationFailed(f"{title} refused user {username!r}: check username and password")
    if isinstance(root, exceptions.ProbableAccessDeniedError):
        if "not found" in text:
            return ConnectionFailed(
                f"{title} has no virtual host {vhost!r}: create it (rabbitmqctl add_vhost), or mend the path of the url"
            )
        return AuthenticationFailed(
            f"{title} refused user {username!r} the virtual host {vhost!r}: grant it (rabbitmqctl set_permissions)"
        )
    advice = _tls_advice.of_error(root, "rabbitmq")
    if advice:
        return ConnectionFailed(f"{title}: {advice}")
    if isinstance(root, exceptions.IncompatibleProtocolError):
        asked = _tls_advice.of_silence("rabbitmq", secure=secure)
        return ConnectionFailed(f"{title}: what answers there does not speak AMQP 0-9-1: {asked}")
    return ConnectionFailed(f"{title}: {text}")


def _root(error: BaseException) -> BaseException:
    """What is at the bottom of pika's errors within errors."""
    while True:
        inner: Any = None
        if isinstance(error, connection_workflow.AMQPConnectionWorkflowFailed):
            inner = error.exceptions[-1] if error.exceptions else None
        else:
            inner = getattr(error, "exception", None) or (error.args[0] if error.args else None)
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _say(error: BaseException) -> str:
    """An error of pika's in one line."""
    root = _root(error)
    if isinstance(root, exceptions.ConnectionClosedByBroker | exceptions.ChannelClosedByBroker):
        return f"the broker closed it: {root.reply_text} ({root.reply_code})"
    if isinstance(root, exceptions.ConnectionClosedByClient | exceptions.ChannelClosedByClient):
        return "closed"
    if isinstance(root, exceptions.AMQPError) and root.args and isinstance(root.args[0], str):
        return root.args[0]
    return str(root) or type(root).__name__
