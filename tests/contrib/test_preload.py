"""A client made before the fork, as by ``gunicorn --preload``, used first by many threads of the child at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .servers import environment

SCRIPT = """
import os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import pubsub_facade.client as client
from pubsub_facade import PubSub

made = []
create = client.create

def slowly(settings):
    made.append(threading.get_ident())
    time.sleep(0.05)
    return create(settings)

pubsub = PubSub()
pubsub.publish("a", "parent")
client.create = slowly
pid = os.fork()
if pid == 0:
    together = threading.Barrier(16)

    def one(number):
        together.wait()
        return pubsub.publish("a", number).id

    with ThreadPoolExecutor(16) as pool:
        ids = set(pool.map(one, range(16)))
    pubsub.close()
    print("clients", len(made), "published", len(ids), flush=True)
    os._exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
pubsub.close()
"""


def test_threads_that_publish_first_in_a_forked_child_share_one_client(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment(PUBSUB_URL=f"sqlite:///{tmp_path / 'pubsub.db'}"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["clients 1 published 16", "child 0"], done.stderr
