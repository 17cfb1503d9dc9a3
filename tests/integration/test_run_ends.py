"""``pubsub run`` ends on what waiting cannot mend, by a code and one line that says what to mend."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pika
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from brokers.broker import PASSWORD, USER
from pubsub_facade import AsyncPubSub, Settings
from pubsub_facade.cli.errors import MISUSE, REFUSED
from tests.integration.guarded import BARRED, BARRED_USER
from tests.integration.secured import Secured
from tests.integration.test_secrets import PUBSUB, toml

SPACE: Final = "ends"

APP: Final = """
from pubsub_facade import AsyncPubSub

pubsub = AsyncPubSub()


@pubsub.subscriber("b.#", subscription="audit", ordered=True)
async def handle(payload: object) -> None:
    return
"""


def run(folder: Path, settings: Mapping[str, Any], code: int) -> str:
    """The one line that ``pubsub run`` ends with; the code must be this one."""
    (folder / "app.py").write_text(APP)
    (folder / "pubsub.toml").write_text(toml(settings) + "\n")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
    ended = subprocess.run(
        [PUBSUB, "run", "app:pubsub"], cwd=folder, env=kept, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("pubsub: ")]
    assert line == ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    return line


def test_a_wrong_password_ends_it(secured: Secured, tmp_path: Path) -> None:
    line = run(tmp_path, secured.settings_of(USER, "wrong-password", SPACE), REFUSED)
    assert "127.0.0.1" in line
    assert "check username" in line
    assert "password" in line
    assert "wrong-password" not in line


def test_a_user_without_rights_ends_it(secured: Secured, tmp_path: Path) -> None:
    line = run(tmp_path, secured.settings_of(BARRED_USER, BARRED, SPACE), REFUSED)
    assert SPACE in line
    assert "grant" in line


# -- what is there under our names, and is something else --------------------------------------------

Conflict = Callable[[Secured], Awaitable[None]]


async def an_exchange_of_another_type(secured: Secured) -> None:
    await on_rabbitmq(secured, lambda channel: channel.exchange_declare(SPACE, "direct", durable=True))


async def a_queue_of_another_kind(secured: Secured) -> None:
    queue = f"{SPACE}.audit:dead"
    await on_rabbitmq(secured, lambda channel: channel.queue_declare(queue, durable=True))


async def on_rabbitmq(secured: Secured, act: Callable[[Any], object]) -> None:
    def once() -> None:
        login = pika.PlainCredentials(USER, PASSWORD)
        parameters = pika.ConnectionParameters("127.0.0.1", secured.plain_port, credentials=login)
        with pika.BlockingConnection(parameters) as connection:
            act(connection.channel())

    await asyncio.to_thread(once)


async def a_topic_whose_name_is_too_like_ours(secured: Secured) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=f"127.0.0.1:{secured.plain_port}")
    await admin.start()
    try:
        await admin.create_topics([NewTopic(f"{SPACE}___registry", 1, 1)])
    finally:
        await admin.close()


async def an_order_over_other_topics(secured: Secured) -> None:
    async with AsyncPubSub(Settings(**secured.settings_of(USER, PASSWORD, SPACE))) as pubsub:
        await pubsub.declare("a.#", subscription="audit", ordered=True)


CONFLICTS: Final[dict[str, dict[Conflict, tuple[str, ...]]]] = {
    "rabbitmq": {
        an_exchange_of_another_type: (f"exchange '{SPACE}'", "'direct'", "another namespace", "delete it"),
        a_queue_of_another_kind: (f"queue '{SPACE}.audit:dead'", "'audit'", "another name", "delete it"),
    },
    "kafka": {a_topic_whose_name_is_too_like_ours: (f"'{SPACE}...registry'", "another namespace")},
    "activemq": {an_order_over_other_topics: ("'audit'", "a.#", "b.#", "another name", "delete it")},
    "artemis": {an_order_over_other_topics: ("'audit'", "a.#", "b.#", "another name", "delete it")},
}


async def test_a_conflict_on_the_broker_ends_it(secured: Secured, tmp_path: Path) -> None:
    for conflict, words in CONFLICTS[secured.name].items():
        await conflict(secured)
        try:
            line = await asyncio.to_thread(run, tmp_path, secured.settings_of(USER, PASSWORD, SPACE), MISUSE)
        finally:
            if secured.name == "rabbitmq":
                await on_rabbitmq(secured, lambda channel: channel.exchange_delete(SPACE))
        assert [word for word in words if word not in line] == [], line
