"""``pubsub tail``: look at what is published, from now on, without taking anything from any subscription."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import click

from pubsub_facade.cli.errors import Failed, say
from pubsub_facade.cli.options import Options, pass_options
from pubsub_facade.cli.output import (
    console,
    flush,
    on_terminal,
    plain_line,
    pretty,
    record,
    write,
    write_json,
)
from pubsub_facade.client import AsyncPubSub
from pubsub_facade.errors import Closed
from pubsub_facade.message import Delivery
from pubsub_facade.stream import Stream

BATCH = 100  # deliveries printed before the output is flushed


@click.command(short_help="Show messages as they are published.")
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per line, as `pubsub publish` reads it."
)
@click.option("--count", "-n", type=click.IntRange(min=1), metavar="N", help="End after N messages.")
@click.option(
    "--filter",
    "filter_",
    metavar="FILTER",
    help="Only messages whose headers it selects, as \"lang = 'en'\".",
)
@pass_options
def tail(
    options: Options, patterns: tuple[str, ...], as_json: bool, count: int | None, filter_: str | None
) -> None:
    """Show messages on topics that match PATTERN, as they are published, until Ctrl-C.

    In a pattern * is one word and # any number of words: quote it. A pipe gets one line per message: time,
    topic, key and payload, separated by tabs.

    \b
    pubsub tail 'social.#'
    pubsub tail 'social.post.*' --filter "lang = 'en'" --json | jq .payload
    """
    asyncio.run(_tail(AsyncPubSub(options.settings()), patterns, as_json, count, filter_))


async def _tail(
    client: AsyncPubSub, patterns: tuple[str, ...], as_json: bool, count: int | None, filter_: str | None
) -> None:
    show = _printer(as_json)
    signals: list[int] = []
    async with client, client.subscribe(*patterns, filter=filter_) as stream:
        loop = asyncio.get_running_loop()
        showing = loop.create_task(_show(stream, show, count))

        def on_signal(number: int) -> None:
            signals.append(number)
            showing.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        say(
            f"receiving {' '.join(patterns)} on {client.settings.backend}, namespace {client.settings.namespace}"
        )
        await asyncio.wait([showing])
        if not showing.cancelled():
            showing.result()
    if signals:
        raise Failed(128 + signals[0])


async def _show(stream: Stream, show: Any, count: int | None) -> None:
    left = count
    while left is None or left > 0:
        try:
            deliveries = await stream.receive_many(BATCH if left is None else min(BATCH, left))
        except Closed:
            return
        for delivery in deliveries:
            show(delivery)
        flush()
        for delivery in deliveries:
            await delivery.ack()
        if left is not None:
            left -= len(deliveries)


def _printer(as_json: bool) -> Any:
    if as_json:
        return lambda delivery: write_json(record(delivery))
    if on_terminal():
        printed = console()
        return lambda delivery: printed.print(pretty(delivery))

    def plain(delivery: Delivery) -> None:
        write(plain_line(delivery))

    return plain
