"""Brokers with TLS listeners of their own, and the certificates of an authority that the tests make."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509 import load_pem_x509_certificate

from brokers.broker import PASSWORD, STATE, USER, Broker
from brokers.ports import DEFAULTS
from pubsub_facade.testing.faults import free_port
from tests.integration.guarded import GUARDED, KAFKA_LINES, add_users

SECRET: Final = "keystore-secret"


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, a server certificate for 127.0.0.1 and localhost, a client certificate, and bad ones."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        folder.mkdir(parents=True, exist_ok=True)
        ca, stranger = trustme.CA(), trustme.CA()
        ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        stranger.cert_pem.write_to_path(str(folder / "stranger.pem"))
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        issued = {
            "server": ca.issue_cert("127.0.0.1", "localhost"),
            "expired": ca.issue_cert(
                "127.0.0.1", not_after=past, not_before=past - datetime.timedelta(days=9)
            ),
            "client": ca.issue_cert("app@pubsub.example"),
            "intruder": stranger.issue_cert("app@pubsub.example"),
        }
        for name, cert in issued.items():
            chain = b"".join(blob.bytes() for blob in cert.cert_chain_pems)
            (folder / f"{name}.pem").write_bytes(chain)
            (folder / f"{name}_key.pem").write_bytes(cert.private_key_pem.bytes())
            (folder / f"{name}_both.pem").write_bytes(_pkcs8(cert.private_key_pem.bytes()) + chain)
        certificate = load_pem_x509_certificate((folder / "server.pem").read_bytes())
        key: Any = load_pem_private_key((folder / "server_key.pem").read_bytes(), None)
        store = pkcs12.serialize_key_and_certificates(
            b"server", key, certificate, None, BestAvailableEncryption(SECRET.encode())
        )
        (folder / "server.p12").write_bytes(store)
        trusted = load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        (folder / "trust.p12").write_bytes(
            pkcs12.serialize_java_truststore(
                [pkcs12.PKCS12Certificate(trusted, b"ca")], BestAvailableEncryption(SECRET.encode())
            )
        )
        for path in folder.iterdir():
            path.chmod(0o644)
        return cls(folder)


def _pkcs8(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return load_pem_private_key(pem, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Secured:
    """One broker with a TLS listener (``port``) and one that wants a client certificate (``mutual_port``)."""

    def __init__(self, name: str) -> None:
        self.name = name
        directory = STATE / f"tls-{name}"
        cls = GUARDED[name]
        cls(directory).remove()
        self.certificates = Certificates.make(directory / "tls")
        self.port, self.mutual_port = free_port(), free_port()
        self.plain_port = 0
        ports = {port: free_port() for port in DEFAULTS[name]}
        extra, listeners = getattr(self, f"_{name}")(ports)
        self.broker: Broker = cls(directory, ports, extra=extra, listeners=listeners)
        self.broker.start()
        add_users(self.broker)
        self.plain_port = self.broker.ports[{"rabbitmq": "amqp", "kafka": "client"}.get(name, "stomp")]

    def settings(self, port: int, tls: Mapping[str, Any], **section: Any) -> dict[str, Any]:
        """Settings for this broker on ``port``."""
        fields: dict[str, Any] = {"tls": dict(tls), **section}
        backend = {"artemis": "activemq"}.get(self.name, self.name)
        if self.name == "kafka":
            fields = {"bootstrap_servers": [f"127.0.0.1:{port}"], **fields}
            fields["tls"].setdefault("enabled", True)
        elif self.name == "rabbitmq":
            fields = {"url": f"amqps://{USER}:{PASSWORD}@127.0.0.1:{port}/%2F", **fields}
        else:
            fields = {"url": f"stomps://{USER}:{PASSWORD}@127.0.0.1:{port}", **fields}
        if self.name == "artemis":
            fields["flavor"] = "artemis"
        return {"backend": backend, "namespace": "tls", "connect_timeout": 4.0, backend: fields}

    def settings_of(self, username: str, password: str, namespace: str) -> dict[str, Any]:
        """Settings of a user with a password, over TLS."""
        sasl = {"sasl_mechanism": "PLAIN"} if self.name == "kafka" else {}
        port = self.sasl_port if self.name == "kafka" else self.port
        tls = {"ca": self.certificates.ca}
        settings = self.settings(port, tls, username=username, password=password, **sasl)
        return {**settings, "namespace": namespace}

    def _rabbitmq(self, ports: Mapping[str, int]) -> tuple[list[str], list[str]]:
        # One set of TLS options for all listeners: a client that shows a certificate is checked, on any.
        self.mutual_port = self.port
        files = self.certificates
        return [
            f"listeners.ssl.1 = 127.0.0.1:{self.port}",
            f"ssl_options.cacertfile = {files.ca}",
            f"ssl_options.certfile = {files.server}",
            f"ssl_options.keyfile = {files.server_key}",
            "ssl_options.verify = verify_peer",
            "ssl_options.fail_if_no_peer_cert = false",
        ], []

    def _kafka(self, ports: Mapping[str, int]) -> tuple[list[str], list[str]]:
        files = self.certificates
        plain, controller = ports["client"], ports["controller"]
        self.sasl_port = free_port()
        return [
            f"listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller},"
            f"TLS://127.0.0.1:{self.port},MUTUAL://127.0.0.1:{self.mutual_port},SASL://127.0.0.1:{self.sasl_port}",
            f"advertised.listeners=PLAINTEXT://127.0.0.1:{plain},TLS://127.0.0.1:{self.port},"
            f"MUTUAL://127.0.0.1:{self.mutual_port},SASL://127.0.0.1:{self.sasl_port}",
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,TLS:SSL,MUTUAL:SSL,SASL:SASL_SSL",
            "ssl.keystore.type=PEM",
            f"ssl.keystore.location={files.server_both}",
            "ssl.truststore.type=PEM",
            f"ssl.truststore.location={files.ca}",
            "listener.name.mutual.ssl.client.auth=required",
            *KAFKA_LINES,
        ], []

    def _activemq(self, ports: Mapping[str, int]) -> tuple[list[str], list[str]]:
        folder = self.certificates.folder
        context = (
            f'<sslContext><sslContext keyStore="file:{folder}/server.p12" keyStorePassword="{SECRET}" '
            f'keyStoreType="PKCS12" trustStore="file:{folder}/trust.p12" trustStorePassword="{SECRET}" '
            'trustStoreType="PKCS12"/></sslContext>'
        )
        return [context], [
            f'<transportConnector name="tls" uri="stomp+ssl://127.0.0.1:{self.port}"/>',
            f'<transportConnector name="mutual" uri="stomp+ssl://127.0.0.1:{self.mutual_port}?needClientAuth=true"/>',
        ]

    def _artemis(self, ports: Mapping[str, int]) -> tuple[list[str], list[str]]:
        folder = self.certificates.folder
        stores = (
            f"protocols=STOMP;sslEnabled=true;keyStorePath={folder}/server.p12;keyStorePassword={SECRET};"
            f"keyStoreType=PKCS12;trustStorePath={folder}/trust.p12;trustStorePassword={SECRET};trustStoreType=PKCS12"
        )
        return [], [
            f'<acceptor name="tls">tcp://127.0.0.1:{self.port}?{stores}</acceptor>',
            f'<acceptor name="mutual">tcp://127.0.0.1:{self.mutual_port}?{stores};needClientAuth=true</acceptor>',
        ]
