"""Artemis and a consumer that goes away right after its acks: ``python -m tests.chaos.stuck [--closes N]``.

Plain sockets, nothing of ours: so it shows a fault of the broker. A message that is on its way to a consumer, or
being acked, while the broker closes that session is now and then neither done nor given back: it counts as being
delivered, in nobody's hand, until the broker starts again. Run it on a newer Artemis to see whether it still is so.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Final

from brokers.artemis import Artemis
from brokers.broker import PASSWORD, USER
from brokers.waiting import wait_until
from tests.chaos.autopsy import ARTEMIS_QUEUES, COUNTS
from tests.chaos.deletions import http

QUEUE: Final = "stuck"
HELD: Final = 50  # messages that a consumer acks in one go before it closes
AT_ONCE: Final = 6


def frame(command: str, body: str = "", **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}:{value}\n" for name, value in headers.items())
    return f"{command}\n{lines}\n{body}\0".encode()


async def connect(broker: Artemis) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.ports["stomp"])
    writer.write(frame("CONNECT", accept_version="1.2", host="/", login=USER, passcode=PASSWORD))
    await reader.readuntil(b"\0")
    return reader, writer


async def publish(broker: Artemis, count: int) -> None:
    reader, writer = await connect(broker)
    for number in range(count):
        asked = {"receipt": number} if number == count - 1 else {}
        writer.write(
            frame(
                "SEND", "x" * 200, destination=QUEUE, destination_type="ANYCAST", persistent="true", **asked
            )
        )
    await reader.readuntil(b"RECEIPT")
    writer.close()


async def consume_and_go(broker: Artemis, orderly: bool) -> None:
    """Take `HELD` messages, ack them all, and close: with a DISCONNECT and its receipt, or just so."""
    reader, writer = await connect(broker)
    writer.write(
        frame(
            "SUBSCRIBE", destination=QUEUE, id=1, subscription_type="ANYCAST",
            ack="client-individual", consumer_window_size=HELD * 1000,
        )
    )  # fmt: skip
    acks: list[str] = []
    while len(acks) < HELD:
        received = (await reader.readuntil(b"\0")).decode()
        acks += [line[4:] for line in received.splitlines() if line.startswith("ack:")]
    writer.write(b"".join(frame("ACK", id=ack) for ack in acks))
    if orderly:
        writer.write(frame("DISCONNECT", receipt="bye"))
        await reader.readuntil(b"RECEIPT")
    writer.close()
    await writer.wait_closed()


async def go(broker: Artemis, closes: int, orderly: bool) -> None:
    for _ in range(closes // AT_ONCE):
        await publish(broker, AT_ONCE * HELD * 3)
        async with asyncio.timeout(30):
            await asyncio.gather(*(consume_and_go(broker, orderly) for _ in range(AT_ONCE)))


def stuck(broker: Artemis) -> int:
    """Messages that count as being delivered once no consumer is there any more."""
    bean = ARTEMIS_QUEUES.replace("queue=*", f'queue="{QUEUE}"')
    counts: dict[str, int] = {}

    def left() -> bool:
        asked = {"type": "read", "mbean": bean, "attribute": COUNTS}
        try:
            found = http("POST", f"{broker.console_url}/", asked).get("value")
        except OSError:  # the console is up after the broker
            return False
        counts.update(*(found or {}).values())
        return not counts.get("ConsumerCount")

    wait_until(left, 30, "the end of all consumers")
    return counts.get("DeliveringCount", 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.stuck", description="A fault of Artemis.")
    parser.add_argument("--closes", type=int, default=1200, help="how many consumers come and go")
    closes = parser.parse_args().closes
    with tempfile.TemporaryDirectory(prefix="stuck-") as folder:
        broker = Artemis(Path(folder) / "artemis")
        broker.start()
        try:
            for name, orderly in (("with DISCONNECT and its receipt", True), ("without a word", False)):
                before = stuck(broker)
                asyncio.run(go(broker, closes, orderly))
                print(
                    f"{closes} consumers left {name}: {stuck(broker) - before} messages are stuck", flush=True
                )
        finally:
            broker.remove()


if __name__ == "__main__":
    main()
