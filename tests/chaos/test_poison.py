"""Messages that kill or fail whoever touches them stop nobody else (contract 8)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from benchmarks.memory import resident
from brokers.broker import ROOT
from pubsub_facade import AsyncPubSub, Backoff, Delivery, Message, Settings
from pubsub_facade.consumer import WINDOW
from tests.chaos.poison import DEADLY, MAX_ATTEMPTS, SUBSCRIPTION
from tests.chaos.world import FORMS
from tests.conftest import broker_settings

GROWTH = 20.0  # MiB: half of what the failing messages are together

FORM_PARAMETERS = [
    form if form == "sqlite" else pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS
]


def config_for(form: str, folder: Path) -> Path:
    """A config file with a namespace of its own."""
    namespace = f"poison-{uuid.uuid4().hex[:8]}"
    path = folder / "pubsub.toml"
    if form == "sqlite":
        text = f'backend = "sqlite"\n[sqlite]\npath = "{folder / "poison.db"}"\n'
    else:
        broker_settings(form)
        text = (ROOT / ".brokers" / f"pubsub.{form}.toml").read_text()
    path.write_text(f'namespace = "{namespace}"\n{text}')
    return path


def start_member(config: Path, handled: Path, log: Path) -> subprocess.Popen[bytes]:
    """A member that notes in ``handled`` what it handled, until it dies or is told to end."""
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.poison", str(config), str(handled)], cwd=ROOT, stderr=errors
        )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("form", FORM_PARAMETERS)
async def test_a_payload_that_kills_the_process_is_a_dead_letter_after_max_attempts(
    form: str, tmp_path: Path
) -> None:
    config, handled = config_for(form, tmp_path), tmp_path / "handled"
    handled.touch()
    wanted = {f"m{number}" for number in range(100)}
    async with AsyncPubSub(Settings.load(config)) as pubsub:
        if not pubsub.capabilities.stored_attempts:
            pytest.skip("capability stored_attempts is false")
        await pubsub.declare("poison.#", subscription=SUBSCRIPTION)
        texts = [*sorted(wanted)[:50], DEADLY, *sorted(wanted)[50:]]
        await pubsub.publish_many([Message("poison.text", text) for text in texts])
        deaths = 0
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            member = start_member(config, handled, tmp_path / "log")
            try:
                while member.poll() is None and time.monotonic() < deadline:
                    await asyncio.sleep(0.1)
                    if await pubsub.dead_letters(SUBSCRIPTION).count() and wanted <= set(
                        handled.read_text().split()
                    ):
                        break
                else:
                    deaths += 1
                    continue
                break
            finally:
                member.terminate()
                member.wait(30)
        letters = [letter async for letter in pubsub.dead_letters(SUBSCRIPTION)]
        log = (tmp_path / "log").read_text()[-3000:]
        assert wanted <= set(handled.read_text().split()), f"after {deaths} deaths: {log}"
        assert [letter.payload for letter in letters] == [DEADLY], f"after {deaths} deaths: {log}"
        assert letters[0].failure is not None
        assert letters[0].failure.attempts == MAX_ATTEMPTS
        assert deaths >= MAX_ATTEMPTS
        await pubsub.delete(SUBSCRIPTION)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", FORM_PARAMETERS)
async def test_messages_that_always_fail_do_not_hold_up_the_others(form: str, tmp_path: Path) -> None:
    async with AsyncPubSub(Settings.load(config_for(form, tmp_path))) as pubsub:
        good = 0
        done = asyncio.Event()

        @pubsub.subscriber(
            "poison.#", subscription="overload", max_attempts=20, backoff=Backoff(initial=5, maximum=5)
        )
        async def handle(text: str) -> None:
            nonlocal good
            if text == "bad":
                raise ValueError("always")
            good += 1
            if good == 500:
                done.set()

        await pubsub.start()
        await pubsub.publish_many([Message("poison.a", "bad") for _ in range(500)])
        await pubsub.publish_many([Message("poison.a", "good") for _ in range(500)])
        async with asyncio.timeout(60):
            await done.wait()
        await pubsub.close()
    async with AsyncPubSub(Settings.load(tmp_path / "pubsub.toml")) as pubsub:
        await pubsub.delete("overload")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("form", FORM_PARAMETERS)
async def test_messages_that_always_fail_fill_no_memory(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "pubsub_facade")  # pytest keeps each line
    count, tenth = 6_000, 600
    sizes: dict[int, float] = {}
    failed = 0
    all_failed, good = asyncio.Event(), asyncio.Event()
    async with AsyncPubSub(Settings.load(config_for(form, tmp_path))) as pubsub:

        @pubsub.subscriber(
            "poison.#", subscription="overload", max_attempts=20, backoff=Backoff(initial=600, maximum=600)
        )
        async def handle(text: str) -> None:
            nonlocal failed
            if text == "good":
                good.set()
                return
            failed += 1
            if failed % tenth == 0:
                sizes[failed] = resident()
            if failed == count:
                all_failed.set()
            raise ValueError("always")

        await pubsub.start()
        for _ in range(count // tenth):
            await pubsub.publish_many([Message("poison.a", "x" * 8000) for _ in range(tenth)])
        async with asyncio.timeout(150):
            await all_failed.wait()
            await pubsub.publish("poison.a", "good")
            await good.wait()
        assert max(sizes.values()) - sizes[tenth] < GROWTH, sizes
        await pubsub.close()
    async with AsyncPubSub(Settings.load(tmp_path / "pubsub.toml")) as pubsub:
        await pubsub.delete("overload")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", FORM_PARAMETERS)
async def test_a_slow_member_does_not_starve_the_others(form: str, tmp_path: Path) -> None:
    """It keeps back what it has in hand, on Kafka what is in its partitions, and no more."""
    settings = Settings.load(config_for(form, tmp_path))
    count = 3000
    published = {f"m{number}" for number in range(count)}
    held: set[str] = set()
    handled: set[str] = set()
    go_on = asyncio.Event()
    async with AsyncPubSub(settings) as slow, AsyncPubSub(settings) as fast:
        if not slow.capabilities.competing:
            pytest.skip("capability competing is false: one member is active, the others stand by")

        @slow.subscriber("poison.#", subscription="overload")
        async def hold(text: str, delivery: Delivery) -> None:
            held.add(delivery.id)
            await go_on.wait()

        @fast.subscriber("poison.#", subscription="overload")
        async def handle(text: str, delivery: Delivery) -> None:
            handled.add(delivery.id)

        await slow.start()
        await fast.start()
        for number in itertools.count():  # until both have work: a group of Kafka's takes its time to share
            if held and handled:
                break
            await fast.publish("poison.probe", "probe", key=f"k{number}", id=f"p{number}")
            await asyncio.sleep(0.05)
        await fast.publish_many(
            [Message("poison.a", "text", key=f"k{number}", id=f"m{number}") for number in range(count)]
        )
        others = {
            "kafka": count // 3 - 200,  # the keys of one partition in three, about
            "artemis": count - 4 * WINDOW,  # its window is in bytes, and these are small
        }.get(form, count - WINDOW)
        async with asyncio.timeout(20):
            while len(handled & published) < others:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.02)
        assert held
        go_on.set()
        async with asyncio.timeout(30):
            while published - handled - held:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await slow.close()
        await fast.delete("overload")
