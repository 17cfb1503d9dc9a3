"""A wrong handler is an error when it is registered, and not a crash loop at the first message."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from pubsub_facade import ConfigError, Delivery, PubSub, Subscribers
from pubsub_facade.handler import Handler

RECEIVER: Any = None
DELIVERY = Delivery(RECEIVER, 1, "s", "t", b"7", content_type="application/json")


def result(function: Any) -> Any:
    handler = Handler(function)
    payload = handler.decode(DELIVERY.body, DELIVERY.content_type) if handler.decode else None
    return handler.call(payload, DELIVERY)


class Callee:
    def __call__(self, payload: int) -> Any:
        return payload

    def method(self, payload: int, delivery: Delivery) -> Any:
        return payload, delivery

    @staticmethod
    def static(payload: int) -> Any:
        return payload

    async def later(self, payload: int) -> None: ...


def test_the_signatures_that_work() -> None:
    def payload_only(payload: int) -> Any:
        return payload

    def both(payload: int, delivery: Delivery) -> Any:
        return payload, delivery

    def delivery_only(delivery: Delivery) -> Any:
        return delivery

    def bare(payload):  # type: ignore[no-untyped-def]
        return payload

    def with_default(payload: int, other: int = 5) -> Any:
        return payload, other

    def optional_delivery(payload: int, delivery: Delivery = None) -> Any:  # type: ignore[assignment]
        return payload, delivery

    def variadic(*arguments: Any) -> Any:
        return arguments

    def keywords(payload: str, *, limit: int = 3) -> Any:
        return payload, limit

    assert result(payload_only) == 7
    assert result(both) == (7, DELIVERY)
    assert result(delivery_only) is DELIVERY
    assert result(bare) == 7
    assert result(with_default) == (7, 5)
    assert result(optional_delivery) == (7, DELIVERY)
    assert result(variadic) == (7,)
    assert result(Callee()) == 7
    assert result(Callee().method) == (7, DELIVERY)
    assert result(Callee.static) == 7
    assert result(lambda payload: payload) == 7
    assert result(functools.partial(with_default, other=1)) == (7, 1)


def test_async_handlers_are_known_as_such() -> None:
    class Async:
        async def __call__(self, payload: int) -> None: ...

    async def function(payload: int) -> None: ...

    assert Handler(function).is_async
    assert Handler(Async()).is_async
    assert Handler(Callee().later).is_async
    assert Handler(functools.partial(function)).is_async
    assert not Handler(Callee()).is_async


def test_signatures_that_cannot_be_called_are_refused_with_what_to_write() -> None:
    def none() -> None: ...

    def three(payload: int, delivery: Delivery, more: int) -> None: ...

    def keyword(payload: int, *, required: int) -> None: ...

    def reversed_order(delivery: Delivery, payload: int) -> None: ...

    def unreadable(payload: "Missing") -> None: ...  # type: ignore[name-defined] # noqa: F821, UP037

    class Opaque: ...

    opaque: Any = lambda payload: None  # noqa: E731
    opaque.__annotations__ = {"payload": Opaque}
    for function in (none, three, keyword, reversed_order, unreadable, opaque, 7, "handler", None):
        with pytest.raises(ConfigError):
            Handler(function)  # type: ignore[arg-type]


def test_registration_refuses_what_cannot_work() -> None:
    subscribers = Subscribers()
    for concurrency in (0, -1, 1.5, True, "4"):
        with pytest.raises(ConfigError, match="concurrency"):
            subscribers.subscriber("a", subscription="s", concurrency=concurrency)  # type: ignore[arg-type]


def test_handlers_collected_elsewhere_are_included_and_checked() -> None:
    def handle(payload: int) -> None: ...

    module, pubsub = Subscribers(), PubSub(backend="memory")
    module.subscriber("a", subscription="s")(handle)
    pubsub.include(module)
    assert [each.handler.function for each in pubsub.subscribers.registrations] == [handle]
    pubsub.subscriber("a", subscription="s")(handle)  # the same again: two members
    other = Subscribers()
    other.subscriber("a", subscription="s", max_attempts=9)(handle)
    with pytest.raises(ConfigError, match="'s'"):
        pubsub.include(other)
    pubsub.close()
