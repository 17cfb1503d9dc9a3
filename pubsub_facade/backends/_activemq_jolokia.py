"""ActiveMQ Classic's management over HTTP (Jolokia): counts, and removing queues, which STOMP cannot.

Only used where ``admin_url`` is set; each call is one HTTP request on a thread.
"""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from pubsub_facade.address import split_netloc
from pubsub_facade.errors import PubSubError
from pubsub_facade.settings import ActivemqSettings

TIMEOUT: Final = 10.0  # s for one request
USAGES: Final = (
    "StorePercentUsage",
    "MemoryPercentUsage",
    "TempPercentUsage",
    "JobSchedulerStorePercentUsage",
)
_BROKER: Final = "org.apache.activemq:type=Broker,brokerName=*"


class Jolokia:
    """The agent at ``url``, which holds no user and no password."""

    def __init__(self, url: str, username: str | None, password: str | None) -> None:
        self._url = url
        self._broker: str | None = None  # its MBean
        self._headers = {"Content-Type": "application/json", "Origin": url}
        if username is not None:
            token = base64.b64encode(f"{username}:{password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"

    @classmethod
    def of(cls, settings: ActivemqSettings) -> Jolokia | None:
        """The agent that the settings name; its user and password are the broker's where it names none."""
        if settings.admin_url is None:
            return None
        parts = urlsplit(settings.admin_url.get_secret_value())
        username, password, _ = split_netloc(parts.netloc)
        address = settings.address
        if username is None:
            username, password = address.username, address.secret
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        return cls(bare, username, password)

    async def queues(self, names: Sequence[str]) -> tuple[int, int]:
        """Messages held by these queues, and how many of them are handed out; queues that are not there hold none."""
        found = await self._read(
            f"{_BROKER},destinationType=Queue,destinationName=*", "Name", "QueueSize", "InFlightCount"
        )
        chosen = [each for each in found if each["Name"] in names]
        return sum(each["QueueSize"] for each in chosen), sum(each["InFlightCount"] for each in chosen)

    async def durable(self, clients: Sequence[str]) -> tuple[int, int]:
        """Messages that wait for the durable subscriptions of these client-ids, and how many are handed out."""
        found = await self._read(
            f"{_BROKER},destinationType=Topic,destinationName=*,endpoint=Consumer,clientId=*,consumerId=*",
            "ClientId",
            "PendingQueueSize",
            "MessageCountAwaitingAcknowledge",
            "SubscriptionName",
        )
        chosen = [each for each in found if each["ClientId"] in clients and each["SubscriptionName"]]
        return (
            sum(each["PendingQueueSize"] for each in chosen),
            sum(each["MessageCountAwaitingAcknowledge"] for each in chosen),
        )

    async def broker(self) -> dict[str, Any]:
        """Whether the broker is persistent, and how much of each limit is used, in per cent."""
        found = await self._read(_BROKER, "Persistent", *USAGES)
        return next(iter(found), {})

    async def duplicates(self) -> int:
        """Messages of topics that the broker took for duplicates since it was started, and dropped."""
        found = await self._read(
            f"{_BROKER},destinationType=Topic,destinationName=*", "DuplicateFromStoreCount"
        )
        return sum(each.get("DuplicateFromStoreCount") or 0 for each in found)

    async def remove_queue(self, name: str) -> None:
        """Remove a queue and what it holds; one that is not there is no error."""
        await self._call("removeQueue", name)

    async def remove_topic(self, name: str) -> None:
        """Remove a topic; one that is not there is no error."""
        await self._call("removeTopic", name)

    async def _call(self, operation: str, name: str) -> None:
        if self._broker is None:
            found = await self._ask({"type": "search", "mbean": _BROKER})
            self._broker = str(found[0])
        signature = f"{operation}(java.lang.String)"
        await self._ask({"type": "exec", "mbean": self._broker, "operation": signature, "arguments": [name]})

    async def _read(self, mbean: str, *attributes: str) -> list[dict[str, Any]]:
        try:
            found = await self._ask({"type": "read", "mbean": mbean, "attribute": list(attributes)})
        except _NotFound:
            return []
        return list(found.values())

    async def _ask(self, request: dict[str, Any]) -> Any:
        return await asyncio.to_thread(self._post, json.dumps(request).encode())

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self._url, body, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                result = json.load(answer)
        except (OSError, ValueError) as error:
            raise PubSubError(
                f"activemq: Jolokia at {self._url} does not answer: {error}: check admin_url"
            ) from error
        if result.get("status") == 404:
            raise _NotFound(str(result.get("error")))
        if result.get("status") != 200:
            raise PubSubError(
                f"activemq: Jolokia at {self._url} refused: {result.get('error')}: check its rights"
            )
        return result["value"]


class _NotFound(PubSubError):
    """There is no such MBean."""
