"""Services of the frameworks, ended as service managers end them: signals, exit codes, health, concurrency."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pubsub_facade import PubSub

from .services import DEADLINE, SUBSCRIBERS, Site

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
