"""Services of the frameworks, ended as service managers end them: signals, exit codes, health, concurrency."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pubsub_facade import Message, PubSub, Settings
from pubsub_facade.contrib.outbox import SENT
from pubsub_facade.testing.faults import Proxy, free_port

from ..conftest import broker_settings
from .services import DEADLINE, RELAY, SUBSCRIBERS, Site, health, until

DRIVER = """
from pubsub_facade import PubSubError
from pubsub_facade.backends.memory import MemoryBackend

class Refusing(MemoryBackend):
    async def declare(self, subscription):
        raise PubSubError("not today")
"""

both = pytest.mark.parametrize("framework", list(SUBSCRIBERS))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


@pytest.fixture
def client(site: Site) -> Iterator[PubSub]:
    with site.client() as client:
        yield client


# -- signals ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_what_is_in_hand(framework: str, number: int, site: Site, client: PubSub) -> None:
    members = site.start(*SUBSCRIBERS[framework])
    members.wait_for("receiving sync.# for sync")
    client.publish("sync.x", "slow")
    site.wait_for_note("begin slow")
    members.process.send_signal(number)
    members.wait_for("finishing what is in hand")
    client.publish("sync.x", "later")
    site.go()
    code, said = members.result()
    assert code == 0, said
    assert site.notes == ["begin slow", "end slow"]
    assert client.backlog("sync").waiting == 1


@both
def test_a_later_signal_ends_at_once_and_nothing_is_lost(framework: str, site: Site, client: PubSub) -> None:
    members = site.start(*SUBSCRIBERS[framework], PUBSUB_SQLITE__LEASE="2")
    members.wait_for("receiving")
    client.publish("sync.x", "slow")
    site.wait_for_note("begin slow")
    members.process.send_signal(signal.SIGTERM)
    members.wait_for("finishing what is in hand")
    deadline = time.monotonic() + DEADLINE
    while members.process.poll() is None and time.monotonic() < deadline:
        members.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert members.result()[0] == 128 + signal.SIGTERM
    with client.subscribe("sync.#", subscription="sync") as stream:
        delivery = stream.receive(DEADLINE)
        assert delivery.payload == "slow"
        delivery.ack()


@both
def test_a_signal_sent_twice_at_once_is_one(framework: str, site: Site, client: PubSub) -> None:
    members = site.start(*SUBSCRIBERS[framework])
    members.wait_for("receiving")
    client.publish("sync.x", "slow")
    site.wait_for_note("begin slow")
    members.process.send_signal(signal.SIGTERM)
    members.process.send_signal(signal.SIGINT)
    members.wait_for("finishing what is in hand")
    site.go()
    code, said = members.result()
    assert code == 0, said
    assert site.notes == ["begin slow", "end slow"]


@both
def test_a_signal_that_another_thread_got_is_heard(framework: str, site: Site, client: PubSub) -> None:
    members = site.start(*SUBSCRIBERS[framework])
    members.wait_for("receiving")
    client.publish("sync.x", "signal")
    code, said = members.result()
    assert code == 0, said
    assert site.notes == ["begin signal", "end signal"]


# -- exit codes, concurrency, health ---------------------------------------------------------------


@both
def test_the_grace_time_ends_and_says_so_by_its_exit_code(framework: str, site: Site, client: PubSub) -> None:
    members = site.start(*SUBSCRIBERS[framework], "--grace", "0.2")
    members.wait_for("receiving")
    client.publish("sync.x", "slow")
    site.wait_for_note("begin slow")
    began = time.monotonic()
    code, said = members.end()
    assert code == 5
    assert time.monotonic() - began < 10
    assert said.count("not finished") == 1
    assert "subscription sync: 1 delivery was not finished within 0.2 s; it comes again" in said
    with client.subscribe("sync.#", subscription="sync") as stream:
        delivery = stream.receive(DEADLINE)
        assert delivery.payload == "slow"
        delivery.ack()


@both
def test_a_member_that_cannot_go_on_is_exit_code_1(framework: str, site: Site) -> None:
    (site.folder / "driver.py").write_text(DRIVER)
    (site.folder / "driver-1.dist-info").mkdir()
    (site.folder / "driver-1.dist-info" / "entry_points.txt").write_text(
        "[pubsub_facade.backends]\nrefusing = driver:Refusing\n"
    )
    code, said = site.run(*SUBSCRIBERS[framework], PUBSUB_BACKEND="refusing")
    assert code == 1, said
    assert "not today" in said
    assert "Traceback" not in said


@both
def test_concurrency_bounds_how_many_messages_are_in_hand(framework: str, site: Site, client: PubSub) -> None:
    members = site.start(
        *SUBSCRIBERS[framework], "--concurrency", "3", PUBSUB_SUBSCRIPTIONS__SYNC__CONCURRENCY="1"
    )
    members.wait_for("receiving")
    for _ in range(12):
        client.publish("sync.x", "slow")
    site.wait_for_note("begin slow", 3)
    site.go()
    site.wait_for_note("end slow", 12)
    assert members.end()[0] == 0
    assert site.overlap == 3


@pytest.fixture
def rabbit(tmp_path: Path) -> Iterator[Rabbit]:
    rabbit = Rabbit(tmp_path)
    yield rabbit
    rabbit.close()


class Rabbit:
    """The site on RabbitMQ, by a proxy, in a namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self._direct: Settings = broker_settings("rabbitmq")(namespace=f"test-{uuid.uuid4().hex[:10]}")
        ((host, port),) = self._direct.rabbitmq.address.hosts
        self.proxy = Proxy(host, port).start()
        self.url = self._direct.rabbitmq.url.get_secret_value().replace(f":{port}", f":{self.proxy.port}")
        self.site = Site(
            folder, f'url = "{self.url}"\nnamespace = "{self._direct.namespace}"\nreconnect_max = 0.2\n'
        )
        self.client = PubSub(self._direct)

    def url_with(self, password: str) -> str:
        """The URL with another password."""
        parts = urlsplit(self.url)
        return self.url.replace(f":{parts.password}@", f":{password}@")

    def close(self) -> None:
        self.site.close()
        self.client.delete("sync")
        self.client.close()
        self.proxy.stop()


@both
@pytest.mark.broker("rabbitmq")
def test_a_refused_password_is_exit_code_3(framework: str, rabbit: Rabbit) -> None:
    code, said = rabbit.site.run(*SUBSCRIBERS[framework], PUBSUB_URL=rabbit.url_with("wrong-9fe1"))
    assert code == 3, said
    assert "refused" in said
    assert "wrong-9fe1" not in said


@both
@pytest.mark.broker("rabbitmq")
def test_health_tells_when_the_broker_is_away_and_back(framework: str, rabbit: Rabbit) -> None:
    rabbit.proxy.refuse()
    port = free_port()
    members = rabbit.site.start(*SUBSCRIBERS[framework], "--health", str(port))
    until(lambda: health(port)[0] == 503, "503 before the broker was ever there")
    for _ in range(2):
        rabbit.proxy.restore()
        until(lambda: health(port)[0] == 200, "200 while it receives")
        assert health(port)[1] == {"healthy": True, "state": "connected", "members": {"sync": True}}
        rabbit.proxy.refuse()
        until(lambda: health(port)[0] == 503, "503 while the broker is away")
        assert health(port)[1]["healthy"] is False
        assert health(port)[1]["state"] in ("connecting", "reconnecting")
    assert members.end()[0] == 0


# -- the relay -------------------------------------------------------------------------------------


def migrate(site: Site) -> None:
    """Make the tables of the Django project."""
    code, said = site.run("django", "migrate", "-v0")
    assert code == 0, said


def write(site: Site, count: int) -> None:
    """Commit messages to the outbox of the Django project."""
    code, said = site.run(
        "django",
        "shell",
        "-c",
        "from django.db import transaction\n"
        "from pubsub_facade.contrib.django import publish_many_on_commit\n"
        "from pubsub_facade import Message\n"
        "with transaction.atomic():\n"
        f"    publish_many_on_commit([Message('sync.x', str(n)) for n in range({count})])",
    )
    assert code == 0, said


def waiting(site: Site) -> int:
    """How many rows of the outbox wait."""
    code, said = site.run(*RELAY, "--lag")
    assert code == 0, said
    return int(said.split()[0])


@pytest.fixture
def outbox(site: Site) -> Site:
    """The site with its tables."""
    migrate(site)
    return site


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Where a broker listens that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(DEADLINE)
        yield listening


def test_a_relay_takes_a_signal_sent_twice_at_once_for_one(outbox: Site) -> None:
    relay = outbox.start(*RELAY, "--health", str(port := free_port()))
    until(lambda: health(port)[0], "the relay's health")
    relay.process.send_signal(signal.SIGTERM)
    relay.process.send_signal(signal.SIGINT)
    code, said = relay.result()
    assert code == 0, said
    assert said.count("finishing what is in hand") == 1


def test_a_later_signal_ends_a_relay_at_once(outbox: Site, silent: socket.socket) -> None:
    write(outbox, 1)
    relay = outbox.start(*RELAY, PUBSUB_URL=f"amqp://127.0.0.1:{silent.getsockname()[1]}")
    connection, _ = silent.accept()  # it publishes
    with connection:
        relay.process.send_signal(signal.SIGTERM)
        relay.wait_for("finishing what is in hand")
        while relay.process.poll() is None:
            relay.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
    assert relay.result()[0] == 128 + signal.SIGTERM
    assert waiting(outbox) == 1


def test_a_signal_ends_a_relay_that_drains_after_the_batch_in_hand(outbox: Site, client: PubSub) -> None:
    write(outbox, 3000)
    relay = outbox.start(*RELAY, "--drain", "--batch", "1")
    with client.subscribe("sync.#") as stream:
        stream.receive(DEADLINE).ack()
    code, said = relay.end()
    assert code == 0, said
    published = int(said.split()[-1])
    assert 1 <= published < 3000
    assert waiting(outbox) == 3000 - published


@pytest.mark.parametrize("how", [[], ["--drain"]])
@pytest.mark.broker("rabbitmq")
def test_a_refused_password_ends_a_relay_by_exit_code_3(how: list[str], rabbit: Rabbit) -> None:
    migrate(rabbit.site)
    write(rabbit.site, 1)
    code, said = rabbit.site.run(*RELAY, *how, PUBSUB_URL=rabbit.url_with("wrong-9fe1"))
    assert code == 3, said
    assert "wrong-9fe1" not in said
    assert waiting(rabbit.site) == 1


def test_a_relay_that_cannot_drain_ends_by_exit_code_1(outbox: Site) -> None:
    write(outbox, 1)
    code, said = outbox.run(*RELAY, "--drain", PUBSUB_URL="amqp://127.0.0.1:1", PUBSUB_PUBLISH_TIMEOUT="0.3")
    assert code == 1, said
    assert "127.0.0.1:1" in said
    assert waiting(outbox) == 1


@pytest.mark.broker("rabbitmq")
def test_a_relay_s_health_tells_when_the_broker_is_away_and_back(rabbit: Rabbit) -> None:
    migrate(rabbit.site)
    rabbit.client.declare("sync.#", subscription="sync")
    rabbit.proxy.refuse()
    port = free_port()
    relay = rabbit.site.start(*RELAY, "--health", str(port))
    until(lambda: health(port)[0] == 200, "200 while there is nothing to publish")
    for turn in (1, 2):
        write(rabbit.site, 10)
        until(lambda: health(port)[0] == 503, "503 while the broker is away")
        assert "broker" in health(port)[1]["trouble"]
        rabbit.proxy.restore()
        until(lambda: health(port)[0] == 200, "200 when it is back")
        facts = {"healthy": True, "trouble": None, "published": 10 * turn, "set_aside": 0}
        until(lambda: health(port)[1] == facts, "all published")  # noqa: B023 - called in this turn
        rabbit.proxy.refuse()
    assert relay.end()[0] == 0
    with rabbit.client.subscribe("sync.#", subscription="sync") as stream:
        for _ in range(20):
            stream.receive(DEADLINE).ack()


@pytest.mark.broker("rabbitmq")
def test_a_relay_is_healthy_again_when_its_rows_are_gone_and_the_broker_is_back(rabbit: Rabbit) -> None:
    migrate(rabbit.site)
    write(rabbit.site, 1)
    rabbit.proxy.refuse()
    port = free_port()
    relay = rabbit.site.start(*RELAY, "--health", str(port))
    until(lambda: health(port)[0] == 503, "503 while the broker is away")
    rows("DELETE FROM pubsub_outbox", rabbit.site)  # published by another relay, or discarded in the admin
    held = "SELECT COUNT(*) FROM pubsub_outbox_shard WHERE owner <> ''"
    until(lambda: rows(held, rabbit.site) == [(0,)], "the relay has nothing in hand")
    assert health(port)[0] == 503
    rabbit.proxy.restore()
    until(lambda: health(port)[0] == 200, "200 when the broker is back")
    assert health(port)[1]["published"] == 0
    assert relay.end()[0] == 0


def test_a_relay_is_healthy_again_when_its_database_is_back(outbox: Site) -> None:
    port = free_port()
    relay = outbox.start(*RELAY, "--health", str(port))
    until(lambda: health(port)[0] == 200, "200 while there is nothing to publish")
    rows("ALTER TABLE pubsub_outbox RENAME TO hidden", outbox)
    until(lambda: health(port)[0] == 503, "503 while the table is away")
    assert "database" in health(port)[1]["trouble"]
    rows("ALTER TABLE hidden RENAME TO pubsub_outbox", outbox)
    until(lambda: health(port)[0] == 200, "200 when it is back")
    assert relay.end()[0] == 0


def rows(sql: str, site: Site) -> list[tuple[int, ...]]:
    """Run a statement on the database of the Django project."""
    with contextlib.closing(sqlite3.connect(site.folder / "app.sqlite3", timeout=30)) as file, file:
        return list(file.execute(sql))


def test_keep_keeps_what_was_sent_until_it_is_old_enough(outbox: Site) -> None:
    write(outbox, 2500)
    rows(f"UPDATE pubsub_outbox SET state = {SENT}, due = {time.time() - 3700}", outbox)
    write(outbox, 5)
    relay = outbox.start(*RELAY, "--keep", "3600")
    count = "SELECT state, COUNT(*) FROM pubsub_outbox GROUP BY state"
    until(lambda: rows(count, outbox) == [(SENT, 5)], "what is old is deleted, what was just sent is there")
    assert relay.end()[0] == 0
    write(outbox, 2)
    assert outbox.run(*RELAY, "--drain", "-v0") == (0, "published 2\n")
    assert rows(count, outbox) == [(SENT, 5)]  # without --keep it is deleted as it is settled


def test_pruning_by_command_deletes_no_more_at_once_than_it_is_told(outbox: Site) -> None:
    write(outbox, 25)
    rows(f"UPDATE pubsub_outbox SET state = {SENT}, due = 0", outbox)
    script = (
        "from django.core.management import call_command\n"
        "from django.db import connection\n"
        "from django.test.utils import CaptureQueriesContext\n"
        "with CaptureQueriesContext(connection) as queries:\n"
        "    call_command('pubsub_prune', '--batch', '10')\n"
        "print(sum(query['sql'].startswith('DELETE') for query in queries))"
    )
    code, said = outbox.run("django", "shell", "-v0", "-c", script)
    assert (code, said) == (0, "deleted 0 marks and 25 sent rows\n3\n")


# -- members in a web server -----------------------------------------------------------------------


def test_members_in_a_server_s_workers_finish_what_is_in_hand_and_lose_nothing(
    site: Site, client: PubSub
) -> None:
    port = free_port()
    client.declare("sync.#", subscription="sync")
    server = site.start("uvicorn", "served:app", "--workers", "2", "--port", str(port))
    until(lambda: health(port, "/health")[0] == 200, "a worker that receives")
    assert health(port, "/health")[1] == {"healthy": True, "state": "connected", "members": {"sync": True}}
    client.publish_many([Message("sync.x", "slow") for _ in range(300)])
    site.wait_for_note("begin slow", 2)  # one in each worker, as each handles one at a time
    server.process.send_signal(signal.SIGTERM)
    for _ in range(2):
        server.wait_for("Waiting for application shutdown")
    assert "end slow" not in site.notes
    site.go()
    code, said = server.result()
    assert code == 0, said
    assert "Traceback" not in said
    ended = site.notes.count("end slow")
    assert ended == site.notes.count("begin slow") >= 2
    assert client.backlog("sync").waiting == 300 - ended
