"""Users of the secured brokers beside the one with all rights: one with a password to look for, one without rights."""

from __future__ import annotations

import base64
import json
import urllib.request
from typing import Final

from brokers import native
from brokers.activemq import Classic
from brokers.artemis import Artemis
from brokers.broker import PASSWORD, USER, Broker
from brokers.kafka import Kafka
from brokers.rabbitmq import RabbitMQ

KNOWN_USER: Final = "auditor"
KNOWN: Final = "known-7f3e9c41b2"
"""A password that is nowhere else: whoever shows it has leaked it."""

BARRED_USER: Final = "barred"
BARRED: Final = "barred-52d1"

USERS: Final = ((KNOWN_USER, KNOWN), (BARRED_USER, BARRED))

RIGHTS: Final = ("configure", "write", "read")
"""On RabbitMQ."""

JAAS: Final = "org.apache.kafka.common.security"
KAFKA_LINES: Final = (
    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    f"super.users=User:ANONYMOUS;User:{USER};User:{KNOWN_USER}",
    f"ssl.principal.mapping.rules=RULE:^.*$/{USER}/",
    "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
    f"listener.name.sasl.plain.sasl.jaas.config={JAAS}.plain.PlainLoginModule required "
    + " ".join(f'user_{user}="{password}"' for user, password in ((USER, PASSWORD), *USERS))
    + ";",
    f"listener.name.sasl.scram-sha-256.sasl.jaas.config={JAAS}.scram.ScramLoginModule required;",
    f"listener.name.sasl.scram-sha-512.sasl.jaas.config={JAAS}.scram.ScramLoginModule required;",
)


class GuardedKafka(Kafka):
    """Knows one user by SCRAM from its first start on."""

    format_options = tuple(
        option
        for bits in (256, 512)
        for option in ("--add-scram", f"SCRAM-SHA-{bits}=[name={USER},password={PASSWORD}]")
    )


class GuardedClassic(Classic):
    """Only the group ``users`` may do anything; the barred user is in none that may. Jolokia knows the known user."""

    def _agent(self) -> str:
        return (
            super()
            ._agent()
            .replace(f"user={USER},password={PASSWORD}", f"user={KNOWN_USER},password={KNOWN}")
        )

    def configure(self) -> None:
        super().configure()
        path = self.directory / "activemq.xml"
        users = (
            f'<authenticationUser username="{KNOWN_USER}" password="{KNOWN}" groups="users,admins"/>'
            f'<authenticationUser username="{BARRED_USER}" password="{BARRED}" groups="barred"/></users>'
        )
        entries = "".join(
            f'<authorizationEntry {kind}=">" read="users" write="users" admin="users"/>'
            for kind in ("queue", "topic")
        )
        all_groups = "users,barred"
        advisory = (
            f'<authorizationEntry topic="ActiveMQ.Advisory.>" read="{all_groups}" write="{all_groups}" '
            f'admin="{all_groups}"/>'
        )
        plugin = (
            "</simpleAuthenticationPlugin><authorizationPlugin><map><authorizationMap><authorizationEntries>"
            f"{entries}{advisory}</authorizationEntries></authorizationMap></map></authorizationPlugin>"
        )
        text = path.read_text()
        for there, instead in (("</users>", users), ("</simpleAuthenticationPlugin>", plugin)):
            assert text.count(there) == 1, there
            text = text.replace(there, instead)
        path.write_text(text)


class GuardedArtemis(Artemis):
    """The role ``amq`` may do all; the barred user has another."""

    def configure(self) -> None:
        super().configure()
        etc = self.directory / "instance" / "etc"
        for file, lines in (
            ("artemis-users.properties", [f"{user} = {password}" for user, password in USERS]),
            ("artemis-roles.properties", [f"amq = {USER},{KNOWN_USER}", f"barred = {BARRED_USER}"]),
        ):
            path = etc / file
            kept = [line for line in path.read_text().splitlines() if not line.startswith(("amq", "barred"))]
            path.write_text("\n".join([*kept, *(line for line in lines if line not in kept), ""]))


GUARDED: Final[dict[str, type[Broker]]] = {
    **native.BROKERS,
    "kafka": GuardedKafka,
    "activemq": GuardedClassic,
    "artemis": GuardedArtemis,
}


def add_users(broker: Broker) -> None:
    """What a running broker must be told of its users."""
    if isinstance(broker, RabbitMQ):
        for user, password in USERS:
            _put(broker, f"/users/{user}", {"password": password, "tags": ""})
            grant(broker, user, **(dict.fromkeys(RIGHTS, ".*") if user == KNOWN_USER else {}))


def grant(broker: RabbitMQ, user: str, **rights: str) -> None:
    """Give a user these rights on names that match, and no others."""
    _put(broker, f"/permissions/%2F/{user}", {**dict.fromkeys(RIGHTS, "^$"), **rights})


def _put(broker: RabbitMQ, path: str, body: dict[str, str]) -> None:
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        broker.management_url + path, json.dumps(body).encode(), headers, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=20):
        return
