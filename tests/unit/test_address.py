"""Broker addresses: taken apart, several at once, percent-encoded, and shown without their password."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from pubsub_facade import ConfigError
from pubsub_facade.address import (
    Address,
    SecretUrl,
    Tls,
    addresses_of,
    host_port,
    mask,
    show_host,
    split_url,
    url_parts,
)


def address(url: str, **kwargs: bool) -> Address:
    return addresses_of(SecretUrl(url), 5672, 5671, None, None, **kwargs)


# -- taking apart -------------------------------------------------------------------------------------


def test_a_url_is_hosts_user_password_and_path() -> None:
    parts = address("amqp://app:secret@one,two:5673/v%2Fhost")
    assert parts.hosts == (("one", 5672), ("two", 5673))
    assert (parts.username, parts.secret, parts.path, parts.secure) == ("app", "secret", "v/host", False)


def test_user_and_password_are_percent_decoded() -> None:
    parts = address("amqp://a%40b:p%3A%2F%3F%23%40%25@host")
    assert (parts.username, parts.secret, parts.hosts) == ("a@b", "p:/?#@%", (("host", 5672),))


def test_a_password_may_hold_colons_and_at_signs_before_the_last_one() -> None:
    parts = address("amqp://app:a:b@c@host")
    assert (parts.username, parts.secret, parts.hosts) == ("app", "a:b@c", (("host", 5672),))


def test_an_empty_password_is_not_no_password() -> None:
    assert address("amqp://app:@host").secret == ""
    assert address("amqp://app@host").secret is None


def test_fields_outrank_what_the_url_holds() -> None:
    parts = addresses_of(SecretUrl("amqp://a:b@host"), 1, 2, "user", SecretStr("word"))
    assert (parts.username, parts.secret) == ("user", "word")


@pytest.mark.parametrize(
    ("url", "tls", "secure", "port"),
    [
        ("amqp://host", False, False, 5672),
        ("amqps://host", False, True, 5671),
        ("AMQPS://host", False, True, 5671),
        ("amqp://host", True, True, 5671),
        ("amqps://host:7", False, True, 7),
    ],
)
def test_the_scheme_or_the_settings_choose_tls_and_the_port(
    url: str, tls: bool, secure: bool, port: int
) -> None:
    parts = address(url, tls=tls)
    assert (parts.secure, parts.hosts) == (secure, (("host", port),))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("host", "host", 1),
        ("host:2", "host", 2),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]", "::1", 1),
        ("[fe80::1%eth0]:7", "fe80::1%eth0", 7),
    ],
)
def test_host_and_port(text: str, host: str, port: int) -> None:
    assert host_port(text, 1) == (host, port)
    assert host_port(show_host(host, port), 1) == (host, port)


@pytest.mark.parametrize(
    "text", ["", ":1", "host:", "host:0", "host:65536", "host:x", "::1", "[::1", "a b", "[x]"]
)
def test_what_is_no_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        host_port(text, 1)


def test_an_at_sign_after_a_delimiter_is_an_unencoded_password() -> None:
    with pytest.raises(ConfigError, match="%2F"):
        url_parts("amqp://app:pa/ss@host")


def test_a_url_stands_for_a_backend_and_its_section() -> None:
    assert split_url("stomps://app:pw@one,two:1?flavor=artemis&tls.ca=ca.pem&tls.hostname=b") == {
        "backend": "activemq",
        "activemq": {
            "url": "stomps://one,two:1",
            "username": "app",
            "password": "pw",
            "flavor": "artemis",
            "tls": {"ca": "ca.pem", "hostname": "b"},
        },
    }
    assert split_url("kafkas://one,two:1") == {
        "backend": "kafka",
        "kafka": {"bootstrap_servers": ["one", "two:1"], "tls": {"enabled": True}},
    }
    assert split_url("sqlite:////var/lib/my%20app.db?lease=5") == {
        "backend": "sqlite",
        "sqlite": {"path": "/var/lib/my app.db", "lease": "5"},
    }
    assert split_url("memory://hub") == {"backend": "memory", "url": "memory://hub"}


# -- masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://app:pw@host/v", "amqp://app:***@host/v"),
        ("redis://:pw@host", "redis://:***@host"),
        ("amqp://app@host", "amqp://app@host"),
        ("amqp://host:5672/v", "amqp://host:5672/v"),
        ("kafka://h?password=pw&partitions=3", "kafka://h?password=***&partitions=3"),
        ("kafka://h?tls.key_password=pw", "kafka://h?tls.key_password=***"),
        ("sqlite:///pubsub.db", "sqlite:///pubsub.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert mask(url) == shown
    assert str(SecretUrl(url)) == shown
    assert shown in repr(SecretUrl(url))
    assert SecretUrl(url).get_secret_value() == url


@given(st.text(st.characters(codec="utf-8", exclude_characters="*"), min_size=3, max_size=20))
def test_no_password_shows_however_it_is_written(password: str) -> None:
    secret = f"X{password}Y"
    for url in (f"amqp://app:{secret}@host/v", f"app:{secret}@host", f"amqp://:{secret}@host:1,host2"):
        assert secret not in mask(url)


@given(st.text())
def test_taking_apart_raises_nothing_but_config_errors(text: str) -> None:
    for url in (text, f"amqp://{text}", f"kafka://{text}", f"sqlite:///{text}"):
        try:
            split_url(url)
        except ConfigError:
            continue


# -- TLS ----------------------------------------------------------------------------------------------


def test_tls_verifies_unless_turned_off_by_name() -> None:
    context = Tls().context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    context = Tls(verify=False).context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize(
    ("tls", "wanted"),
    [
        (Tls(), False),
        (Tls(hostname="h"), False),
        (Tls(enabled=True), True),
        (Tls(enabled=False), False),
        (Tls(ca=Path("ca.pem")), True),
        (Tls(cert=Path("cert.pem")), True),
    ],
)
def test_a_file_means_tls(tls: Tls, wanted: bool) -> None:
    assert tls.wanted is wanted


@pytest.mark.parametrize("name", ["ca", "cert"])
def test_a_file_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"tls.{name} 'nowhere.pem'"):
        Tls(**{name: Path("nowhere.pem")}).context()


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("not a certificate")
    with pytest.raises(ConfigError, match=r"ca.pem"):
        Tls(ca=file).context()
