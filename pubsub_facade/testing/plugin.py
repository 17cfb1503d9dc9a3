"""The pytest plugin: clients on the memory backend, or on a real broker by marker, clean for each test.

Loaded by every pytest run in an environment that has this package, so importing it costs nothing: all else is
imported when a fixture is first used. It changes no test that does not ask for one of its fixtures.
"""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pubsub_facade import AsyncPubSub, PubSub, Settings
    from pubsub_facade.testing.hub import Published, TestHub

FOLDER = "pubsub_brokers"
START = "pubsub_brokers_start"
LEFT_OUT = "BROKERS"
START_TIMEOUT = 600  # s for the command that starts a broker, images or packages included

_found = pytest.StashKey[dict[str, "tuple[str | None, str | None]"]]()  # name -> URL, why it did not start


class Hooks:
    """What a ``conftest.py`` can add."""

    @pytest.hookspec(firstresult=True)
    def pytest_pubsub_broker(self, name: str, config: pytest.Config) -> str | None:
        """The URL of the broker of ``@pytest.mark.broker(name)``, started if need be; asked once a session.

        None: not known here; its settings are in the folder of the ini option ``pubsub_brokers``.
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        FOLDER, "folder with a pubsub.NAME.toml for each real broker, from the root", default=".brokers"
    )
    parser.addini(
        START, "command that starts {broker} where it is not up; run once a session for each", default=""
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "broker(name): run on the real broker whose settings are in pubsub.NAME.toml of the ini option "
        f"{FOLDER!r}; fails where there is none, is skipped where the environment's {LEFT_OUT} leaves it out",
    )


@pytest.fixture
def pubsub_hub() -> Iterator[TestHub]:
    """The memory hub of this test: its clock (`advance`), its faults (`fail`), and when it is quiet (`drain`)."""
    from pubsub_facade.testing.hub import TestHub

    hub = TestHub(f"test-{uuid.uuid4().hex}")
    yield hub
    hub.forget()


@pytest.fixture
def pubsub_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of this test's broker: its own memory hub, or the one of ``@pytest.mark.broker("NAME")``.

    ``PUBSUB_URL`` names the hub too, for clients that the code under test makes itself. The clients of
    ``pubsub_facade.contrib.django`` are there, whatever the ``PUBSUB`` setting says, and are as before at the end.
    """
    settings: Settings
    if request.node.get_closest_marker("broker") is not None:
        settings = request.getfixturevalue("broker")
    else:
        hub: TestHub = request.getfixturevalue("pubsub_hub")
        for name in [name for name in os.environ if name.upper().startswith("PUBSUB_")]:
            monkeypatch.delenv(name)
        settings = hub.settings(backend="memory", namespace="test")
        monkeypatch.setenv("PUBSUB_URL", hub.url)
        monkeypatch.setenv("PUBSUB_NAMESPACE", "test")
    with _djangos_clients_on(settings):
        yield settings


@contextmanager
def _djangos_clients_on(settings: Settings) -> Iterator[None]:
    """Point the clients of `contrib.django` at ``settings`` and back, where this process has it."""
    module = "pubsub_facade.contrib.django.clients"
    clients: Any = sys.modules.get(module)
    if clients is None or not clients.django_settings.configured:
        yield
        if module in sys.modules:  # first imported, or Django first set up, by the test
            sys.modules[module].close_all()
        return
    from pubsub_facade.contrib.django.test import override

    with override(settings):
        there = clients._clients.values() if settings.backend != "memory" else ()
        declared = [(client, _declared(client._client)) for client in there]
        yield
        for client, names in declared:
            for name in names:
                client.delete(name)


@pytest.fixture
def pubsub(pubsub_settings: Settings) -> Iterator[PubSub]:
    """A `PubSub` of this test alone; closed at its end."""
    from pubsub_facade.sync import PubSub

    client = PubSub(pubsub_settings)
    names = _declared(client._client) if pubsub_settings.backend != "memory" else set()
    yield client
    for name in names:
        client.delete(name)
    client.close(5)


@pytest.fixture
def async_pubsub(pubsub_settings: Settings) -> AsyncPubSub:
    """An `AsyncPubSub` of this async test alone; closed when the test function returns.

    It meets the clients of the fixture ``pubsub`` on the same broker.
    """
    from pubsub_facade.client import AsyncPubSub

    client = AsyncPubSub(pubsub_settings)
    client._test_names = _declared(client) if pubsub_settings.backend != "memory" else set()  # type: ignore[attr-defined]
    return client


@pytest.fixture
def published(pubsub_settings: Settings, request: pytest.FixtureRequest) -> Published:
    """What was published on this test's hub: ``published.one("social.post.created", author=42)``."""
    from pubsub_facade.testing.hub import Published

    if pubsub_settings.backend != "memory":
        raise pytest.UsageError(
            "the fixture 'published' sees the memory hub only: subscribe, where the test runs on a real broker"
        )
    return Published(request.getfixturevalue("pubsub_hub"))


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Settings:
    """`Settings` of the real broker of ``@pytest.mark.broker("NAME")``, in a namespace of this test's own.

    Started, where the session has not yet, by the hook ``pytest_pubsub_broker`` or the ini option
    ``pubsub_brokers_start``.
    """
    from pubsub_facade.settings import Settings

    marker = request.node.get_closest_marker("broker")
    name = marker.args[0] if marker is not None and marker.args else getattr(request, "param", None)
    if not isinstance(name, str):
        raise pytest.UsageError("the fixture 'broker' needs a name: @pytest.mark.broker(\"rabbitmq\")")
    chosen = os.environ.get(LEFT_OUT)
    if chosen is not None and name.partition("-")[0] not in [part.strip() for part in chosen.split(",")]:
        pytest.skip(f"{name} is left out by {LEFT_OUT}={chosen}")
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    url = _started(request.config, name)
    if url is not None:
        return Settings.load(url=url, namespace=namespace)
    file = Path(request.config.rootpath, request.config.getini(FOLDER), f"pubsub.{name}.toml")
    if not file.is_file():
        pytest.fail(
            f"this test needs the broker {name!r}, and there is no {file}: start it, or leave it out by "
            f"{LEFT_OUT}=",
            pytrace=False,
        )
    return Settings.load(file, namespace=namespace)


def _started(config: pytest.Config, name: str) -> str | None:
    """Have the broker started, once a session; its URL where the hook tells it."""
    found = config.stash.setdefault(_found, {})
    if name not in found:
        url: str | None = config.hook.pytest_pubsub_broker(name=name, config=config)
        command = shlex.split(config.getini(START))
        problem = None
        if url is None and command:
            problem = _run([part.replace("{broker}", name.partition("-")[0]) for part in command], config)
        found[name] = url, problem
    url, problem = found[name]
    if problem is not None:
        pytest.fail(f"the broker {name!r} could not be started ({START}): {problem}", pytrace=False)
    return url


def _run(command: list[str], config: pytest.Config) -> str | None:
    """Run a command; what went wrong, or None."""
    try:
        done = subprocess.run(
            command,
            cwd=config.rootpath,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_TIMEOUT,
            check=False,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Close the async client in the test's own loop, whichever plugin runs that."""
    client: Any = getattr(item, "funcargs", {}).get("async_pubsub")
    if client is not None and isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _closing(item.obj, client)


def _closing(function: Any, client: AsyncPubSub) -> Any:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        finally:
            for name in getattr(client, "_test_names", ()):
                await client.delete(name)
            await client.close(5)

    return run


def _declared(client: AsyncPubSub) -> set[str]:
    """The names of subscriptions that ``client`` declares from now on."""
    names: set[str] = set()
    backend = client._supervisor.backend
    declare = backend.declare

    async def noting(subscription: Any) -> None:
        names.add(subscription.name)
        await declare(subscription)

    backend.declare = noting  # type: ignore[method-assign]
    return names
