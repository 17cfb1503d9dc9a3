"""A handler whose effect and whose mark commit together: the part that no database has to know.

Turns the user's function into one of (payload, delivery) with the same payload annotation, so that it is
registered like any other handler; what is done around it is the integration's.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pubsub_facade.errors import ConfigError
from pubsub_facade.message import MAX_ID, Delivery

MARK_COLUMNS = ("subscription", "message_id", "handled")
MARK_UNIQUE = ("subscription", "message_id")


def mark_id(id: str) -> str:
    """What a mark holds for a message id: the id, or a digest where the column cannot hold it.

    Only foreign clients send such an id: one over `MAX_ID` characters, or with a NUL, which PostgreSQL refuses.
    """
    if len(id) > MAX_ID or "\0" in id:
        return f"sha256:{hashlib.sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return id


class Effect:
    """The user's function and how to call it.

    Arguments:
        function: of (payload), (payload, delivery) or (delivery), and of ``extra`` by keyword.
        extra: names of parameters that the integration gives.
    """

    def __init__(self, function: Callable[..., Any], extra: tuple[str, ...] = ()) -> None:
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        hints = get_type_hints(function)
        names = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in extra
            and parameter.kind is not parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
        ]
        missing = [name for name in extra if name not in inspect.signature(function).parameters]
        if missing or not 1 <= len(names) <= 2:
            wanted = ", ".join(("payload", *extra))
            raise ConfigError(
                f"handler {function.__qualname__}{inspect.signature(function)} cannot be called with ({wanted}) or "
                f"with the delivery too: name its parameters so"
            )
        self._alone = len(names) == 1 and hints.get(names[0]) is Delivery
        self._both = len(names) == 2
        self._hint: Any = bytes if self._alone else hints.get(names[0], Any)

    def call(self, payload: Any, delivery: Delivery, **extra: Any) -> Any:
        """Call the function with what it takes; the coroutine of an async one."""
        if self._alone:
            return self.function(delivery, **extra)
        if self._both:
            return self.function(payload, delivery, **extra)
        return self.function(payload, **extra)

    def dress(self, handler: Callable[[Any, Delivery], Any]) -> Callable[[Any, Delivery], Any]:
        """Give ``handler`` the function's name and payload annotation."""
        handler.__annotations__ = {"payload": self._hint, "delivery": Delivery}
        handler.__name__ = self.function.__name__
        handler.__qualname__ = self.function.__qualname__
        handler.__module__ = self.function.__module__
        handler.__doc__ = self.function.__doc__
        return handler
