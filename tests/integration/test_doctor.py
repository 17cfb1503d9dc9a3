"""``pubsub doctor`` on real brokers: sound ones pass, and each deliberate misconfiguration is found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from brokers import native
from brokers.broker import CONF, STATE, Broker
from brokers.rabbitmq import RabbitMQ
from tests.conftest import FOLDER, broker_settings

PUBSUB = str(Path(sys.executable).with_name("pubsub"))
FORMS = ["rabbitmq", "kafka", "activemq", "activemq-virtual", "artemis"]

Findings = list[tuple[str, str]]  # level, and what was found with what to mend


def doctor(config: Path, *, code: int, **variables: str) -> Findings:
    """Run it, hold it to its exit code, and return what it said."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
    settings = {"PUBSUB_CONFIG": str(config), "PUBSUB_NAMESPACE": f"doctor-{uuid.uuid4().hex[:8]}"}
    done = subprocess.run(
        [PUBSUB, "doctor"],
        env={**kept, "PYTHONWARNINGS": "error", **settings, **variables},
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, ""), done.stdout + done.stderr
    lines = [line.split("\t", 1) for line in done.stdout.splitlines()]
    return [(level, rest) for level, rest in lines]


def found(findings: Findings, level: str, words: str) -> bool:
    return any(each == level and words in text for each, text in findings)


@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.broker(form)) for form in FORMS])
def test_a_sound_broker_has_no_problem(form: str) -> None:
    broker_settings(form)
    findings = doctor(FOLDER / f"pubsub.{form}.toml", code=0)
    assert found(findings, "ok", "")


@contextmanager
def own(name: str, extra: list[str]) -> Iterator[tuple[Broker, Path]]:
    """A broker of its own with these lines added to its configuration, and a config file for it."""
    cls = native.BROKERS[name]
    directory = STATE / f"doctor-{name}"
    cls(directory).remove()
    broker = cls(directory, extra=extra)
    config = directory / "pubsub.toml"
    try:
        broker.start()
        config.write_text(cls.settings(broker.ports)[name])
        config.chmod(0o644)
        yield broker, config
    finally:
        broker.remove()


@pytest.mark.broker("rabbitmq")
def test_a_memory_alarm_on_rabbitmq_is_found() -> None:
    with own("rabbitmq", []) as (broker, config):
        assert found(doctor(config, code=0), "ok", "a quorum queue confirmed a message")
        assert isinstance(broker, RabbitMQ)
        broker.ctl("set_vm_memory_high_watermark", "0.000001")
        deadline = time.monotonic() + 30
        while "memory" not in broker.ctl("eval", "rabbit_alarm:get_alarms()."):
            assert time.monotonic() < deadline
        assert found(doctor(config, code=1), "problem", "a memory or disk alarm blocks publishers")


@pytest.mark.broker("kafka")
def test_kafka_that_cannot_keep_its_promises_is_found() -> None:
    lines = ["min.insync.replicas=2", "offsets.retention.minutes=60", "unclean.leader.election.enable=true"]
    with own("kafka", lines) as (_, config):
        findings = doctor(config, code=1)
        assert found(findings, "problem", "min_insync_replicas 2 is more than the replication factor 1")
        assert found(findings, "problem", "unclean.leader.election.enable")
        assert found(findings, "warning", "auto.create.topics.enable")
        assert found(findings, "warning", "a subscription without members for longer begins again")
        more = doctor(config, code=1, PUBSUB_KAFKA__REPLICATION_FACTOR="3")
        assert found(more, "problem", "replication_factor 3 is more than there are brokers (1)")


@pytest.mark.broker("activemq")
def test_classic_without_scheduler_store_and_large_frames_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound = CONF / "activemq.xml"
    text = sound.read_text()
    for there, instead in (
        ('schedulerSupport="true"', 'schedulerSupport="false"'),
        ('persistent="true"', 'persistent="false"'),
        ("wireFormat.maxFrameSize=104857600", "wireFormat.maxFrameSize=1000000"),
    ):
        assert there in text
        text = text.replace(there, instead)
    (tmp_path / "activemq.xml").write_text(text)
    (tmp_path / "log4j2.properties").write_bytes((CONF / "log4j2.properties").read_bytes())
    monkeypatch.setattr("brokers.activemq.CONF", tmp_path)
    with own("activemq", []) as (_, config):
        findings = doctor(config, code=1)
        assert found(findings, "problem", 'set schedulerSupport="true"')
        assert found(findings, "problem", "raise wireFormat.maxFrameSize")
        assert found(findings, "problem", "keeps messages in memory only")
        known = doctor(config, code=1, PUBSUB_ACTIVEMQ__SCHEDULER="false")
        assert found(known, "ok", "no scheduler, as the settings say")


@pytest.mark.broker("artemis")
def test_artemis_that_throws_messages_away_is_found() -> None:
    with own("artemis", []) as (broker, config):
        broker.stop()
        broker_xml = broker.directory / "instance" / "etc" / "broker.xml"
        pristine = next(broker_xml.parent.glob("broker.[0-9]*"))
        text = pristine.read_text()
        for there, instead in (
            (
                "<persistence-enabled>true</persistence-enabled>",
                "<persistence-enabled>false</persistence-enabled>",
            ),
            ("<address-full-policy>PAGE<", "<address-full-policy>DROP<"),
        ):
            assert there in text, text
            text = text.replace(there, instead)
        pristine.write_text(text)
        broker.start()
        findings = doctor(config, code=1)
        assert found(findings, "problem", "address-full-policy is DROP")
        assert found(findings, "problem", "keeps messages in memory only")
