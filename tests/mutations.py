"""Break one rule of the contract at a time, and see the suite turn red: ``python -m tests.mutations``.

Each break is a text replaced in a copy of the package; the cases that should notice run against the copy, on the
memory backend. A break that goes unnoticed, or whose text is no longer there, is an error. ``-k WORD`` picks some.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
DEADLINE: Final = "4"  # s that a case waits for what a break may have taken away
CONFORMANCE: Final = "tests/unit/test_conformance.py"


@dataclass(frozen=True)
class Mutation:
    """One broken rule.

    Arguments:
        rule: what the package does no more.
        file: in the package.
        old, new: the text and what stands there instead.
        case: the test that must fail; a name, or part of one.
        tests: the file it is in.
    """

    rule: str
    file: str
    old: str
    new: str
    case: str
    tests: str = CONFORMANCE


MUTATIONS: Final = (
    Mutation(
        "a message is settled only after its handler returned",
        "workers.py",
        "            payload: Any = None\n            if handler.decode",
        "            payload: Any = None\n            delivery.receiver.ack(delivery)\n            if handler.decode",
        "a_message_is_settled_once_its_handler_returned",
    ),
    Mutation(
        "a filter is applied",
        "backends/memory.py",
        "self.filter is None or self.filter.matches(message.headers)",
        "True",
        "each_filter_selects_exactly_its_messages",
    ),
    Mutation(
        "* is exactly one word",
        "topics.py",
        '        child = node.children.get("#")\n',
        '        child = node.children.get("#") or node.children.get("*")\n',
        "each_pattern_gets_exactly_its_topics",
    ),
    Mutation(
        "# is also no word",
        "topics.py",
        "        _skip_many(following)\n",
        "",
        "each_pattern_gets_exactly_its_topics",
    ),
    Mutation(
        "a parked message comes back as the next attempt",
        "backends/memory.py",
        "entry.attempt = delivery.attempt + 1",
        "entry.attempt = delivery.attempt",
        "a_message_is_tried_max_attempts_times",
    ),
    Mutation(
        "a held message comes back as the next attempt",
        "consumer.py",
        "        delivery.attempt += 1\n",
        "",
        "a_failing_message_holds_its_key_only",
    ),
    Mutation(
        "a dead letter says why it failed",
        "backends/memory.py",
        "shown.failure = letter.failure",
        "shown.failure = None",
        "a_dead_letter_is_the_original_message",
    ),
    Mutation(
        "the first failure's time is kept over retries",
        "consumer.py",
        "first_at=delivery.failure.first_at if delivery.failure is not None else now,",
        "first_at=now,",
        "a_dead_letter_is_the_original_message",
    ),
    Mutation(
        "a key has one message out at a time",
        "lanes.py",
        "        if self._ordered and delivery.key is not None:\n            if delivery.key in self._busy:",
        "        if False:\n            if delivery.key in self._busy:",
        "an_unsettled_message_holds_its_key",
    ),
    Mutation(
        "members of an ordered subscription do not share a key",
        "backends/memory.py",
        "if entry.message.key is not None and holders and holders[0] is not receiver:",
        "if False:",
        "in_order_over_three_members_with_failures",
    ),
    Mutation(
        "an ordered subscription does not park",
        "consumer.py",
        "self._holds = subscription.ordered or subscription.name is None",
        "self._holds = subscription.name is None",
        "a_failing_message_holds_its_key_only",
    ),
    Mutation(
        "a retry waits for its backoff",
        "consumer.py",
        "delay = self.subscription.backoff.delay(delivery.attempt) if after is None else max(0.0, after)",
        "delay = 0.0",
        "each_attempt_waits_longer_by_the_backoff",
    ),
    Mutation(
        "a waiting message holds up nobody",
        "consumer.py",
        "        self._parking.append(delivery)\n        return self._copy(delivery)",
        "        time.sleep(delay)\n        self._parking.append(delivery)\n        return self._copy(delivery)",
        "a_waiting_message_does_not_hold_up_others",
    ),
    Mutation(
        "max_attempts is the last attempt",
        "consumer.py",
        "or delivery.attempt >= self.subscription.max_attempts:",
        "or delivery.attempt + 1 >= self.subscription.max_attempts:",
        "a_message_is_tried_max_attempts_times",
    ),
    Mutation(
        "Reject is no retry",
        "consumer.py",
        "foreseen = isinstance(error, Reject | DecodeError)",
        "foreseen = isinstance(error, DecodeError)",
        "reject_makes_a_dead_letter_at_once",
    ),
    Mutation(
        "what does not decode is no retry",
        "consumer.py",
        "foreseen = isinstance(error, Reject | DecodeError)",
        "foreseen = isinstance(error, Reject)",
        "an_undecodable_payload_is_a_dead_letter_at_once",
    ),
    Mutation(
        "a BaseException is its message's failure, not the member's end",
        "workers.py",
        "        except BaseException as error:  # whatever",
        "        except Exception as error:  # whatever",
        "whatever_a_handler_raises",
    ),
    Mutation(
        "a handler's own cancellation is its message's failure",
        "workers.py",
        "        while task.cancelling():\n            task.uncancel()\n        return False",
        "        return bool(task.cancelling())",
        "cancelled_from_within",
    ),
    Mutation(
        "every ephemeral subscription gets each message",
        "backends/memory.py",
        "                queue = _Queue(subscription)\n                space.ephemeral.append(queue)",
        "                queue = space.ephemeral[0] if space.ephemeral else _Queue(subscription)\n"
        "                space.ephemeral.append(queue)",
        "an_ephemeral_subscription_gets_each_message",
    ),
    Mutation(
        "an ephemeral subscription is gone when it disconnects",
        "backends/memory.py",
        "                self._space.ephemeral.remove(self._queue)",
        "                pass",
        "publishing_to_nobody_is_refused",
    ),
    Mutation(
        "what is released comes again",
        "backends/memory.py",
        "                self._queue.give_back([entry])\n",
        "                pass\n",
        "a_released_message_comes_again",
    ),
    Mutation(
        "what is released stays before the others of its key",
        "consumer.py",
        "if self._lanes.holds(delivery) and not self._stopping",
        "if False and not self._stopping",
        "a_released_message_keeps_its_place",
    ),
    Mutation(
        "leaving gives back what was not settled",
        "backends/memory.py",
        "            self._queue.give_back([entry for entry in map(self._queue.settle, mine) if entry is not None])",
        "            [self._queue.settle(each) for each in mine]",
        "leaving_a_stream_gives_back",
    ),
    Mutation(
        "close waits for the handlers in hand",
        "client.py",
        "            await consumer.settle(max(0.0, end - time.monotonic()))\n",
        "",
        "close_lets_handlers_finish",
    ),
    Mutation(
        "close waits for sync handlers too",
        "client.py",
        "            await consumer.settle(max(0.0, end - time.monotonic()))\n",
        "",
        "close_lets_sync_handlers_finish",
    ),
    Mutation(
        "the second settlement does nothing",
        "consumer.py",
        "        if delivery.settled:\n            return False\n",
        "",
        "a_handler_may_settle_by_hand",
    ),
    Mutation(
        "a namespace is its own",
        "backends/memory.py",
        "return self.hub.namespace(self.settings.namespace)",
        'return self.hub.namespace("")',
        "two_namespaces_do_not_see_each_other",
    ),
    Mutation(
        "a replay is for its subscription only",
        "backends/memory.py",
        "            queue.ready.extend(_Entry(self.hub.next(), message) for message in messages)\n",
        "            for message in messages:\n                self.hub.route(self._space, message)\n",
        "a_replay_goes_to_that_subscription_only",
    ),
    Mutation(
        "a replay starts at attempt 1 and leaves no dead letter",
        "dead_letters.py",
        "            await self.purge([letter.id for letter in batch])\n",
        "",
        "a_replay_goes_to_that_subscription_only",
    ),
    Mutation(
        "declaring again changes the patterns",
        "backends/memory.py",
        "                queue.define(subscription)\n",
        "                pass\n",
        "other_patterns_count_from_now_on",
    ),
    Mutation(
        "declaring again keeps what waits",
        "backends/memory.py",
        "                queue.define(subscription)\n",
        "                self._space.queues[subscription.name] = _Queue(subscription)\n",
        "other_patterns_count_from_now_on",
    ),
    Mutation(
        "deleting forgets",
        "backends/memory.py",
        "            queue = self._space.queues.pop(subscription, None)\n",
        "            queue = self._space.queues.get(subscription)\n",
        "deleting_a_subscription_removes_all_it_holds",
    ),
    Mutation(
        "a window bounds what is out",
        "backends/memory.py",
        "self._queue.take(self, self._window - self._out)",
        "self._queue.take(self, 10_000)",
        "at_most_a_window",
    ),
    Mutation(
        "an oversize payload is refused",
        "client.py",
        "if len(prepared.body) > limit:",
        "if len(prepared.body) > limit + 1:",
        "the_largest_payload_arrives",
    ),
    Mutation(
        "a batch is checked before any of it is sent",
        "client.py",
        "        prepared = [self.prepare(message) for message in messages]\n        if prepared:\n",
        "        prepared = []\n        for message in messages:\n            prepared.append(self.prepare(message))\n"
        "            await self._publish(prepared[-1:], timeout)\n        if not prepared:\n",
        "a_bad_topic_is_refused or the_largest_payload",
    ),
    Mutation(
        "a closed client refuses to publish",
        "client.py",
        '        if self._closed:\n            raise Closed("this client is closed: make a new one")\n'
        "        if self._publisher is None:",
        "        if self._publisher is None:",
        "a_closed_client_refuses_everything",
    ),
    Mutation(
        "a user's header keeps out of the facade's names",
        "message.py",
        "if name.lower().startswith(RESERVED_PREFIX):",
        "if False:",
        "what_a_message_cannot_be_is_refused",
    ),
    Mutation(
        "a delay is waited for",
        "backends/memory.py",
        "                if message.delay:\n",
        "                if False:\n",
        "a_delayed_message_comes_when_its_time_has_come",
    ),
    Mutation(
        "seek to a time leaves out what is older",
        "backends/memory.py",
        "and (since is None or (message.timestamp or 0) >= since)",
        "",
        "seek_to_a_time",
    ),
    Mutation(
        "handlers of an unordered subscription run at the same time",
        "client.py",
        "workers = workers_for(consumer, registration.handler, concurrency)",
        "workers = workers_for(consumer, registration.handler, 1)",
        "without_order_handlers_run_at_the_same_time",
    ),
    Mutation(
        "sync publishes that wait together share a confirm",
        "publisher.py",
        "while line and len(batch.messages) < MAX_BATCH and",
        "while line and len(batch.messages) < 1 and",
        "threads_publish_at_once_and_share_confirms",
    ),
    Mutation(
        "a lost link is made good",
        "publisher.py",
        "not self._flying and not self._sends:\n                        self._requeue()\n",
        "not self._flying and not self._sends:\n                        self._returned.clear()\n",
        "a_lost_link_is_made_good",
        "tests/unit/test_publisher.py",
    ),
    Mutation(
        "what may have left is not called unsent",
        "publisher.py",
        '"not stored" if index >= publication.sent else "unknown"',
        '"not stored"',
        "without_a_confirm_says_unknown",
        "tests/unit/test_publisher.py",
    ),
    Mutation(
        "a copy that is not stored is kept",
        "consumer.py",
        "                    kept.extend(mine)\n",
        "                    pass\n",
        "not_stored_is_kept",
        "tests/unit/test_consumer.py",
    ),
    Mutation(
        "what a lost link had in line is forgotten",
        "consumer.py",
        "        self._lanes.clear()\n",
        "",
        "a_lost_link_is_joined_again",
        "tests/unit/test_consumer.py",
    ),
    Mutation(
        "the mark stays below what is open",
        "acks.py",
        "        if line[0] != tag:\n            self._done[tag] = None\n            return True\n"
        "        line.popleft()\n        mark",
        "        line.remove(tag)\n        mark",
        "the_mark_is_below_all_that_is_open",
        "tests/unit/test_acks.py",
    ),
    Mutation(
        "what was committed of a Kafka topic says nothing of one that was made again under its name",
        "backends/_kafka_pins.py",
        "for tp, known in found.items() if same(known.topic_id, ids.get(tp[0]))}",
        "for tp, known in found.items()}",
        "a_commit_or_pin_of_another_topic_says_nothing",
        "tests/unit/test_kafka_wire.py",
    ),
    Mutation(
        "a Kafka topic goes by its id in a fetch",
        "backends/_kafka_fetch.py",
        "[1] < FETCH_IDS:",
        "[1] < 99:",
        "a_broker_is_asked_for_what_it_knows",
        "tests/unit/test_kafka_wire.py",
    ),
)


def run(mutation: Mutation) -> str | None:
    """None where the break was noticed, else what is wrong."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copy = Path(directory)
        shutil.copytree(
            ROOT / "pubsub_facade", copy / "pubsub_facade", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        broken = copy / "pubsub_facade" / mutation.file
        text = broken.read_text()
        if mutation.old not in text:
            return "its text is not there any more"
        broken.write_text(text.replace(mutation.old, mutation.new, 1))
        words = mutation.case if mutation.tests != CONFORMANCE else f"TestMemory and ({mutation.case})"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "--tb=line",
        ]
        result = subprocess.run(
            [*command, "--timeout=60", "-k", words, mutation.tests],
            cwd=copy,
            env={"PATH": "/usr/bin:/bin", "CONFORMANCE_DEADLINE": DEADLINE, "HOME": directory},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode == 1:
        return None
    if result.returncode == 0:
        return f"nobody noticed: {result.stdout.strip().splitlines()[-1]}"
    return f"pytest ended with {result.returncode}: {(result.stdout + result.stderr)[-400:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only rules that hold this text")
    parser.add_argument("-j", type=int, default=2, help="how many at once")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if arguments.k in mutation.rule]
    unnoticed = 0
    with ThreadPoolExecutor(arguments.j) as pool:
        for mutation, wrong in zip(chosen, pool.map(run, chosen), strict=True):
            print(
                f"{'NOT NOTICED' if wrong else 'noticed'}: {mutation.rule}{f' ({wrong})' if wrong else ''}",
                flush=True,
            )
            unnoticed += wrong is not None
    print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks noticed")
    return 1 if unnoticed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
