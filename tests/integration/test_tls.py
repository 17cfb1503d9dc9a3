"""TLS on each broker: who may be trusted is trusted, and nobody else, in words that say what is wrong."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from brokers.broker import PASSWORD, USER
from pubsub_facade import AsyncPubSub, AuthenticationFailed, ConnectionFailed, Settings
from tests.integration.secured import Secured


async def round_trip(settings: dict[str, Any]) -> None:
    """Publish and receive one message."""
    async with AsyncPubSub(Settings(**settings)) as pubsub:
        try:
            async with pubsub.subscribe("tls.#", subscription="tls") as stream:
                sent = await pubsub.publish("tls.a", "hello")
                delivery = await stream.receive(20)
                assert (delivery.id, delivery.payload) == (sent.id, "hello")
                await delivery.ack()
        finally:
            await pubsub.delete("tls")


async def refused(settings: dict[str, Any]) -> str:
    """The text of the ConnectionFailed that connecting raises, and no password in it."""
    async with AsyncPubSub(Settings(**settings)) as pubsub:
        with pytest.raises(ConnectionFailed) as caught:
            await pubsub.ping()
    text = str(caught.value)
    assert "127.0.0.1" in text
    assert f":{PASSWORD}@" not in text
    return text


async def test_the_right_authority_is_trusted(secured: Secured) -> None:
    await round_trip(secured.settings(secured.port, {"ca": secured.certificates.ca}))


async def test_a_certificate_of_another_authority_is_refused(secured: Secured) -> None:
    text = await refused(secured.settings(secured.port, {"ca": secured.certificates.stranger}))
    assert "certificate" in text.lower()


async def test_the_system_s_authorities_do_not_know_this_broker(secured: Secured) -> None:
    text = await refused(secured.settings(secured.port, {}))
    assert "certificate" in text.lower()


async def test_a_certificate_for_another_name_is_refused(secured: Secured) -> None:
    tls = {"ca": secured.certificates.ca, "hostname": "broker.example"}
    text = await refused(secured.settings(secured.port, tls))
    assert "broker.example" in text


async def test_a_name_given_by_hand_is_what_the_certificate_must_hold(secured: Secured) -> None:
    await round_trip(secured.settings(secured.port, {"ca": secured.certificates.ca, "hostname": "localhost"}))


async def test_verification_is_off_only_by_name(secured: Secured) -> None:
    await round_trip(secured.settings(secured.port, {"verify": False, "ca": secured.certificates.stranger}))


async def test_tls_to_a_plain_port_is_refused_in_words_that_ask_for_tls(secured: Secured) -> None:
    text = await refused(secured.settings(secured.plain_port, {"ca": secured.certificates.ca}))
    assert "is it a TLS port" in text


async def test_plain_text_to_a_tls_port_is_refused_in_words_that_ask_for_tls(secured: Secured) -> None:
    settings = secured.settings(secured.port, {})
    section = settings[settings["backend"]]
    section["tls"] = {"enabled": False}
    if "url" in section:
        section["url"] = section["url"].replace("amqps:", "amqp:").replace("stomps:", "stomp:")
    text = await refused(settings)
    assert "is it a TLS port (enabled of [" in text
    assert "certificate" not in text


async def test_a_client_certificate_opens_a_door_that_wants_one(secured: Secured) -> None:
    files = secured.certificates
    tls = {"ca": files.ca, "cert": files.client, "key": files.client_key}
    await round_trip(secured.settings(secured.mutual_port, tls))


async def test_a_client_certificate_of_another_authority_is_refused(secured: Secured) -> None:
    files = secured.certificates
    tls = {"ca": files.ca, "cert": files.intruder, "key": files.intruder_key}
    text = await refused(secured.settings(secured.mutual_port, tls))
    assert "see cert and key of [" in text or "(cert and key of [" in text


@pytest.mark.parametrize(
    "secured",
    [pytest.param(name, marks=pytest.mark.broker(name)) for name in ("kafka", "activemq", "artemis")],
    indirect=True,
)
async def test_a_door_that_wants_a_client_certificate_says_so_to_who_has_none(secured: Secured) -> None:
    """RabbitMQ has one set of TLS options for all its doors, and those here let clients without one in."""
    text = await refused(secured.settings(secured.mutual_port, {"ca": secured.certificates.ca}))
    assert "see cert and key of [" in text or "(cert and key of [" in text


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_whoever_wants_a_client_certificate_is_understood(
    secured: Secured, version: ssl.TLSVersion
) -> None:
    """In TLS 1.3 the refusal comes when the client believes that it has been let in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secured.certificates.server, secured.certificates.server_key)
    context.load_verify_locations(secured.certificates.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version
    with served(context) as port:
        text = await refused(secured.settings(port, {"ca": secured.certificates.ca}))
    assert "see cert and key of [" in text or "(cert and key of [" in text


async def test_a_wrong_password_is_an_authentication_error(secured: Secured) -> None:
    if secured.name == "kafka":
        settings = secured.settings(
            secured.sasl_port,
            {"ca": secured.certificates.ca},
            username=USER,
            password="wrong-password",
            sasl_mechanism="PLAIN",
        )
    else:
        settings = secured.settings(secured.port, {"ca": secured.certificates.ca}, password="wrong-password")
    async with AsyncPubSub(Settings(**settings)) as pubsub:
        with pytest.raises(AuthenticationFailed) as caught:
            await pubsub.ping()
    assert "wrong-password" not in str(caught.value)
    assert USER in str(caught.value)


sasl = pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
only_kafka = pytest.mark.parametrize(
    "secured", [pytest.param("kafka", marks=pytest.mark.broker("kafka"))], indirect=True
)


def by_sasl(secured: Secured, mechanism: str, password: str) -> dict[str, Any]:
    tls = {"ca": secured.certificates.ca}
    return secured.settings(
        secured.sasl_port, tls, username=USER, password=password, sasl_mechanism=mechanism
    )


@only_kafka
@sasl
async def test_sasl_lets_a_known_user_in(secured: Secured, mechanism: str) -> None:
    await round_trip(by_sasl(secured, mechanism, PASSWORD))


@only_kafka
@sasl
async def test_sasl_keeps_a_wrong_password_out(secured: Secured, mechanism: str) -> None:
    async with AsyncPubSub(Settings(**by_sasl(secured, mechanism, "wrong-password"))) as pubsub:
        with pytest.raises(AuthenticationFailed) as caught:
            await pubsub.ping()
    assert "wrong-password" not in str(caught.value)
    assert mechanism in str(caught.value)


async def test_an_expired_certificate_is_refused(secured: Secured) -> None:
    """Before a word of the broker's protocol is spoken, so that whose certificate it is does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secured.certificates.expired, secured.certificates.expired_key)
    with served(context) as port:
        text = await refused(secured.settings(port, {"ca": secured.certificates.ca}))
    assert "expired" in text


@contextmanager
def served(context: ssl.SSLContext) -> Iterator[int]:
    """A port where somebody agrees on TLS, or does not, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        context.wrap_socket(connection, server_side=True).close()
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
