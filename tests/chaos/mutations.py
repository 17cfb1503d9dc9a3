"""Break what keeps messages safe and see the chaos tests turn red, one by one: ``python -m tests.chaos.mutations``.

Each break is a text replaced in a copy of the checkout, with brokers of its own; ``-k WORD`` picks some. A break
that goes unnoticed, or whose text is no longer there, is an error. The injuries are those it cannot survive.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from brokers.broker import ROOT, STATE

CHAOS: Final = "tests/chaos/test_chaos.py"
KILLS: Final = "tests/chaos/test_kills.py"
RECOVERY: Final = "tests/chaos/test_recovery.py"


@dataclass(frozen=True)
class Break:
    """One thing that no longer holds.

    Arguments:
        what: is wrong now.
        file: in the package.
        old, new: the text and what stands there instead.
        tests: the file that must turn red.
        form: backend form of the test; "" where the file has one only.
        injuries: that are drawn from, by their names.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    form: str = ""
    injuries: str = ""


BREAKS: Final = (
    Break(
        "a message is acked before its handler",
        "workers.py",
        "            payload: Any = None\n            if handler.decode",
        "            payload: Any = None\n            delivery.receiver.ack(delivery)\n            if handler.decode",
        CHAOS,
        "sqlite",
        "ended_while_handling member_killed",
    ),
    Break(
        "publish returns before its messages are confirmed",
        "publisher.py",
        "        publication = _Publication(messages, deadline, done)\n",
        "        publication = _Publication(messages, deadline, lambda error: None)\n        done(None)\n",
        KILLS,
    ),
    Break(
        "a lease is never returned",
        "backends/_sqlite_upkeep.py",
        "        if self._pipes.alive(token) is False:\n            return True\n",
        "        return False\n",
        KILLS,
    ),
    Break(
        "originals are acked before the dead letter or the retry is confirmed, on RabbitMQ",
        "backends/_rabbitmq_receiver.py",
        "        outcome = await self._copies.write([copy for _, copy in copies])\n",
        "        for delivery, _ in copies:\n            self._settle(delivery)\n"
        "        self._flush_all()\n        await asyncio.sleep(0.002)\n"
        "        outcome = await self._copies.write([copy for _, copy in copies])\n",
        CHAOS,
        "rabbitmq",
        "ended_while_burying ended_while_parking ended_while_copied",
    ),
    Break(
        "a retry's copy is lost on Kafka when the member ends",
        "backends/_kafka_receiver.py",
        "            await self._shelf.store(zip(copies, dues, strict=True))\n",
        "            self._spawn(self._shelf.store(list(zip(copies, dues, strict=True))[1:]))\n",
        CHAOS,
        "kafka",
        "ended_while_parking ended_while_copied",
    ),
    Break(
        "originals are acked before the copy is stored on ActiveMQ",
        "backends/_activemq_receiver.py",
        "        await store(self._links[0], chosen)\n",
        "        for delivery in deliveries:\n            self.ack(delivery)\n        await self.flush()\n"
        "        await asyncio.sleep(0.002)\n        await store(self._links[0], chosen)\n",
        CHAOS,
        "activemq",
        "ended_while_burying ended_while_parking ended_while_copied",
    ),
    Break(
        "what was unconfirmed when the link was lost is called sent",
        "publisher.py",
        "            batch.error = error\n            self._returned.append(batch)\n",
        "            self._settle(batch, None)\n",
        CHAOS,
        "rabbitmq",
        "broker_killed cut_every_connection refuse_connections_for_a_second stalled_link",
    ),
    Break(
        "nothing is sent again after a reconnect",
        "publisher.py",
        "                self._line.appendleft(entry)\n",
        "                pass\n",
        RECOVERY,
        "rabbitmq",
    ),
    Break(
        "the low-water mark skips what is open",
        "acks.py",
        "        if line[0] != tag:\n            self._done[tag] = None\n            return True\n"
        "        line.popleft()\n        mark",
        "        while line[0] != tag:\n            line.popleft()\n        line.popleft()\n        mark",
        CHAOS,
        "rabbitmq",
        "ended_while_handling member_killed",
    ),
    Break(
        "offsets are committed on revoke before handlers are done",
        "backends/_kafka_receiver.py",
        "        await self._until_idle(share * self._shared.rebalance_timeout)\n",
        "        for partition in self._partitions.values():\n            for offset in list(partition.open):\n"
        "                partition.settle(offset)\n",
        CHAOS,
        "kafka",
        "members_come_and_go member_told_to_end member_killed",
    ),
    Break(
        "a queue that is deleted stops its members without a word",
        "backends/_rabbitmq_receiver.py",
        '        self.fail(ConnectionLost(f"rabbitmq: a queue of subscription {self._label!r} was deleted"))\n',
        "        pass\n",
        CHAOS,
        "rabbitmq",
        "something_deleted_under_its_members",
    ),
)


def run(each: Break) -> str | None:
    """None where the break was noticed, else what is wrong."""
    with tempfile.TemporaryDirectory(prefix="break-") as directory:
        copy = Path(directory)
        for name in ("pubsub_facade", "tests", "brokers"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / STATE.name).mkdir()
        (copy / STATE.name / "lib").symlink_to(STATE / "lib")
        broken = copy / "pubsub_facade" / each.file
        text = broken.read_text()
        if each.old not in text:
            return "its text is not there any more"
        broken.write_text(text.replace(each.old, each.new, 1))
        return _wrong(each, copy)


def _wrong(each: Break, copy: Path) -> str | None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", "-rf", each.tests]
        + (["-k", f"[{each.form}]"] if each.form else []),
        cwd=copy,
        env={**os.environ, "INJURIES": each.injuries, "PATIENCE": "15", "SEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = (result.stdout + result.stderr).strip()
    if result.returncode == 1 and "AssertionError" in said:
        return None
    if result.returncode == 0:
        return f"nobody noticed: {said.splitlines()[-1]}"
    return f"pytest ended with {result.returncode}: {said[-600:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only what holds this text")
    arguments = parser.parse_args()
    chosen = [each for each in BREAKS if arguments.k in each.what]
    unnoticed = 0
    for each in chosen:
        wrong = run(each)
        unnoticed += wrong is not None
        print(f"{f'NOT NOTICED ({wrong})' if wrong else 'noticed'}: {each.what}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks noticed")
    return 1 if unnoticed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
