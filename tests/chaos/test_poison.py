"""Messages that kill or fail whoever touches them stop nobody else (contract 8)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from brokers.broker import ROOT
from pubsub_facade import AsyncPubSub, Backoff, Message, Settings
from tests.chaos.poison import DEADLY, MAX_ATTEMPTS, SUBSCRIPTION
from tests.chaos.world import FORMS
from tests.conftest import broker_settings

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
