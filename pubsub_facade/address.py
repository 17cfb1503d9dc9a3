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
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Secret, SecretStr

from pubsub_facade.errors import ConfigError

MASK: Final = "***"
_PASSWORD: Final = re.compile(r"(?<=://)([^/?#@:]*):[^/?#]*@")
_SECTIONS: Final = {
    "amqp": ("rabbitmq", False),
    "amqps": ("rabbitmq", True),
    "stomp": ("activemq", False),
    "stomps": ("activemq", True),
    "kafka": ("kafka", False),
    "kafkas": ("kafka", True),
}


def mask(url: str) -> str:
    """``url`` with its password replaced by ``***``."""
    return _PASSWORD.sub(rf"\1:{MASK}@", url)


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


def addresses_of(
    url: SecretUrl, port: int, secure_port: int, username: str | None, password: SecretStr | None
) -> Address:
    """Take a broker URL apart.

    Arguments:
        port, secure_port: where the URL names none: without and with TLS.
        username, password: outrank those in the URL.
    """
    text = url.get_secret_value()
    parts = urlsplit(text)
    secure = parts.scheme in ("amqps", "stomps", "kafkas")
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
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]\s]+))(?::(\d{1,5}))?", text)
    if match is None or not 0 < int(match[3] or default) < 65536:
        raise ConfigError(f"address {text!r} is not usable: write host:port, as localhost:{default}")
    return match[1] or match[2], int(match[3] or default)


def check_address(*schemes: str) -> AfterValidator:
    """A validator: a URL with one of these schemes and at least one good host."""

    def check(url: SecretUrl) -> SecretUrl:
        text = url.get_secret_value()
        scheme, separator, _ = text.partition("://")
        if not separator or scheme not in schemes:
            raise ValueError(
                f"{mask(text)!r} is not a usable URL: write {schemes[0]}://user:password@host:port "
                f"({schemes[-1]} for TLS)"
            )
        try:
            hosts = addresses_of(url, 1, 1, None, None).hosts
        except (ConfigError, ValueError) as error:
            raise ValueError(f"{mask(text)!r} is not a usable URL: {error}") from None
        if not hosts:
            raise ValueError(f"{mask(text)!r} names no host: write {schemes[0]}://host:port")
        return url

    return AfterValidator(check)


def split_url(text: str) -> dict[str, Any]:
    """The settings that one URL stands for: the backend by its scheme, and its section.

    ``kafka://user:password@h1:9092,h2:9092``, ``amqps://h/vhost``, ``stomp://h:61613?flavor=artemis``,
    ``sqlite:///file.db``, ``memory://name``. Query parameters are fields of the section, ``tls.ca=…`` too.
    Another scheme is the name of a registered driver, which reads ``url`` itself. Raises ConfigError.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+_-]*", scheme):
        raise ConfigError(
            f"url {mask(text)!r} is not usable: write scheme://host:port, as kafka://localhost:9092, "
            "amqp://user:password@localhost:5672/%2F, stomp://localhost:61613 or sqlite:///pubsub.db"
        )
    if scheme == "sqlite":
        path, _, query = rest.partition("?")
        if not path.startswith("/") or len(path) < 2:
            raise ConfigError(
                f"url {text!r} names no file: write sqlite:///pubsub.db, or sqlite:////absolute/path"
            )
        return {"backend": "sqlite", "sqlite": {**_query(query), "path": unquote(path[1:])}}
    if scheme not in _SECTIONS:
        return {"backend": scheme, "url": text}
    section, secure = _SECTIONS[scheme]
    parts = urlsplit(text)
    fields = _query(parts.query)
    user, password, hosts = split_netloc(parts.netloc)
    if user is not None:
        fields["username"] = user
    if password is not None:
        fields["password"] = password
    if section != "kafka":
        bare = f"{scheme}://{','.join(hosts)}{parts.path}"
        return {"backend": section, section: {**fields, "url": bare}}
    for host in hosts:
        host_port(host, 9092)
    if secure:
        fields.setdefault("tls", {})["enabled"] = True
    return {"backend": "kafka", "kafka": {**fields, "bootstrap_servers": hosts}}


def _query(query: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        *outer, last = name.split(".")
        place = fields
        for word in outer:
            place = place.setdefault(word, {})
        place[last] = value
    return fields


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
                secret = None if self.key_password is None else self.key_password.get_secret_value()
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
