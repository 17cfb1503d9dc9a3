"""The command ``pubsub``, run as its users run it: the real executable, on the embedded backend."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_facade import PubSub, Reject, __version__
from pubsub_facade.cli.errors import guarded
from pubsub_facade.cli.publish import parse_header, ranges
from pubsub_facade.cli.root import cli

PUBSUB = str(Path(sys.executable).with_name("pubsub"))
SECRET = "hunter2-9fe1"
DEADLINE = 20.0  # s for anything that should happen at once, on a busy machine


def environment(**variables: str) -> dict[str, str]:
    """Ours without settings from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
    return {**kept, "PYTHONWARNINGS": "error", **variables}


Result = subprocess.CompletedProcess[str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "pubsub.toml").write_text('backend = "sqlite"\nnamespace = "social"\n')
    return tmp_path


@pytest.fixture
def pubsub(place: Path) -> Callable[..., Result]:
    """Run ``pubsub`` with these arguments and return what came out."""

    def run(*arguments: str, input: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
        data = input.encode() if isinstance(input, str) else input
        done = subprocess.run(
            [PUBSUB, *arguments],
            cwd=place,
            env=environment(**(env or {})),
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return Result(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def client(place: Path) -> Iterator[PubSub]:
    """What the test itself publishes and receives with, in the same place."""
    with PubSub(namespace="social", sqlite={"path": place / "pubsub.db"}, backend="sqlite") as made:
        yield made


class Running:
    """A ``pubsub`` that goes on until ended; its output is read line by line."""

    def __init__(self, place: Path, *arguments: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [PUBSUB, *arguments],
            cwd=place,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def wait_for(self, words: str) -> str:
        """The line of standard error that holds ``words``; fails where it does not come."""
        assert self.process.stderr is not None
        seen: list[str] = []
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            line = self.process.stderr.readline()
            seen.append(line)
            if words in line:
                return line
            if not line:
                break
        pytest.fail(f"{words!r} was not said: {''.join(seen)}")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Signal it; its exit code and the rest of its output."""
        self.process.send_signal(number)
        return self.result()

    def result(self) -> tuple[int, str, str]:
        out, error = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, error


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Running]]:
    """Start a ``pubsub`` that is ended at the latest with the test."""
    running: list[Running] = []

    def run(*arguments: str, **variables: str) -> Running:
        running.append(Running(place, *arguments, **variables))
        return running[-1]

    yield run
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


def one_line(result: Result, *words: str) -> None:
    """Standard error is one line that says these words."""
    assert result.stderr.startswith("pubsub: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def received(client: PubSub, subscription: str, count: int) -> list[Any]:
    """``count`` deliveries that wait in the subscription, acknowledged."""
    found = []
    with client.subscribe("#", subscription=subscription) as stream:
        for _ in range(count):
            found.append(stream.receive(DEADLINE))
            found[-1].ack()
    return found


# -- the command itself -------------------------------------------------------------------------------


def test_version_is_told_quickly(pubsub: Callable[..., Result]) -> None:
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = pubsub("--version")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.stdout == f"pubsub-facade {__version__}\n"
    assert min(spent) < 0.6, spent  # s of the processor: 0.3 here, whoever else is busy


@pytest.mark.parametrize("command", [[], ["config"]])
def test_a_group_without_a_command_shows_its_help(command: list[str], pubsub: Callable[..., Result]) -> None:
    result = pubsub(*command)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == pubsub(*command, "--help").stdout


@pytest.mark.parametrize("arguments", [["run"], ["run", "app:pubsub"], ["--debug", "run"]])
def test_a_program_that_runs_handlers_by_another_command_names_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(cli, arguments, name="manage.py pubsub") == 2
    assert "manage.py pubsub runs no handlers: use manage.py runsubscribers" in capsys.readouterr().err
    guarded(cli, ["--help"], name="manage.py pubsub")
    shown = capsys.readouterr().out
    assert "publish" in shown
    assert "\n  run " not in shown


def test_help_names_every_command(pubsub: Callable[..., Result]) -> None:
    result = pubsub("--help")
    assert result.returncode == 0
    for command in [
        "publish",
        "tail",
        "run",
        "config",
        "ping",
        "declare",
        "delete",
        "backlog",
        "seek",
        "dead",
    ]:
        assert re.search(rf"^  {command} ", result.stdout, re.MULTILINE)
        assert pubsub(command, "--help").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pubish"], ["did you mean 'publish'"]),
        (["zzz"], ["no command 'zzz'", "known are publish, tail"]),
        (["publish", "--nope"], ["--nope", "pubsub publish --help"]),
        (["publish", "--url", "x"], ["--url stands before the command"]),
        (["publish"], ["topic"]),
        (["publish", "a", "b", "--file", "c"], ["--file"]),
        (["publish", "a", "--file", "nowhere"], ["'nowhere'", "No such file"]),
        (["publish", "a", "b", "--header", "x"], ["'x' is no header", "name:int=3"]),
        (["publish", "a", "b", "--header", "x:int=y"], ["'x'", "'y' is no int"]),
        (["publish", "a..b", "c"], ["'a..b'", "empty word"]),
        (["publish", "a", "b", "--header", "pubsub-x=1"], ["pubsub-x", "rename it"]),
        (["publish", "a", "{", "--content", "json"], ["not JSON"]),
        (["publish", "a", "b", "--delay", "-1"], ["delay"]),
        (["publish", "a", "b", "--timeout", "0"], ["timeout"]),
        (["tail", "a..b"], ["'a..b'"]),
        (["tail", "a", "--filter", "x >"], ["filter"]),
        (["tail"], ["PATTERN"]),
        (["declare", "a b", "x"], ["'a b'", "subscription name"]),
        (["seek", "a", "yesterday", "--yes"], ["'yesterday'", "beginning, end"]),
        (["seek", "a", "end"], ["--yes"]),
        (["delete", "a"], ["--yes"]),
        (["dead", "a", "purge", "--all"], ["--yes"]),
        (["dead", "a", "replay"], ["ids, or --all"]),
        (["dead", "a", "replay", "x", "--all"], ["not both"]),
        (["--url", "nonsense", "ping"], ["command line: --url", "scheme://host:port"]),
        (["--url", "nats://h", "ping"], ["unknown backend 'nats'"]),
        (["--config", "nowhere.toml", "ping"], ["'nowhere.toml'"]),
        (["--namespace", "a b", "ping"], ["command line: --namespace", "'a b'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], pubsub: Callable[..., Result]
) -> None:
    result = pubsub(*arguments)
    if arguments == ["publish"]:  # an empty standard input is no mistake
        assert (result.returncode, result.stdout) == (0, "0 published\n")
        return
    assert (result.returncode, result.stdout) == (2, "")
    one_line(result, *words)


@pytest.mark.parametrize("command", [["ping"], ["tail", "#"], ["backlog", "a"], ["dead", "a", "list"]])
def test_a_broker_that_is_not_there_is_one_line_and_exit_code_1(
    command: list[str], pubsub: Callable[..., Result]
) -> None:
    result = pubsub(*command, env={"PUBSUB_URL": f"amqp://app:{SECRET}@127.0.0.1:1"})
    assert (result.returncode, result.stdout) == (1, "")
    one_line(result, "127.0.0.1:1")
    assert SECRET not in result.stderr


def test_publish_waits_for_a_broker_as_long_as_it_was_told(pubsub: Callable[..., Result]) -> None:
    began = time.monotonic()
    result = pubsub("--url", "amqp://127.0.0.1:1", "publish", "a", "b", "--timeout", "1.5")
    assert result.returncode == 1
    assert time.monotonic() - began > 1.5
    one_line(result, "127.0.0.1:1", "not confirmed")


def test_debug_shows_the_traceback(pubsub: Callable[..., Result]) -> None:
    result = pubsub("--debug", "declare", "a b", "x")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "subscription name 'a b'" in result.stderr.splitlines()[-1]


def test_an_error_of_our_own_says_how_to_see_more(pubsub: Callable[..., Result], place: Path) -> None:
    (place / "broken.py").write_text("def factory():\n    return 1 / 0\n")
    result = pubsub("run", "broken:factory")
    assert result.returncode != 0
    one_line(result, "ZeroDivisionError", "--debug")


def test_ping_tells_how_long_it_took(pubsub: Callable[..., Result]) -> None:
    result = pubsub("ping")
    assert result.returncode == 0
    assert re.fullmatch(r"sqlite: answered in [\d.]+ ms \(connected in [\d.]+ ms\)\n", result.stdout)


# -- publish ------------------------------------------------------------------------------------------


def test_publish_prints_the_id_of_a_message_that_everybody_gets(
    pubsub: Callable[..., Result], client: PubSub
) -> None:
    client.declare("#", subscription="all")
    result = pubsub(
        "publish",
        "social.post.created",
        '{"author": 42}',
        *("--key", "42", "-H", "lang=en", "-H", "n:int=3", "-H", "x:float=1.5", "-H", "ok:bool=true"),
        *("-H", '{"more": "a=b", "many": 2}', "-H", "with:colon=c", "-H", "empty="),
    )
    assert result.returncode == 0
    [delivery] = received(client, "all", 1)
    assert result.stdout == f"{delivery.id}\n"
    assert (delivery.topic, delivery.payload, delivery.key) == ("social.post.created", {"author": 42}, "42")
    assert delivery.headers == {
        "lang": "en",
        "n": 3,
        "x": 1.5,
        "ok": True,
        "more": "a=b",
        "many": 2,
        "with:colon": "c",
        "empty": "",
    }
    assert type(delivery.headers["n"]) is int
    assert type(delivery.headers["ok"]) is bool


@pytest.mark.parametrize(
    ("arguments", "payload"),
    [
        (["hello"], "hello"),
        (["42"], 42),
        (["42", "--content", "text"], "42"),
        (["42", "--content", "raw"], b"42"),
        (['"quoted"'], "quoted"),
        (['{"a":'], '{"a":'),
        ([""], ""),
        (["--file", "json"], {"a": 1}),
        (["--file", "json", "--content", "text"], '{"a": 1}'),
        (["--file", "json", "--content", "raw"], b'{"a": 1}'),
        (["--file", "bytes"], bytes(range(256))),
    ],
)
def test_the_payload_is_what_content_says(
    arguments: list[str], payload: Any, pubsub: Callable[..., Result], client: PubSub, place: Path
) -> None:
    (place / "json").write_text('{"a": 1}')
    (place / "bytes").write_bytes(bytes(range(256)))
    client.declare("#", subscription="all")
    assert pubsub("publish", "topic", *arguments).returncode == 0
    [delivery] = received(client, "all", 1)
    assert delivery.payload == payload


def test_a_file_can_be_standard_input_as_one_message(pubsub: Callable[..., Result], client: PubSub) -> None:
    client.declare("#", subscription="all")
    assert pubsub("publish", "topic", "--file", "-", input=b"\x00\xff\n\n").returncode == 0
    [delivery] = received(client, "all", 1)
    assert delivery.payload == b"\x00\xff\n\n"


def test_the_id_can_be_given_and_the_delay_is_kept(pubsub: Callable[..., Result], client: PubSub) -> None:
    client.declare("#", subscription="all")
    assert pubsub("publish", "a", "late", "--delay", "1.5").returncode == 0
    assert pubsub("publish", "a", "now", "--id", "mine").stdout == "mine\n"
    first, second = received(client, "all", 2)
    assert (first.id, first.payload, second.payload) == ("mine", "now", "late")
    assert time.time() - second.timestamp >= 1.5


def test_json_lines_with_a_topic_are_payloads(pubsub: Callable[..., Result], client: PubSub) -> None:
    client.declare("#", subscription="all")
    result = pubsub("publish", "a.b", "--key", "k", "-H", "x=y", input='{"topic": 1}\n\n"text"\n3\n[null]')
    assert (result.returncode, result.stdout, result.stderr) == (0, "4 published\n", "")
    deliveries = received(client, "all", 4)
    assert [each.payload for each in deliveries] == [{"topic": 1}, "text", 3, [None]]
    assert {(each.topic, each.key, each.headers["x"]) for each in deliveries} == {("a.b", "k", "y")}


def test_json_lines_without_a_topic_are_whole_messages(pubsub: Callable[..., Result], client: PubSub) -> None:
    client.declare("#", subscription="all")
    lines = [
        {"topic": "a", "payload": {"x": 1}, "key": "k", "headers": {"n": 1}, "id": "one"},
        {"topic": "b", "base64": base64.b64encode(b"\xff\x00").decode(), "key": None},
        {"topic": "c", "payload": None},
    ]
    result = pubsub("publish", input="\n".join(map(json.dumps, lines)))
    assert (result.returncode, result.stdout) == (0, "3 published\n")
    one, two, three = received(client, "all", 3)
    assert (one.topic, one.payload, one.key, one.headers, one.id) == ("a", {"x": 1}, "k", {"n": 1}, "one")
    assert (two.topic, two.payload, two.key) == ("b", b"\xff\x00", None)
    assert (three.topic, three.payload) == ("c", None)


def test_lines_that_cannot_be_published_are_named_and_the_others_are_published(
    pubsub: Callable[..., Result], client: PubSub
) -> None:
    client.declare("#", subscription="all")
    lines = [
        '{"topic": "good", "payload": 1}',
        "not json",
        '{"payload": 1}',
        '{"topic": "bad..topic", "payload": 1}',
        '{"topic": "x", "payload": 1, "headrs": {}}',
        '{"topic": "x", "payload": 1, "headers": {"h": [1]}}',
        '{"topic": "x", "payload": 1, "base64": ""}',
        '{"topic": "x", "base64": "%"}',
        '{"topic": "x", "payload": 1, "delay": "soon"}',
        '{"topic": "x", "payload": 1, "headers": 3}',
        '{"topic": "good", "payload": 2}',
    ]
    result = pubsub("publish", input="\n".join(lines))
    assert (result.returncode, result.stdout) == (4, "")
    told = result.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in told[:-1]] == [f"line {number}" for number in range(2, 11)]
    assert told[-1] == "pubsub: 9 of 11 lines were not published"
    assert [each.payload for each in received(client, "all", 2)] == [1, 2]


def test_a_file_of_nothing_but_bad_lines_is_not_told_line_by_line_for_ever(
    pubsub: Callable[..., Result],
) -> None:
    result = pubsub("publish", input="x\n" * 5000)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) < 30
    assert "5000 of 5000 lines" in result.stderr


def test_what_the_broker_refuses_of_a_batch_is_told_by_line(
    pubsub: Callable[..., Result], client: PubSub
) -> None:
    client.declare("wanted.#", subscription="some")
    lines = [
        {"topic": f"{'wanted' if number % 2 else 'unwanted'}.x", "payload": number} for number in range(6)
    ]
    result = pubsub(
        "publish", input="\n".join(map(json.dumps, lines)), env={"PUBSUB_REQUIRE_SUBSCRIBERS": "true"}
    )
    assert result.returncode == 4
    assert "lines 1, 3, 5: not stored" in result.stderr
    assert "3 of 6 lines were not published" in result.stderr
    assert [each.payload for each in received(client, "some", 3)] == [1, 3, 5]


def test_lines_are_published_as_they_come(place: Path, client: PubSub) -> None:
    client.declare("#", subscription="all")
    process = subprocess.Popen(
        [PUBSUB, "publish", "a"], cwd=place, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        with client.subscribe("#", subscription="all") as stream:
            for number in range(3):
                process.stdin.write(f"{number}\n".encode())
                process.stdin.flush()
                delivery = stream.receive(DEADLINE)
                assert delivery.payload == number
                delivery.ack()
        out, _ = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (0, b"3 published\n")
    finally:
        process.kill()
        process.communicate()


def test_many_lines_go_in_batches(pubsub: Callable[..., Result], client: PubSub) -> None:
    client.declare("#", subscription="all")
    result = pubsub("publish", "a", input="".join(f'{{"n": {number}}}\n' for number in range(20_000)))
    assert (result.returncode, result.stdout) == (0, "20000 published\n")
    assert client.backlog("all").waiting == 20_000


def in_terminal(place: Path, command: list[str], stdin: int | None = None) -> tuple[int, str]:
    """Run ``command`` with a terminal for its output and errors; exit code and what the terminal got."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=place,
        env=environment(TERM="xterm-256color", COLUMNS="120", LINES="40"),
        stdin=slave if stdin is None else stdin,
        stdout=slave,
        stderr=slave,
        close_fds=True,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.1)
        if ready:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
    os.close(master)
    return process.wait(DEADLINE), shown.decode()


def test_a_terminal_sees_a_progress_bar(place: Path, client: PubSub) -> None:
    client.declare("#", subscription="all")
    lines = place / "lines.jsonl"
    lines.write_text("".join(f"{number}\n" for number in range(3000)))
    with lines.open("rb") as file:
        code, shown = in_terminal(place, [PUBSUB, "publish", "a"], file.fileno())
    assert code == 0
    assert "3,000 messages" in shown
    assert "100%" in shown
    assert "3000 published" in shown


def test_a_pipe_sees_none(pubsub: Callable[..., Result]) -> None:
    assert pubsub("publish", "a", input="1\n2\n").stderr == ""


def test_a_terminal_is_not_read_as_json_lines(place: Path) -> None:
    code, shown = in_terminal(place, [PUBSUB, "publish", "a"])
    assert code == 2
    assert "JSON Lines on standard input" in shown


# -- tail ---------------------------------------------------------------------------------------------


def test_tail_shows_what_is_published_and_takes_nothing_from_anybody(
    client: PubSub, start: Callable[..., Running]
) -> None:
    client.declare("#", subscription="all")
    tail = start("tail", "social.post.*", "--count", "2")
    tail.wait_for("receiving social.post.* on sqlite, namespace social")
    client.publish("social.user.created", 1)
    client.publish("social.post.created", {"author": 42, "text": "a\tb\nc"}, key="42")
    client.publish("social.post.deleted", "two\nlines")
    code, out, _ = tail.result()
    assert code == 0
    first, second = (line.split("\t") for line in out.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first[0])
    assert first[1:] == ["social.post.created", "42", r'{"author": 42, "text": "a\tb\nc"}']
    assert second[1:] == ["social.post.deleted", "-", r"two\nlines"]
    assert [each.topic for each in received(client, "all", 3)] == [
        "social.user.created",
        "social.post.created",
        "social.post.deleted",
    ]


def test_each_tail_gets_its_own_copy(client: PubSub, start: Callable[..., Running]) -> None:
    tails = [start("tail", "#", "-n", "1") for _ in range(2)]
    for tail in tails:
        tail.wait_for("receiving")
    client.publish("a", "x")
    assert [tail.result()[0] for tail in tails] == [0, 0]


def test_tail_selects_by_filter(client: PubSub, start: Callable[..., Running]) -> None:
    tail = start("tail", "#", "--filter", "lang = 'en' AND n > 1", "-n", "1")
    tail.wait_for("receiving")
    for lang, number in (("fr", 2), ("en", 1), ("en", 2)):
        client.publish("a", f"{lang}{number}", headers={"lang": lang, "n": number})
    assert tail.result()[1].endswith("\ten2\n")


def test_what_tail_writes_as_json_publish_reads(
    client: PubSub, start: Callable[..., Running], pubsub: Callable[..., Result]
) -> None:
    sent = [
        client.publish(
            "a.b", {"x": [1, None, "é"]}, key="k", headers={"s": "ü\n", "i": 1, "f": 2.5, "b": False}
        ),
        client.publish("a.c", "text with\nlines"),
        client.publish("a.d", bytes(range(256))),
        client.publish("a.e", b""),
    ]
    client.declare("#", subscription="copies")
    tail = start("tail", "#", "--json", "-n", "4")
    tail.wait_for("receiving")
    client.publish_many(sent)
    code, lines, _ = tail.result()
    assert code == 0
    assert len(lines.splitlines()) == 4
    received(client, "copies", 4)
    assert pubsub("publish", input=lines).returncode == 0
    for copy, original in zip(received(client, "copies", 4), sent, strict=True):
        assert (copy.topic, copy.payload, copy.key) == (original.topic, original.payload, original.key)
        assert dict(copy.headers) == dict(original.headers)
        assert copy.id == original.id


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_tail_quietly(number: int, code: int, start: Callable[..., Running]) -> None:
    tail = start("tail", "#")
    tail.wait_for("receiving")
    assert tail.end(number) == (code, "", "")


def test_a_closed_pipe_ends_tail_quietly(client: PubSub, start: Callable[..., Running]) -> None:
    tail = start("tail", "#")
    tail.wait_for("receiving")
    client.publish("a", "first")
    assert tail.line().endswith("first")
    assert tail.process.stdout is not None
    assert tail.process.stderr is not None
    tail.process.stdout.close()
    client.publish("a", "second")
    assert tail.process.wait(DEADLINE) == 141
    assert tail.process.stderr.read() == ""


def test_help_into_a_closed_pipe_is_quiet(place: Path) -> None:
    command = f"{PUBSUB} publish --help | true; {PUBSUB} config show --all | head -n 1"
    done = subprocess.run(
        ["sh", "-c", command], cwd=place, env=environment(), capture_output=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == (b'backend = "sqlite"  # pubsub.toml: backend\n', b"")


def test_a_terminal_sees_colours_and_no_control_characters_of_a_message(place: Path, client: PubSub) -> None:
    evil = "\x1b]0;title\x07\x9b31m\u202eevil"
    client.publish("warm", "up")  # the database exists
    master, slave = pty.openpty()
    tail = subprocess.Popen(
        [PUBSUB, "tail", "#", "-n", "2"],
        cwd=place,
        env=environment(TERM="xterm-256color", COLUMNS="120"),
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(slave)
    try:
        assert tail.stderr is not None
        assert "receiving" in tail.stderr.readline()
        client.publish("social.post", {"text": evil}, key="k")
        client.publish("social.post", evil, headers={"h": evil})
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:
                break
        text = shown.decode()
        assert tail.wait(DEADLINE) == 0
        assert "\x1b[1;36msocial.post" in text
        for sign in ("\x1b]0", "\x07", "\x9b", "\u202e"):
            assert sign not in text
        assert r"\u202eevil" in text
    finally:
        tail.kill()
        tail.communicate()
        os.close(master)


@pytest.mark.parametrize(
    "locale",
    [
        {"LANG": "C"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    ],
)
def test_text_outside_ascii_works_in_every_locale(
    locale: dict[str, str], pubsub: Callable[..., Result], client: PubSub, start: Callable[..., Running]
) -> None:
    client.publish("warm", "up")
    tail = start("tail", "#", "--json", "-n", "3", **locale)
    tail.wait_for("receiving")
    assert pubsub("publish", "a", "naïve 日本 🎉", "-H", "h=ü", "-k", "ключ", env=locale).returncode == 0
    assert pubsub("publish", "a", '{"x": "ça"}', env=locale).returncode == 0
    assert pubsub("publish", "a", input='"ligne é"\n', env=locale).returncode == 0
    one, two, three = map(json.loads, tail.result()[1].splitlines())
    assert (one["payload"], one["headers"], one["key"]) == ("naïve 日本 🎉", {"h": "ü"}, "ключ")
    assert (two["payload"], three["payload"]) == ({"x": "ça"}, "ligne é")
    result = pubsub("publish", "é", "x", env=locale)
    assert result.returncode == 2
    assert "'é'" in result.stderr


# -- config show --------------------------------------------------------------------------------------


def test_config_show_says_where_each_value_came_from(place: Path, pubsub: Callable[..., Result]) -> None:
    (place / "pubsub.toml").write_text(
        'backend = "rabbitmq"\npublish_timeout = 5\n[rabbitmq]\nheartbeat = 7\n'
        '[subscriptions.analytics]\ntopics = ["social.#"]\n'
    )
    (place / ".env").write_text(f"PUBSUB_RABBITMQ__PASSWORD={SECRET}\n")
    result = pubsub(
        "--namespace", "tests", "config", "show", env={"PUBSUB_RABBITMQ__URL": f"amqp://app:{SECRET}@one,two"}
    )
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert 'backend = "rabbitmq"  # pubsub.toml: backend' in lines
    assert 'namespace = "tests"  # command line: --namespace' in lines
    assert "publish_timeout = 5.0  # pubsub.toml: publish_timeout" in lines
    assert "connect_timeout = 10.0  # default" in lines
    assert 'rabbitmq.url = "amqp://app:***@one,two"  # environment: PUBSUB_RABBITMQ__URL' in lines
    assert 'rabbitmq.username = "app"  # environment: PUBSUB_RABBITMQ__URL' in lines
    assert 'rabbitmq.password = "***"  # environment: PUBSUB_RABBITMQ__URL' in lines
    assert "rabbitmq.heartbeat = 7  # pubsub.toml: rabbitmq.heartbeat" in lines
    assert (
        'subscriptions.analytics.topics = ["social.#"]  # pubsub.toml: subscriptions.analytics.topics'
        in lines
    )
    assert not [line for line in lines if line.startswith("kafka.")]
    assert SECRET not in result.stdout + result.stderr


def test_config_show_says_which_file_it_is(place: Path, pubsub: Callable[..., Result]) -> None:
    assert f'sqlite.path = "{place}/pubsub.db"  # default\n' in pubsub("config", "show").stdout
    shown = json.loads(pubsub("--url", "sqlite:///data/x.db", "config", "show", "--json").stdout)
    assert shown["sqlite.path"]["value"] == f"{place}/data/x.db"


def test_config_show_as_json_has_everything(pubsub: Callable[..., Result]) -> None:
    result = pubsub(
        "config", "show", "--all", "--json", env={"PUBSUB_URL": f"kafka://app:{SECRET}@one,two:1"}
    )
    shown = json.loads(result.stdout)
    assert shown["backend"] == {"value": "kafka", "origin": "environment: PUBSUB_URL"}
    assert shown["kafka.bootstrap_servers"]["value"] == ["one:9092", "two:1"]
    assert shown["kafka.password"] == {"value": "***", "origin": "environment: PUBSUB_URL"}
    assert shown["activemq.tls.verify"] == {"value": True, "origin": "default"}
    assert SECRET not in result.stdout


def test_config_show_on_a_terminal_is_a_table(place: Path) -> None:
    code, shown = in_terminal(place, [PUBSUB, "config", "show"])
    assert code == 0
    assert "setting" in shown
    assert "pubsub.toml: namespace" in shown


@pytest.mark.parametrize(
    "arguments", [["config", "show"], ["ping"], ["--debug", "ping"], ["publish", "a", "b"]]
)
def test_no_output_shows_a_secret(arguments: list[str], pubsub: Callable[..., Result], place: Path) -> None:
    (place / "pubsub.toml").write_text(
        f'backend = "rabbitmq"\n[rabbitmq]\nurl = "http://app:{SECRET}@h"\npassword = ["{SECRET}"]\n'
    )
    result = pubsub(*arguments)
    assert result.returncode == 2
    assert "pubsub.toml: rabbitmq.url" in result.stderr
    assert SECRET not in result.stdout + result.stderr


# -- subscriptions ------------------------------------------------------------------------------------


def test_declare_backlog_seek_and_delete(pubsub: Callable[..., Result], client: PubSub) -> None:
    assert pubsub("declare", "analytics", "social.#", "x.*").stdout == "declared analytics: social.# x.*\n"
    for topic in ("social.post", "x.y", "z"):
        client.publish(topic, 1)
    result = pubsub("backlog", "analytics", "--json")
    found = json.loads(result.stdout)["analytics"]
    assert (found["waiting"], found["in_flight"], found["dead"]) == (2, 0, 0)
    assert 0 <= found["oldest"] < DEADLINE
    assert "analytics\twaiting=2\tin_flight=0\tdead=0\toldest=" in pubsub("backlog", "analytics").stdout
    assert pubsub("seek", "analytics", "end", "--yes").stdout == "moved analytics to end\n"
    assert json.loads(pubsub("backlog", "analytics", "--json").stdout)["analytics"]["waiting"] == 0
    assert pubsub("seek", "analytics", "2020-01-01T00:00:00Z", "--yes").returncode == 0
    assert json.loads(pubsub("backlog", "analytics", "--json").stdout)["analytics"]["waiting"] == 2
    assert pubsub("delete", "analytics", "-y").stdout == "deleted analytics\n"
    assert pubsub("backlog", "analytics").returncode == 2


@pytest.mark.parametrize(
    "command",
    [
        ["backlog", "nosuch"],
        ["backlog", "nosuch", "--json"],
        ["seek", "nosuch", "end", "--yes"],
        ["dead", "nosuch"],
        ["dead", "nosuch", "list"],
        ["dead", "nosuch", "list", "--json"],
        ["dead", "nosuch", "show", "an-id"],
        ["dead", "nosuch", "edit", "an-id", "new"],
        ["dead", "nosuch", "replay", "--all"],
        ["dead", "nosuch", "replay", "an-id"],
        ["dead", "nosuch", "purge", "--all", "--yes"],
    ],
)
def test_a_subscription_that_is_not_there_is_an_error(
    command: list[str], pubsub: Callable[..., Result]
) -> None:
    result = pubsub(*command)
    shown = "{}\n" if command == ["backlog", "nosuch", "--json"] else ""
    assert (result.returncode, result.stdout) == (2, shown)
    one_line(result, "no subscription 'nosuch'", "'social'", "sqlite", "pubsub declare nosuch PATTERN")


def test_backlog_shows_those_that_are_there_and_names_the_others(
    pubsub: Callable[..., Result], client: PubSub
) -> None:
    client.declare("a", subscription="here")
    result = pubsub("backlog", "nosuch", "here", "neither")
    assert result.returncode == 2
    assert result.stdout.startswith("here\twaiting=0")
    one_line(result, "no subscription 'nosuch', 'neither' in")


def test_declare_takes_a_filter(pubsub: Callable[..., Result], client: PubSub) -> None:
    assert pubsub("declare", "analytics", "#", "--filter", "n > 1").returncode == 0
    for number in range(4):
        client.publish("a", number, headers={"n": number})
    assert [each.payload for each in received_filtered(client)] == [2, 3]


def received_filtered(client: PubSub) -> list[Any]:
    with client.subscribe("#", subscription="analytics", filter="n > 1") as stream:
        return [stream.receive(DEADLINE) for _ in range(2)]


# -- dead letters -------------------------------------------------------------------------------------


@pytest.fixture
def dead(client: PubSub) -> list[str]:
    """The ids of three dead letters of *analytics*."""

    def refuse(payload: Any) -> None:
        raise Reject("no author\nat all")

    client.declare("#", subscription="analytics")
    client.declare("#", subscription="other")
    ids = [
        client.publish("social.post", {"n": 1, "text": "é"}, key="k", headers={"h": 1}).id,
        client.publish("social.post", "text").id,
        client.publish("social.post", b"\x00\xff").id,
    ]
    with PubSub(client.settings) as member:
        member.subscriber("#", subscription="analytics")(refuse)
        member.start()
        deadline = time.monotonic() + DEADLINE
        while client.backlog("analytics").dead != 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    return ids


def test_dead_letters_are_listed(pubsub: Callable[..., Result], dead: list[str]) -> None:
    result = pubsub("dead", "analytics", "list")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == dead
    assert rows[0][1:3] == ["social.post", "1"]
    assert rows[0][4] == r"Reject: no author\nat all"
    assert pubsub("dead", "analytics").stdout == result.stdout
    assert len(pubsub("dead", "analytics", "list", "--limit", "2").stdout.splitlines()) == 2
    first = json.loads(pubsub("dead", "analytics", "list", "--json").stdout.splitlines()[0])
    assert (first["payload"], first["headers"], first["key"]) == ({"n": 1, "text": "é"}, {"h": 1}, "k")
    assert (first["failure"]["error_type"], first["failure"]["error"]) == ("Reject", "no author\nat all")
    assert pubsub("dead", "other", "list").stdout == ""


def test_a_dead_letter_is_shown_in_full(pubsub: Callable[..., Result], dead: list[str]) -> None:
    shown = pubsub("dead", "analytics", "show", dead[0]).stdout
    for words in (dead[0], "social.post", "h=1", "Reject: no author", "attempts:      1", '"text": "é"'):
        assert words in shown
    assert "b'\\x00\\xff'" in pubsub("dead", "analytics", "show", dead[2]).stdout
    result = pubsub("dead", "analytics", "show", "nope")
    assert result.returncode == 1
    one_line(result, "'nope'", "list them")


def test_dead_letters_are_replayed_to_their_subscription_only(
    pubsub: Callable[..., Result], client: PubSub, dead: list[str]
) -> None:
    received(client, "other", 3)
    assert pubsub("dead", "analytics", "replay", dead[1]).stdout == "replayed 1\n"
    [delivery] = received(client, "analytics", 1)
    assert (delivery.id, delivery.payload, delivery.attempt) == (dead[1], "text", 1)
    assert pubsub("dead", "analytics", "replay", "--all").stdout == "replayed 2\n"
    assert [each.id for each in received(client, "analytics", 2)] == [dead[0], dead[2]]
    assert client.backlog("other").waiting == 0
    assert client.backlog("analytics").dead == 0


def test_ids_that_are_no_dead_letters_are_told(pubsub: Callable[..., Result], dead: list[str]) -> None:
    result = pubsub("dead", "analytics", "replay", dead[0], "nope")
    assert (result.returncode, result.stdout) == (4, "replayed 1\n")
    one_line(result, "1 of the ids")
    assert pubsub("dead", "analytics", "purge", "nope", "--yes").returncode == 1


def test_a_dead_letter_is_edited_and_replayed(
    pubsub: Callable[..., Result], client: PubSub, dead: list[str]
) -> None:
    assert pubsub("dead", "analytics", "edit", dead[0], '{"n": 2}', "-H", "more=x").returncode == 0
    [delivery] = received(client, "analytics", 1)
    assert (delivery.id, delivery.payload, delivery.key) == (dead[0], {"n": 2}, "k")
    assert delivery.headers == {"h": 1, "more": "x"}
    assert pubsub("dead", "analytics", "edit", dead[1], "-H", "fixed:bool=true").returncode == 0
    [delivery] = received(client, "analytics", 1)
    assert (delivery.payload, delivery.headers) == ("text", {"fixed": True})
    result = pubsub("dead", "analytics", "edit", dead[2])
    assert result.returncode == 2
    one_line(result, "--file")


def test_an_editor_opens_on_a_terminal(place: Path, client: PubSub, dead: list[str]) -> None:
    editor = place / "editor"
    editor.write_text('#!/bin/sh\nsed -i s/é/mended/ "$1"\n')
    editor.chmod(0o755)
    command = ["env", f"EDITOR={editor}", PUBSUB, "dead", "analytics", "edit", dead[0]]
    code, shown = in_terminal(place, command)
    assert (code, shown.strip()) == (0, f"replayed {dead[0]}")
    [delivery] = received(client, "analytics", 1)
    assert delivery.payload == {"n": 1, "text": "mended"}


def test_dead_letters_are_purged(pubsub: Callable[..., Result], client: PubSub, dead: list[str]) -> None:
    assert pubsub("dead", "analytics", "purge", dead[0], "--yes").stdout == "purged 1\n"
    assert client.backlog("analytics").dead == 2
    assert pubsub("dead", "analytics", "purge", "--all", "--yes").stdout == "purged 2\n"
    assert client.backlog("analytics").dead == 0


def test_a_person_is_asked_before_anything_is_removed(place: Path, client: PubSub, dead: list[str]) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [PUBSUB, "dead", "analytics", "purge", "--all"],
        cwd=place,
        env=environment(),
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(master, b"n\n")
    out, error = process.communicate(timeout=DEADLINE)
    os.close(master)
    os.close(slave)
    assert (process.returncode, out) == (130, "")
    assert "Remove all dead letters for good?" in error
    assert client.backlog("analytics").dead == 3


# -- run ----------------------------------------------------------------------------------------------

APP = """
import os, sys, time
from pathlib import Path
from pubsub_facade import AsyncPubSub, PubSub, Subscribers

def note(word):
    with open("notes", "a") as file:
        file.write(f"{word}\\n")

pubsub = PubSub()

@pubsub.subscriber("sync.#", subscription="sync")
def handle(payload: str) -> None:
    note(f"begin {payload}")
    deadline = time.monotonic() + 30
    while payload == "slow" and not Path("go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    note(f"end {payload}")

def with_async(client):
    @client.subscriber("async.#", subscription="async")
    async def handle_async(payload: str) -> None:
        note(f"async {payload} {client.settings.namespace}")
    return client

class holder:
    inner = with_async(AsyncPubSub())

def factory():
    return with_async(AsyncPubSub())

async def async_factory():
    return with_async(AsyncPubSub())

collected = Subscribers()

@collected.subscriber("async.#", subscription="async")
def collect(payload: str) -> None:
    note(f"async {payload} social")

empty = PubSub()
number = 3

def takes(argument): ...

def returns():
    return 3
"""


@pytest.fixture
def app(place: Path) -> Path:
    (place / "app.py").write_text(APP)
    return place / "notes"


def wait_for_note(notes: Path, word: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not notes.exists() or word not in notes.read_text().splitlines():
        assert time.monotonic() < deadline, (
            f"no {word!r} in {notes.read_text() if notes.exists() else 'nothing'}"
        )
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["holder.inner", "factory", "async_factory", "collected"])
def test_run_finds_a_client_a_factory_or_subscribers(
    name: str, app: Path, client: PubSub, start: Callable[..., Running]
) -> None:
    running = start("run", f"app:{name}")
    running.wait_for("receiving async.# for async")
    client.publish("async.x", "hello")
    wait_for_note(app, "async hello social")
    code, out, error = running.end()
    assert (code, out) == (0, "")
    assert error.splitlines()[-1].endswith("drained")


def test_run_on_a_terminal_says_what_it_receives(place: Path, client: PubSub) -> None:
    (place / "ends.py").write_text(
        "import os, signal\n"
        "from pubsub_facade import PubSub\n"
        "pubsub = PubSub()\n"
        "@pubsub.subscriber('a', subscription='s')\n"
        "def end(payload): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    client.declare("a", subscription="s")
    client.publish("a", 1)
    code, shown = in_terminal(place, [PUBSUB, "run", "ends:pubsub"])
    assert code == 0
    assert "sqlite: receiving a for s" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_what_is_in_hand(
    number: int, app: Path, place: Path, client: PubSub, start: Callable[..., Running]
) -> None:
    running = start("run", "app:pubsub")
    running.wait_for("receiving sync.# for sync")
    client.publish("sync.x", "slow")
    wait_for_note(app, "begin slow")
    running.process.send_signal(number)
    running.wait_for("finishing what is in hand")
    client.publish("sync.x", "later")
    (place / "go").touch()
    code, _, error = running.result()
    assert code == 0, error
    assert app.read_text().splitlines() == ["begin slow", "end slow"]
    assert client.backlog("sync").waiting == 1


def test_a_later_signal_ends_at_once_and_nothing_is_lost(
    app: Path, client: PubSub, start: Callable[..., Running]
) -> None:
    running = start("run", "app:pubsub", PUBSUB_SQLITE__LEASE="2")
    running.wait_for("receiving")
    client.publish("sync.x", "slow")
    wait_for_note(app, "begin slow")
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("finishing what is in hand")
    deadline = time.monotonic() + DEADLINE
    while running.process.poll() is None and time.monotonic() < deadline:
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert running.result()[0] == 128 + signal.SIGTERM
    [delivery] = received(client, "sync", 1)
    assert delivery.payload == "slow"


@pytest.mark.parametrize("name", ["pubsub", "factory"])
def test_a_signal_sent_twice_at_once_is_one(
    name: str, app: Path, client: PubSub, start: Callable[..., Running]
) -> None:
    running = start("run", f"app:{name}")
    running.wait_for("receiving")
    running.process.send_signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGINT)
    code, _, error = running.result()
    assert code == 0
    assert error.splitlines()[-1].endswith("drained")


def test_a_broker_that_is_absent_is_waited_for_until_a_signal(
    app: Path, start: Callable[..., Running]
) -> None:
    running = start("run", "app:factory", PUBSUB_URL="amqp://127.0.0.1:1", PUBSUB_RECONNECT_MAX="0.1")
    running.wait_for("127.0.0.1:1")
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(1)
    code, _, error = running.end()
    assert code == 0
    assert error.count("127.0.0.1:1") == 0  # told once, however often it was tried


def test_the_grace_time_ends_and_says_so_by_its_exit_code(
    app: Path, client: PubSub, start: Callable[..., Running]
) -> None:
    running = start("run", "app:pubsub", "--grace", "0.2")
    running.wait_for("receiving")
    client.publish("sync.x", "slow")
    wait_for_note(app, "begin slow")
    began = time.monotonic()
    code, _, error = running.end()
    assert code == 5
    assert time.monotonic() - began < 10
    assert error.count("not finished") == 1
    assert error.endswith(" subscription sync: 1 delivery was not finished within 0.2 s; it comes again\n")
    [delivery] = received(client, "sync", 1)
    assert delivery.payload == "slow"


def test_concurrency_is_what_the_command_line_says(
    app: Path, place: Path, client: PubSub, start: Callable[..., Running]
) -> None:
    running = start("run", "app:pubsub", "--concurrency", "3", PUBSUB_SUBSCRIPTIONS__SYNC__CONCURRENCY="1")
    running.wait_for("receiving")
    for number in range(3):
        client.publish("sync.x", "slow", key=str(number))
    deadline = time.monotonic() + DEADLINE
    while not app.exists() or app.read_text().count("begin slow") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (place / "go").touch()
    assert running.end()[0] == 0


def test_the_options_before_the_command_reach_the_application(
    app: Path, place: Path, start: Callable[..., Running]
) -> None:
    running = start(
        "--url",
        f"sqlite:///{place}/other.db",
        "--namespace",
        "elsewhere",
        "run",
        "app:factory",
        PUBSUB_BACKEND="memory",
    )
    running.wait_for("receiving")
    with PubSub(namespace="elsewhere", url=f"sqlite:///{place}/other.db") as other:
        other.publish("async.x", "hello")
        wait_for_note(app, "async hello elsewhere")
    assert running.end()[0] == 0


def test_the_only_client_of_a_module_need_not_be_named(place: Path, start: Callable[..., Running]) -> None:
    (place / "single.py").write_text(
        "from pubsub_facade import PubSub\nclient = PubSub()\n\n"
        "@client.subscriber('#', subscription='s')\ndef handle(payload): ...\n"
    )
    running = start("run", "single")
    running.wait_for("receiving # for s")
    assert running.end()[0] == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:pubsub", ["no module 'nowhere'", "MODULE:OBJECT"]),
        ("app:nothing", ["no 'nothing'", "app:pubsub", "app:empty"]),
        ("app:number", ["int", "PubSub"]),
        ("app:takes", ["without arguments", "argument"]),
        ("app:returns", ["returned int"]),
        ("app:empty", ["no handlers"]),
        ("app", ["which object", "app:pubsub, app:empty"]),
        (":pubsub", ["no module's name"]),
        ("broken:pubsub", ["importing 'broken'", "NameError", "nothing", "broken.py, line 2"]),
        ("imports:pubsub", ["importing 'imports'", "no_such_package", "imports.py, line 1"]),
        ("handler:pubsub", ["importing 'handler'", "cannot be called with (payload)"]),
        ("syntax:pubsub", ["importing 'syntax'", "SyntaxError"]),
    ],
)
def test_an_application_that_cannot_run_is_one_line_and_exit_code_2(
    name: str, words: list[str], app: Path, place: Path, pubsub: Callable[..., Result]
) -> None:
    (place / "broken.py").write_text("pubsub = 1\nnothing\n")
    (place / "imports.py").write_text("import no_such_package\n")
    (place / "syntax.py").write_text("def (\n")
    (place / "handler.py").write_text(
        "from pubsub_facade import PubSub\npubsub = PubSub()\n"
        "@pubsub.subscriber('#', subscription='s')\ndef handle(a, b, c): ...\n"
    )
    result = pubsub("run", name)
    assert result.returncode == 2
    one_line(result, *words)


def test_wrong_settings_end_run_with_exit_code_2(app: Path, pubsub: Callable[..., Result]) -> None:
    result = pubsub("run", "app:pubsub", env={"PUBSUB_NAMESPCE": "x"})
    assert result.returncode == 2
    one_line(result, "PUBSUB_NAMESPACE")


# -- parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        ("a=b", {"a": "b"}),
        ("a=b=c", {"a": "b=c"}),
        ("a:int=-3", {"a": -3}),
        ("a:str=3", {"a": "3"}),
        ("a:bool=FALSE", {"a": False}),
        ("a:b:float=1e3", {"a:b": 1000.0}),
        (":int=3", {":int": "3"}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_headers_are_read_with_their_types(text: str, headers: dict[str, Any]) -> None:
    assert parse_header(text) == headers


@pytest.mark.parametrize("text", ["", "a", "=b", "a:int=x", "a:bool=1", '{"a":'])
def test_headers_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError):
        parse_header(text)


def test_line_numbers_are_told_as_ranges() -> None:
    assert ranges([5]) == "line 5"
    assert ranges([3, 1, 2, 7, 9, 10]) == "lines 1-3, 7, 9-10"
