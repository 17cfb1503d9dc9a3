"""One member of a consumer group: joins, keeps its place by heartbeats, gives its partitions up in order.

Owns the group protocol and nothing of messages. While its owner finishes what is in hand, heartbeats go on,
so that giving up may take as long as the group's rebalance timeout. What is not in order (another
generation, an unknown member) means that the partitions are lost: the owner forgets them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol

import aiokafka.errors as kafka_errors
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest, LeaveGroupRequest, SyncGroupRequest

from pubsub_facade._tasks import cancel
from pubsub_facade.backends._kafka_cluster import (
    GROUP,
    Cluster,
    Link,
    backoff,
    by_number,
    by_topic,
    check_rights,
    explain,
)
from pubsub_facade.backends._kafka_partition import Progress
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.errors import ConnectionLost, PubSubError, TopologyConflict

log = logging.getLogger("pubsub_facade")

PROTOCOL: Final = "roundrobin"
LEAVE_TIMEOUT: Final = 2.0  # seconds

_MEMBER_ID_REQUIRED: Final = 79
_UNKNOWN_MEMBER: Final = 25
_ILLEGAL_GENERATION: Final = 22
_REBALANCE: Final = 27
_COORDINATOR: Final = {14, 15, 16}  # loading, not available, not the coordinator
_MISMATCH: Final = {23, 24, 26}  # other protocol, invalid group id, invalid session timeout


class NotAMember(Exception):
    """The group does not take this from us: it has moved on without us."""


class Owner(Protocol):
    """Whom a membership tells."""

    async def topics(self) -> Collection[str]:
        """The Kafka topics to have partitions of, as they are now: another member may have joined for a new one."""

    async def assigned(self, tps: Collection[TP]) -> None:
        """These are ours now, and no others. May raise NotAMember or ConnectionLost: the group is joined again."""

    async def revoke(self) -> None:
        """Finish, commit, give up everything. Bounded by the owner."""

    def forfeit(self) -> None:
        """Everything is lost already: forget it."""

    def fail(self, error: PubSubError) -> None:
        """This cannot be mended here."""


class Membership:
    """A place in a consumer group.

    Arguments:
        link: a connection of its own, because joining waits at the broker.
        session_timeout: seconds without a heartbeat until the group goes on without us.
        rebalance_timeout: seconds that the group waits for members to give up their partitions.
        places: member ids of this process that could not leave when their link was lost. Taking such a place
            again spares the group waiting for it to time out.
    """

    def __init__(
        self,
        cluster: Cluster,
        group: str,
        link: Link,
        owner: Owner,
        session_timeout: float,
        rebalance_timeout: float,
        places: list[str],
    ) -> None:
        self.group = group
        self._cluster = cluster
        self._link = link
        self._owner = owner
        self._session_timeout = session_timeout
        self._rebalance_timeout = rebalance_timeout
        self._interval = min(0.5, session_timeout / 10)
        self._places = places
        self._member = places.pop() if places else ""
        self._generation = -1
        self._rejoin = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Join, and stay until `leave`."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"pubsub-kafka-{self.group}")

    def rejoin(self) -> None:
        """The owner wants other topics."""
        self._rejoin.set()

    async def stop(self) -> None:
        """No more beats, no more calls to the owner; commits are still possible for a while."""
        if self._task is not None:
            await cancel(self._task)
            self._task = None
        self._cluster.drop(self._link)

    async def leave(self) -> None:
        """Leave the group: its partitions go to others at once. The owner has given them up. Never raises."""
        await self.stop()
        member, self._member = self._member, ""
        if member:
            try:
                async with asyncio.timeout(LEAVE_TIMEOUT):
                    node = await self._cluster.coordinator(self.group)
                    await self._cluster.call(node, LeaveGroupRequest(self.group, member), GROUP)
            except (PubSubError, TimeoutError):
                self._places.append(member)

    # -- life -------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                tps = await self._join()
                try:
                    await self._owner.assigned(tps)
                except NotAMember:
                    self._owner.forfeit()
                    self._member = ""
                    continue
                await self._stay()
        except PubSubError as error:
            self._owner.forfeit()
            self._owner.fail(error)

    async def _stay(self) -> None:
        """Beat until the group is to be joined again."""
        while True:
            if not self._rejoin.is_set():
                try:
                    async with asyncio.timeout(self._interval):
                        await self._rejoin.wait()
                except TimeoutError:
                    pass
            code = 0 if self._rejoin.is_set() else await self._beat()
            if code in (_UNKNOWN_MEMBER, _ILLEGAL_GENERATION):
                self._lose()
                return
            if code == _REBALANCE or self._rejoin.is_set():
                await self._step_down()
                return

    async def _step_down(self) -> None:
        """Let the owner give up everything; beat meanwhile."""
        task = asyncio.get_running_loop().create_task(self._owner.revoke(), name="pubsub-kafka-revoke")
        try:
            while not task.done():
                await asyncio.wait([task], timeout=self._interval)
                if not task.done() and await self._beat() in (_UNKNOWN_MEMBER, _ILLEGAL_GENERATION):
                    self._lose()
                    return
            await task
        finally:
            await cancel(task)

    def _lose(self) -> None:
        log.warning(
            "kafka: group %r went on without this member, which joins again: no heartbeat of it came in time "
            "(session_timeout is %g s: did a handler hold up the event loop, or were the brokers out of reach?). "
            "What it had in hand comes again",
            self.group,
            self._session_timeout,
        )
        self._member = ""
        self._owner.forfeit()

    async def _beat(self) -> int:
        """One heartbeat; returns its error code. An answer that does not come in time is no answer."""
        try:
            node = await self._cluster.coordinator(self.group)
            request = HeartbeatRequest(self.group, self._generation, self._member)
            response = await self._cluster.call(node, request, GROUP, self._session_timeout)
        except ConnectionLost:
            self._cluster.coordinator_moved(self.group)
            await self._cluster.refresh(())
            return 0
        if response.error_code in _COORDINATOR:
            self._cluster.coordinator_moved(self.group)
            return 0
        check_rights(response.error_code, "Read", f"group {self.group!r}")
        return int(response.error_code)

    # -- joining ----------------------------------------------------------------------------------

    async def _join(self) -> list[TP]:
        """Join, take part in sharing out, return what is ours. Tries until it is there."""
        pause = 0.0
        while True:
            await asyncio.sleep(pause)
            pause = min(max(0.05, pause * 2), 1.0)
            self._rejoin.clear()
            try:
                topics = sorted(await self._owner.topics())
                node = await self._cluster.coordinator(self.group)
                response = await self._cluster.call(node, self._join_request(topics), self._link)
                code = response.error_code
                if code == _MEMBER_ID_REQUIRED:
                    self._member = response.member_id
                    pause = 0.0
                    continue
                if not code:
                    self._member, self._generation = response.member_id, response.generation_id
                    code, assignment = await self._sync(node, response)
                    if not code:
                        self._cluster.drop(self._link)
                        return _partitions(assignment)
            except ConnectionLost:
                self._cluster.coordinator_moved(self.group)
                await self._cluster.refresh(())
                continue
            self._handle(code)

    def _join_request(self, topics: Sequence[str]) -> Any:
        metadata = ConsumerProtocolMemberMetadata(0, list(topics), b"").encode()
        return JoinGroupRequest(
            self.group,
            int(self._session_timeout * 1000),
            int(self._rebalance_timeout * 1000),
            self._member,
            None,
            "consumer",
            [(PROTOCOL, metadata)],
        )

    def _handle(self, code: int) -> None:
        check_rights(code, "Read", f"group {self.group!r}")
        if code in _MISMATCH:
            raise TopologyConflict(
                f"kafka: group {self.group!r} cannot be joined ({explain(code)}): another program has members in "
                "it that share out partitions in another way; stop them or choose another subscription name"
            )
        if code in _COORDINATOR:
            self._cluster.coordinator_moved(self.group)
        elif code != _REBALANCE:
            self._member = ""

    async def _sync(self, node: int, joined: Any) -> tuple[int, bytes]:
        shares: list[tuple[str, bytes]] = []
        if joined.leader_id == joined.member_id:
            wanted = {
                member[0]: ConsumerProtocolMemberMetadata.decode(member[-1]).subscription
                for member in joined.members
            }
            unknown = {name for names in wanted.values() for name in names} - self._cluster.topics.keys()
            if unknown:
                await self._cluster.refresh(unknown)
            shares = [
                (member, ConsumerProtocolMemberAssignment(0, by_number(tps), b"").encode())
                for member, tps in share_out(wanted, self._cluster.topics).items()
            ]
        request = SyncGroupRequest(self.group, joined.generation_id, joined.member_id, None, shares)
        response = await self._cluster.call(node, request, self._link)
        return response.error_code, response.member_assignment

    # -- offsets ----------------------------------------------------------------------------------

    async def committed(self, tps: Collection[TP]) -> dict[TP, Progress]:
        """What the group has committed for these partitions; those without a commit are left out."""
        return await committed(self._cluster, self.group, tps)

    async def commit(self, offsets: Mapping[TP, Progress]) -> None:
        """Commit as a member. Raises NotAMember where the group has moved on, ConnectionLost to try later."""
        code = await commit(self._cluster, self.group, offsets, self._generation, self._member)
        if code in (_UNKNOWN_MEMBER, _ILLEGAL_GENERATION):
            raise NotAMember(explain(code))
        if code:
            raise ConnectionLost(
                f"kafka: offsets of group {self.group!r} were not committed: {explain(code)}"
            )


async def committed(cluster: Cluster, group: str, tps: Collection[TP] | None) -> dict[TP, Progress]:
    """What a group has committed; for all partitions where ``tps`` is None."""
    rows = None
    if tps is not None:
        rows = by_number(tps)
    for pause in backoff(20.0):
        node = await cluster.coordinator(group)
        response = await cluster.call(node, OffsetFetchRequest(group, rows), GROUP)
        parts = [(topic, *part) for topic, partitions in response.topics for part in partitions]
        code = response.error_code or next((part[4] for part in parts if part[4]), 0)
        if not code:
            return {
                (topic, number): Progress.read(offset, metadata or "")
                for topic, number, offset, metadata, _ in parts
                if offset >= 0
            }
        check_rights(code, "Describe", f"group {group!r} and its topics")
        cluster.coordinator_moved(group)
        await asyncio.sleep(pause)
    raise ConnectionLost(f"kafka: offsets of group {group!r} cannot be read: {explain(code)}")


async def commit(
    cluster: Cluster, group: str, offsets: Mapping[TP, Progress], generation: int = -1, member: str = ""
) -> int:
    """Commit; returns the first error code. Without generation and member: for a group that has no members."""
    rows = by_topic({tp: (progress.offset, progress.metadata()) for tp, progress in offsets.items()})
    node = await cluster.coordinator(group)
    request = OffsetCommitRequest(group, generation, member, -1, rows)
    response = await cluster.call(node, request, GROUP)
    codes = [part[1] for _, partitions in response.topics for part in partitions]
    code = next(
        (code for code in codes if code and code != kafka_errors.UnknownTopicOrPartitionError.errno), 0
    )
    if code in _COORDINATOR:
        cluster.coordinator_moved(group)
    check_rights(code, "Read", f"group {group!r} and its topics")
    return int(code)


def share_out(
    wanted: Mapping[str, Collection[str]], topics: Mapping[str, Sequence[int]]
) -> dict[str, list[TP]]:
    """Every partition to the member that has least of those that want its topic; the same for the same input."""
    shares: dict[str, list[TP]] = {member: [] for member in sorted(wanted)}
    for topic in sorted({name for names in wanted.values() for name in names}):
        takers = [member for member in shares if topic in wanted[member]]
        for number in range(len(topics.get(topic, ()))):
            least = min(takers, key=lambda member: len(shares[member]))
            shares[least].append((topic, number))
    return shares


def _partitions(assignment: bytes) -> list[TP]:
    if not assignment:
        return []
    decoded = ConsumerProtocolMemberAssignment.decode(assignment)
    return [(topic, number) for topic, numbers in decoded.assignment for number in numbers]
