"""Accounting: members are killed and cut off while they book, and messages come twice; the ledger's sum matches."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from pubsub_facade import Message, PubSub, Settings
from pubsub_facade.contrib.sqlalchemy import Inbox
from pubsub_facade.testing.faults import Proxy, wait_until

from .conftest import ROOT
from .servers import HERE, environment

PAYMENTS = 6000
SEED = 6


@pytest.mark.broker("rabbitmq")
@pytest.mark.timeout(200)
def test_each_payment_is_booked_exactly_once_under_kills_cuts_and_twins(
    tmp_path: Path, database_url: Callable[[str], str]
) -> None:
    url, suffix = database_url("postgresql"), uuid.uuid4().hex[:12]
    engine = sa.create_engine(url)
    metadata = sa.MetaData()
    Inbox(metadata, f"inbox_{suffix}")
    ledger = sa.Table(
        f"ledger_{suffix}",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("amount", sa.Integer, nullable=False),
    )
    metadata.create_all(engine)
    settings = Settings.load(ROOT / ".brokers" / "pubsub.rabbitmq.toml", namespace=f"test-{suffix}")
    port = settings.rabbitmq.address.hosts[0][1]
    draw = random.Random(SEED)
    members: list[subprocess.Popen[bytes]] = []
    with PubSub(settings) as pubsub, Proxy("127.0.0.1", port) as proxy:
        address = settings.rabbitmq.url.get_secret_value().replace(f":{port}", f":{proxy.port}")
        variables = environment(PUBSUB_URL=address, PUBSUB_NAMESPACE=settings.namespace)

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, str(HERE / "ledger_script.py"), url, suffix]
            with (tmp_path / "members.log").open("ab") as log:
                return subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=log, stderr=log)

        try:
            pubsub.declare("pay.*", subscription="ledger")
            members = [start() for _ in range(3)]
            numbers = list(range(1, PAYMENTS + 1))
            for batch in range(0, PAYMENTS, 500):
                sent = [Message("pay.made", {"amount": n}, id=f"p{n}") for n in numbers[batch : batch + 500]]
                pubsub.publish_many(sent)
                pubsub.publish_many(sent[:50])  # twins, as after a crash of the publisher
                time.sleep(draw.uniform(0.1, 0.6))  # when the fault strikes, not what is waited for
                if batch % 1500 == 0:
                    proxy.cut()
                else:
                    victim = draw.randrange(3)
                    assert members[victim].poll() is None, (tmp_path / "members.log").read_text()[-3000:]
                    members[victim].kill()
                    members[victim].wait()
                    members[victim] = start()
            wait_until(lambda: _booked(engine, ledger)[0] >= PAYMENTS, 100, "every payment in the ledger")
            wait_until(lambda: pubsub.backlog("ledger").waiting == 0, 60, "the backlog to be empty")
            assert pubsub.dead_letters("ledger").count() == 0
        finally:
            for member in members:
                member.terminate()
            codes = [member.wait(30) for member in members]
            pubsub.delete("ledger")
    assert codes == [0, 0, 0], (tmp_path / "members.log").read_text()[-3000:]
    assert _booked(engine, ledger) == (PAYMENTS, sum(numbers)), json.dumps({"seed": SEED})
    metadata.drop_all(engine)
    engine.dispose()


def _booked(engine: sa.Engine, ledger: sa.Table) -> tuple[int, int]:
    with engine.connect() as connection:
        count, total = connection.execute(
            sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(ledger.c.amount), 0))
        ).one()
        return int(count), int(total)
