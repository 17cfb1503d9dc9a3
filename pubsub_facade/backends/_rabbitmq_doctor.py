"""What `pubsub doctor` asks of RabbitMQ: by doing once, with a queue of its own, what the driver lives by.

AMQP tells no settings. So a quorum queue is declared, a message is confirmed by it, and both are removed:
that shows the right to do so, a quorum, and whether a memory or disk alarm blocks publishers.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Final

from pubsub_facade.backends import _rabbitmq_wire as mapping
from pubsub_facade.backends._rabbitmq_confirms import Confirms, Outgoing
from pubsub_facade.backends._rabbitmq_link import Link
from pubsub_facade.backends._rabbitmq_names import Arguments
from pubsub_facade.backends.base import Finding
from pubsub_facade.errors import AuthenticationFailed, ConnectionLost
from pubsub_facade.message import Message

OLDEST: Final = (3, 10)  # at-least-once dead-lettering of quorum queues, which delayed messages wait by
CONFIRM: Final = 5.0  # s that the broker may take for one confirm
EXPIRES: Final = 60_000  # ms until the broker removes our queue, if we cannot


async def examine(
    link: Link, namespace: str, arguments: Arguments, ordered_queues: int, hashes: bool
) -> list[Finding]:
    """All findings.

    Arguments:
        link: of its own: an alarm blocks it.
        ordered_queues: of the settings.
        hashes: whether the broker has the consistent-hash exchange.
    """
    return [
        _version(str((link.server_properties or {}).get("version", ""))),
        await _queue(link, f"{namespace}:doctor.{uuid.uuid4().hex}", arguments),
        _spread(ordered_queues, hashes),
        Finding(
            "ok",
            "consumer_timeout is not shown over AMQP: with its default a delivery that is unsettled for 30 minutes "
            "is taken back, with the link; a handler that takes longer needs a higher one",
        ),
        Finding(
            "ok",
            "cluster_partition_handling is not shown over AMQP: on a cluster of three or more nodes it should be "
            "pause_minority, else a node that is cut off keeps its idle members, and stays apart once it is healed",
        ),
    ]


def _version(text: str) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        return Finding(
            "problem",
            f"RabbitMQ {text or 'of unknown version'}: retries are not kept by a confirmed copy before 3.10",
            "upgrade to RabbitMQ 3.10 or newer",
        )
    return Finding("ok", f"RabbitMQ {text}")


async def _queue(link: Link, queue: str, arguments: Arguments) -> Finding:
    """Whether a quorum queue can be made, and confirms a message."""
    try:
        channel = await link.open_channel()
        options = arguments.quorum(**{"x-expires": EXPIRES})
        await channel.call(channel.pika.queue_declare, queue, durable=True, arguments=options)
        confirms = await Confirms.open(link)
        finding = await _confirmed(link, confirms, queue)
        if finding.level == "ok":  # in an alarm the broker still takes the first, and reads no further
            finding = await _confirmed(link, confirms, queue)
        if (
            not link.blocked
        ):  # else it answers nothing more; the queue expires, and the channel ends with the link
            await channel.call(channel.pika.queue_delete, queue)
            await channel.close()
        return finding
    except AuthenticationFailed as error:
        return Finding("problem", str(error), "rabbitmqctl set_permissions for this user and virtual host")
    except ConnectionLost as error:
        return Finding(
            "problem",
            f"no quorum queue can be used: {error}",
            "start the nodes that are down; replicas in [rabbitmq] must not be more than there are",
        )


async def _confirmed(link: Link, confirms: Confirms, queue: str) -> Finding:
    message = Message("doctor", None)
    outgoing = Outgoing("doctor", "", queue, mapping.encode(message), b"", mandatory=True)
    confirmed = asyncio.ensure_future(confirms.write([outgoing]))
    deadline = asyncio.get_running_loop().time() + CONFIRM
    while not (confirmed.done() or link.blocked) and asyncio.get_running_loop().time() < deadline:
        await asyncio.wait({confirmed}, timeout=0.05)
    if confirmed.done() and not confirmed.result().fates:
        return Finding("ok", "a quorum queue confirmed a message")
    confirmed.cancel()
    if link.blocked:
        return Finding(
            "problem",
            "a memory or disk alarm blocks publishers: they wait until their timeout",
            "free memory or disk space on the node that raised it (rabbitmqctl status), or raise its limit",
        )
    return Finding(
        "problem",
        f"a quorum queue confirmed no message within {CONFIRM:g} s: it has no quorum, or the broker is overloaded",
        "start the nodes that are down (rabbitmq-queues quorum_status)",
    )


def _spread(queues: int, hashes: bool) -> Finding:
    if hashes:
        return Finding(
            "ok", f"the consistent-hash exchange is there: ordered subscriptions use {queues} queues"
        )
    if queues == 1:
        return Finding("ok", "no consistent-hash exchange, and ordered_queues = 1 needs none")
    return Finding(
        "warning",
        "no consistent-hash exchange: an ordered subscription declared now has one queue, and one active member",
        "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange on each node",
    )
