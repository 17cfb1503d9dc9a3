"""Where a retry waits: which partition of the subscription's retry topic, and when its turn comes.

Each partition but the first ones has one fixed wait, so that it is a queue by time and its head is always
the next one due: any number of retries wait on the broker, none holds up another, and none is kept in
memory. A delay is made of such waits, the longest first. The first partitions take what is due soon (and
replays, due at once) in any order: their few messages wait in the member that reads them. Pure: no I/O.
"""

from __future__ import annotations

from typing import Final

SOON: Final = 2.0  # seconds: up to here a member waits with the message in hand
SOON_PARTITIONS: Final = 2
WAITS: Final = (2.0, 8.0, 32.0, 128.0, 512.0, 2048.0)  # seconds, one partition each
PARTITIONS: Final = SOON_PARTITIONS + len(WAITS)
SLACK: Final = 0.02  # seconds: due within this is due


def place(delay: float, spread: int, partitions: int = PARTITIONS) -> int:
    """The partition for a message that is due in ``delay`` seconds.

    Arguments:
        spread: any number, by which those due soon are spread over their partitions.
        partitions: how many the topic really has.
    """
    found = 0
    for index, wait in enumerate(WAITS, start=SOON_PARTITIONS):
        if wait > delay or index >= partitions:
            break
        found = index
    if delay <= SOON or not found:
        return spread % min(SOON_PARTITIONS, partitions)
    return found


def ready_at(partition: int, stored_at: float, due: float) -> float:
    """When a message stored at ``stored_at`` and due at ``due`` leaves this partition (seconds since the epoch)."""
    index = partition - SOON_PARTITIONS
    if not 0 <= index < len(WAITS):
        return due
    return min(due, stored_at + WAITS[index])
