"""Who would get a message on ActiveMQ: what a publisher makes of the entries that subscriptions leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest

from pubsub_facade import Message, Settings
from pubsub_facade.backends._activemq_demand import MAX_AGE, Demand, View
from pubsub_facade.backends._activemq_forms import Artemis, Durable, Form, Virtual
from pubsub_facade.backends._activemq_record import Record, places_for
from pubsub_facade.backends._activemq_session import Session
from pubsub_facade.backends._activemq_wire import ENTRY, GONE, OWNER
from pubsub_facade.backends._stomp import Frame
from pubsub_facade.errors import ConnectionLost, PubSubError
from pubsub_facade.subscription import Subscription

Wanted = Callable[[Mapping[str, str]], bool]


def record(*patterns: str, filter: str | None = None, old: Record | None = None) -> Record:
    subscription = Subscription("s", patterns, filter=filter)
    return Record.declared(subscription, old, places_for(patterns, ordered=False))


def entry(owner: str, of: Record | bytes, **headers: str) -> Frame:
    body = of if isinstance(of, bytes) else of.to_json()
    return {OWNER: owner, ENTRY: f"{owner}-{len(body)}", **headers}, body


def wanted(view: View, *topics: str) -> list[str]:
    return [topic for topic in topics if view.wants(Message(topic, 1))]


def test_nobody_wants_anything_where_there_are_no_entries() -> None:
    assert wanted(View([]), "a", "a.b") == []


def test_a_message_is_wanted_by_the_patterns_themselves_and_not_by_their_places() -> None:
    view = View([entry("s", record("a.#.z", "b.*"))])
    assert wanted(view, "a.z", "a.x.y.z", "a.x", "b.x", "b", "b.x.y") == ["a.z", "a.x.y.z", "b.x"]


def test_a_filter_decides_as_on_the_other_backends() -> None:
    view = View([entry("s", record("a", filter="n > 1")), entry("t", record("a", filter="lang = 'de'"))])
    assert view.wants(Message("a", 1, headers={"n": 2}))
    assert view.wants(Message("a", 1, headers={"lang": "de"}))
    assert not view.wants(Message("a", 1, headers={"n": 1}))
    assert not view.wants(Message("a", 1))


def test_only_the_rules_in_force_count() -> None:
    first = record("a.*", filter="n > 1")
    view = View([entry("s", record("b.*", old=first))])
    assert wanted(view, "a.x", "b.x") == ["b.x"]


def test_entries_that_were_written_at_once_are_taken_together_as_records_are() -> None:
    older, newer = record("a"), record("b")
    for frames in ([entry("s", older), entry("s", newer)], [entry("s", newer), entry("s", older)]):
        assert wanted(View(frames), "a", "b") == ["b"]


def test_a_lease_counts_until_it_lapses_or_its_owner_says_that_it_is_gone() -> None:
    lease = entry("~1", record("a"), expires="100000")
    assert wanted(View([lease], now=99.0), "a") == ["a"]
    assert wanted(View([lease], now=101.0), "a") == []
    assert wanted(View([lease]), "a") == ["a"], "the broker left out what has lapsed"
    renewed = entry("~1", record("a"), expires="130000")
    assert wanted(View([lease, renewed], now=101.0), "a") == ["a"]
    gone = entry("~1", b"", **{GONE: "1"})
    other = entry("~2", record("b"), expires="130000")
    for frames in ([lease, renewed, gone, other], [gone, renewed, other, lease]):
        assert wanted(View(frames), "a", "b") == ["b"]


def test_what_is_no_entry_is_passed_over_and_what_cannot_be_read_is_told() -> None:
    foreign = ({"message-id": "1"}, b"hello")
    assert wanted(View([foreign, entry("s", record("a"), expires="soon")], now=1.0), "a") == ["a"]
    with pytest.raises(PubSubError, match="'audit'"):
        View([entry("audit", b"{}")])


@pytest.mark.parametrize("form", [Durable, Virtual, Artemis])
def test_each_namespace_and_each_form_of_classic_has_entries_of_its_own(form: type[Form]) -> None:
    names = {form(Settings(namespace=namespace)).demand for namespace in ("a", "a.b", "a-b")}
    assert len(names) == 3
    assert Durable(Settings()).demand != Virtual(Settings()).demand


def test_a_lease_neither_outlives_the_broker_nor_its_time() -> None:
    lines = Durable(Settings(namespace="a")).passing_lines("q", 5).splitlines()
    assert "persistent:false" in lines
    assert "persistent:true" not in lines
    assert [line.partition(":")[0] for line in lines] == ["destination", "persistent", "expires"]


class Shelf:
    """The queue of entries: ``shown`` to browsers, ``held`` in truth."""

    demand = "q"

    def __init__(self, *held: Frame) -> None:
        self.held = list(held)
        self.shown: Sequence[Frame] | None = None
        self.read: list[str] = []
        self.fail: BaseException | None = None

    async def browse(self, session: Session, queue: str) -> list[Frame]:
        self.read.append("browsed")
        return await self._all(self.held if self.shown is None else self.shown)

    async def sweep(self, session: Session, queue: str, gone: Wanted) -> list[Frame]:
        self.read.append("swept")
        found = await self._all(self.held)
        self.held = [frame for frame in self.held if not gone(frame[0])]
        return found

    async def _all(self, frames: Sequence[Frame]) -> list[Frame]:
        await asyncio.sleep(0)
        if self.fail is not None:
            raise self.fail
        return list(frames)


def publisher(shelf: Shelf) -> Demand:
    return Demand(cast(Session, None), cast(Form, shelf))


async def alone(demand: Demand, *topics: str) -> list[str]:
    return [message.topic for message in await demand.unwanted([Message(topic, 1) for topic in topics])]


async def test_what_is_wanted_is_sent_by_the_view_in_hand() -> None:
    shelf = Shelf(entry("s", record("a.#")))
    demand = publisher(shelf)
    for _ in range(3):
        assert await alone(demand, "a.b", "a") == []
    assert shelf.read == ["browsed"]


async def test_nothing_is_refused_before_all_entries_were_read_anew() -> None:
    shelf = Shelf(entry("s", record("a.#")))
    demand = publisher(shelf)
    assert await alone(demand, "b", "a") == ["b"]
    shelf.held.append(entry("t", record("b")))
    assert await alone(demand, "b", "a", "c") == ["c"]
    assert shelf.read == ["browsed", "swept", "swept"]
    shelf.read.clear()
    assert await alone(demand, "b") == [], "the newest reading is kept"
    assert shelf.read == []


async def test_a_browser_that_does_not_show_all_refuses_nothing() -> None:
    shelf = Shelf(entry("s", record("a")), entry("t", record("b")))
    shelf.shown = shelf.held[:1]
    assert await alone(publisher(shelf), "b") == []


async def test_a_view_is_sent_by_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shelf = Shelf(entry("s", record("a")))
    demand = publisher(shelf)
    await alone(demand, "a")
    shelf.held.clear()
    now += MAX_AGE
    assert await alone(demand, "a") == []
    now += 0.1
    assert await alone(demand, "a") == ["a"]


async def test_a_new_link_knows_nothing_of_the_old_ones_view() -> None:
    shelf = Shelf(entry("s", record("a")))
    demand = publisher(shelf)
    await alone(demand, "a")
    demand.reset()
    await alone(demand, "a")
    assert shelf.read == ["browsed", "browsed"]


@pytest.mark.parametrize("error", [ConnectionLost("cut"), PubSubError("not readable")])
async def test_where_the_entries_cannot_be_read_nothing_is_called_unwanted(error: PubSubError) -> None:
    shelf = Shelf()
    shelf.fail = error
    demand = publisher(shelf)
    with pytest.raises(type(error), match=str(error)):
        await alone(demand, "a")
    shelf.fail = None
    assert await alone(demand, "a") == ["a"], "the next call reads again"


async def test_who_publishes_first_is_answered_first() -> None:
    """Calls of `send` in order keep their order: one that need not read must not overtake one that must."""
    shelf = Shelf(entry("s", record("a")))
    demand = publisher(shelf)
    await alone(demand, "a")
    order: list[str] = []

    async def publish(topic: str) -> None:
        await alone(demand, topic)
        order.append(topic)

    async with asyncio.TaskGroup() as group:
        for topic in ("b", "a", "c", "a"):
            group.create_task(publish(topic))
    assert order == ["b", "a", "c", "a"]


async def test_declaring_again_mends_an_entry_and_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now_in_force = record("b", old=record("a"))
    stored: list[Any] = []

    async def store(link: object, letters: Sequence[Any]) -> None:
        stored.extend(letters)

    monkeypatch.setattr("pubsub_facade.backends._activemq_demand.store", store)
    for held in (
        [],
        [entry("s", record("a"))],
        [entry("s", b"{}")],
        [entry("s", now_in_force), entry("s", record("a"))],
        [entry("s", now_in_force)],
    ):
        stored.clear()
        form = _Shelf(Settings(namespace="x"), Shelf(*held, entry("other", record("a"))))
        await Demand(cast(Session, _Linked()), form).confirm("s", now_in_force)
        owners = [frame[0][OWNER] for frame in form.shelf.held]
        if held == [entry("s", now_in_force)]:
            assert (owners, stored) == (["s", "other"], [])
        else:
            assert owners == ["other"], "what was there is removed"
            assert [letter.headers[OWNER] for letter in stored] == ["s"]
            assert Record.from_json(stored[0].body) == now_in_force


class _Linked:
    main = None


class _Shelf(Durable):
    """Names as Classic has them, with a queue in memory."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        super().__init__(settings)
        self.shelf = shelf

    async def browse(self, session: Session, queue: str) -> list[Frame]:
        return await self.shelf.browse(session, queue)

    async def sweep(self, session: Session, queue: str, wanted: Wanted) -> list[Frame]:
        return await self.shelf.sweep(session, queue, wanted)
