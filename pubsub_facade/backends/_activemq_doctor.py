"""What `pubsub doctor` asks of ActiveMQ: by doing once what the driver lives by, and of its management.

STOMP tells no settings. So a message is delayed, and one of the largest size is sent, on links of their
own: what Classic's scheduler and frame limit do with them is seen, not read. Both go to places that end
with their link.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from pubsub_facade.backends._activemq_forms import Form
from pubsub_facade.backends._activemq_jolokia import USAGES, Jolokia
from pubsub_facade.backends._activemq_session import Session
from pubsub_facade.backends._activemq_watch import ADVISORIES, told
from pubsub_facade.backends._stomp import Frame, Link
from pubsub_facade.backends.base import Finding
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.settings import ActivemqSettings

DELAY: Final = 1.0  # s that the scheduler is asked to hold a message back
LATE: Final = 15.0  # s until a message counts as lost
HEARD: Final = 5.0  # s until an advisory counts as not to be had
PLACE: Final = "/temp-queue/doctor"
FULL: Final = 80  # per cent of a limit of the broker, from which on it is told


async def examine_classic(session: Session, form: Form, settings: ActivemqSettings) -> list[Finding]:
    """All findings on Classic."""
    found = [await _scheduler(session, settings.scheduler)]
    found.append(await _largest(session, {"destination": "/temp-topic/doctor"}, settings.max_payload))
    found.append(await _removals(session, form))
    jolokia = Jolokia.of(settings)
    if jolokia is None:
        what = "admin_url is not set: persistence, limits and dropped duplicates are not checked, backlogs not known"
        return [*found, Finding("warning", what, "set activemq.admin_url to the broker's Jolokia")]
    try:
        return [*found, *broker_findings(await jolokia.broker()), _dropped(await jolokia.duplicates())]
    except PubSubError as error:
        return [*found, Finding("warning", str(error), "check activemq.admin_url, its user and its password")]


async def examine_artemis(session: Session, form: Form, settings: ActivemqSettings) -> list[Finding]:
    """All findings on Artemis."""
    address = {"destination": f"{form.space}$doctor", "destination-type": "MULTICAST"}
    found = [await _largest(session, address, settings.max_payload)]
    reply_to = f"{form.space}$reply"
    try:
        persistent = await session.manage("broker", "isPersistenceEnabled", reply_to=reply_to)
        rules = await session.manage(
            "broker", "getAddressSettingsAsJSON", f"{form.space}.x", reply_to=reply_to
        )
    except PubSubError as error:
        mend = "grant manage on activemq.management to this user: subscriptions are made by it"
        return [*found, Finding("problem", str(error), mend)]
    found += [_persistent(bool(persistent)), full_policy(json.loads(rules))]
    return [*found, await _astray(session, form, reply_to)]


# -- what is seen by doing ------------------------------------------------------------------------------


@asynccontextmanager
async def _own_link(session: Session) -> AsyncIterator[tuple[Link, asyncio.Queue[Frame | ConnectionLost]]]:
    link = await session.connect()
    box: asyncio.Queue[Frame | ConnectionLost] = asyncio.Queue()

    def received(frames: list[Frame]) -> None:
        for frame in frames:
            box.put_nowait(frame)

    link.on_messages, link.on_lost = received, box.put_nowait
    try:
        yield link, box
    finally:
        await link.close()


async def _scheduler(session: Session, wanted: bool) -> Finding:
    """Whether a message with a delay is held back; without the scheduler it comes at once."""
    loop = asyncio.get_running_loop()
    try:
        async with _own_link(session) as (link, box), asyncio.timeout(LATE):
            await link.ask("SUBSCRIBE", {"destination": PLACE, "id": "1", "ack": "auto"})
            began = loop.time()
            await link.ask("SEND", {"destination": PLACE, "AMQ_SCHEDULED_DELAY": int(DELAY * 1000)})
            came = await box.get()
            if isinstance(came, ConnectionLost):
                raise came
    except (PubSubError, TimeoutError) as error:
        why = str(error) or f"it did not come within {LATE:g} s"
        return Finding(
            "problem",
            f"a delayed message was not delivered: {why}",
            "look at the broker's log, and at its store",
        )
    return schedule_finding(loop.time() - began, wanted)


def schedule_finding(waited: float, wanted: bool) -> Finding:
    """What it means that a message delayed by `DELAY` came after ``waited`` seconds."""
    if waited >= DELAY / 2:
        also = "" if wanted else "; activemq.scheduler = true would let retries wait in it"
        return Finding("ok", f"the scheduler holds messages back{also}")
    if not wanted:
        return Finding("ok", "no scheduler, as the settings say: retries wait in the member that gets them")
    return Finding(
        "problem",
        "the broker has no scheduler: delayed messages and retries come at once",
        'set schedulerSupport="true" on <broker>, or activemq.scheduler = false',
    )


async def _removals(session: Session, form: Form) -> Finding:
    """Whether the broker tells in words which destinations come and go: it tells of those there are to begin with."""
    try:
        async with _own_link(session) as (link, box), asyncio.timeout(HEARD):
            await link.ask("SUBSCRIBE", {**form.from_notices(), "id": "there-is-one"})
            await link.ask("SUBSCRIBE", {**ADVISORIES, "id": "1"})
            came = await box.get()
            while not isinstance(came, ConnectionLost) and told(came[1]) is None:
                came = await box.get()
            if isinstance(came, ConnectionLost):
                raise came
    except (PubSubError, TimeoutError) as error:
        why = str(error) or "nothing came"
        return Finding(
            "warning",
            f"members do not notice when their topics or queues are removed by the console (no advisories: {why})",
            'grant read and admin on the topics ActiveMQ.Advisory.>, do not set advisorySupport="false", and give '
            "the broker XStream and Jettison, as its distribution does; else remove by pubsub delete only",
        )
    return Finding("ok", "members notice when their topics or queues are removed by the console")


async def _largest(session: Session, place: dict[str, str], size: int) -> Finding:
    """Whether the broker takes a frame of the largest payload."""
    try:
        async with _own_link(session) as (link, _), asyncio.timeout(LATE):
            await link.ask("SEND", {**place, "content-length": size}, bytes(size))
    except (PubSubError, TimeoutError) as error:
        why = str(error) or f"no answer within {LATE:g} s"
        return Finding(
            "problem",
            f"a message of max_payload ({size} bytes) was not taken: {why}",
            "raise wireFormat.maxFrameSize of the connector, or lower activemq.max_payload",
        )
    return Finding("ok", f"a message of max_payload ({size} bytes) was taken")


# -- what management tells ------------------------------------------------------------------------------


async def _astray(session: Session, form: Form, reply_to: str) -> Finding:
    """Messages that Artemis counts as being delivered, and no consumer has.

    A link that ends without a word may leave one so (``tests/chaos/stuck.py``). What is just being acked looks
    the same for a moment: it must be so in two looks.
    """
    names = await session.manage("broker", "getQueueNames", reply_to=reply_to)
    first = await _held_by_nobody(
        session, [name for name in names if name.startswith(f"{form.space}$")], reply_to
    )
    if first:
        await asyncio.sleep(DELAY)
    second = await _held_by_nobody(session, list(first), reply_to)
    return astray_finding({name: min(count, first[name]) for name, count in second.items()})


async def _held_by_nobody(session: Session, queues: list[str], reply_to: str) -> dict[str, int]:
    counts = {}
    for name in queues:
        delivering = await session.manage(f"queue.{name}", "getDeliveringCount", reply_to=reply_to)
        if not delivering:
            continue
        told = await session.manage(f"queue.{name}", "listConsumersAsJSON", reply_to=reply_to)
        held = sum(int(each["messagesInTransit"]) for each in json.loads(told))
        if delivering > held:
            counts[name] = delivering - held
    return counts


def astray_finding(queues: dict[str, int]) -> Finding:
    """What it means that so many messages of these queues are in nobody's hand. Pure."""
    if not queues:
        return Finding("ok", "what is being delivered is in a consumer's hand")
    told = ", ".join(f"{count} of {name}" for name, count in sorted(queues.items()))
    return Finding(
        "problem",
        f"messages that count as being delivered are in no consumer's hand: {told}",
        "restart the broker: it stored them, and hands them out again",
    )


def broker_findings(broker: dict[str, Any]) -> list[Finding]:
    """What the broker's own MBean says. Pure."""
    found = [_persistent(bool(broker.get("Persistent")))]
    for attribute in USAGES:
        share = broker.get(attribute) or 0
        if share >= FULL:
            found.append(
                Finding(
                    "warning",
                    f"{attribute} is at {share} % of its limit: publishers wait when it is full",
                    "let members catch up, or raise the limit in <systemUsage>",
                )
            )
    return found


def _dropped(count: int) -> Finding:
    if not count:
        return Finding("ok", "the broker took no message of a durable subscription for a duplicate")
    return Finding(
        "problem",
        f"since it was started the broker has dropped {count} messages that it took for duplicates",
        'give <policyEntry topic=">"> a <pendingDurableSubscriberPolicy> of <storeDurableSubscriberCursor '
        'useCache="false"/>',
    )


def _persistent(persistent: bool) -> Finding:
    if persistent:
        return Finding("ok", "the broker stores messages")
    return Finding(
        "problem",
        "the broker keeps messages in memory only: a restart loses them all",
        "turn persistence on (persistent on Classic's <broker>, persistence-enabled on Artemis' <core>)",
    )


def full_policy(rules: dict[str, Any]) -> Finding:
    """What Artemis does when an address has no room. Pure."""
    policy = str(rules.get("addressFullMessagePolicy", "PAGE"))
    if policy == "DROP":
        return Finding(
            "problem",
            "address-full-policy is DROP: when an address is full messages are confirmed and thrown away",
            "set address-full-policy to PAGE, BLOCK or FAIL for the addresses of this namespace",
        )
    return Finding("ok", f"address-full-policy is {policy}: nothing confirmed is dropped")
