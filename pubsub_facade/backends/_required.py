"""Publishing where subscribers are required: what a refusal says, and who refuses where the broker cannot.

The driver tells who would get nothing; what somebody wants is sent all the same. Where it cannot be known,
nothing is sent: a publish is never refused by mistake, and never sent unasked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from pubsub_facade.errors import ConnectionLost, Fate, PubSubError, SendFailed
from pubsub_facade.message import Message

NAMED: Final = 3  # topics that an error names


def unheard(name: str, topics: Iterable[str], count: int) -> str:
    """The text for messages that no subscription would get.

    Arguments:
        name: the backend's.
        topics: of each such message.
        count: messages of the batch.
    """
    alone = list(topics)
    distinct = list(dict.fromkeys(alone))
    named = ", ".join(repr(topic) for topic in distinct[:NAMED])
    more = f" and {len(distinct) - NAMED} more" if len(distinct) > NAMED else ""
    return (
        f"{name}: {len(alone)} of {count} messages have no subscription (require_subscribers is set), "
        f"on {named}{more}: run the handlers first, or `pubsub declare NAME PATTERN` with a pattern that matches"
    )


async def send_wanted(
    name: str,
    messages: Sequence[Message],
    unwanted: Callable[[Sequence[Message]], Awaitable[list[Message]]],
    send: Callable[[Sequence[Message]], Awaitable[None]],
) -> None:
    """Send what some subscription would get. Raises SendFailed for the rest, and as ``unwanted`` and ``send`` do.

    Arguments:
        name: the backend's, for errors.
        unwanted: those that no subscription would get. What it raises beside ConnectionLost says that this
            cannot be known.
        send: begun without a pause after ``unwanted`` has answered, so that order is kept.
    """
    try:
        alone = await unwanted(messages)
    except ConnectionLost:
        raise
    except PubSubError as error:
        raise SendFailed(
            f"{name}: who would get {len(messages)} messages cannot be known (require_subscribers is set), "
            f"so none was sent: {error}",
            {message.id: "not stored" for message in messages},
        ) from error
    if not alone:
        await send(messages)
        return
    text = unheard(name, (message.topic for message in alone), len(messages))
    fates: dict[str, Fate] = {message.id: "not stored" for message in alone}
    refused = set(map(id, alone))
    wanted = [message for message in messages if id(message) not in refused]
    if wanted:
        try:
            await send(wanted)
        except SendFailed as error:
            raise SendFailed(f"{text}; {error}", fates | error.fates) from error
    raise SendFailed(text, fates)
