"""What one member tells its group of its progress: before it hands out, now and then, and when it leaves.

Decides when to commit; what a commit says is the partition's. Commits are merged by a timer, never made for
one message. A commit that fails is made with the next one, or its messages come again: nothing is lost by it.
An ephemeral subscription has no group, and nothing to commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final

from pubsub_facade.backends._kafka_member import Membership, NotAMember
from pubsub_facade.backends._kafka_partition import Partition
from pubsub_facade.backends._kafka_records import TP
from pubsub_facade.backends._kafka_shelf import Shelf
from pubsub_facade.errors import ConnectionLost, PubSubError

log = logging.getLogger("pubsub_facade")

COMMIT_EVERY: Final = 0.15  # seconds
COMMIT_TIMEOUT: Final = 5.0


class Commits:
    """The commits of one member.

    Arguments:
        group: None: there is nothing to commit.
        partitions: those that the member holds, now.
        window: deliveries that it may hand out between two commits.
        shelf: whose handled retries are deleted after a commit that says so.
        spawn: runs a coroutine as a task that ends with the member.
        came: called with a partition that may be handed out from at last.
        fail: called with what cannot be mended here.
    """

    def __init__(
        self,
        group: Membership | None,
        partitions: Mapping[TP, Partition],
        window: int,
        shelf: Shelf,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        came: Callable[[Partition], None],
        fail: Callable[[PubSubError], None],
    ) -> None:
        self._group = group
        self._partitions = partitions
        self._window = window
        self._shelf = shelf
        self._spawn = spawn
        self._came = came
        self._fail = fail
        self._unmarked: list[Partition] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # -- before anything is handed out ------------------------------------------------------------

    def mark(self, partition: Partition) -> None:
        """Something came on a partition that nobody was handed anything of: say first that it may be so now."""
        self._unmarked.append(partition)
        if len(self._unmarked) == 1:
            self._spawn(self._commit_marks())

    async def _commit_marks(self) -> None:
        while self._unmarked:
            partitions = [partition for partition in self._unmarked if not partition.held]
            try:
                await self.commit(partitions)
            except NotAMember as error:
                log.debug("%s: %s", self._name, error)  # the next heartbeat learns the same
                await asyncio.sleep(COMMIT_EVERY)
                continue
            except ConnectionLost as error:
                log.debug("%s: %s; trying again", self._name, error)
                await asyncio.sleep(COMMIT_EVERY)
                continue
            self._unmarked = [partition for partition in self._unmarked if partition not in partitions]
            self._unmarked = [partition for partition in self._unmarked if not partition.held]
            for partition in partitions:
                partition.marked = True
                self._came(partition)

    # -- now and then -----------------------------------------------------------------------------

    def soon(self) -> None:
        """Commit what has changed, with all that changes until then."""
        if self._group is not None and self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(COMMIT_EVERY, self._due)

    def _due(self) -> None:
        self._timer = None
        self._spawn(self.quietly())

    def stop(self) -> None:
        """No more by the timer; what is asked for is still committed."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def quietly(self, *, leaving: bool = False) -> None:
        """Commit what has changed, all where we leave; what fails is done with the next commit, or comes again."""
        chosen = self.dirty()
        if leaving:
            chosen = [
                partition for partition in self._partitions.values() if partition.marked or partition.dirty
            ]
        try:
            await self.commit(chosen, leaving=leaving)
        except NotAMember as error:
            log.debug("%s: not committed: %s", self._name, error)
        except ConnectionLost as error:
            log.debug("%s: not committed: %s", self._name, error)
            if not leaving:
                self.soon()
        except PubSubError as error:
            self._fail(error)
        else:
            await self._shelf.purge(chosen)

    # -- at once ----------------------------------------------------------------------------------

    def dirty(self) -> list[Partition]:
        """The partitions of which the last commit does not say all."""
        return [partition for partition in self._partitions.values() if partition.dirty]

    async def commit(self, partitions: Iterable[Partition], *, leaving: bool = False) -> None:
        """Raises NotAMember, ConnectionLost."""
        if self._group is None:
            return
        chosen = list(partitions)
        progress = {part.tp: part.progress(0 if leaving else self._window) for part in chosen}
        for partition in chosen:
            partition.dirty = False
        if not progress:
            return
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT):
                await self._group.commit(progress)
        except BaseException as error:
            for partition in chosen:
                partition.dirty = True
            if isinstance(error, TimeoutError):
                raise ConnectionLost("kafka: the commit was not answered in time") from error
            raise

    @property
    def _name(self) -> str:
        return "" if self._group is None else self._group.group
