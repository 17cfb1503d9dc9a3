"""The embedded backend: what only a file shared by several processes can go through."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from pubsub_facade import AsyncPubSub, Delivery, Message, PubSub, Settings
from pubsub_facade.backends import _sqlite_upkeep
from pubsub_facade.backends._sqlite_schema import APPLICATION_ID, VERSION
from pubsub_facade.backends._sqlite_store import Store
from pubsub_facade.backends._sqlite_wakeup import Pipes
from pubsub_facade.backends._sqlite_writer import Writer
from pubsub_facade.backends.sqlite import SqliteReceiver
from pubsub_facade.errors import ConfigError, PublishTimeout, PubSubError, SendFailed
from pubsub_facade.subscription import Backoff

SPAWN = multiprocessing.get_context("spawn")
DEADLINE = 60.0
SOON = Backoff(0.01, 0.05)


def settings_for(path: Path, **section: Any) -> Settings:
    return Settings.load(backend="sqlite", sqlite={"path": path, **section})


@asynccontextmanager
async def client(path: Path, **section: Any) -> AsyncIterator[AsyncPubSub]:
    pubsub = AsyncPubSub(settings_for(path, **section))
    try:
        yield pubsub
    finally:
        await pubsub.close(1)


@contextmanager
def shell(path: Path) -> Iterator[sqlite3.Connection]:
    """The file as the sqlite3 shell sees it."""
    with closing(sqlite3.connect(path, timeout=DEADLINE, isolation_level=None)) as connection:
        yield connection


def content(path: Path) -> bytes:
    return path.read_bytes()


def size(path: Path) -> int:
    return path.stat().st_size


def damage(path: Path) -> None:
    """Overwrite the beginning of each page but the first."""
    damaged = bytearray(path.read_bytes())
    for page in range(1, len(damaged) // 4096):
        damaged[page * 4096 : page * 4096 + 200] = random.Random(page).randbytes(200)
    path.write_bytes(damaged)


async def until(reached: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end, f"waited {DEADLINE} s until {what}"
        await asyncio.sleep(0.02)


async def take(pubsub: AsyncPubSub, count: int, subscription: str = "analytics") -> list[Delivery]:
    """That many deliveries, each acked."""
    async with pubsub.subscribe("social.#", subscription=subscription) as stream:
        taken = []
        for _ in range(count):
            delivery = await stream.receive(DEADLINE)
            await delivery.ack()
            taken.append(delivery)
        return taken


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pubsub.db"


# -- several processes --------------------------------------------------------------------------------


def publish_some(path: Path, first: int, count: int) -> None:
    async def run() -> None:
        async with client(path) as pubsub:
            for start in range(first, first + count, 50):
                await pubsub.publish_many(Message("social.post", n) for n in range(start, start + 50))

    asyncio.run(run())


def consume_some(path: Path, report: Connection) -> None:
    async def run() -> None:
        async with client(path) as pubsub:

            @pubsub.subscriber("social.#", subscription="analytics")
            async def count(payload: int) -> None:
                report.send(payload)

            await pubsub.start()
            report.send("ready")
            await asyncio.sleep(DEADLINE)

    asyncio.run(run())


@contextmanager
def spawned(target: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    process = SPAWN.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


async def test_processes_publish_into_one_file_and_share_what_is_in_it(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
    ours, theirs = SPAWN.Pipe(duplex=False)
    with (
        spawned(consume_some, path, theirs),
        spawned(consume_some, path, theirs),
        spawned(publish_some, path, 0, 500),
        spawned(publish_some, path, 500, 500),
    ):
        seen: Counter[Any] = Counter()
        end = time.monotonic() + DEADLINE
        while sum(seen.values()) < 1002:
            assert await asyncio.to_thread(ours.poll, end - time.monotonic()), f"seen {sum(seen.values())}"
            seen[ours.recv()] += 1
    assert seen.pop("ready") == 2
    assert seen == Counter(range(1000))


def claim_and_wait(path: Path, report: Connection) -> None:
    async def run() -> None:
        async with (
            client(path, lease=600) as pubsub,
            pubsub.subscribe("social.#", subscription="analytics") as stream,
            pubsub.subscribe("social.#"),
        ):
            held = [(await stream.receive()).payload for _ in range(10)]
            report.send(held)
            await asyncio.sleep(DEADLINE)

    asyncio.run(run())


async def test_what_a_killed_process_had_claimed_comes_again_at_once_as_the_next_attempt(path: Path) -> None:
    async with client(path, lease=600) as pubsub:  # the lease is not what frees it
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish_many(Message("social.post", n) for n in range(10))
        ours, theirs = SPAWN.Pipe(duplex=False)
        with spawned(claim_and_wait, path, theirs) as process:
            assert await asyncio.to_thread(ours.poll, DEADLINE)
            assert sorted(ours.recv()) == list(range(10))
            assert (await pubsub.backlog("analytics")).in_flight == 10
            process.kill()
            again = await asyncio.wait_for(take(pubsub, 10), 20)
        assert sorted(delivery.payload for delivery in again) == list(range(10))
        assert {delivery.attempt for delivery in again} == {2}
        assert all(delivery.redelivered for delivery in again)
        with shell(path) as sql:
            left = "SELECT count(*) FROM subscriptions WHERE name IS NULL"
            await until(lambda: sql.execute(left).fetchone() == (0,), "its ephemeral subscription has gone")


def die_of_poison(path: Path, max_attempts: int) -> None:
    async def run() -> None:
        async with client(path) as pubsub:

            @pubsub.subscriber("social.#", subscription="analytics", max_attempts=max_attempts)
            async def handle(payload: int) -> None:
                if payload == 7:
                    os._exit(9)

            await pubsub.start()
            await until_empty(pubsub)

    asyncio.run(run())


async def until_empty(pubsub: AsyncPubSub) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        backlog = await pubsub.backlog("analytics")
        if not backlog.waiting and not backlog.in_flight:
            return
        assert time.monotonic() < end, backlog
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("max_attempts", [1, 3])
async def test_a_message_that_kills_its_process_is_buried_and_its_neighbours_are_not(
    path: Path, max_attempts: int
) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish_many(Message("social.post", n) for n in range(60))
    deaths = 0
    while True:
        with spawned(die_of_poison, path, max_attempts) as process:
            await asyncio.to_thread(process.join, DEADLINE)
        if process.exitcode != 9:
            break
        deaths += 1
        assert deaths <= max(2, max_attempts), "the poison was handed out again and again"
    assert process.exitcode == 0
    async with client(path) as pubsub:
        letters = [letter async for letter in pubsub.dead_letters("analytics")]
    assert [letter.payload for letter in letters] == [7]
    assert letters[0].failure is not None
    assert letters[0].failure.attempts == max_attempts


async def test_what_was_claimed_and_not_handled_is_given_back_on_close_as_the_same_attempt(
    path: Path,
) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish_many(Message("social.post", n) for n in range(5))
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await stream.receive(DEADLINE)
        again = await take(pubsub, 5)
    assert [delivery.attempt for delivery in again] == [1] * 5


async def test_another_process_is_woken_and_does_not_look_for_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite_upkeep, "LOOK", 600)
    async with (
        client(path) as publisher,
        client(path) as member,
        member.subscribe("social.#", subscription="analytics") as stream,
    ):
        for n in range(20):
            await publisher.publish("social.post", n)
            assert (await stream.receive(DEADLINE / 2)).payload == n


async def test_without_named_pipes_members_look_for_themselves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no named pipes here")

    monkeypatch.setattr(os, "mkfifo", refuse)
    async with (
        client(path) as publisher,
        client(path) as member,
        member.subscribe("social.#", subscription="analytics") as stream,
    ):
        await publisher.publish("social.post", "seen")
        assert (await stream.receive(DEADLINE)).payload == "seen"


async def test_a_process_taken_for_dead_joins_again_and_its_late_ack_settles_nothing(path: Path) -> None:
    async with client(path) as pubsub, client(path) as other:
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish("social.post", "once more")
            late = await stream.receive(DEADLINE)
            with shell(path) as sql:
                sql.execute("BEGIN IMMEDIATE")
                row = sql.execute(
                    "SELECT p.id, p.token, p.seen FROM members m JOIN processes p ON p.id = m.process"
                ).fetchone()
                store = Store(sql, "pubsub")
                store.look()
                _sqlite_upkeep.Upkeep(pubsub.settings.sqlite, Pipes(path))._reap(store, *row)
                sql.execute("COMMIT")
            again = await stream.receive(DEADLINE)
            assert (again.payload, again.attempt) == ("once more", 2)
            await late.ack()
            assert (await other.backlog("analytics")).in_flight == 1
            await again.ack()
        assert (await other.backlog("analytics")).in_flight == 0


def test_children_forked_in_the_middle_of_publishing_go_on_with_links_of_their_own(path: Path) -> None:
    pubsub = PubSub(settings_for(path))
    ended = threading.Event()
    published = 0

    def publish() -> None:
        nonlocal published
        while not ended.is_set():
            pubsub.publish("social.post", published, timeout=DEADLINE)
            published += 1

    thread = threading.Thread(target=publish)
    try:
        pubsub.declare("social.#", subscription="analytics")
        thread.start()
        for n in range(10):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    pubsub.publish("social.post", 100 + n, timeout=10)
                    pubsub.close(1)
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ended.set()
        thread.join()
        assert published > 10
        assert pubsub.backlog("analytics").waiting == published + 10
    finally:
        ended.set()
        pubsub.close()
    assert not path.with_name("pubsub.db-members").exists(), "a process is still entered"


def test_nothing_a_forked_child_publishes_is_lost_when_its_parent_closes_the_file_first(path: Path) -> None:
    pubsub = PubSub(settings_for(path))
    pubsub.declare("social.#", subscription="analytics")
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pubsub.publish("social.post", 1, timeout=10)
            theirs.send("published")
            theirs.recv()
            pubsub.publish("social.post", 2, timeout=10)
            status = 0
        finally:
            os._exit(status)
    try:
        assert ours.poll(DEADLINE)
        pubsub.close()
    finally:
        ours.send("go on")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0
    again = PubSub(settings_for(path))
    try:
        assert again.backlog("analytics").waiting == 2
    finally:
        again.close()


async def test_a_client_given_up_while_it_connects_leaves_nobody_behind(path: Path) -> None:
    async with client(path, lease=600) as other:
        await other.ping()
        with shell(path) as sql:
            sql.execute("BEGIN IMMEDIATE")
            hasty = AsyncPubSub(settings_for(path))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(hasty.ping(), 0.2)
            await hasty.close(0)
            sql.execute("ROLLBACK")
            await until(
                lambda: (
                    [w._sqlite.path for w in _writers() if w.thread.is_alive()].count(path) == 1
                    and sql.execute("SELECT count(*) FROM processes").fetchone() == (1,)
                ),
                "only the other is there",
            )


async def test_a_late_ack_from_before_a_seek_settles_nothing_after_it(path: Path) -> None:
    async with client(path) as pubsub, pubsub.subscribe("social.#", subscription="analytics") as stream:
        await pubsub.publish("social.post", "twice")
        late = await stream.receive(DEADLINE)
        await pubsub.seek("analytics", "beginning")
        again = await stream.receive(DEADLINE)
        await late.ack()
        backlog = await pubsub.backlog("analytics")
        assert backlog.in_flight == 1
        await again.ack()
        assert (await pubsub.backlog("analytics")).in_flight == 0


# -- the file -----------------------------------------------------------------------------------------


async def refusal(path: Path, **section: Any) -> str:
    """How the file is refused: at once, by publishing as well as by receiving."""
    began = time.monotonic()
    async with client(path, **section) as pubsub:
        with pytest.raises(ConfigError) as published:
            await pubsub.publish("social.post", 1)
        with pytest.raises(ConfigError):
            async with pubsub.subscribe("social.#", subscription="analytics"):
                pass
    assert time.monotonic() - began < 10
    assert str(path) in str(published.value)
    return str(published.value)


async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    with open(path, "w") as file:  # noqa: ASYNC230
        file.write("Dear diary, " * 1000)
    assert "is not a SQLite database" in await refusal(path)
    assert content(path) == b"Dear diary, " * 1000


async def test_another_program_s_database_is_refused_and_left_alone(path: Path) -> None:
    with shell(path) as sql:
        sql.execute("CREATE TABLE accounts (name TEXT)")
    before = content(path)
    assert "another program's database" in await refusal(path)
    assert content(path) == before


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.ping()
    with shell(path) as sql:
        sql.execute(f"PRAGMA user_version = {VERSION + 1}")
    text = await refusal(path)
    assert f"schema version {VERSION + 1}" in text
    assert "upgrade the package" in text


async def test_the_file_says_whose_it_is_and_which_version(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.ping()
    with shell(path) as sql:
        assert sql.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert sql.execute("PRAGMA user_version").fetchone() == (VERSION,)
        assert sql.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_a_damaged_file_is_refused(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish_many(Message("social.post", "x" * 500) for _ in range(200))
    damage(path)
    async with client(path) as pubsub:
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"is damaged: .* restore a backup"):
            await pubsub.publish("social.post", 1)
        assert time.monotonic() - began < 10, "it was tried again and again"


async def test_a_file_damaged_in_use_ends_publishing_and_receiving_with_a_clear_error(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await pubsub.publish_many(Message("social.post", "x" * 500) for _ in range(200))
            with shell(path) as sql:
                sql.execute("UPDATE processes SET pid = pid + 1")  # what others have cached is void
                sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            damage(path)
            with pytest.raises(PubSubError, match="is damaged"):
                await pubsub.publish("social.post", 1)
            with pytest.raises(ConfigError, match="is damaged"):
                while True:
                    await stream.receive(DEADLINE)


@pytest.mark.parametrize("place", ["missing/pubsub.db", "."])
async def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, place: str) -> None:
    text = await refusal(tmp_path / place)
    assert "there is no directory" in text or "is a directory" in text


async def test_a_read_only_place_is_refused() -> None:
    text = await refusal(Path("/proc/pubsub.db"))
    assert "read-only" in text or "cannot be opened for writing" in text


async def test_a_file_removed_in_use_is_noticed_before_a_message_is_lost_in_it(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        for file in path.parent.glob("pubsub.db*"):
            if file.is_file():
                file.unlink()
        await pubsub.publish("social.post", "into the new file")
        await pubsub.declare("social.#", subscription="analytics")
        with shell(path) as sql:
            assert sql.execute("SELECT CAST(body AS TEXT) FROM messages").fetchall() == [
                ("into the new file",)
            ]


async def test_a_relative_path_means_the_same_file_after_the_directory_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    async with client(Path("pubsub.db")) as pubsub:
        with caplog.at_level(logging.INFO, "pubsub_facade"):
            await pubsub.declare("social.#", subscription="analytics")
        monkeypatch.chdir(tmp_path / "elsewhere")
        await pubsub.publish("social.post", 1)
    assert f"sqlite: connected to {tmp_path}/pubsub.db" in [each.getMessage() for each in caplog.records]
    assert not (tmp_path / "elsewhere" / "pubsub.db").exists()
    with shell(tmp_path / "pubsub.db") as sql:
        assert sql.execute("SELECT count(*) FROM messages").fetchone() == (1,)


# -- room ---------------------------------------------------------------------------------------------


async def test_a_full_file_refuses_clearly_loses_nothing_and_works_again_after_there_is_room(
    path: Path,
) -> None:
    async with client(path, max_size=1 << 20) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        stored: list[str] = []
        refused: SendFailed | None = None
        for _ in range(100):
            batch = [Message("social.post", os.urandom(8000)) for _ in range(5)]
            try:
                stored += [message.id for message in await pubsub.publish_many(batch)]
            except SendFailed as error:
                refused = error
                break
        assert refused is not None
        assert set(refused.fates.values()) == {"not stored"}
        assert "sqlite.max_size" in str(refused)
        assert size(path) <= 1 << 20
        assert len(stored) > 50
        taken = await take(pubsub, len(stored))
        assert [delivery.id for delivery in taken] == stored
        await pubsub.publish("social.post", os.urandom(8000))
        assert len(await take(pubsub, 1)) == 1


async def test_history_gives_way_to_new_messages_when_the_file_is_full(path: Path) -> None:
    async with client(path, max_size=1 << 20, retention=3600) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        for _ in range(20):  # 3 MB, settled, all of it within its retention
            await pubsub.publish_many(Message("social.post", os.urandom(15000)) for _ in range(10))
            await take(pubsub, 10)
    assert size(path) <= 1 << 20


async def test_the_file_does_not_grow_with_what_has_been_settled(path: Path) -> None:
    sizes = []
    async with client(path, retention=0) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        for _ in range(6):
            await pubsub.publish_many(Message("social.post", "x" * 1000) for _ in range(500))
            await take(pubsub, 500)
            with shell(path) as sql:
                count = "SELECT count(*) FROM messages"
                await until(lambda: sql.execute(count).fetchone() == (0,), "settled messages are deleted")  # noqa: B023
                sizes.append(sql.execute("PRAGMA page_count").fetchone()[0])
    assert sizes[-1] <= sizes[1] * 1.2, sizes


async def test_what_waits_outlives_the_retention(path: Path) -> None:
    async with client(path, retention=0, history=0) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.declare("social.#", subscription="audit")
        await pubsub.publish_many(Message("social.post", n) for n in range(2000))
        await take(pubsub, 2000, "audit")
        with shell(path) as sql:
            horizon = "SELECT value FROM state WHERE name = 'horizon'"
            await until(lambda: sql.execute(horizon).fetchone()[0] > 2000, "the retention is over")
            assert [delivery.payload for delivery in await take(pubsub, 2000)] == list(range(2000))
            count = "SELECT count(*) FROM messages"
            await until(lambda: sql.execute(count).fetchone() == (0,), "settled messages are deleted")


async def test_a_deleted_subscription_s_backlog_is_cleared_away(path: Path) -> None:
    async with client(path, retention=0) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        for _ in range(8):
            await pubsub.publish_many(Message("social.post", n) for n in range(500))
        with shell(path) as sql:
            horizon = "SELECT value FROM state WHERE name = 'horizon'"
            await until(lambda: sql.execute(horizon).fetchone()[0] > 4000, "the retention is over")
        await pubsub.delete("analytics")
        left = "SELECT (SELECT count(*) FROM deliveries) + (SELECT count(*) FROM messages)"
        with shell(path) as sql:
            await until(lambda: sql.execute(left).fetchone() == (0,), "nothing is left of it")


async def test_large_bodies_are_handed_out_a_few_at_a_time_and_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims: list[int] = []
    original = Store.claim

    def spy(store: Store, *arguments: Any, **options: Any) -> Any:
        claimed = original(store, *arguments, **options)
        if claimed.claim is not None:
            claims.append(len(claimed.claim.bodies))
        return claimed

    monkeypatch.setattr(Store, "claim", spy)
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        bodies = [random.Random(n).randbytes(3 << 20) for n in range(5)]
        for body in bodies:
            await pubsub.publish("social.post", body)
        assert [delivery.body for delivery in await take(pubsub, 5)] == bodies
    assert max(claims) <= 8 << 20


# -- other users of the file --------------------------------------------------------------------------


async def test_a_publish_waits_while_another_program_has_the_file_locked(path: Path) -> None:
    states: list[str] = []
    async with client(path) as pubsub:
        pubsub.on_state(states.append)
        await pubsub.declare("social.#", subscription="analytics")
        with shell(path) as sql:
            sql.execute("BEGIN IMMEDIATE")
            publishing = asyncio.create_task(pubsub.publish("social.post", "patient"))
            done, _ = await asyncio.wait([publishing], timeout=0.3)
            assert not done
            sql.execute("ROLLBACK")
        await asyncio.wait_for(publishing, DEADLINE)
        assert (await take(pubsub, 1))[0].payload == "patient"
        assert states == ["connecting", "connected"]


async def test_a_publish_ends_by_its_timeout_and_a_close_by_its_own_while_the_file_stays_locked(
    path: Path,
) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        with shell(path) as sql:
            sql.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            with pytest.raises(PublishTimeout):
                await pubsub.publish("social.post", "hurried", timeout=0.3)
            await pubsub.close(0.1)
            assert time.monotonic() - began < 20
            sql.execute("ROLLBACK")


async def test_the_sqlite3_shell_reads_what_waits_and_what_failed(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish(
            "social.post", {"author": 42}, key="42", headers={"lang": "en", "n": 1.5, "b": True}
        )
        await pubsub.publish("social.post", "dead")
        with shell(path) as sql:
            assert sql.execute("SELECT namespace, name, unsettled, dead FROM backlog").fetchall() == [
                ("pubsub", "analytics", 2, 0)
            ]
            topic, key, headers, body = sql.execute(
                "SELECT topic, key, headers, CAST(body AS TEXT) FROM messages WHERE key IS NOT NULL"
            ).fetchone()
            assert (topic, key, json.loads(body)) == ("social.post", "42", {"author": 42})
            assert json.loads(headers) == {"lang": "en", "n": 1.5, "b": True}
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            await (await stream.receive(DEADLINE)).ack()
            await (await stream.receive(DEADLINE)).reject("spoiled")
        with shell(path) as sql:
            (failure,) = sql.execute("SELECT failure FROM dead").fetchone()
            assert json.loads(failure)["error"] == "spoiled"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("headers", "not json"),
        ("headers", "[1, 2]"),
        ("headers", '{"a": [1], "b": null, "c": "kept"}'),
        ("headers", b"\xff\xfe"),
        ("id", b"\xff"),
        ("key", 17),
        ("content_type", "no/such; type"),
        ("topic", "not a . topic"),
        ("body", "text"),
        ("body", 3.5),
    ],
)
async def test_odd_rows_in_the_inbox_are_delivered_and_hold_up_nothing(
    path: Path, column: str, value: Any
) -> None:
    row: dict[str, Any] = {"topic": "social.post", "body": b"foreign", column: value}
    async with client(path) as pubsub, pubsub.subscribe("#", subscription="analytics") as stream:
        with shell(path) as sql:
            sql.execute(
                f"INSERT INTO inbox ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()]
            )
        foreign = await stream.receive(DEADLINE)
        expected = row["body"] if isinstance(row["body"], bytes) else str(row["body"]).encode()
        assert foreign.body == expected
        assert foreign.id
        if column == "headers" and "kept" in str(value):
            assert foreign.headers == {"c": "kept"}
        await foreign.ack()
        await pubsub.publish("social.post", "ours")
        assert (await stream.receive(DEADLINE)).payload == "ours"


# -- batches ------------------------------------------------------------------------------------------


async def test_publishes_that_wait_together_share_a_commit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        commits = 0
        original = Store.commit

        def spy(store: Store) -> None:
            nonlocal commits
            commits += 1
            original(store)

        monkeypatch.setattr(Store, "commit", spy)
        await asyncio.gather(*(pubsub.publish("social.post", n) for n in range(200)))
        assert commits < 20
        commits = 0
        await take(pubsub, 200)
        assert commits < 60


async def test_one_batch_is_a_few_steps_of_sql_whatever_its_size(path: Path) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        for name in ("notifications", "audit"):
            await pubsub.declare("social.#", subscription=name)
        statements: list[str] = []
        (writer,) = [w for w in _writers() if w._sqlite.path == path]
        await writer.call(
            lambda store: store.connection.set_trace_callback(statements.append), transaction=False
        )
        await pubsub.publish_many(Message("social.post", n) for n in range(500))
        mine = [s for s in statements if not s.lstrip().startswith(("SELECT (SELECT", "PRAGMA", "--"))]
        assert 0 < len(mine) < 12, mine


def _writers() -> list[Writer]:
    from pubsub_facade.backends._sqlite_writer import _writers

    return list(_writers)


async def test_an_ack_goes_through_beside_a_publish_that_finds_no_room(path: Path) -> None:
    async with client(path, max_size=1 << 20) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish("social.post", "small")
        async with pubsub.subscribe("social.#", subscription="analytics") as stream:
            small = await stream.receive(DEADLINE)
            results = await asyncio.gather(
                small.ack(), pubsub.publish("social.post", os.urandom(2 << 20)), return_exceptions=True
            )
            assert [type(result) for result in results] == [type(None), SendFailed]
        backlog = await pubsub.backlog("analytics")
        assert (backlog.waiting, backlog.in_flight) == (0, 0)


async def test_a_member_holds_no_more_than_its_window_and_is_given_more_when_it_settles_one(
    path: Path,
) -> None:
    async with client(path) as pubsub:
        await pubsub.declare("social.#", subscription="analytics")
        await pubsub.publish_many(Message("social.post", n) for n in range(30))
        async with pubsub.subscribe("social.#", subscription="analytics", window=10) as stream:
            held = [await stream.receive(DEADLINE) for _ in range(10)]
            with pytest.raises(TimeoutError):
                await stream.receive(0.2)
            assert (await pubsub.backlog("analytics")).in_flight == 10
            await held[0].ack()
            assert (await stream.receive(DEADLINE)).payload == 10
            (receiver,) = list(pubsub._supervisor.backend._receivers)  # type: ignore[attr-defined]
            assert isinstance(receiver, SqliteReceiver)
            assert len(receiver._out) == 10
