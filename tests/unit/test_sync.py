"""`PubSub` for sync code: threads, signals of misuse, and the end of the interpreter."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pubsub_facade import (
    AsyncPubSub,
    Closed,
    ConnectionLost,
    Delivery,
    Message,
    PubSub,
    PubSubError,
    Subscribers,
)
from pubsub_facade.backends.memory import Hub
from pubsub_facade.testing.conformance import DEADLINE


@pytest.fixture
def name() -> Iterator[str]:
    name = f"sync-{uuid.uuid4().hex}"
    yield name
    Hub.drop(name)


@pytest.fixture
def pubsub(name: str) -> Iterator[PubSub]:
    with PubSub(url=f"memory://{name}", reconnect_min=0.01, reconnect_max=0.05) as client:
        yield client


def test_every_verb_of_the_async_client_is_there_with_the_same_parameters() -> None:
    import inspect

    def verbs(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(kind).items()
            if inspect.isfunction(member) and not name.startswith("_")
        }

    sync, other = verbs(PubSub), verbs(AsyncPubSub)
    for inner in ("publisher", "serve", "timeout"):  # what the sync client itself stands on
        del other[inner]
    assert other == sync


def test_a_call_from_its_own_loop_is_refused_and_not_a_deadlock(pubsub: PubSub) -> None:
    errors: list[BaseException] = []
    done = threading.Event()

    @pubsub.subscriber("a", subscription="s", max_attempts=1)
    async def handle(payload: int) -> None:
        for call in (lambda: pubsub.publish("b", 1), lambda: pubsub.backlog("s"), pubsub.ping):
            try:
                call()
            except PubSubError as error:
                errors.append(error)
        done.set()

    pubsub.start()
    pubsub.publish("a", 1)
    assert done.wait(DEADLINE)
    assert len(errors) == 3
    assert all("AsyncPubSub" in str(error) for error in errors)


def test_a_sync_handler_may_publish_and_settle_by_hand(pubsub: PubSub) -> None:
    done = threading.Event()
    seen: list[tuple[object, int]] = []

    @pubsub.subscriber("a", subscription="s")
    def handle(payload: int, delivery: Delivery) -> None:
        seen.append((payload, delivery.attempt))
        if delivery.attempt == 1:
            delivery.retry(0)  # type: ignore[unused-coroutine]
            return
        pubsub.publish("b", payload + 1)

    @pubsub.subscriber("b", subscription="t")
    def finish(payload: int, delivery: Delivery) -> None:
        seen.append((payload, delivery.attempt))
        delivery.reject("enough")  # type: ignore[unused-coroutine]  # a sync handler's delivery settles without await
        done.set()

    pubsub.start()
    pubsub.publish("a", 1)
    assert done.wait(DEADLINE)
    assert seen == [(1, 1), (1, 2), (2, 1)]
    assert [letter.payload for letter in pubsub.dead_letters("t")] == [2]


def test_a_lost_link_is_made_good_under_sync_callers(pubsub: PubSub, name: str) -> None:
    pubsub.declare("a", subscription="s")
    for _ in range(3):
        Hub.named(name).fail("send", ConnectionLost("cut"))
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda n: pubsub.publish("a", n).id, range(40)))
    assert len(ids) == 40
    assert pubsub.backlog("s").waiting == 40


def test_close_wakes_those_who_wait(pubsub: PubSub) -> None:
    started = threading.Event()
    result: list[BaseException] = []

    def wait() -> None:
        with pubsub.subscribe("a", subscription="s") as stream:
            started.set()
            try:
                stream.receive(DEADLINE)
            except Closed as error:
                result.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert started.wait(DEADLINE)
    pubsub.close()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert len(result) == 1


def test_a_stream_is_iterated_until_it_is_closed(pubsub: PubSub) -> None:
    got: list[int] = []
    with pubsub.subscribe("a", subscription="s") as stream:
        pubsub.publish_many(Message("a", n) for n in range(200))
        for delivery in stream:
            got.append(delivery.payload)
            delivery.ack()
            if len(got) == 200:
                stream.close()
    assert sorted(got) == list(range(200))
    assert pubsub.backlog("s").waiting == 0


def test_what_was_fetched_and_not_seen_goes_back(pubsub: PubSub) -> None:
    with pubsub.subscribe("a", subscription="s") as stream:
        pubsub.publish_many(Message("a", n) for n in range(10))
        stream.receive(DEADLINE).ack()
    backlog = pubsub.backlog("s")
    assert (backlog.waiting, backlog.in_flight) == (9, 0)


def test_handlers_collected_elsewhere_are_served(pubsub: PubSub) -> None:
    module, done = Subscribers(), threading.Event()

    @module.subscriber("a", subscription="s")
    def handle(payload: int) -> None:
        done.set()

    pubsub.include(module)
    pubsub.start()
    pubsub.publish("a", 1)
    assert done.wait(DEADLINE)


async def test_the_sync_client_works_beside_a_running_loop(name: str) -> None:
    """Called in a thread of an async program; its own loop is another one."""
    with PubSub(url=f"memory://{name}") as pubsub:
        async with AsyncPubSub(url=f"memory://{name}") as other, other.subscribe("a") as stream:
            sent = await asyncio.to_thread(pubsub.publish, "a", 1)
            delivery = await stream.receive(DEADLINE)
            assert delivery.id == sent.id
            await delivery.ack()


PROGRAM = """
    import sys, threading
    from pathlib import Path
    from pubsub_facade import PubSub
    pubsub = PubSub(url="sqlite:///" + sys.argv[1])
"""


def program(text: str, database: Path, *, wait: bool = True) -> subprocess.Popen[str]:
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(text)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(database)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if wait:
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()
    return process


def test_an_interpreter_that_ends_without_close_ends_in_time(tmp_path: Path) -> None:
    process = program(
        """
        @pubsub.subscriber("a", subscription="s")
        def handle(payload: int) -> None: ...
        pubsub.start()
        pubsub.publish("a", 1)
        """,
        tmp_path / "p.db",
    )
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, "", "")


def test_a_preloaded_client_works_in_each_forked_child(tmp_path: Path) -> None:
    """As gunicorn does with --preload: the parent has published, its children do, with handlers too."""
    process = program(
        """
        import os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        pubsub.declare("a", subscription="s")
        pubsub.publish("a", "parent")
        children = []
        for number in range(3):
            pid = os.fork()
            if pid == 0:
                with_threads = [threading.Thread(target=pubsub.publish, args=("a", [number, n])) for n in range(4)]
                for thread in with_threads:
                    thread.start()
                for thread in with_threads:
                    thread.join()
                pubsub.close()
                os._exit(0)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        pubsub.publish("a", "parent after")
        print(codes, pubsub.backlog("s").waiting)
        """,
        tmp_path / "p.db",
    )
    out, err = process.communicate()
    assert (out.strip(), err) == ("[0, 0, 0] 14", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_handles_until_a_signal_and_finishes_what_is_in_hand(tmp_path: Path, number: int) -> None:
    process = program(
        """
        import time
        @pubsub.subscriber("a", subscription="s")
        def handle(payload: int) -> None:
            print("begun", flush=True)
            time.sleep(0.5)
            print("finished", flush=True)
        pubsub.declare("a", subscription="s")
        pubsub.publish("a", 1)
        pubsub.run()
        print("waiting", pubsub.state, flush=True)
        """,
        tmp_path / "p.db",
        wait=False,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out, err) == (0, "finished\nwaiting closed\n", "")


def test_a_second_signal_ends_at_once_with_nothing_acked_that_was_not_handled(tmp_path: Path) -> None:
    process = program(
        """
        import time
        @pubsub.subscriber("a", subscription="s")
        def handle(payload: int) -> None:
            print("begun", flush=True)
            time.sleep(600)
        pubsub.declare("a", subscription="s")
        pubsub.publish("a", 1)
        pubsub.run()
        """,
        tmp_path / "p.db",
        wait=False,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        while process.poll() is None and time.monotonic() - began < DEADLINE:
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.05)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    with (
        PubSub(url=f"sqlite:///{tmp_path / 'p.db'}") as pubsub,
        pubsub.subscribe("a", subscription="s") as stream,
    ):
        assert stream.receive(DEADLINE).payload == 1
