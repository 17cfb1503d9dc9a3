"""Broker addresses: URLs with a password that no text shows, several hosts in one, TLS beside them.

One URL names a backend by its scheme, its hosts with commas, and fields of its section by its query.
Pure but for `Tls.context`, which reads the files it names.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import parse_qsl, unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Secret, SecretStr, model_validator

from pubsub_facade.errors import ConfigError

MASK: Final = "***"
_QUERY_SECRET: Final = re.compile(r"([?&][^=&#]*(?:passw|secret|token)[^=&#]*=)[^&#]*", re.IGNORECASE)
_SECTIONS: Final = {
    "amqp": ("rabbitmq", False),
    "amqps": ("rabbitmq", True),
    "stomp": ("activemq", False),
    "stomps": ("activemq", True),
    "kafka": ("kafka", False),
    "kafkas": ("kafka", True),
}
SECURE: Final = frozenset(scheme for scheme, (_, secure) in _SECTIONS.items() if secure)
_MEANT: Final = {
    "rabbitmq": "amqp://host:5672",
    "activemq": "stomp://host:61613",
    "artemis": "stomp://host:61613?flavor=artemis",
}


def mask(url: str) -> str:
    """``url`` with its password replaced by ``***``; hides too much rather than too little of a bad one."""
    url = _QUERY_SECRET.sub(rf"\1{MASK}", url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    userinfo, at, hosts = rest.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}{separator}{user}:{MASK}@{hosts}" if at and colon else url


class SecretUrl(Secret[str]):
    """A URL whose password no ``str``, ``repr`` or dump shows; `get_secret_value` is the whole."""

    def _display(self) -> str:
        return mask(self.get_secret_value())


@dataclass(frozen=True)
class Address:
    """Where a broker is and who we are there.

    Arguments:
        hosts: ``(host, port)``, tried in this order.
        secure: over TLS.
        username, password: None where none was given.
        path: decoded, without the leading slash (RabbitMQ: the virtual host).
    """

    hosts: tuple[tuple[str, int], ...]
    secure: bool
    username: str | None
    password: SecretStr | None
    path: str

    @property
    def secret(self) -> str | None:
        """The password itself."""
        return None if self.password is None else self.password.get_secret_value()

    def __str__(self) -> str:
        """The hosts, for errors and logs."""
        return ",".join(show_host(host, port) for host, port in self.hosts)


def show_host(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class Parts:
    """A URL between its delimiters, still encoded. `urlsplit` would refuse several IPv6 hosts in one."""

    scheme: str
    netloc: str
    path: str
    query: str


def url_parts(text: str) -> Parts:
    """Take ``text`` apart. Raises ConfigError for an ``@`` where only an unencoded password can put one."""
    scheme, _, rest = text.partition("://")
    end = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    netloc, tail = rest[:end], rest[end:]
    if "@" in tail:
        raise ConfigError(
            f"url {mask(text)!r} has an '@' after a '/', '?' or '#': percent-encode what stands in user, "
            "password or path (%2F for '/', %3F for '?', %23 for '#', %40 for '@')"
        )
    path, _, query = tail.partition("#")[0].partition("?")
    return Parts(scheme.lower(), netloc, path, query)


def addresses_of(
    url: SecretUrl,
    port: int,
    secure_port: int,
    username: str | None,
    password: SecretStr | None,
    *,
    tls: bool = False,
) -> Address:
    """Take a broker URL apart.

    Arguments:
        port, secure_port: where the URL names none: without and with TLS.
        username, password: outrank those in the URL.
        tls: use TLS whatever the scheme says.
    """
    parts = url_parts(url.get_secret_value())
    secure = tls or parts.scheme in SECURE
    user, secret, hosts = split_netloc(parts.netloc)
    path = unquote(parts.path.removeprefix("/"))
    return Address(
        tuple(host_port(host, secure_port if secure else port) for host in hosts),
        secure,
        user if username is None else username,
        password if password is not None else None if secret is None else SecretStr(secret),
        path,
    )


def split_netloc(netloc: str) -> tuple[str | None, str | None, list[str]]:
    """User, password and hosts of the part between ``//`` and ``/``."""
    userinfo, at, hosts = netloc.rpartition("@")
    user, colon, password = userinfo.partition(":")
    return (
        unquote(user) if at else None,
        unquote(password) if colon else None,
        [host for host in hosts.split(",") if host],
    )


def host_port(text: str, default: int) -> tuple[str, int]:
    """``host``, ``host:port`` or ``[v6]:port``; ConfigError where the port is no port."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^:\[\]\s]+))(?::(\d{1,5}))?", text)
    if match is None or not 0 < int(match[3] or default) < 65536:
        raise ConfigError(f"address {mask(text)!r} is not usable: write host:port, as localhost:{default}")
    return match[1] or match[2], int(match[3] or default)


def check_address(plain: str, secure: str, port: int) -> AfterValidator:
    """A validator: a URL with one of these two schemes and at least one good host.

    Arguments:
        port: to show in an error.
    """

    def check(url: SecretUrl) -> SecretUrl:
        text = url.get_secret_value()
        scheme, separator, _ = text.partition("://")
        if not separator or scheme.lower() not in (plain, secure):
            raise ValueError(
                f"{mask(text)!r} is no URL of this broker: write {plain}://user:password@host:{port} "
                f"({secure} for TLS)"
            )
        try:
            hosts = addresses_of(url, port, port, None, None).hosts
            query = url_parts(text).query
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not hosts:
            raise ValueError(f"{mask(text)!r} names no host: write {plain}://host:{port}")
        if query:
            raise ValueError(
                f"{mask(text)!r} has a query, which only the url above all sections may have: "
                "give its fields beside this one"
            )
        return url

    return AfterValidator(check)


def split_url(text: str) -> dict[str, Any]:
    """The settings that one URL stands for: the backend by its scheme, and its section.

    ``kafka://user:password@h1:9092,h2:9092``, ``amqps://h/vhost``, ``stomp://h:61613?flavor=artemis``,
    ``sqlite:///file.db``, ``memory://name``. Query parameters are fields of the section, ``tls.ca=…`` too.
    Another scheme is the name of a registered driver, which reads ``url`` itself. Raises ConfigError.
    """
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+_-]*", scheme):
        raise ConfigError(
            f"url {mask(text)!r} is not usable: write scheme://host:port, as kafka://localhost:9092, "
            "amqp://user:password@localhost:5672/%2F, stomp://localhost:61613 or sqlite:///pubsub.db"
        )
    if scheme == "sqlite":
        path, _, query = rest.partition("?")
        if not path.startswith("/") or len(path) < 2:
            raise ConfigError(
                f"url {mask(text)!r} names no file: write sqlite:///pubsub.db, or sqlite:////absolute/path"
            )
        return {"backend": "sqlite", "sqlite": {**_query(query, text), "path": unquote(path[1:])}}
    if scheme in _MEANT:
        raise ConfigError(f"url {mask(text)!r} is not usable: write {_MEANT[scheme]}")
    if scheme not in _SECTIONS:
        return {"backend": scheme, "url": text}
    section, secure = _SECTIONS[scheme]
    parts = url_parts(text)
    fields = _query(parts.query, text)
    user, password, hosts = split_netloc(parts.netloc)
    if not hosts:
        raise ConfigError(f"url {mask(text)!r} names no host: write {scheme}://host:port")
    if user is not None:
        fields["username"] = user
    if password is not None:
        fields["password"] = password
    if section != "kafka":
        bare = f"{scheme}://{','.join(hosts)}{parts.path}"
        return {"backend": section, section: {**fields, "url": bare}}
    if parts.path not in ("", "/"):
        raise ConfigError(f"url {mask(text)!r} has a path, which Kafka has no use for: leave it out")
    if secure:
        _put(fields, "tls.enabled", True, text)
    return {"backend": "kafka", "kafka": {**fields, "bootstrap_servers": hosts}}


def _query(query: str, url: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        _put(fields, name, value, url)
    return fields


def _put(fields: dict[str, Any], key: str, value: Any, url: str) -> None:
    *outer, last = key.split(".")
    place = fields
    for word in outer:
        place = place.setdefault(word, {})
        if not isinstance(place, dict):
            raise ConfigError(f"url {mask(url)!r} gives {word!r} both a value and fields: give one of them")
    place[last] = value


class Tls(BaseModel):
    """``[….tls]``: how the broker proves who it is, and how we do.

    Arguments:
        enabled: use TLS; None: where the URL's scheme says so, or any file is named here.
        ca: PEM file of the authorities we trust; None: the system's.
        cert, key: PEM files of our certificate and its private key.
        key_password: of the private key.
        verify: False: trust anybody. For experiments.
        hostname: name that the broker's certificate must hold; None: the host we connect to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    enabled: bool | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    key_password: SecretStr | None = None
    verify: bool = True
    hostname: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.key is not None and self.cert is None:
            raise ValueError("key without cert: give both, or cert alone where it holds the key too")
        if self.enabled is False and any((self.ca, self.cert, self.hostname)):
            raise ValueError("enabled is false beside files or a hostname: leave out one or the other")
        return self

    @cached_property
    def wanted(self) -> bool:
        """Whether TLS is asked for here, whatever a URL says."""
        if self.enabled is not None:
            return self.enabled
        return self.ca is not None or self.cert is not None

    def context(self) -> ssl.SSLContext:
        """A client context. Raises ConfigError naming the file that cannot be used."""
        for name, path in self._files():
            if not path.is_file():
                raise ConfigError(f"tls.{name} {str(path)!r} is not a file that can be read")
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if self.cert is not None:
                # An empty password fails on an encrypted key; None would ask the terminal, and wait.
                secret = "" if self.key_password is None else self.key_password.get_secret_value()
                context.load_cert_chain(self.cert, self.key, secret)
        except (ssl.SSLError, OSError) as error:
            files = ", ".join(f"{name} {str(path)!r}" for name, path in self._files())
            raise ConfigError(f"the TLS files cannot be used ({files}): {error}") from error
        return context

    def _files(self) -> Iterator[tuple[str, Path]]:
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            if path is not None:
                yield name, path
