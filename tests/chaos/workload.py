"""The processes that chaos happens to: a publisher, and a member of both subscriptions.

Each writes down what it knows for certain, line by line into a file of its own, because it may be killed at
any point: a publisher the ids whose publish returned, a member what its handler is about to return from.
Run as ``python -m tests.chaos.workload publish|consume …``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pubsub_facade import (
    AsyncPubSub,
    Backoff,
    Delivery,
    Message,
    PubSubError,
    Reject,
    SendFailed,
    Settings,
)
from tests.chaos.books import BOOKED, keep_books
from tests.chaos.levers import Levers, true_time

SUBSCRIPTIONS = ("ledger", "audit")
SPARE = "spare"  # a third one of each member, on topics of its own: it may be deleted under them
TOPICS = 7
BATCH = 20
REJECTED_EVERY = 101
FAILS_ONCE_EVERY = 37
TIMEOUT = 6.0  # s until a publisher gives a batch up, and publishes what is not confirmed again
WINDOW = 100  # deliveries a member has in hand at most, by the client's default


def message_id(publisher: int, number: int) -> str:
    """The id of a publisher's message: a killed publisher's successor uses the same again."""
    return f"{publisher}-{number}"


def is_to_be_booked(id: str) -> bool:
    """Whether the message of this id is for the subscription that keeps books."""
    return _topic(_number(id)) == BOOKED


def is_to_be_rejected(id: str) -> bool:
    """Whether the handlers reject the message of this id: these, and no others, end in the dead letters."""
    return _number(id) % REJECTED_EVERY == 0


def _number(id: str) -> int:
    return int(id.rpartition("-")[2])


def _topic(number: int) -> str:
    return f"chaos.t{number % TOPICS}.created"


async def publish(
    settings: Settings, folder: Path, levers: Levers, publisher: int, count: int, rate: float
) -> None:
    """Publish from where this publisher's predecessor was certain, at ``rate`` messages a second.

    At least ``count`` of them, and until it is told that it is enough.
    """
    path = folder / f"published-{publisher}"
    done = sum(1 for _ in path.open()) if path.exists() else 0
    with path.open("a") as confirmed:
        async with AsyncPubSub(settings) as pubsub:
            levers.watch(pubsub._supervisor.backend)
            begin, first = time.monotonic(), done
            while done < count or not levers.enough:
                numbers = range(done, done + BATCH)
                await _confirm(pubsub, [_message(publisher, number) for number in numbers])
                confirmed.write("".join(f"{message_id(publisher, number)}\n" for number in numbers))
                confirmed.flush()
                done = numbers.stop
                await asyncio.sleep(max(0.0, begin + (done - first) / rate - time.monotonic()))


def _message(publisher: int, number: int) -> Message:
    return Message(
        _topic(number),
        {"publisher": publisher, "number": number},
        key=f"k{number % 23}",
        headers={"number": number},
        id=message_id(publisher, number),
    )


async def _confirm(pubsub: AsyncPubSub, messages: list[Message]) -> None:
    """Publish until every message is confirmed, each with its own id."""
    while messages:
        try:
            await pubsub.publish_many(messages, timeout=TIMEOUT)
            return
        except SendFailed as error:
            logging.warning("not confirmed: %s", error)
            messages = [message for message in messages if message.id in error.fates]
        except PubSubError as error:
            logging.warning("not sent: %s", error)
            await asyncio.sleep(0.1)


class Handled:
    """A member's file of what it handled for one subscription."""

    def __init__(self, folder: Path, subscription: str) -> None:
        self._file: IO[str] = (folder / f"handled-{subscription}-{os.getpid()}").open("a", buffering=1)

    def write(self, delivery: Delivery) -> None:
        self._file.write(f"{delivery.id} {true_time():.4f} {delivery.attempt}\n")


def member(settings: Settings, folder: Path, levers: Levers) -> AsyncPubSub:
    """A client whose handlers reject some messages, fail some once, and are now and then slow."""
    pubsub = AsyncPubSub(settings)
    levers.watch(pubsub._supervisor.backend)
    for subscription in SUBSCRIPTIONS:
        handled = Handled(folder, subscription)
        failed: set[str] = set()

        async def handle(
            payload: dict[str, Any],
            delivery: Delivery,
            handled: Handled = handled,
            failed: set[str] = failed,
        ) -> None:
            number = payload["number"]
            if is_to_be_rejected(delivery.id):
                raise Reject("one in a hundred is rejected")
            if number % FAILS_ONCE_EVERY == 0 and delivery.attempt == 1 and delivery.id not in failed:
                failed.add(delivery.id)
                raise ValueError("fails the first time")
            levers.here("handling")
            await asyncio.sleep(levers.slow or random.choice((0, 0, 0.001, 0.01)))
            handled.write(delivery)
            levers.here("handled")

        _subscribe(pubsub, ["chaos.#"], subscription)(handle)

    spare = Handled(folder, SPARE)

    async def note(delivery: Delivery) -> None:
        spare.write(delivery)

    _subscribe(pubsub, [f"{SPARE}.#"], SPARE)(note)
    keep_books(pubsub, folder)
    return pubsub


def _subscribe(pubsub: AsyncPubSub, patterns: Sequence[str], subscription: str) -> Any:
    return pubsub.subscriber(
        *patterns,
        subscription=subscription,
        concurrency=8,
        max_attempts=50,
        backoff=Backoff(initial=0.2, maximum=1),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("publish", "consume"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--publisher", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {os.getpid()} %(levelname)s %(message)s")
    settings = Settings.load(options.config)
    levers = Levers(options.folder / "levers")
    levers.take_over_the_clock()
    if options.role == "publish":
        asyncio.run(publish(settings, options.folder, levers, options.publisher, options.count, options.rate))
    else:
        asyncio.run(_consume(settings, options.folder, levers))


async def _consume(settings: Settings, folder: Path, levers: Levers) -> None:
    await member(settings, folder, levers).run()


if __name__ == "__main__":
    main()
