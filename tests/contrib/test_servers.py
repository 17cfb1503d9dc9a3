"""Web applications on real servers and real brokers: each 2xx answer has its event, whatever happens meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pubsub_facade import PubSub, Settings
from pubsub_facade.testing.faults import Proxy, wait_until

from .conftest import ROOT
from .servers import HERE, Server, environment, fire

REQUESTS = 2000
APPLICATIONS = {
    "flask": "flask_app:create_app()",
    "django": "project.wsgi:application",
    "django-async": "project.asgi:application",
    "fastapi": "fastapi_app:app",
}


class Desk:
    """One backend in a namespace of this test's own: the environment of servers, and a count of what arrived."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.folder = folder
        self.namespace = f"test-{uuid.uuid4().hex[:10]}"
        config = folder / "broker.toml"
        if backend == "sqlite":
            config.write_text(f'backend = "sqlite"\n[sqlite]\npath = "{folder / "pubsub.db"}"\n')
        else:
            there = ROOT / ".brokers" / f"pubsub.{backend}.toml"
            if not there.is_file():
                pytest.fail(f"this test needs the broker {backend!r}, and there is no {there}", pytrace=False)
            config.write_text(there.read_text())
        self.config = config
        self.pubsub = PubSub(Settings.load(config, namespace=self.namespace))
        self.pubsub.declare("social.#", subscription="count")

    def environment(self, **more: str) -> dict[str, str]:
        return environment(
            PUBSUB_CONFIG=str(self.config),
            PUBSUB_NAMESPACE=self.namespace,
            DJANGO_SETTINGS_MODULE="project.settings",
            DATABASE_URL=f"sqlite:///{self.folder / 'app.sqlite3'}",
            **more,
        )

    def arrived(self, ids: list[str], timeout: float = 40) -> int:
        """Wait until all these ids have arrived; how many messages there were in all."""
        missing, total = set(ids), 0
        deadline = time.monotonic() + timeout
        with self.pubsub.subscribe("social.#", subscription="count") as stream:
            while missing:
                try:
                    delivery = stream.receive(max(0.1, deadline - time.monotonic()))
                except TimeoutError:
                    raise AssertionError(f"{len(missing)} of {len(ids)} messages never arrived") from None
                missing.discard(delivery.id)
                total += 1
                delivery.ack()
        return total

    def close(self) -> None:
        self.pubsub.delete("count")
        self.pubsub.close()


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(request.param, tmp_path)
    yield desk
    desk.close()


BACKENDS = [
    backend if backend == "sqlite" else pytest.param(backend, marks=pytest.mark.broker(backend))
    for backend in ("sqlite", "rabbitmq", "kafka", "activemq")
]
SERVERS = [
    ("gunicorn-sync", "flask"),
    ("gunicorn-gthread", "django"),
    ("gunicorn-preload", "flask"),
    ("uvicorn", "django-async"),
    ("uvicorn", "fastapi"),
    ("runserver", ""),
]


@pytest.mark.parametrize("desk", BACKENDS, indirect=True)
@pytest.mark.parametrize(("server", "application"), SERVERS)
def test_each_2xx_answer_has_its_event(desk: Desk, server: str, application: str) -> None:
    path = {"runserver": "/post/", "django": "/post/", "django-async": "/apost/"}.get(
        application or server, "/post"
    )
    with Server(server, APPLICATIONS.get(application, ""), desk.environment(), desk.folder) as running:
        load = fire(running.url + path, REQUESTS)
        assert load.statuses == {200: REQUESTS}, running.log.read_text()[-3000:]
        links = running.connections_to(_port_of(desk.pubsub.settings))
    if desk.pubsub.settings.backend != "sqlite":
        assert 1 <= len(links) <= 2
        most = 3 if desk.pubsub.settings.backend == "kafka" else 1  # Kafka's client has links by purpose
        assert max(links.values()) <= most, links
    assert len(set(load.ids)) == REQUESTS
    assert desk.arrived(load.ids) == REQUESTS


def _port_of(settings: Settings) -> int:
    if settings.backend == "kafka":
        return int(settings.kafka.bootstrap_servers[0].rpartition(":")[2])
    if settings.backend == "rabbitmq":
        return settings.rabbitmq.address.hosts[0][1]
    return settings.activemq.address.hosts[0][1]


@pytest.mark.parametrize("desk", BACKENDS, indirect=True)
def test_a_plain_script_with_threads_publishes_all(desk: Desk) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "plain_script.py"), str(REQUESTS)],
        env=desk.environment(),
        cwd=desk.folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    ids = done.stdout.split()
    assert len(set(ids)) == REQUESTS
    assert desk.arrived(ids) == REQUESTS


@pytest.mark.parametrize(
    "desk", [pytest.param("rabbitmq", marks=pytest.mark.broker("rabbitmq"))], indirect=True
)
def test_a_graceful_reload_loses_nothing(desk: Desk) -> None:
    with Server("gunicorn-gthread", APPLICATIONS["flask"], desk.environment(), desk.folder) as running:
        timers = [threading.Timer(after, running.reload) for after in (0.5, 2.0)]
        for timer in timers:
            timer.start()
        load = fire(running.url + "/post", REQUESTS)
        for timer in timers:
            timer.join()
    assert set(load.statuses) <= {200, "ReadError", "RemoteProtocolError", "ConnectError", "WriteError"}
    assert load.statuses[200] >= REQUESTS * 0.95
    assert desk.arrived(load.ids) >= len(load.ids)


@pytest.mark.parametrize(
    "desk", [pytest.param("rabbitmq", marks=pytest.mark.broker("rabbitmq"))], indirect=True
)
def test_a_broker_that_is_down_gives_503_in_time_and_the_outbox_keeps_what_is_committed(
    desk: Desk, database_url: Callable[[str], str]
) -> None:
    target = desk.pubsub.settings.rabbitmq
    with Proxy("127.0.0.1", _port_of(desk.pubsub.settings)) as proxy:
        url = target.url.get_secret_value().replace(f":{_port_of(desk.pubsub.settings)}", f":{proxy.port}")
        setting = json.dumps({"backend": "rabbitmq", "rabbitmq": {"url": url}})
        variables = desk.environment(SOCIAL_PUBSUB=setting, POST_TIMEOUT="3")
        _manage(variables, "migrate", "--run-syncdb", "-v0")
        with Server("gunicorn-gthread", APPLICATIONS["django"], variables, desk.folder) as running:
            assert fire(running.url + "/post/", 20).statuses == {200: 20}
            proxy.refuse()
            refused = fire(running.url + "/post/", 16, at_once=8)  # no more than one worker has threads
            assert refused.statuses == {503: 16}
            assert refused.longest < 3 + 2  # the view's publish timeout, and a margin for a busy machine
            kept = fire(running.url + "/outbox/", 50, at_once=4)
            assert kept.statuses == {200: 50}
            relay = subprocess.Popen(
                [sys.executable, "-m", "django", "pubsub_relay"],
                env=variables,
                cwd=desk.folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                proxy.restore()
                assert desk.arrived(kept.ids) >= 50
                wait_until(
                    lambda: fire(running.url + "/post/", 4, at_once=1).statuses == {200: 4},
                    15,
                    "publishing again",
                )
            finally:
                relay.terminate()
                _, told = relay.communicate(timeout=20)
            assert relay.returncode == 0, told


@pytest.mark.parametrize(
    ("desk", "server", "application"),
    [
        pytest.param("rabbitmq", "gunicorn-gthread", "flask", marks=pytest.mark.broker("rabbitmq")),
        pytest.param("activemq", "uvicorn", "fastapi", marks=pytest.mark.broker("activemq")),
    ],
    indirect=["desk"],
)
@pytest.mark.parametrize("fault", [Proxy.refuse, Proxy.swallow], ids=["refuses", "says-nothing"])
def test_a_broker_that_goes_while_requests_come_costs_none_its_answer(
    desk: Desk, server: str, application: str, fault: Callable[[Proxy], None]
) -> None:
    port = _port_of(desk.pubsub.settings)
    with Proxy("127.0.0.1", port) as proxy:
        proxied = desk.folder / "proxied.toml"
        proxied.write_text(desk.config.read_text().replace(f":{port}", f":{proxy.port}"))
        variables = desk.environment(POST_TIMEOUT="3") | {"PUBSUB_CONFIG": str(proxied)}
        with Server(server, APPLICATIONS[application], variables, desk.folder) as running:
            assert fire(running.url + "/post", 20).statuses == {200: 20}
            faults = [threading.Timer(0.5, fault, [proxy]), threading.Timer(5.5, proxy.restore)]
            for timer in faults:
                timer.start()
            load = fire(running.url + "/post", REQUESTS, at_once=8)  # no more than one worker has threads
            for timer in faults:
                timer.join()
            assert set(load.statuses) == {200, 503}, load.statuses
            assert load.longest < 3 + 2  # the view's publish timeout, and a margin for a busy machine
            wait_until(
                lambda: fire(running.url + "/post", 4, at_once=1).statuses == {200: 4}, 15, "publishing again"
            )
    assert desk.arrived(load.ids) >= load.statuses[200]


def _manage(variables: dict[str, str], *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "django", *arguments],
        env=variables,
        check=True,
        capture_output=True,
        timeout=60,
    )
