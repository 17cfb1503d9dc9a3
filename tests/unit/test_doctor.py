"""What ``pubsub doctor`` says of settings and states that cost messages."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pubsub_facade import Finding, PubSub
from pubsub_facade.backends import _activemq_doctor as activemq
from pubsub_facade.backends import _kafka_doctor as kafka
from pubsub_facade.backends import _rabbitmq_doctor as rabbitmq
from pubsub_facade.backends import _sqlite_doctor as sqlite
from pubsub_facade.settings import KafkaSettings, SqliteSettings

DOCTOR = [str(Path(sys.executable).with_name("pubsub")), "doctor"]


def told(findings: list[Finding], level: str) -> str:
    """What was found at a level; each with what to do about it, and what is ok without."""
    assert all(bool(each.mend) == (each.level != "ok") for each in findings), findings
    return "\n".join(each.what for each in findings if each.level == level)


# -- the command ----------------------------------------------------------------------------------------


def doctor(place: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
    return subprocess.run(
        [*DOCTOR, *arguments],
        cwd=place,
        env={**kept, "PYTHONWARNINGS": "error", "PUBSUB_BACKEND": "sqlite", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_sound_file_has_no_problem_and_exit_code_0(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert "journal_mode is wal" in [line[1] for line in lines]
    assert "problem" not in {line[0] for line in lines}


def test_a_power_cut_that_loses_messages_is_a_warning_with_what_to_mend(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json", PUBSUB_SQLITE__SYNCHRONOUS="normal")
    assert done.returncode == 0, done.stderr
    (warning,) = [each for each in json.loads(done.stdout) if "synchronous" in each["what"]]
    assert warning["level"] == "warning"
    assert "power cut" in warning["what"]
    assert 'sqlite.synchronous = "full"' in warning["mend"]


def test_a_damaged_file_is_a_problem_and_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "pubsub.db"
    with PubSub(backend="sqlite", sqlite={"path": path}) as pubsub:
        pubsub.declare("#", subscription="all")
        for number in range(200):
            pubsub.publish("a.b", "x" * 500, id=f"m{number}")
    with sqlite3.connect(path) as file:  # an index that no longer says what its table holds
        file.execute("PRAGMA writable_schema = ON")
        file.execute("CREATE INDEX lying ON messages (id)")
        file.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX lying ON messages (topic)' WHERE name = 'lying'"
        )
    file.close()
    done = doctor(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "problem\tintegrity_check: " in done.stdout
    assert done.stderr == ""


def test_a_backend_without_checks_says_so(tmp_path: Path) -> None:
    done = doctor(tmp_path, PUBSUB_BACKEND="memory")
    assert (done.returncode, done.stdout) == (0, "memory: nothing to check\n")


def test_a_broker_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = doctor(tmp_path, PUBSUB_URL="amqp://guest:guest@127.0.0.1:1/%2F", PUBSUB_BACKEND="rabbitmq")
    assert done.returncode == 1
    assert done.stderr.startswith("pubsub: ")
    assert done.stdout == ""


# -- sqlite ---------------------------------------------------------------------------------------------


def test_a_network_filesystem_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "pubsub.db"
    local = [("/", "ext4"), (str(tmp_path.parent), "nfs4"), (str(tmp_path), "ext4")]
    assert told([*sqlite._filesystem(path, local)], "ok")
    assert "nfs4" in told([*sqlite._filesystem(path, [*local[:2]])], "problem")
    over = [*local, (str(tmp_path), "cifs")]  # mounted on top of it
    assert "cifs" in told([*sqlite._filesystem(path, over)], "problem")


def test_little_room_is_a_warning(tmp_path: Path) -> None:
    assert "10 MiB" in told([*sqlite._room(tmp_path / "pubsub.db", 10 << 20)], "warning")


def test_a_file_near_its_limit_is_a_warning(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "full.db") as file:
        file.execute("CREATE TABLE filler (body BLOB)")
        file.execute("INSERT INTO filler VALUES (zeroblob(1000000))")
        settings = SqliteSettings(max_size=1 << 20)
        assert "max_size" in told([*sqlite._limit(file, settings)], "warning")
        file.execute("DELETE FROM filler")
        assert "max_size" in told([*sqlite._limit(file, settings)], "ok")
    file.close()


# -- kafka ----------------------------------------------------------------------------------------------

SOUND = {
    "auto.create.topics.enable": "false",
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offset.metadata.max.bytes": "4096",
    "offsets.retention.minutes": "100000",
}


def cluster(config: dict[str, str], brokers: int = 3, **more: Any) -> kafka.Seen:
    nodes = {node: f"k{node}:9092" for node in range(1, brokers + 1)}
    return kafka.Seen(nodes, dict.fromkeys(nodes, SOUND | config), **more)


def test_a_sound_cluster_is_ok() -> None:
    findings = kafka.findings(
        cluster({}, topics={"n.a": [(3, 3)]}, topic_configs={"n.a": {"min.insync.replicas": "2"}}),
        KafkaSettings(),
    )
    assert {each.level for each in findings} == {"ok"}, findings


@pytest.mark.parametrize(
    ("config", "brokers", "level", "words"),
    [
        ({}, 2, "problem", "more than there are brokers"),
        ({"min.insync.replicas": "4"}, 3, "problem", "nothing can be published"),
        ({"min.insync.replicas": "3"}, 3, "warning", "one broker down stops publishing"),
        ({"min.insync.replicas": "1"}, 3, "warning", "one of 3 brokers only"),
        (
            {"default.replication.factor": "1", "min.insync.replicas": "1"},
            1,
            "warning",
            "replication factor 1",
        ),
        ({"auto.create.topics.enable": "true"}, 3, "warning", "auto.create.topics.enable"),
        ({"offsets.retention.minutes": "10080"}, 3, "warning", "7 days"),
        ({"unclean.leader.election.enable": "true"}, 3, "problem", "may become leader"),
        ({"offset.metadata.max.bytes": "100"}, 3, "problem", "commits may be refused"),
        ({"delete.topic.enable": "false"}, 3, "warning", "cannot be deleted"),
    ],
)
def test_a_cluster_that_costs_messages_is_told(
    config: dict[str, str], brokers: int, level: str, words: str
) -> None:
    assert words in told(kafka.findings(cluster(config, brokers), KafkaSettings()), level)


def test_our_settings_come_before_the_broker_s_defaults() -> None:
    settings = KafkaSettings(replication_factor=5, min_insync_replicas=2)
    assert "replication_factor 5" in told(kafka.findings(cluster({}), settings), "problem")


@pytest.mark.parametrize(
    ("partitions", "config", "level", "words"),
    [
        ([(3, 2)], {}, "warning", "missing or behind on n.a"),
        ([(1, 1)], {"min.insync.replicas": "2"}, "problem", "nothing can be published there"),
        ([(3, 3)], {"max.message.bytes": "1000"}, "problem", "max.message.bytes"),
    ],
)
def test_topics_that_are_there_are_looked_at(
    partitions: list[tuple[int, int]], config: dict[str, str], level: str, words: str
) -> None:
    seen = cluster({}, topics={"n.a": partitions}, topic_configs={"n.a": config})
    assert words in told(kafka.findings(seen, KafkaSettings()), level)


def test_brokers_out_of_reach_are_told() -> None:
    seen = cluster({}, errors={2: "no answer"}, unreachable=["k9:9092"])
    findings = kafka.findings(seen, KafkaSettings())
    assert "k2:9092" in told(findings, "problem")
    assert "k9:9092" in told(findings, "warning")


def test_a_user_who_may_not_see_the_configuration_is_told_which_right_is_missing() -> None:
    seen = kafka.Seen({1: "k1:9092"}, {1: {"error": "ClusterAuthorizationFailed"}})
    findings = kafka.findings(seen, KafkaSettings(replication_factor=1, min_insync_replicas=1))
    assert any("DescribeConfigs" in each.mend for each in findings)


# -- rabbitmq, activemq: what is pure of them -----------------------------------------------------------


def test_an_old_rabbitmq_is_a_problem() -> None:
    assert rabbitmq._version("3.9.13").level == "problem"
    assert rabbitmq._version("").level == "problem"
    assert {rabbitmq._version(text).level for text in ("3.10.8", "4.1.0-rc.1")} == {"ok"}


def test_ordered_subscriptions_without_the_plugin_are_a_warning() -> None:
    assert rabbitmq._spread(4, hashes=False).level == "warning"
    assert {rabbitmq._spread(1, hashes=False).level, rabbitmq._spread(4, hashes=True).level} == {"ok"}


def test_a_missing_scheduler_is_a_problem_unless_the_settings_know() -> None:
    assert activemq.schedule_finding(0.01, wanted=True).level == "problem"
    assert activemq.schedule_finding(0.01, wanted=False).level == "ok"
    assert activemq.schedule_finding(activemq.DELAY, wanted=True).level == "ok"


def test_a_broker_that_keeps_messages_in_memory_is_a_problem() -> None:
    assert "in memory only" in told(activemq.broker_findings({"Persistent": False}), "problem")
    assert "StorePercentUsage is at 97 %" in told(
        activemq.broker_findings({"Persistent": True, "StorePercentUsage": 97}), "warning"
    )


def test_dropping_when_full_is_a_problem() -> None:
    assert activemq.full_policy({"addressFullMessagePolicy": "DROP"}).level == "problem"
    assert activemq.full_policy({}).level == "ok"
    assert activemq._dropped(2).level == "problem"
    assert activemq._dropped(0).level == "ok"


def test_messages_in_nobodys_hand_are_a_problem() -> None:
    assert "2 of shop$retry.audit" in told([activemq.astray_finding({"shop$retry.audit": 2})], "problem")
    assert activemq.astray_finding({}).level == "ok"
