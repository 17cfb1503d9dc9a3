"""A handler: the user's function, what it wants to be called with, and how to call it.

Everything about its signature is settled once, when it is registered, so that a wrong handler is an error
at import and not a crash loop at the first message.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final, get_type_hints

from pubsub_facade.codec import Decoder, decoder
from pubsub_facade.errors import ConfigError
from pubsub_facade.message import Delivery

_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Handler:
    """A function taking the payload, the payload and the `Delivery`, or the `Delivery` alone.

    Arguments:
        function: sync or async; its first parameter's annotation says what the payload becomes.
        delivery_types: annotations that mean "the delivery itself" (`Delivery`, and its sync form).

    Raises ConfigError where the signature cannot be called so.
    """

    __slots__ = ("call", "decode", "function", "is_async", "name")

    call: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], delivery_types: tuple[type, ...] = (Delivery,)) -> None:
        if not callable(function):
            raise ConfigError(
                f"{function!r} is not a handler: give a function of (payload) or (payload, delivery)"
            )
        self.function = function
        self.name = getattr(function, "__qualname__", None) or repr(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
        )
        hints = _hints(function)
        names = self._parameters(function)
        wants_delivery = [hints.get(name) in delivery_types for name in names]
        self.decode: Decoder | None = None
        if len(names) == 1 and wants_delivery[0]:
            self.call = lambda payload, delivery: function(delivery)
            return
        if wants_delivery[0]:
            raise ConfigError(f"handler {self.name} takes the delivery first: write (payload, delivery)")
        self.decode = decoder(hints.get(names[0]))
        if len(names) == 1:
            self.call = lambda payload, delivery: function(payload)
        else:
            self.call = function

    def _parameters(self, function: Callable[..., Any]) -> list[str]:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"handler {self.name} has no signature that can be read: wrap it in a def"
            ) from error
        names = [p.name for p in parameters if p.kind in _POSITIONAL]
        required = [p.name for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if keywords or len(required) > 2 or (not names and not variadic):
            raise ConfigError(
                f"handler {self.name}{inspect.signature(function)} cannot be called with (payload) or "
                "(payload, delivery): give it one or two parameters, and defaults to all others"
            )
        if not names:
            return ["*"]
        return names[: max(1, len(required))] if len(required) != 1 else self._one_or_two(names, function)

    @staticmethod
    def _one_or_two(names: list[str], function: Callable[..., Any]) -> list[str]:
        """One required parameter; a second one with a default is the delivery only if annotated so."""
        if len(names) > 1 and _hints(function).get(names[1]) is Delivery:
            return names[:2]
        return names[:1]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    try:
        return get_type_hints(target)
    except Exception as error:  # an annotation is an expression: it can raise anything
        name = getattr(function, "__qualname__", function)
        raise ConfigError(f"the annotations of handler {name} cannot be read: {error}") from error
