"""Settings: one config file, the environment, and code, in one model; and where each value came from.

Precedence: code, environment (``PUBSUB_``, nested ``__``), ``.env``, secrets directory, TOML
(``pubsub.toml``, or ``[tool.pubsub]`` in ``pyproject.toml``), defaults. Each source's ``url`` is taken apart
within that source, so that ``PUBSUB_URL`` alone outranks a whole file. What is not known is an error that
names the nearest known key. Secrets are masked in every text this module makes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_serializer,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pubsub_facade._settings_errors import explain, masked
from pubsub_facade._settings_sources import ORIGINS, Sources
from pubsub_facade.address import (
    SECURE,
    Address,
    SecretUrl,
    Tls,
    addresses_of,
    check_address,
    host_port,
    show_host,
    split_url,
    url_parts,
)
from pubsub_facade.errors import PubSubError
from pubsub_facade.filters import Filter
from pubsub_facade.subscription import check_subscription
from pubsub_facade.topics import check_pattern

ENV_PREFIX: Final = "PUBSUB_"
CONFIG_FILE: Final = "pubsub.toml"

__all__ = [
    "ActivemqSettings",
    "KafkaSettings",
    "MemorySettings",
    "RabbitmqSettings",
    "Settings",
    "SqliteSettings",
    "SubscriptionSettings",
]


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _patterns(value: list[str]) -> list[str]:
    with _as_value_error():
        return [check_pattern(pattern) for pattern in value]


def _filter(value: str) -> str:
    with _as_value_error():
        Filter.parse(value)
    return value


def _backend(value: str) -> str:
    if "://" in value or "@" in value:
        raise ValueError("it is no backend's name: give an address as url")
    return value


def _subscription(value: str) -> str:
    with _as_value_error():
        return check_subscription(value)


def _servers(value: list[str]) -> list[str]:
    with _as_value_error():
        return [show_host(*host_port(server, KAFKA_PORT)) for server in value]


@contextmanager
def _as_value_error() -> Iterator[None]:
    """What pydantic takes for a fault of the field it stands in."""
    try:
        yield
    except PubSubError as error:
        raise ValueError(str(error)) from None


Words = Annotated[list[str], BeforeValidator(_split)]
"""A list; in the environment, text with commas or JSON."""

KAFKA_PORT: Final = 9092

MiB: Final = 1 << 20


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True)


class MemorySettings(_Section):
    """``[memory]``

    Arguments:
        max_payload: bytes of one encoded payload at most.
    """

    max_payload: int = Field(16 * MiB, ge=1)


class SqliteSettings(_Section):
    """``[sqlite]``

    Arguments:
        path: the database file.
        max_payload: bytes of one encoded payload at most.
        lease: seconds that a member without a sign of life keeps what it was handed.
        retention: seconds that messages are kept for `seek` after every subscription has settled them.
        history: messages kept for `seek` at most; what still waits for a subscription is always kept.
        busy_timeout: seconds to wait for another process's write.
        synchronous: ``full`` survives a power cut, ``normal`` only a crash of the process.
        max_size: bytes the file may grow to; None: as far as the disk goes.
    """

    path: Path = Path("pubsub.db")
    max_payload: int = Field(64 * MiB, ge=1, le=900 * MiB)
    lease: float = Field(30.0, gt=0)
    retention: float = Field(3600.0, ge=0)
    history: int = Field(100_000, ge=0)
    busy_timeout: float = Field(30.0, gt=0)
    synchronous: Literal["full", "normal"] = "full"
    max_size: int | None = Field(None, ge=MiB)


def _check_agreement(url: SecretUrl, tls: Tls) -> None:
    if tls.enabled is False and url_parts(url.get_secret_value()).scheme in SECURE:
        raise ValueError("the url asks for TLS and tls.enabled is false: change one of them")


class RabbitmqSettings(_Section):
    """``[rabbitmq]``

    Arguments:
        url: ``amqp://user:password@host:port,host2:port2/vhost``; ``amqps`` is TLS. Several hosts: tried in turn.
        username, password: instead of those in the URL.
        tls: CA, client certificate, verification.
        heartbeat: seconds without a sign of life until a link is given up (both sides).
        max_payload: bytes of one encoded payload at most.
        ordered_queues: queues that an ordered subscription is spread over, where the broker has the
            consistent-hash exchange; 1: one queue.
        replicas: members of each quorum queue; None: the broker's default.
    """

    url: Annotated[SecretUrl, check_address("amqp", "amqps", 5672)] = SecretUrl(
        "amqp://guest:guest@localhost:5672/%2F"
    )
    username: str | None = None
    password: SecretStr | None = None
    tls: Tls = Tls()
    heartbeat: int = Field(10, ge=1, le=3600)
    max_payload: int = Field(16 * MiB, ge=1, le=128 * MiB)
    ordered_queues: int = Field(4, ge=1, le=64)
    replicas: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        _check_agreement(self.url, self.tls)
        return self

    @property
    def address(self) -> Address:
        """The URL taken apart, with user and password from wherever they were given."""
        return addresses_of(self.url, 5672, 5671, self.username, self.password, tls=self.tls.wanted)


class KafkaSettings(_Section):
    """``[kafka]``

    Arguments:
        bootstrap_servers: ``host:port`` of some brokers.
        username, password: for SASL.
        sasl_mechanism: ``PLAIN``, ``SCRAM-SHA-256`` or ``SCRAM-SHA-512``; None: SCRAM-SHA-256 if a user is given.
        tls: enabled, CA, client certificate, verification.
        partitions: of the topics we create (None: the broker's default); so many members of a subscription can
            share a topic's messages.
        replication_factor, min_insync_replicas: of the topics we create; None: the broker's default.
        retention: seconds that a topic we create keeps messages; None: the broker's default.
        compression: codec of the batches we send.
        max_payload: bytes of one encoded payload at most; the topics we create accept it, with its headers.
        metadata_max_age: seconds until topics created elsewhere are noticed.
        session_timeout: seconds without a heartbeat until a member's partitions go to others. A slow handler
            does not count: members beat while handlers work.
    """

    bootstrap_servers: Annotated[Words, Field(min_length=1), AfterValidator(_servers)] = ["localhost:9092"]
    username: str | None = None
    password: SecretStr | None = None
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    tls: Tls = Tls()
    partitions: int | None = Field(3, ge=1)
    replication_factor: int | None = Field(None, ge=1)
    min_insync_replicas: int | None = Field(None, ge=1)
    retention: float | None = Field(None, gt=0)
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"
    max_payload: int = Field(4 * MiB, ge=1, le=96 * MiB)
    metadata_max_age: float = Field(1.0, gt=0)
    session_timeout: float = Field(10.0, ge=6)


class ActivemqSettings(_Section):
    """``[activemq]``

    Arguments:
        url: ``stomp://user:password@host:port,host2:port2``; ``stomps`` is TLS. Several hosts: tried in turn.
        username, password: instead of those in the URL.
        tls: CA, client certificate, verification.
        flavor: ``classic`` or ``artemis``.
        subscriptions: Classic only. ``durable``: one active member, others stand by. ``virtual``: members
            compete (virtual topics).
        heartbeat: seconds without a sign of life until a link is given up.
        max_payload: bytes of one encoded payload at most; the broker's ``maxFrameSize`` must allow it.
        scheduler: Classic only: whether the broker has ``schedulerSupport="true"``: retries and delays wait
            there; False: retries wait in the member that gets them, and there is no delay.
        admin_url: Classic only: the broker's Jolokia, as ``http://localhost:8161/api/jolokia/``; for backlogs
            and for deleting virtual-topic subscriptions. User and password are the broker's unless it has its own.
    """

    url: Annotated[SecretUrl, check_address("stomp", "stomps", 61613)] = SecretUrl("stomp://localhost:61613")
    username: str | None = None
    password: SecretStr | None = None
    tls: Tls = Tls()
    flavor: Literal["classic", "artemis"] = "classic"
    subscriptions: Literal["durable", "virtual"] = "durable"
    heartbeat: float = Field(10.0, ge=0.2, le=3600)
    max_payload: int = Field(16 * MiB, ge=1, le=100 * MiB)
    scheduler: bool = True
    admin_url: Annotated[SecretUrl, check_address("http", "https", 8161)] | None = None

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        _check_agreement(self.url, self.tls)
        return self

    @property
    def address(self) -> Address:
        """The URL taken apart, with user and password from wherever they were given."""
        return addresses_of(self.url, 61613, 61612, self.username, self.password, tls=self.tls.wanted)


class SubscriptionSettings(_Section):
    """``[subscriptions.NAME]``: tunes what code declares, or provisions a subscription ahead of it.

    Arguments:
        topics: patterns, instead of the code's.
        filter, ordered, max_attempts, concurrency: instead of the code's.
        backoff_initial, backoff_maximum: seconds.
    """

    topics: Annotated[Words, Field(min_length=1), AfterValidator(_patterns)] | None = None
    filter: Annotated[str, AfterValidator(_filter)] | None = None
    ordered: bool | None = None
    max_attempts: int | None = Field(None, ge=1)
    concurrency: int | None = Field(None, ge=1)
    backoff_initial: float | None = Field(None, ge=0)
    backoff_maximum: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check_backoff(self) -> Self:
        initial, maximum = self.backoff_initial, self.backoff_maximum
        if initial is not None and maximum is not None and initial > maximum:
            raise ValueError("backoff_initial is above backoff_maximum: give initial <= maximum, in seconds")
        return self


class Settings(BaseSettings):
    """All settings; every field can be given in code, environment, ``.env``, secrets directory or TOML.

    Arguments:
        backend: ``sqlite``, ``memory``, ``rabbitmq``, ``kafka``, ``activemq``, or a registered driver's name.
        namespace: prefixes every name on the broker, so that environments and tests share one safely.
        url: the broker's address; its scheme chooses the backend.
        require_subscribers: refuse to publish what no subscription would get (capability).
        publish_timeout: seconds a publish waits for its confirm, through outages too.
        connect_timeout: seconds for one attempt to connect.
        reconnect_min, reconnect_max: seconds between attempts to connect, from first to longest.
        subscriptions: per subscription name.
        options: for third-party drivers: anything.

    Raises ConfigError for what is unknown, missing or wrong; it names the key, the source and the fix.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
        nested_model_default_partial_update=False,
    )

    backend: Annotated[str, AfterValidator(_backend)] = "sqlite"
    namespace: Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\z", max_length=60)] = (
        "pubsub"
    )
    url: SecretUrl | None = None
    require_subscribers: bool = False
    publish_timeout: float = Field(30.0, gt=0, lt=1e9)
    connect_timeout: float = Field(10.0, gt=0, lt=1e9)
    reconnect_min: float = Field(0.05, gt=0)
    reconnect_max: float = Field(2.0, gt=0)
    memory: MemorySettings = MemorySettings()
    sqlite: SqliteSettings = SqliteSettings()
    rabbitmq: RabbitmqSettings = RabbitmqSettings()
    kafka: KafkaSettings = KafkaSettings()
    activemq: ActivemqSettings = ActivemqSettings()
    subscriptions: dict[Annotated[str, AfterValidator(_subscription)], SubscriptionSettings] = {}
    options: dict[str, Any] = {}
    origins: dict[str, str] = Field({}, exclude=True, repr=False)
    """Dotted key -> the source its value came from; what is not in it is a default."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self)) from None

    @model_validator(mode="after")
    def _check_reconnect(self) -> Self:
        if self.reconnect_min > self.reconnect_max:
            raise ValueError("reconnect_min is above reconnect_max: give min <= max, in seconds")
        return self

    @field_serializer("options", when_used="json")
    def _mask_options(self, options: dict[str, Any]) -> Any:
        return masked(options)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, masked(value) if name == "options" else value

    @classmethod
    def load(cls, config: str | os.PathLike[str] | None = None, **overrides: Any) -> Settings:
        """Settings from all sources.

        Arguments:
            config: the TOML file; None: ``PUBSUB_CONFIG``, else ``pubsub.toml`` here, else ``pyproject.toml`` here.
            overrides: any field, above all other sources; a section is a mapping.
        """
        if config is not None:
            overrides[Sources.CONFIG] = Path(config)
        return cls(**overrides)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (Sources(settings_cls, init_settings, split_url),)


assert ORIGINS in Settings.model_fields
