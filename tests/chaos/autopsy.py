"""What the broker says of itself where a chaos run misses messages: written beside the run's logs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess

from brokers.artemis import Artemis
from brokers.rabbitmq import RabbitMQ
from tests.chaos.deletions import http
from tests.chaos.world import World

COUNTS = ("MessageCount", "DeliveringCount", "ScheduledCount", "ConsumerCount")
ARTEMIS_QUEUES = (
    "org.apache.activemq.artemis:broker=*,component=addresses,address=*,"
    "subcomponent=queues,routing-type=*,queue=*"
)


def write(world: World) -> None:
    """Its queues, its log and, of a Java broker, its threads; nothing where the form has no broker."""
    broker = world.broker
    if broker is None:
        return
    shutil.copy(broker.log, world.folder / "broker.log")
    if not isinstance(broker, RabbitMQ):  # whom jstack's SIGQUIT ends
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no JDK here
            command = ["jstack", str(broker.daemon.pid())]
            threads = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            (world.folder / "threads.txt").write_text(threads.stdout)
    queues = world.folder / "queues.json"
    with contextlib.suppress(OSError):  # the broker answers nobody: its threads tell why
        if isinstance(broker, Artemis):
            url = f"{broker.console_url}/"
            asked = {"type": "read", "mbean": ARTEMIS_QUEUES, "attribute": COUNTS}
            found = http("POST", url, asked)
            for bean, counts in found["value"].items():
                if counts["DeliveringCount"]:  # in whose hand are they?
                    asked = {"type": "exec", "mbean": bean, "operation": "listDeliveringMessagesAsJSON()"}
                    counts["delivering"] = http("POST", url, asked).get("value")
                    asked = {"type": "exec", "mbean": bean, "operation": "listConsumersAsJSON()"}
                    counts["consumers"] = http("POST", url, asked).get("value")
            queues.write_text(json.dumps(found, indent=1))
        elif isinstance(broker, RabbitMQ):
            queues.write_text(json.dumps(http("GET", f"{broker.management_url}/queues", None), indent=1))
