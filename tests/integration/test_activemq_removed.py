"""ActiveMQ Classic: topics and queues that its management removes under members, and brokers that do not tell."""

from __future__ import annotations

import logging
import secrets
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from brokers.activemq import Classic
from brokers.broker import STATE
from brokers.ports import DEFAULTS
from pubsub_facade import AsyncPubSub, Message, SendFailed, Settings
from pubsub_facade.backends._activemq_jolokia import Jolokia
from pubsub_facade.backends.activemq import ActivemqBackend
from pubsub_facade.testing.conformance import Inbox, eventually, receive, until
from pubsub_facade.testing.faults import free_port
from tests.conftest import broker_settings

FORMS: Final = [
    pytest.param(form, marks=pytest.mark.broker(form)) for form in ("activemq", "activemq-virtual")
]
DURABLE: Final = pytest.mark.parametrize("console", FORMS[:1], indirect=True)
VIRTUAL: Final = pytest.mark.parametrize("console", FORMS[1:], indirect=True)
BOTH: Final = pytest.mark.parametrize("console", FORMS, indirect=True)


class Console:
    """Clients of one form in a namespace with a dot, and the management that removes things under them."""

    def __init__(self, form: str) -> None:
        self.settings = broker_settings(form)(namespace=f"t{secrets.token_hex(4)}.gone")
        self.space = self.settings.namespace.replace(".", "~")
        jolokia = Jolokia.of(self.settings.activemq)
        assert jolokia is not None
        self._jolokia = jolokia
        self._stack = AsyncExitStack()

    async def client(self, **settings: Any) -> AsyncPubSub:
        chosen = self.settings.model_copy(update=settings)
        return await self._stack.enter_async_context(AsyncPubSub(chosen))

    async def remove_topic(self, topic: str) -> None:
        await self._jolokia.remove_topic(f"{self.space}.{topic}")

    async def remove_queue(self, queue: str) -> None:
        await self._jolokia.remove_queue(queue)

    async def finish(self) -> None:
        await self._stack.aclose()
        async with AsyncPubSub(self.settings) as pubsub:
            await pubsub.delete("audit")


@pytest_asyncio.fixture
async def console(request: pytest.FixtureRequest) -> AsyncIterator[Console]:
    console = Console(request.param)
    yield console
    await console.finish()


async def member(pubsub: AsyncPubSub, *patterns: str, ordered: bool = False) -> Inbox:
    inbox = Inbox()
    pubsub.subscriber(*patterns, subscription="audit", ordered=ordered)(inbox)
    await pubsub.start()
    return inbox


async def until_it_arrives(pubsub: AsyncPubSub, inbox: Inbox, topic: str) -> None:
    """Nobody has promised what is published before the members have got over it; what comes after that is."""
    ids: set[str] = set()

    async def one() -> bool:
        ids.add((await pubsub.publish(topic, "again")).id)
        return bool(ids & set(inbox.ids))

    await eventually(one, f"a message on {topic} after the removal")
    sent = await pubsub.publish_many([Message(topic, n) for n in range(50)])
    await inbox.until_ids(message.id for message in sent)


def warnings(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in found if all(word in text for word in words)]


@DURABLE
class TestTopics:
    """Durable subscriptions: the broker never again gives one anything of a topic that was removed and came back."""

    @pytest.mark.parametrize("pattern", ["a.x", "a.*", "#"])
    async def test_a_member_receives_again_from_a_topic_that_was_removed(
        self, console: Console, pattern: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        pubsub, running = await console.client(), await console.client()
        inbox = await member(running, pattern)
        await inbox.until_ids([(await pubsub.publish("a.x", 1)).id])
        for time in (1, 2):  # what it has of its own now is removed as well
            await console.remove_topic("a.x")
            await until_it_arrives(pubsub, inbox, "a.x")
            assert len(warnings(caplog, f"topic {console.space}.a.x was removed")) == time

    async def test_what_waits_on_other_topics_stays_and_nothing_comes_twice(self, console: Console) -> None:
        pubsub, running = await console.client(), await console.client()
        async with running.subscribe("#", subscription="audit", window=1) as stream:
            sent = await pubsub.publish_many([Message("b.y", n) for n in range(20)])
            (held,) = await receive(stream, 1, ack=False)
            await pubsub.publish("a.x", "goes with its topic")
            await console.remove_topic("a.x")

            async def apart() -> bool:
                return (await pubsub.backlog("audit")).waiting is None

            await eventually(apart, "a place for the topic alone")
            await held.ack()
            assert [d.id for d in await receive(stream, 19)] == [message.id for message in sent[1:]]
            after = await pubsub.publish_many([Message(topic, topic) for topic in ("a.x", "b.y", "a.x")])
            assert {d.id for d in await receive(stream, 3)} == {message.id for message in after}
            with pytest.raises(TimeoutError):
                await stream.receive(0.5)

    async def test_the_next_member_has_it_too(self, console: Console) -> None:
        pubsub, running, standing_by = [await console.client() for _ in range(3)]
        inbox = await member(running, "#")
        await inbox.until_ids([(await pubsub.publish("a.x", 1)).id])
        other = await member(standing_by, "#")
        await console.remove_topic("a.x")
        await until_it_arrives(pubsub, inbox, "a.x")
        await running.close()
        sent = await pubsub.publish_many([Message("a.x", n) for n in range(20)])
        await other.until_ids(message.id for message in sent)

    async def test_an_ordered_subscription_goes_on_and_can_be_declared_again(
        self, console: Console, caplog: pytest.LogCaptureFixture
    ) -> None:
        pubsub, running = await console.client(), await console.client()
        inbox = await member(running, "a.*", ordered=True)
        await inbox.until_ids([(await pubsub.publish("a.x", 1)).id])
        await console.remove_topic("a.x")
        await until_it_arrives(pubsub, inbox, "a.x")
        assert warnings(caplog, "its order beside other topics is not kept")
        await pubsub.declare("a.*", subscription="audit", ordered=True)

    async def test_topics_of_others_are_none_of_its_business(
        self, console: Console, caplog: pytest.LogCaptureFixture
    ) -> None:
        pubsub, running = await console.client(), await console.client()
        inbox = await member(running, "a.*")
        await pubsub.declare("a.*", subscription="other")
        await pubsub.publish_many([Message("b.x", 1), Message("a.x", 1)])
        await console.remove_topic("b.x")
        await pubsub.delete("other")  # removes a topic below a.*, by which the broker remembered it
        await console.remove_topic("a.x")
        await until_it_arrives(pubsub, inbox, "a.x")
        assert len(warnings(caplog, "was removed")) == 1


@VIRTUAL
class TestQueues:
    """Virtual topics: the broker does not make the queue again, and what is published goes nowhere."""

    async def test_members_join_again_when_their_queue_was_removed(
        self, console: Console, caplog: pytest.LogCaptureFixture
    ) -> None:
        pubsub, one, two = [await console.client() for _ in range(3)]
        inbox = await member(one, "a.*")
        two.subscriber("a.*", subscription="audit")(inbox)
        await two.start()
        await inbox.until_ids([(await pubsub.publish("a.x", 1)).id])
        queue = f"Consumer.audit.VirtualTopic.{console.space}.a.*"

        def told() -> int:
            return len(warnings(caplog, f"queue {queue} was removed", "joining again"))

        await console.remove_queue(queue)
        await until(lambda: told() == 2, "a warning of each member")
        await until_it_arrives(pubsub, inbox, "a.x")
        await console.remove_queue(queue)  # one of them may still be joining
        await until(lambda: told() > 2, "another warning")
        await until_it_arrives(pubsub, inbox, "a.x")

    async def test_members_elsewhere_survive_a_delete(self, console: Console) -> None:
        pubsub, running = await console.client(), await console.client(require_subscribers=True)
        inbox = await member(running, "a.*")
        await pubsub.delete("audit")
        await until_it_arrives(pubsub, inbox, "a.x")
        await until_it_arrives(await console.client(require_subscribers=True), inbox, "a.x")


@BOTH
class TestBeside:
    """Queues that a subscription has beside what waits for it."""

    @pytest.mark.parametrize("kind", ["retry", "record"])
    async def test_members_join_again_when_it_is_removed(
        self, console: Console, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        pubsub, running = await console.client(), await console.client()
        inbox = await member(running, "a.*")
        queue = f"{console.space}${kind}.audit"
        await console.remove_queue(queue)
        await until(lambda: bool(warnings(caplog, f"queue {queue} was removed")), "a warning")
        await until_it_arrives(pubsub, inbox, "a.x")

    async def test_who_requires_subscribers_finds_them_again_when_the_entries_are_removed(
        self, console: Console
    ) -> None:
        running, pubsub = await console.client(), await console.client(require_subscribers=True)
        inbox = await member(running, "a.*")
        await console.remove_queue(ActivemqBackend(console.settings).form.demand)

        async def taken() -> bool:
            try:
                await inbox.until_ids([(await pubsub.publish("a.x", 1)).id])
            except SendFailed:
                return False
            return True

        await eventually(taken, "a publish that is not refused")


class Untold(Classic):
    """A broker of its own whose clients get no advisories."""

    def configure(self) -> None:
        super().configure()
        path = self.directory / "activemq.xml"
        path.write_text(self.changed(path.read_text()))

    def changed(self, text: str) -> str:
        return text


class Mute(Untold):
    """Publishes none."""

    def changed(self, text: str) -> str:
        return replaced(text, 'useShutdownHook="true"', 'useShutdownHook="true" advisorySupport="false"')


class Strict(Untold):
    """Lets the user do everything else."""

    def changed(self, text: str) -> str:
        entries = "".join(
            f'<authorizationEntry {kind}="{name}" read="{who}" write="users" admin="users"/>'
            for kind, name, who in (
                ("queue", "&gt;", "users"),
                *(("topic", name, "users") for name in ("*", "strict.&gt;", "VirtualTopic.&gt;")),
                ("topic", "ActiveMQ.Advisory.&gt;", "nobody"),
            )
        )
        plugin = (
            "</simpleAuthenticationPlugin><authorizationPlugin><map><authorizationMap><authorizationEntries>"
            f"{entries}</authorizationEntries><tempDestinationAuthorizationEntry><tempDestinationAuthorizationEntry "
            'read="users" write="users" admin="users"/></tempDestinationAuthorizationEntry></authorizationMap></map>'
            "</authorizationPlugin>"
        )
        return replaced(text, "</simpleAuthenticationPlugin>", plugin)


class Lean(Untold):
    """Has not the libraries by which it puts advisories into words."""

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("-cp") + 1
        jars = [str(jar) for jar in Path(command[at]).parent.glob("*.jar")]
        lean = [jar for jar in jars if "xstream" not in jar and "jettison" not in jar]
        assert len(lean) == len(jars) - 2
        return [*command[:at], ":".join(lean), *command[at + 1 :]]


def replaced(text: str, there: str, instead: str) -> str:
    assert text.count(there) == 1, there
    return text.replace(there, instead)


@contextmanager
def running(kind: type[Untold]) -> Iterator[Untold]:
    directory, ports = (
        STATE / f"untold-{kind.__name__.lower()}",
        {name: free_port() for name in DEFAULTS["activemq"]},
    )
    kind(directory, ports).remove()
    broker = kind(directory, ports)
    try:
        broker.start()
        yield broker
    finally:
        broker.remove()


@pytest.mark.broker("activemq")
@pytest.mark.parametrize("kind", [Mute, Strict, Lean])
async def test_members_work_where_nothing_tells_what_is_removed(kind: type[Untold]) -> None:
    with running(kind) as broker:
        for text in broker.settings(broker.ports).values():
            settings = Settings(**tomllib.loads(text), namespace="strict")
            async with AsyncPubSub(settings) as pubsub:
                inbox = await member(pubsub, "a.*")
                sent = await pubsub.publish_many([Message("a.x", n) for n in range(50)])
                await inbox.until_ids(message.id for message in sent)
                assert len(inbox.seen) == 50
                findings = await pubsub.diagnose()
            told = [each for each in findings if "removed by the console" in each.what]
            assert [each.level for each in told] == ["warning"], findings
