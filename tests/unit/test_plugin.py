"""The pytest plugin, as its users see it: each case is a test file of theirs, run by pytest itself."""

from __future__ import annotations

import contextlib
import shlex
import sqlite3
import sys

import pytest

from pubsub_facade import Settings
from pubsub_facade.testing.hub import Published, TestHub
from pubsub_facade.testing.override import override

pytest_plugins = ["pytester"]

CALM = ("-p", "no:cacheprovider", "-p", "no:django")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROKERS", raising=False)


def run(pytester: pytest.Pytester, text: str, *options: str, mode: str = "auto") -> pytest.RunResult:
    pytester.makeini(
        f"[pytest]\nasyncio_mode={mode}\nasyncio_default_fixture_loop_scope=function\nfilterwarnings=\n"
        "    error\n"
        "    ignore:Binding .* is a named parameter:DeprecationWarning\n"  # Python 3.12.0 to 3.12.3, see pyproject
    )
    pytester.makepyfile(text)
    return pytester.runpytest_inprocess(*CALM, *options)


def test_a_test_publishes_and_asserts_on_what_was_sent(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest

        def test_one(pubsub, published):
            pubsub.publish("social.post.created", {"author": 42, "text": "hello"}, key="42")
            pubsub.publish("social.post.deleted", {"author": 42})
            message = published.one("social.post.created", author=42)
            assert message.payload["text"] == "hello" and message.key == "42"
            assert published.topics == ["social.post.created", "social.post.deleted"]
            assert len(published.on("social.#")) == 2
            with pytest.raises(AssertionError, match="0 messages .* with .*43"):
                published.one(author=43)

        def test_the_next_starts_clean(pubsub, published):
            assert len(published) == 0 and not pubsub.subscribers.registrations
        """,
    )
    result.assert_outcomes(passed=2)


def test_time_is_moved_for_retries_delays_and_ordered_keys(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest
        from pubsub_facade import Retry

        @pytest.mark.parametrize("ordered", [False, True])
        def test_retry(pubsub, pubsub_hub, ordered):
            seen = []

            @pubsub.subscriber("a", subscription="s", ordered=ordered)
            def handle(payload: int, delivery) -> None:
                seen.append((payload, delivery.attempt))
                if delivery.attempt < 3 and payload == 1:
                    raise Retry(3600)

            pubsub.start()
            pubsub.publish("a", 1, key="k")
            pubsub.publish("a", 2, key="k")
            pubsub_hub.drain()
            assert seen == ([(1, 1)] if ordered else [(1, 1), (2, 1)])
            pubsub_hub.advance(3600)
            pubsub_hub.drain()
            pubsub_hub.advance(3600)
            pubsub_hub.drain()
            assert seen[-1] == ((2, 1) if ordered else (1, 3))

        def test_delay(pubsub, pubsub_hub, published):
            seen = []
            pubsub.subscriber("a", subscription="s")(seen.append)
            pubsub.start()
            pubsub.publish("a", "later", delay=86400)
            pubsub_hub.drain()
            assert seen == []
            pubsub_hub.advance(86400)
            pubsub_hub.drain()
            assert seen == ["later"]
        """,
    )
    result.assert_outcomes(passed=3)


ASYNC = """
    import pytest
    {mark}
    class TestIt:
        async def test_stream(self, async_pubsub, pubsub_hub, published):
            async with async_pubsub.subscribe("a.*", subscription="s") as stream:
                await async_pubsub.publish("a.b", {{"x": 1}})
                delivery = await stream.receive(5)
                assert delivery.payload == {{"x": 1}}
                await delivery.ack()
            await pubsub_hub.adrain()
            assert published.one(x=1).topic == "a.b"

        async def test_members_are_closed(self, async_pubsub):
            @async_pubsub.subscriber("a", subscription="s")
            async def handle(payload) -> None: ...
            await async_pubsub.start()
            await async_pubsub.publish("a", 1)
"""


def test_async_tests_run_under_pytest_asyncio_in_both_modes(pytester: pytest.Pytester) -> None:
    run(pytester, ASYNC.format(mark="")).assert_outcomes(passed=2)
    run(pytester, ASYNC.format(mark="@pytest.mark.asyncio"), mode="strict").assert_outcomes(passed=2)


ASYNC_BY_ANYIO = (
    ASYNC.format(mark="@pytest.mark.anyio")
    + """
    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""
)


def test_async_tests_run_under_anyio(pytester: pytest.Pytester) -> None:
    run(
        pytester, ASYNC_BY_ANYIO, "-p", "no:asyncio", "-W", "ignore::pytest.PytestConfigWarning"
    ).assert_outcomes(passed=2)


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_async_tests_run_under_anyio_with_pytest_asyncio_there_too(
    pytester: pytest.Pytester, mode: str
) -> None:
    result = run(pytester, ASYNC_BY_ANYIO, mode=mode)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"*asyncio: mode=*{mode.upper()}*"])


LEAVES = """
    import pytest
    from pubsub_facade import Retry

    @pytest.mark.parametrize("n", range(2))
    def test_it(pubsub, pubsub_hub, published, n):
        assert len(published) == 0
        assert pubsub.backlog("kept").waiting == 0
        seen = []

        @pubsub.subscriber("a", subscription="s")
        def handle(payload: int, delivery) -> None:
            seen.append((payload, delivery.attempt))
            raise Retry(3600)

        pubsub.start()
        pubsub_hub.advance(7200)
        pubsub_hub.drain()
        assert seen == []
        with pubsub.subscribe("b", subscription="kept"):
            pass
        pubsub.publish("b", "nobody takes it")
        pubsub.publish("b", "later", delay=3600)
        pubsub.publish("a", n)
        pubsub_hub.drain()
        assert seen == [(n, 1)]
        assert pubsub.backlog("kept").waiting == 1
"""


def test_what_one_test_leaves_behind_the_next_does_not_see(pytester: pytest.Pytester) -> None:
    run(pytester, LEAVES).assert_outcomes(passed=2)


def test_it_runs_on_several_processes(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest

        @pytest.mark.parametrize("n", range(6))
        def test_it(pubsub, published, n):
            pubsub.publish("a", n)
            assert [message.payload for message in published] == [n]
        """,
        "-n",
        "2",
    )
    result.assert_outcomes(passed=6)


def test_clients_made_by_the_code_under_test_meet_on_the_hub(pytester: pytest.Pytester) -> None:
    pytester.makefile(".toml", pubsub='backend = "rabbitmq"\nnamespace = "production"\n')
    result = run(
        pytester,
        """
        from pubsub_facade import PubSub

        def test_it(published):
            with PubSub() as client:
                client.publish("a", 1)
            assert published.one("a").payload == 1
        """,
    )
    result.assert_outcomes(passed=1)


DJANGO_SETTINGS = """
    from pathlib import Path

    SECRET_KEY = "only-for-tests"
    INSTALLED_APPS = {apps}
    DATABASES = {{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}}}
    USE_TZ = True
    BASE_DIR = Path(__file__).parent
    PUBSUB = {pubsub}
"""

DJANGO_TESTS = """
    import pytest
    from pubsub_facade.contrib.django import client, publish

    before = []

    def test_a_client_is_made_without_a_fixture():
        before.append(client())

    @pytest.mark.parametrize("n", range(3))
    def test_it(published, n):
        assert client() is not before[0]
        publish("a", n)
        assert [message.payload for message in published] == [n]

    def test_the_client_of_the_fixture_meets_it(pubsub, published):
        with pubsub.subscribe("a", subscription="s") as stream:
            publish("a", "here")
            delivery = stream.receive(5)
            assert delivery.payload == "here"
            delivery.ack()

    def test_the_client_from_before_is_back():
        assert client() is before[0]
"""


def run_with_django(
    pytester: pytest.Pytester,
    text: str,
    setting: str = "None",
    *,
    apps: str = '["pubsub_facade.contrib.django"]',
    options: tuple[str, ...] = (),
) -> pytest.RunResult:
    """With pytest-django, in a process of its own: Django is set up but once in one."""
    pytester.makepyfile(site_settings=DJANGO_SETTINGS.format(apps=apps, pubsub=setting), test_site=text)
    ini = "" if "no:django" in options else "DJANGO_SETTINGS_MODULE=site_settings\n"
    pytester.makeini(
        f"[pytest]\npythonpath=.\nfilterwarnings=error\nasyncio_default_fixture_loop_scope=function\n{ini}"
    )
    return pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "--strict-config", *options, "test_site.py"
    )


# Nobody answers on port 1: what reaches the setting's broker fails after the time given here.
@pytest.mark.parametrize(
    "setting", ["None", '{"url": "amqp://127.0.0.1:1", "publish_timeout": 1}'], ids=["unset", "a broker"]
)
def test_each_django_test_sees_its_own_messages(pytester: pytest.Pytester, setting: str) -> None:
    run_with_django(pytester, DJANGO_TESTS, setting).assert_outcomes(passed=6)


def test_every_alias_of_a_django_test_is_on_its_hub(pytester: pytest.Pytester) -> None:
    text = """
        from pubsub_facade.contrib.django import client, publish

        def test_it(published):
            for alias in ("default", "audit"):
                with client(alias).subscribe("#", subscription="s") as stream:
                    publish("a", alias, alias=alias)
                    delivery = stream.receive(5)
                    assert delivery.payload == alias
                    delivery.ack()
            assert [message.payload for message in published] == ["default", "audit"]
            assert client("default").settings.namespace != client("audit").settings.namespace
    """
    run_with_django(
        pytester, text, '{"default": "amqp://127.0.0.1:1", "audit": "kafka://127.0.0.1:1"}'
    ).assert_outcomes(passed=1)


def test_a_django_test_with_a_marker_is_on_that_broker_and_leaves_no_subscription(
    pytester: pytest.Pytester,
) -> None:
    folder = pytester.mkdir(".brokers")
    file = folder / "test.db"
    (folder / "pubsub.sqlite.toml").write_text(f'backend = "sqlite"\n[sqlite]\npath = "{file}"\n')
    text = """
        import pytest
        from pubsub_facade.contrib.django import client

        @pytest.mark.broker("sqlite")
        def test_it(pubsub):
            with client().subscribe("a", subscription="s") as stream:
                pubsub.publish("a", 1)
                delivery = stream.receive(5)
                assert delivery.payload == 1
                delivery.ack()
    """
    run_with_django(pytester, text, '"amqp://127.0.0.1:1"').assert_outcomes(passed=1)
    with contextlib.closing(sqlite3.connect(file)) as there:
        assert there.execute("SELECT COUNT(*) FROM messages").fetchone() == (1,)
        assert there.execute("SELECT name FROM subscriptions").fetchall() == []


def test_a_django_client_that_a_test_imports_is_gone_after_it(pytester: pytest.Pytester) -> None:
    text = """
        import sys

        def test_it(published):
            assert "pubsub_facade.contrib.django.clients" not in sys.modules
            import os
            os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
            from pubsub_facade.contrib.django import publish
            publish("a", 1)
            assert published.one("a").payload == 1

        def test_without_a_fixture():
            from pubsub_facade.contrib.django.clients import _clients
            assert _clients == {}
    """
    run_with_django(pytester, text, apps="[]", options=("-p", "no:django")).assert_outcomes(passed=2)


def test_it_imports_no_django(pytester: pytest.Pytester) -> None:
    text = """
        import sys

        def test_it(pubsub, published):
            assert "django" not in sys.modules
    """
    run_with_django(pytester, text, options=("-p", "no:django")).assert_outcomes(passed=1)


def test_a_required_broker_that_is_absent_fails_and_one_left_out_by_name_is_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        import pytest

        @pytest.mark.broker("rabbitmq")
        def test_it(pubsub):
            pubsub.ping()
    """
    result = run(pytester, text)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*needs the broker 'rabbitmq'*pubsub.rabbitmq.toml*"])
    monkeypatch.setenv("BROKERS", "kafka")
    result = run(pytester, text, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*rabbitmq is left out by BROKERS=kafka*"])


def test_a_marked_test_gets_the_broker_of_the_folder(pytester: pytest.Pytester) -> None:
    folder = pytester.mkdir(".brokers")
    (folder / "pubsub.sqlite.toml").write_text(f'backend = "sqlite"\n[sqlite]\npath = "{folder}/test.db"\n')
    result = run(
        pytester,
        """
        import pytest

        @pytest.mark.broker("sqlite")
        def test_it(pubsub, broker):
            assert broker.backend == "sqlite" and broker.namespace.startswith("test-")
            with pubsub.subscribe("a", subscription="s") as stream:
                pubsub.publish("a", 1)
                delivery = stream.receive(5)
                assert delivery.payload == 1
                delivery.ack()
        """,
    )
    result.assert_outcomes(passed=1)


USES_THE_BROKER = """
    import pytest

    @pytest.mark.broker("sqlite")
    @pytest.mark.parametrize("_", range(2))
    def test_it(pubsub, broker, _):
        assert broker.backend == "sqlite"
        pubsub.ping()
"""


def test_a_hook_starts_the_broker_once_and_tells_its_url(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        from pathlib import Path

        def pytest_pubsub_broker(name, config):
            with Path(config.rootpath, "started").open("a") as file:
                print(name, file=file)
            return f"sqlite:///{config.rootpath}/hook.db"
        """
    )
    run(pytester, USES_THE_BROKER).assert_outcomes(passed=2)
    assert (pytester.path / "started").read_text() == "sqlite\n"


def test_a_command_starts_the_broker_once(pytester: pytest.Pytester) -> None:
    start = pytester.makepyfile(
        start="""
        import pathlib, sys
        folder = pathlib.Path(".brokers")
        folder.mkdir()
        (folder / f"pubsub.{sys.argv[1]}.toml").write_text(f'backend = "sqlite"\\n[sqlite]\\npath = "start.db"\\n')
        """
    )
    option = f"pubsub_brokers_start={shlex.quote(sys.executable)} {start.name} {{broker}}"
    run(pytester, USES_THE_BROKER, "-o", option).assert_outcomes(passed=2)


def test_a_broker_that_does_not_start_fails_its_tests_with_what_the_command_said(
    pytester: pytest.Pytester,
) -> None:
    option = f"pubsub_brokers_start={shlex.quote(sys.executable)} no-such-script.py {{broker}}"
    result = run(pytester, USES_THE_BROKER, "-o", option)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*'sqlite' could not be started*ended with 2*", "*no-such-script.py*"])


def test_a_client_that_exists_is_pointed_at_the_hub_and_back(pubsub_hub: TestHub) -> None:
    from pubsub_facade import PubSub

    client = PubSub(Settings.load(url="memory://elsewhere", namespace="mine"))
    seen: list[str] = []
    client.subscriber("a", subscription="s")(seen.append)
    with override(client, pubsub_hub.settings()):
        client.start()
        client.publish("a", "here")
        pubsub_hub.drain()
        assert Published(pubsub_hub).topics == ["a"]
        assert client.settings.namespace == "pubsub"
    assert seen == ["here"]
    assert client.settings.namespace == "mine"
    client.publish("a", "there")
    client.close()
    assert Published(pubsub_hub).topics == ["a"]


def test_a_hub_that_stays_busy_says_who_is(pubsub_hub: TestHub) -> None:
    import threading

    from pubsub_facade import PubSub

    go = threading.Event()
    client = PubSub(pubsub_hub.settings())

    @client.subscriber("a", subscription="slow")
    def wait(payload: str) -> None:
        go.wait(10)

    client.start()
    client.publish("a", "x")
    with pytest.raises(TimeoutError, match="slow: 0 wait, 1 in hand"):
        pubsub_hub.drain(0.2)
    go.set()
    pubsub_hub.drain()
    client.close()
