"""Tests that say nothing of a broker, by Django's own runner; the aliases of ``PUBSUB`` name brokers that are away."""

from __future__ import annotations

import asyncio
import io

import pytest
from django.core.management import call_command
from django.core.signals import setting_changed
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings

from pubsub_facade import ConfigError, Settings
from pubsub_facade.contrib.django import client, publish, publish_on_commit
from pubsub_facade.contrib.django.checks import check
from pubsub_facade.contrib.django.clients import settings_of
from pubsub_facade.contrib.django.relaying import relay
from pubsub_facade.contrib.django.test import capture, override


class Forgetful(TestCase):
    """Nothing of it reaches a broker."""

    def test_what_is_published_stays_here(self) -> None:
        with client().subscribe("a", subscription="s") as here, client("audit").subscribe("a") as there:
            publish("a", 1)
            assert here.receive(5).payload == 1
            with pytest.raises(TimeoutError):
                there.receive(0.05)  # another alias, another broker
            call_command("pubsub", "publish", "a", "typed")
            assert here.receive(5).payload == "typed"

    def test_what_was_set_up_is_kept_but_for_the_broker(self) -> None:
        settings = client().settings
        assert (settings.backend, settings.namespace, settings.publish_timeout) == ("memory", "shop", 0.5)
        assert not settings.require_subscribers  # nobody runs here
        assert settings_of().backend == "rabbitmq"
        assert [found.id for found in check(None)] == []

    def test_capture_sees_all_of_it(self) -> None:
        with capture() as published:
            publish("a", 1)
            publish("a", 2, alias="audit")
        assert [message.payload for message in published] == [1, 2]


class Asking(SimpleTestCase):
    """Those who ask for settings have them."""

    def test_by_override(self) -> None:
        with override(Settings.load(url="kafka://127.0.0.1:1")):
            assert client().settings.backend == "kafka"
        assert client().settings.backend == "memory"

    def test_by_the_setting(self) -> None:
        with override_settings(PUBSUB="kafka://127.0.0.1:1"):
            with override_settings(PUBSUB="stomp://127.0.0.1:1"):
                assert client().settings.backend == "activemq"
            assert client().settings.backend == "kafka"
        assert client().settings.backend == "memory"

    def test_an_override_that_began_unseen_leaves_nothing(self) -> None:
        setting_changed.send(sender=None, setting="PUBSUB", value=None, enter=False)
        assert client().settings.backend == "memory"

    def test_by_alias(self) -> None:
        with override_settings(PUBSUB_REAL_IN_TESTS=["audit"]):
            assert client("audit").settings.backend == "rabbitmq"
            assert client().settings.backend == "memory"
        assert client("audit").settings.backend == "memory"
        for wrong in ("audit", ["nonesuch"]):
            with (
                override_settings(PUBSUB_REAL_IN_TESTS=wrong),
                pytest.raises(ConfigError, match=r"PUBSUB_REAL_IN_TESTS.*list of aliases, of default, audit"),
            ):
                client()


class Relaying(TransactionTestCase):
    """The relay publishes where the clients are."""

    def test_what_it_publishes_stays_here(self) -> None:
        with client().subscribe("a", subscription="relayed") as here:
            publish_on_commit("a", 1)
            call_command("pubsub_relay", "--drain", "-v0", stdout=io.StringIO())
            assert here.receive(5).payload == 1
            publish_on_commit("a", 2)
            asyncio.run(relay(None))
            assert here.receive(5).payload == 2
