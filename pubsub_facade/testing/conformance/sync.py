"""`PubSub`: the same contract for sync code, from many threads, and in a forked child."""

from __future__ import annotations

import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from pubsub_facade.errors import Closed, MessageError, SendFailed, TopicError
from pubsub_facade.message import Delivery, Message
from pubsub_facade.publisher import _Batch
from pubsub_facade.testing.conformance._suite import DEADLINE, QUIET, SOON, Bench, Suite
from pubsub_facade.testing.conformance.retry import ERRORS


class Sync(Suite):
    """The sync verbs, over the same engine."""

    def test_the_sync_verbs_do_what_the_async_ones_do(self, bench: Bench) -> None:
        with bench.sync_client() as pubsub:
            pubsub.declare("social.#", subscription="analytics")
            sent = pubsub.publish("social.post", {"n": 0}, key="k", headers={"lang": "en"})
            more = pubsub.publish_many(Message("social.post", {"n": n}) for n in range(1, 5))
            with pubsub.subscribe("social.#", subscription="analytics") as stream:
                got = [stream.receive(DEADLINE) for _ in range(5)]
                assert {d.id for d in got} == {sent.id, *(message.id for message in more)}
                assert sorted(d.payload["n"] for d in got) == list(range(5))
                for delivery in got:
                    delivery.ack()
                with pytest.raises(TimeoutError):
                    stream.receive(QUIET)
            assert pubsub.backlog("analytics").waiting in (0, None)
            pubsub.ping()
            assert pubsub.state == "connected"
            pubsub.delete("analytics")
        with pytest.raises(Closed):
            pubsub.publish("social.post", "late")
        pubsub.close()

    def test_a_sync_stream_settles_by_hand_and_gives_back_the_rest(self, bench: Bench) -> None:
        pubsub = bench.sync_client()
        with pubsub.subscribe("social.#", subscription="analytics", max_attempts=2, backoff=SOON) as stream:
            sent = pubsub.publish_many(Message("social.post", n) for n in range(4))
            by_id = {d.id: d for d in (stream.receive(DEADLINE) for _ in range(4))}
            by_id[sent[0].id].ack()
            by_id[sent[1].id].reject("bad")
            by_id[sent[2].id].retry(0)
            again = stream.receive(DEADLINE)
            assert (again.id, again.attempt) == (sent[2].id, 2)
            again.retry()  # the last attempt: a dead letter
        with pubsub.subscribe("social.#", subscription="analytics") as stream:
            for delivery in stream:
                assert delivery.id == sent[3].id
                delivery.ack()
                break
        letters = pubsub.dead_letters("analytics")
        assert {letter.id for letter in letters} == {sent[1].id, sent[2].id}
        assert letters.count() == 2
        assert letters.replay([sent[1].id]) == 1
        letters.edit(sent[2].id, "better")
        assert letters.purge() == 0
        with pubsub.subscribe("social.#", subscription="analytics") as stream:
            got = {d.id: d.payload for d in (stream.receive(DEADLINE) for _ in range(2))}
            assert got == {sent[1].id: 1, sent[2].id: "better"}

    def test_threads_publish_at_once_and_share_confirms(self, bench: Bench) -> None:
        pubsub = bench.sync_client()
        pubsub.declare("social.#", subscription="analytics")
        pubsub.publish("elsewhere", "so that there is a publisher")
        publisher = pubsub._client.publisher()
        batches: list[int] = []
        next_batch = publisher._next_batch

        def counted() -> _Batch:
            batch = next_batch()
            batches.append(len(batch.messages))
            return batch

        publisher._next_batch = counted  # type: ignore[method-assign]
        start = threading.Barrier(16)

        def publish(thread: int) -> list[str]:
            start.wait(DEADLINE)
            return [pubsub.publish("social.post", [thread, n]).id for n in range(20)]

        with ThreadPoolExecutor(16) as pool:
            ids = {id for ids in pool.map(publish, range(16)) for id in ids}
        assert len(ids) == 320
        assert sum(batches) == 320
        assert len(batches) < 320, "every publish had a round trip of its own"
        with pubsub.subscribe("social.#", subscription="analytics") as stream:
            got: set[str] = set()
            while got != ids:
                delivery = stream.receive(DEADLINE)
                assert delivery.id in ids
                got.add(delivery.id)
                delivery.ack()

    def test_sync_and_async_handlers_mix(self, bench: Bench) -> None:
        pubsub = bench.sync_client()
        done = threading.Semaphore(0)
        got: dict[str, list[object]] = {"sync": [], "async": [], "delivery": []}

        @pubsub.subscriber("social.#", subscription="sync", concurrency=4)
        def handle(payload: int) -> None:
            got["sync"].append((payload, threading.current_thread() is threading.main_thread()))
            done.release()

        @pubsub.subscriber("social.#", subscription="async")
        async def handle_async(payload: int) -> None:
            got["async"].append((payload, threading.current_thread() is threading.main_thread()))
            done.release()

        @pubsub.subscriber("social.#", subscription="delivery", backoff=SOON)
        def handle_delivery(payload: int, delivery: Delivery) -> None:
            if delivery.attempt == 1:
                raise ValueError("again")
            got["delivery"].append((payload, delivery.topic == "social.post"))
            done.release()

        pubsub.start()
        pubsub.publish_many(Message("social.post", n) for n in range(10))
        for _ in range(30):
            assert done.acquire(timeout=DEADLINE)
        assert sorted(got["sync"]) == [(n, False) for n in range(10)]  # type: ignore[type-var]
        assert sorted(got["async"]) == [(n, False) for n in range(10)]  # type: ignore[type-var]
        assert sorted(got["delivery"]) == [(n, True) for n in range(10)]  # type: ignore[type-var]

    def test_whatever_a_sync_handler_raises_is_its_message_s_failure_only(self, bench: Bench) -> None:
        pubsub = bench.sync_client()
        seen: list[tuple[str, int]] = []

        @pubsub.subscriber("social.#", subscription="analytics", concurrency=2, backoff=SOON)
        def handle(payload: str, delivery: Delivery) -> None:
            seen.append((payload, delivery.attempt))
            if delivery.attempt == 1:
                raise ERRORS[payload]

        pubsub.start()
        pubsub.publish_many(Message("social.post", kind) for kind in ERRORS)
        end = time.monotonic() + DEADLINE
        while len(seen) < 2 * len(ERRORS) and time.monotonic() < end:
            time.sleep(0.01)
        assert sorted(seen) == sorted((kind, attempt) for kind in ERRORS for attempt in (1, 2))

    def test_close_lets_sync_handlers_finish(self, bench: Bench) -> None:
        pubsub = bench.sync_client()
        entered, finished = threading.Event(), []

        @pubsub.subscriber("social.#", subscription="analytics")
        def handle(payload: str) -> None:
            entered.set()
            time.sleep(0.3)  # the work: still under way when close() begins
            finished.append(payload)

        pubsub.start()
        pubsub.publish("social.post", "hello")
        assert entered.wait(DEADLINE)
        pubsub.close()
        assert finished == ["hello"]
        with (
            bench.sync_client() as other,
            other.subscribe("social.#", subscription="analytics") as stream,
            pytest.raises(TimeoutError),
        ):
            stream.receive(QUIET)

    def test_what_is_wrong_is_said_by_the_calling_thread(self, bench: Bench) -> None:
        pubsub = bench.sync_client()
        with pytest.raises(TopicError):
            pubsub.publish("a b", 1)
        with pytest.raises(MessageError):
            pubsub.publish("a", 1, headers={"a": None})  # type: ignore[dict-item]
        if bench.capabilities.require_subscribers:
            strict = bench.sync_client(require_subscribers=True)
            with pytest.raises(SendFailed) as caught:
                strict.publish("social.post", 1, id="alone")
            assert caught.value.fates == {"alone": "not stored"}

    def test_a_forked_child_publishes_on_a_link_of_its_own(self, bench: Bench) -> None:
        if not bench.capabilities.shared:
            pytest.skip("capability shared is false")
        pubsub = bench.sync_client()
        pubsub.declare("social.#", subscription="analytics")
        pubsub.publish("social.post", "parent before")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 on: that threads were there
            child = os.fork()
        if child == 0:
            try:
                pubsub.publish("social.post", "child")
                pubsub.publish_many([Message("social.post", "child many")])
                os._exit(0)
            except BaseException:
                os._exit(1)
        pubsub.publish("social.post", "parent meanwhile")
        assert _exit_code(child) == 0
        pubsub.publish("social.post", "parent after")
        with pubsub.subscribe("social.#", subscription="analytics") as stream:
            got = [stream.receive(DEADLINE).payload for _ in range(5)]
        assert sorted(got) == ["child", "child many", "parent after", "parent before", "parent meanwhile"]


def _exit_code(child: int) -> int:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child did not end")
