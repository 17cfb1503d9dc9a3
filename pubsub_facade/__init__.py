"""One publish/subscribe API over RabbitMQ, Kafka, ActiveMQ and an embedded default, with one contract everywhere."""

from pubsub_facade.backends.base import Backlog, Capabilities, Finding
from pubsub_facade.client import AsyncPubSub
from pubsub_facade.dead_letters import DeadLetters
from pubsub_facade.errors import (
    AuthenticationFailed,
    Closed,
    ConfigError,
    ConnectionFailed,
    ConnectionLost,
    DecodeError,
    FilterError,
    MessageError,
    PayloadTooLarge,
    PublishTimeout,
    PubSubError,
    SendFailed,
    TopicError,
    TopologyConflict,
    UnsupportedFeature,
)
from pubsub_facade.message import Delivery, Failure, HeaderValue, Message, Reject, Retry
from pubsub_facade.settings import Settings
from pubsub_facade.stream import Stream
from pubsub_facade.subscribers import Subscribers
from pubsub_facade.subscription import Backoff, Subscription
from pubsub_facade.sync import PubSub

__all__ = [
    "AsyncPubSub",
    "AuthenticationFailed",
    "Backlog",
    "Backoff",
    "Capabilities",
    "Closed",
    "ConfigError",
    "ConnectionFailed",
    "ConnectionLost",
    "DeadLetters",
    "DecodeError",
    "Delivery",
    "Failure",
    "FilterError",
    "Finding",
    "HeaderValue",
    "Message",
    "MessageError",
    "PayloadTooLarge",
    "PubSub",
    "PubSubError",
    "PublishTimeout",
    "Reject",
    "Retry",
    "SendFailed",
    "Settings",
    "Stream",
    "Subscribers",
    "Subscription",
    "TopicError",
    "TopologyConflict",
    "UnsupportedFeature",
]

__version__ = "0.1.0"
