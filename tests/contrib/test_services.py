"""Services of the frameworks, ended as service managers end them: signals, exit codes, health, concurrency."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pubsub_facade import PubSub
from pubsub_facade.testing.faults import free_port

from .services import DEADLINE, RELAY, SUBSCRIBERS, Site, health, until

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
    code, said = site.run("django", "migrate", "-v0")
    assert code == 0, said
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
