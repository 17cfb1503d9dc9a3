"""An application that does once all that may show a password, at log level DEBUG: run and read by test_secrets.

``python -m tests.integration.secretive CONFIG WRONG NOWHERE``: three config files; by the second the broker
refuses the password, by the third there is no broker. Empty names are left out.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback

from pubsub_facade import AsyncPubSub, Backoff, Message, PubSubError, Reject, Settings

SUBSCRIPTION = "secrets"
LETTERS = 3


def show(*things: object) -> None:
    """In every form that a careless line of code may print."""
    for thing in things:
        print(repr(thing), str(thing), f"{thing}")
        if not isinstance(thing, Settings):
            print(getattr(thing, "__dict__", ""))


async def everything(settings: Settings) -> None:
    """Publish, fail, bury, look at all of it."""
    show(settings, settings.model_dump(exclude={"options"}), settings.model_dump_json(), settings.origins)
    async with AsyncPubSub(settings) as client:
        backend = client._supervisor.backend
        show(client, client.capabilities, backend)

        @client.subscriber(
            "secrets.#",
            subscription=SUBSCRIPTION,
            max_attempts=2,
            backoff=Backoff(initial=0.01, maximum=0.01),
        )
        async def handle(number: int) -> None:
            if number == 0:
                raise Reject("not this one")
            raise ValueError("always")

        await client.start()
        show(backend, *client._members)
        await client.publish_many([Message("secrets.a", number) for number in range(LETTERS)])
        while await client.dead_letters(SUBSCRIPTION).count() < LETTERS:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        async for letter in client.dead_letters(SUBSCRIPTION):
            show(letter, letter.failure, letter.headers, letter.body, letter.payload)
        show(await client.backlog(SUBSCRIPTION), await client.diagnose())
    show(client, backend)
    async with AsyncPubSub(settings) as client:
        await client.delete(SUBSCRIPTION)


async def failing(settings: Settings) -> None:
    """The errors of a client that cannot connect, with their tracebacks and causes."""
    for attempt in ("ping", "publish", "subscribe"):
        async with AsyncPubSub(settings) as client:
            try:
                if attempt == "ping":
                    await client.ping()
                elif attempt == "publish":
                    await client.publish("secrets.a", 1, timeout=0.5)
                else:
                    async with client.subscribe("secrets.#", subscription=SUBSCRIPTION):
                        print("unexpected")
            except PubSubError as error:
                show(error, error.__cause__)
                traceback.print_exc()
                logging.exception("%s failed", attempt)
            else:
                print("unexpected")


async def main(config: str, wrong: str, nowhere: str) -> None:
    await everything(Settings.load(config))
    for each in (wrong, nowhere):
        if each:
            await failing(Settings.load(each))
    print("finished")


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    asyncio.run(main(*sys.argv[1:]))
