"""The link to a Kafka cluster: connections, metadata, one request at a time.

Built on aiokafka's connection and protocol layer, not on its clients: those retry for ever and tell their
log, while a driver has to raise (see docs/decisions). One broker out of reach is no lost link: metadata is
asked for at the others, and whoever called tries again; ConnectionLost from `refresh` means that none answers.
Creates no topic by accident.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import aiokafka.errors as kafka_errors
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.offset import OffsetRequest

from pubsub_facade.address import host_port, show_host
from pubsub_facade.backends import _tls_advice
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.backends._kafka_wire import METADATA_IDS, Metadata, topics_of
from pubsub_facade.errors import AuthenticationFailed, ConnectionFailed, ConnectionLost
from pubsub_facade.settings import KafkaSettings

Link = tuple[str, int]
"""A connection to each broker for one purpose: Kafka answers the requests of a connection one after another."""

CONTROL: Final[Link] = ("control", 0)
ADMIN: Final[Link] = ("admin", 0)
GROUP: Final[Link] = ("group", 0)
PRODUCE: Final[Link] = ("produce", 0)
READ: Final[Link] = ("read", 0)

REQUEST_TIMEOUT: Final = 10.0  # seconds for an answer, where nothing else is said
CLOSE_TIMEOUT: Final = 1.0  # seconds for the other side to see that we close
ADMIN_TIMEOUT: Final = 30.0  # seconds for topics to be made or deleted
DOUBT: Final = 30.0  # seconds in which a broker that is behind the others is asked after them
IDLE: Final = 540_000  # ms; brokers close idle connections after 600,000
EARLIEST: Final = -2
LATEST: Final = -1

_LOST: Final = (kafka_errors.KafkaConnectionError, kafka_errors.NodeNotReadyError, OSError, TimeoutError)
_REFUSED: Final = (
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.AuthenticationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
)


def _tells_no_password(record: logging.LogRecord) -> bool:
    """At level DEBUG aiokafka writes each request as it is; with PLAIN this one holds the password."""
    return not any(type(argument).__name__.startswith("SaslAuthenticate") for argument in record.args or ())


logging.getLogger("aiokafka.conn").addFilter(_tells_no_password)


class Cluster:
    """Connections to the brokers of one cluster.

    Arguments:
        settings: ``[kafka]``.
        connect_timeout: seconds for one attempt to connect.
        slow: purpose -> seconds for an answer, for links whose requests wait at the broker.
    """

    def __init__(self, settings: KafkaSettings, connect_timeout: float, slow: Mapping[str, float]) -> None:
        self.topics: dict[str, list[int]] = {}  # Kafka topic -> leader of each partition, -1: none now
        self.ids: dict[str, str] = {}  # Kafka topic -> its id, as far as brokers tell ids
        self.version = 0  # counts changes of `topics` and `ids`
        self._settings = settings
        self._connect_timeout = connect_timeout
        self._slow = {"admin": ADMIN_TIMEOUT + 10, **slow}
        self._tls = _context(settings) if settings.tls.wanted else None
        self._bootstrap = [host_port(server, 9092) for server in settings.bootstrap_servers]
        self._brokers: dict[int, tuple[str, int]] = {}
        self._epochs: dict[tuple[str, int], int] = {}  # by topic (its id, where there is one): of each leader
        self._doubted: dict[int, float] = {}  # broker -> until when (time.monotonic())
        self._asked = -1  # the broker that told us of leaders last
        self._controller = -1
        self._links: dict[tuple[int, Link], Any] = {}
        self._connecting: dict[tuple[int, Link], asyncio.Lock] = {}
        self._refreshing = asyncio.Lock()
        self._refreshed = 0.0  # when the last refresh of all topics began
        self._unanswered: tuple[float, str] | None = None  # when the last one failed, and how
        self._silent: dict[tuple[str, int], float] = {}  # address -> when we gave up waiting for it to answer
        self._coordinators: dict[str, int] = {}
        self._ending: dict[asyncio.Future[None], Any] = {}  # connections that are closing -> transport
        self._closed = False

    def __str__(self) -> str:
        return ",".join(show_host(*address) for address in self._bootstrap)

    # -- life -------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Learn the brokers from the first bootstrap server that answers, and reach one of them.

        Raises ConnectionFailed or AuthenticationFailed.
        """
        if not self._bootstrap:
            raise ConnectionFailed("kafka: no bootstrap_servers are set: give host:port of a broker")
        try:
            await self._ask_bootstrap(time.monotonic())
            await self.refresh(())
        except ConnectionLost as error:
            raise ConnectionFailed(
                f"{error}; is Kafka running there, and are its listeners right?"
            ) from error

    async def close(self) -> None:
        """Close every connection and wait until they are. Requests under way raise ConnectionLost. Bounded."""
        self._closed = True
        links, self._links = list(self._links.values()), {}
        for conn in links:
            self._end(conn, CloseReason.SHUTDOWN)
        if self._ending:
            await asyncio.wait(self._ending, timeout=CLOSE_TIMEOUT)
        for transport in self._ending.values():  # what the other side does not take holds it open
            transport.abort()
        await asyncio.sleep(0)

    def drop(self, link: Link) -> None:
        """Close the connections of one purpose."""
        for key in [key for key in self._links if key[1] == link]:
            self._end(self._links.pop(key), CloseReason.SHUTDOWN)
        for key in [key for key in self._connecting if key[1] == link and not self._connecting[key].locked()]:
            del self._connecting[key]

    def _end_links(self, node: int) -> None:
        """Requests under way to this broker raise ConnectionLost now."""
        for key in [key for key in self._links if key[0] == node]:
            self._end(self._links.pop(key), CloseReason.CONNECTION_TIMEOUT)

    def _end(self, conn: Any, reason: Any) -> None:
        protocol, writer = conn._protocol, conn._writer
        transport = writer.transport if writer is not None else getattr(protocol, "_transport", None)
        closed = conn.close(reason=reason)
        if protocol is not None and transport is not None and not closed.done():
            self._ending[closed] = transport
            closed.add_done_callback(lambda future: self._ending.pop(future, None))

    # -- requests ---------------------------------------------------------------------------------

    async def call(self, node: int, request: Any, link: Link = CONTROL, timeout: float | None = None) -> Any:
        """One round trip to one broker. Raises ConnectionLost where that broker does not answer.

        Arguments:
            timeout: seconds, where it is shorter than the link's own.
        """
        conn = self._links.get((node, link))
        if conn is None or not conn.connected():
            conn = await self._connect(node, link)
        try:
            if timeout is None:
                return await conn.send(request)
            async with asyncio.timeout(timeout):
                return await conn.send(request)
        except _LOST as error:
            if isinstance(error, TimeoutError):  # on one link it is silence on all: nobody waits it out again
                self._end_links(node)
            else:
                self._end(conn, CloseReason.CONNECTION_TIMEOUT)
            raise ConnectionLost(f"kafka: {self._name(node)} does not answer: {_why(error)}") from error
        except kafka_errors.KafkaError as error:
            raise ConnectionLost(f"kafka: {self._name(node)}: {_why(error)}") from error

    async def call_any(self, request: Any, link: Link = CONTROL) -> Any:
        """One round trip to the first broker that answers. Raises ConnectionLost where none does."""
        error: ConnectionLost | None = None
        for node in self._nodes():
            try:
                return await self.call(node, request, link)
            except ConnectionLost as raised:
                error = raised
        raise error or ConnectionLost(f"kafka: no broker of {self} is known")

    async def call_controller(self, request: Any) -> Any:
        """One round trip to the controller, or to a broker that passes the request on."""
        if self._controller in self._brokers:
            return await self.call(self._controller, request, ADMIN)
        return await self.call_any(request, ADMIN)

    async def coordinator(self, group: str) -> int:
        """The broker that keeps a consumer group; asked for again after `coordinator_moved`."""
        node = self._coordinators.get(group)
        if node is not None and node in self._brokers:
            return node
        for pause in backoff(20.0):
            response = await self.call_any(FindCoordinatorRequest(group, 0))
            if not response.error_code:
                if response.coordinator_id not in self._brokers:
                    await self.refresh(())
                self._coordinators[group] = response.coordinator_id
                return int(response.coordinator_id)
            check_rights(response.error_code, "Describe", f"group {group!r}")
            await asyncio.sleep(pause)
        raise ConnectionLost(f"kafka: no broker keeps group {group!r} (error {response.error_code})")

    def coordinator_moved(self, group: str) -> None:
        """Ask again next time, and others first: one that lost its cluster goes on to call itself coordinator."""
        self.doubt(self._coordinators.pop(group, -1))

    def doubt(self, node: int) -> None:
        """This broker may be cut off from the others: for a while, ask it last who leads and coordinates."""
        self._doubted[node] = time.monotonic() + DOUBT

    async def _connect(self, node: int, link: Link) -> Any:
        if self._closed:
            raise ConnectionLost("kafka: the link was closed")
        key = (node, link)
        async with self._connecting.setdefault(key, asyncio.Lock()):
            conn = self._links.get(key)
            if conn is not None and conn.connected():
                return conn
            if node not in self._brokers:
                raise ConnectionLost(f"kafka: broker {node} is not part of the cluster any more")
            conn = await self._dial(*self._brokers[node], self._slow.get(link[0], REQUEST_TIMEOUT))
            if self._closed:
                self._end(conn, CloseReason.SHUTDOWN)
                raise ConnectionLost("kafka: the link was closed")
            self._links[key] = conn
            return conn

    async def _dial(self, host: str, port: int, timeout: float) -> Any:
        settings = self._settings
        sasl: dict[str, Any] = {}
        if settings.username is not None:
            sasl = {
                "sasl_mechanism": settings.sasl_mechanism or "SCRAM-SHA-256",
                "sasl_plain_username": settings.username,
                "sasl_plain_password": settings.password.get_secret_value() if settings.password else "",
            }
        protocol = ("SASL_" if sasl else "") + ("SSL" if self._tls else "PLAINTEXT")
        conn = AIOKafkaConnection(
            host,
            port,
            client_id="pubsub-facade",
            request_timeout_ms=int(timeout * 1000),
            ssl_context=self._tls,
            security_protocol=protocol,
            max_idle_ms=IDLE,
            **sasl,
        )
        try:
            async with asyncio.timeout(self._connect_timeout):
                await conn.connect()
            return conn
        except BaseException as error:
            self._end(conn, CloseReason.SHUTDOWN)
            if isinstance(error, TimeoutError):
                self._silent[host, port] = time.monotonic()
            if isinstance(error, _REFUSED):
                raise AuthenticationFailed(
                    f"kafka: {show_host(host, port)} refused user {settings.username!r} "
                    f"({sasl.get('sasl_mechanism', 'no SASL')}): {_why(error)}; check username, password, "
                    "sasl_mechanism"
                ) from error
            if isinstance(error, (*_LOST, kafka_errors.KafkaError, AssertionError)):
                where = show_host(host, port)
                why = _advised(error, secure=self._tls is not None)
                raise ConnectionLost(f"kafka: {where} cannot be reached: {why}") from error
            raise

    def _nodes(self) -> list[int]:
        """Known brokers in the order to ask in: not the same one every time, and those with a live connection first.

        A broker that is cut off from its cluster answers as before, for ever: nobody may go by it alone.
        """
        nodes = list(self._brokers)
        random.shuffle(nodes)
        now = time.monotonic()
        live = {node for (node, link), conn in self._links.items() if link == CONTROL and conn.connected()}
        return sorted(
            nodes,
            key=lambda node: (self._doubted.get(node, 0.0) > now, node == self._asked, node not in live),
        )

    def _name(self, node: int) -> str:
        address = self._brokers.get(node)
        return f"broker {node}" + (f" at {show_host(*address)}" if address else "")

    # -- metadata ---------------------------------------------------------------------------------

    async def refresh(self, names: Collection[str] | None, age: float = 0.0) -> None:
        """Learn the brokers, and the leaders of these Kafka topics (None: of all).

        Topics that are not there are not created. Raises ConnectionLost where no broker answers.

        Arguments:
            age: seconds that what is known of all topics may be old.
        """
        called = time.monotonic()
        async with self._refreshing:
            if self._refreshed > called - age:
                return  # somebody has asked for all topics meanwhile
            if self._unanswered is not None and self._unanswered[0] > called:
                raise ConnectionLost(self._unanswered[1])  # somebody has waited in vain meanwhile
            began = time.monotonic()
            try:
                response = await self._metadata(Metadata(names), began)
            except ConnectionLost as error:
                self._unanswered = (time.monotonic(), str(error))
                raise
            self._learn(response, names)
            if names is None:
                self._refreshed = began

    async def _metadata(self, request: Any, began: float) -> Any:
        """Of the brokers that are known; where none of these answers, of those that bootstrap servers name."""
        try:
            return await self._newest(request)
        except ConnectionLost:
            await self._ask_bootstrap(began)
            return await self._newest(request)

    async def _newest(self, request: Any) -> Any:
        """The answer of the first broker that knows of no older leaders than we do; the last one, where all do."""
        response: Any = None
        error: ConnectionLost | None = None
        for node in self._nodes():
            try:
                response = await self.call(node, request)
            except ConnectionLost as raised:
                error = raised
                continue
            self._asked = node
            if not any(epoch < self._epochs.get(key, epoch) for key, epoch in _epochs(response)):
                return response
            self.doubt(node)
        if response is None:
            raise error or ConnectionLost(f"kafka: no broker of {self} is known")
        return response

    async def _ask_bootstrap(self, began: float) -> None:
        """Learn the brokers from the first bootstrap server that answers; not from one that was silent since."""
        error: ConnectionLost | None = None
        for host, port in self._bootstrap:
            if self._silent.get((host, port), 0.0) > began:
                error = ConnectionLost(f"kafka: {show_host(host, port)} does not answer")
                continue
            try:
                conn = await self._dial(host, port, REQUEST_TIMEOUT)
            except ConnectionLost as raised:
                error = raised
                continue
            try:
                self._learn(await conn.send(Metadata(())), ())
                return
            except (*_LOST, kafka_errors.KafkaError) as raised:
                error = ConnectionLost(f"kafka: {show_host(host, port)} does not answer: {_why(raised)}")
                error.__cause__ = raised
            finally:
                self._end(conn, CloseReason.SHUTDOWN)
        assert error is not None
        raise error

    def _learn(self, response: Any, names: Collection[str] | None) -> None:
        if not response.brokers:
            raise ConnectionLost(f"kafka: {self} names no broker of its cluster yet")
        self._brokers = {node: (host, port) for node, host, port, *_ in response.brokers}
        self._controller = response.controller_id
        found: dict[str, list[int]] = {}
        ids: dict[str, str] = {}
        for code, topic, id, internal, partitions in topics_of(response):
            if partitions and not internal and code in (0, kafka_errors.LeaderNotAvailableError.errno):
                leaders = {number: leader for _, number, leader, *_ in partitions}
                found[topic] = [leaders.get(number, -1) for number in range(max(leaders) + 1)]
                id = id or self.ids.get(topic)  # in the midst of an upgrade some brokers tell none
                if id is not None:
                    ids[topic] = id
        epochs = dict(_epochs(response))
        self._epochs = epochs if names is None else self._epochs | epochs
        topics = found
        if names is not None:
            topics = {name: leaders for name, leaders in self.topics.items() if name not in names} | found
            ids = {name: id for name, id in self.ids.items() if name not in names} | ids
        if topics != self.topics or ids != self.ids:
            self.topics = topics
            self.ids = ids
            self.version += 1

    def leader(self, tp: TP) -> int:
        """The broker to ask for a partition; -1 where there is none now."""
        leaders = self.topics.get(tp[0], ())
        return leaders[tp[1]] if tp[1] < len(leaders) else -1

    async def offsets(self, wanted: Mapping[TP, int]) -> dict[TP, int]:
        """Offsets by time in ms since the epoch, or EARLIEST, or LATEST; -1 where nothing is that young."""
        found: dict[TP, int] = {}
        missing = dict(wanted)
        for pause in backoff(20.0):
            for node, tps in by_leader(self, missing).items():
                if node < 0:
                    continue
                topics = by_topic({tp: missing[tp] for tp in tps})
                try:
                    response = await self.call(node, OffsetRequest(-1, 0, topics))
                except ConnectionLost:
                    continue
                for topic, partitions in response.topics:
                    for number, code, _, offset in partitions:
                        if not code:
                            found[(topic, number)] = offset
                        else:
                            check_rights(code, "Describe", f"topic {topic!r}")
            missing = {tp: time for tp, time in missing.items() if tp not in found}
            if not missing:
                return found
            await self.refresh({topic for topic, _ in missing})
            missing = {
                tp: time for tp, time in missing.items() if tp[0] in self.topics
            }  # not deleted meanwhile
            if not missing:
                return found
            await asyncio.sleep(pause)
        raise ConnectionLost(f"kafka: no leader tells the offsets of {sorted(missing)[:3]}")


def _epochs(response: Any) -> Iterator[tuple[tuple[str, int], int]]:
    """The epoch of each partition's leader, where the answer tells it: it grows with each new leader."""
    if response.API_VERSION >= METADATA_IDS:
        for _, name, id, _, partitions in topics_of(response):
            for _, number, _, epoch, *_ in partitions:
                yield (id or name, number), epoch


def by_leader(cluster: Cluster, tps: Iterable[TP]) -> dict[int, list[TP]]:
    """Partitions grouped by the broker to ask."""
    out: dict[int, list[TP]] = {}
    for tp in tps:
        out.setdefault(cluster.leader(tp), []).append(tp)
    return out


def by_topic(values: Mapping[TP, Any]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """As Kafka's requests want it: topic, then (partition, value…) of each."""
    out: dict[str, list[tuple[Any, ...]]] = {}
    for (topic, number), value in values.items():
        rest = value if isinstance(value, tuple) else (value,)
        out.setdefault(topic, []).append((number, *rest))
    return list(out.items())


def by_number(tps: Collection[TP]) -> list[tuple[str, list[int]]]:
    """Topic, then the numbers of its partitions."""
    return [(topic, [number for (number,) in numbers]) for topic, numbers in by_topic(dict.fromkeys(tps, ()))]


def backoff(limit: float) -> Iterable[float]:
    """Pauses for trying again, in seconds, until about ``limit`` seconds have passed."""
    end = time.monotonic() + limit
    pause = 0.02
    while True:
        yield pause * random.uniform(0.5, 1)
        if time.monotonic() > end:
            return
        pause = min(pause * 2, 1.0)


def check_rights(code: int, right: str, on: str) -> None:
    """Raise AuthenticationFailed where an answer says that we may not.

    Arguments:
        right: the operation, as Kafka's ACLs call it.
        on: the resource.
    """
    lacking = lacks(code, right, on)
    if lacking:
        raise AuthenticationFailed(f"kafka: {lacking}")


def lacks(code: int, right: str, on: str) -> str:
    """Which right an answer says that we lack, and what to do; "": it does not say so."""
    error = kafka_errors.for_code(code)
    if error in (
        kafka_errors.TopicAuthorizationFailedError,
        kafka_errors.GroupAuthorizationFailedError,
        kafka_errors.ClusterAuthorizationFailedError,
    ):
        return f"this user lacks the right {right} on {on} ({error.__name__}): grant it (kafka-acls)"
    return ""


def explain(code: int) -> str:
    """What an error code of an answer means."""
    error = kafka_errors.for_code(code)
    return f"{error.__name__}: {error.description}" if getattr(error, "description", "") else error.__name__


def _advised(error: BaseException, *, secure: bool) -> str:
    """Why a broker could not be connected to, and what to look at."""
    advice = _tls_advice.of_error(error, "kafka")
    if not advice and (isinstance(error, TimeoutError | ConnectionResetError) or "closed" in str(error)):
        advice = _tls_advice.of_silence("kafka", secure=secure)
    return f"{_why(error)}: {advice}" if advice else _why(error)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


class _NamedContext(ssl.SSLContext):
    """Checks the broker's certificate against one given name, whatever address it was reached at."""

    expected: str | None = None

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        options["server_hostname"] = self.expected
        return super().wrap_bio(*args, **options)


def _context(settings: KafkaSettings) -> ssl.SSLContext:
    context = settings.tls.context()
    if settings.tls.hostname is not None:
        context.__class__ = _NamedContext
        assert isinstance(context, _NamedContext)
        context.expected = settings.tls.hostname
    return context
