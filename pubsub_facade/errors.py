"""The error tree: every error this package raises on purpose.

    PubSubError
     +- ConfigError             a setting is unknown, missing or wrong
     +- TopicError              a topic or pattern outside the grammar
     +- FilterError             a filter expression that does not parse
     +- MessageError            a message that cannot be sent as it is: header, id, payload
     |   +- PayloadTooLarge     over the limit, refused before sending
     +- DecodeError             a body that does not decode to what the handler asked for
     +- UnsupportedFeature      this backend cannot do that
     +- TopologyConflict        the broker holds something of that name with another shape
     +- ConnectionFailed        no connection could be made
     |   +- AuthenticationFailed  the broker refused the credentials or the right to do this
     +- ConnectionLost          a connection that was there is gone
     +- SendFailed              some messages of a batch were not confirmed; says the fate of each
     |   +- PublishTimeout      not confirmed within the timeout
     +- Closed                  used after close()

Each text says what failed, on which broker (never with a password) and what to do next.
The driver's own error is the ``__cause__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Fate = Literal["not stored", "unknown"]


class PubSubError(Exception):
    """The root: ``except PubSubError`` catches all that this package raises on purpose."""


class ConfigError(PubSubError):
    """A setting is unknown, missing or wrong. Waiting does not mend it."""


class TopicError(PubSubError):
    """A topic or pattern is outside the grammar (contract 1 and 2)."""


class FilterError(PubSubError):
    """A filter expression does not parse (contract 11)."""


class MessageError(PubSubError):
    """A message cannot be sent as it is: a header, the id, the key or the payload is refused."""


class PayloadTooLarge(MessageError):
    """The encoded payload is over the backend's limit; nothing was sent."""


class DecodeError(PubSubError):
    """A body does not decode, or does not validate, as what the handler's annotation asks for."""


class UnsupportedFeature(PubSubError):
    """The backend cannot do what was asked.

    Arguments:
        backend: the backend's name, as in the settings.
        feature: the capability that is missing, in words.
        remedy: what the user can do instead.
    """

    def __init__(self, backend: str, feature: str, remedy: str) -> None:
        super().__init__(f"backend {backend!r} does not support {feature}: {remedy}")
        self.backend = backend
        self.feature = feature
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[UnsupportedFeature], tuple[str, str, str]]:
        return type(self), (self.backend, self.feature, self.remedy)


class TopologyConflict(PubSubError):
    """What the broker holds under this name cannot become what was declared without losing messages."""


class ConnectionFailed(PubSubError):
    """No connection could be made. Waiting may mend it, except for AuthenticationFailed."""


class AuthenticationFailed(ConnectionFailed):
    """The broker refused the credentials, or the right to do this. Waiting does not mend it."""


class ConnectionLost(PubSubError):
    """A connection that was there is gone; what was in hand on it comes again."""


class SendFailed(PubSubError):
    """Messages of a batch were not confirmed.

    Arguments:
        text: what failed and what to do.
        fates: message id -> ``"not stored"`` (certainly not on the broker: safe to publish again) or
            ``"unknown"`` (may be stored: publish again with the same id and let the receiver drop the twin).
            Messages of the batch that are not named were confirmed.
    """

    def __init__(self, text: str, fates: Mapping[str, Fate]) -> None:
        super().__init__(text)
        self.fates: dict[str, Fate] = dict(fates)

    def __reduce__(self) -> tuple[type[SendFailed], tuple[str, dict[str, Fate]]]:
        return type(self), (str(self), self.fates)


class PublishTimeout(SendFailed):
    """The messages were not confirmed within the timeout; ``fates`` says what is known of each."""


class Closed(PubSubError):
    """The client, the stream or the link was closed before this call."""
