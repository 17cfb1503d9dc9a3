"""The whole social network on one machine: ``python examples/social/run.py``.

A publisher, *notifications*, and *analytics* with two members, each a process of its own, on the broker that
the settings name; on the embedded backend in a temporary directory unless they name one. Prints what each
got, then the account: every post must have reached both services. The exit code is 1 if one is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pubsub_facade import PubSub, PubSubError, Settings

HERE = Path(__file__).resolve().parent
PUBSUB = str(Path(sys.executable).with_name("pubsub"))
READY = 20.0  # s for the members to receive
DONE = 20.0  # s from the last post until everybody has all
COLORS = {"publisher": 36, "notifications": 33, "analytics 1": 32, "analytics 2": 35}


class Part:
    """One process of the network, and what it said."""

    def __init__(self, name: str, *command: str) -> None:
        self.name = name
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self.posts_in(line):
                print(f"{self.title}  {line.rstrip()}", flush=True)

    @property
    def title(self) -> str:
        name = f"{self.name:<13}"
        return f"\033[{COLORS[self.name]}m{name}\033[0m" if sys.stdout.isatty() else name

    @staticmethod
    def posts_in(line: str) -> list[int]:
        return [int(number) for number in re.findall(r"\bnumber (\d+)", line)]

    @property
    def posts(self) -> list[int]:
        """The posts it dealt with, as it said so."""
        return [number for line in list(self.lines) for number in self.posts_in(line)]

    @property
    def receives(self) -> bool:
        return any(": receiving " in line for line in list(self.lines))

    def end(self) -> int:
        """Ask it to finish what is in hand; its exit code."""
        self.process.terminate()
        code = self.process.wait(30)
        self._reader.join(5)
        return code

    def complaint(self) -> str:
        return "\n".join([f"{self.name} (exit code {self.process.poll()}) said:", *self.lines[-15:]])


class Failed(Exception):
    """The network did not come to its end."""


def wait_until(condition: str, done: Callable[[], bool], parts: list[Part], seconds: float) -> None:
    """Return once ``done()``; Failed when a part ends before that, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not done():
        ended = [part for part in parts if part.process.poll() is not None]
        if ended or time.monotonic() > deadline:
            said = "\n".join(part.complaint() for part in ended or parts)
            raise Failed(f"{said}\n\nnot {'reached' if ended else f'within {seconds:g} s'}: {condition}")
        time.sleep(0.02)


def environment(directory: str) -> None:
    """Settings for all parts alike: a namespace of this run's own, and a place for the embedded backend."""
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["PUBSUB_NAMESPACE"] = f"social-{os.getpid()}"
    if "PUBSUB_CONFIG" in os.environ:
        os.environ["PUBSUB_CONFIG"] = str(Path(os.environ["PUBSUB_CONFIG"]).resolve())
    settings = Settings.load()
    if settings.backend == "sqlite" and "sqlite.path" not in settings.origins:
        os.environ["PUBSUB_SQLITE__PATH"] = str(Path(directory) / "pubsub.db")


def play(members: list[Part]) -> Part:
    """Let people post while the members receive; the publisher, once everybody has everything."""
    names = {"notifications": "notifications", "analytics 1": "analytics", "analytics 2": "analytics"}
    for name, module in names.items():
        members.append(Part(name, PUBSUB, "run", f"{module}:pubsub"))
    wait_until("all members receive", lambda: all(member.receives for member in members), members, READY)
    publisher = Part("publisher", sys.executable, "publish.py")
    if publisher.process.wait(60) != 0:
        raise Failed(publisher.complaint())
    wait_until("every post reached both services", lambda: complete(publisher, members), members, DONE)
    return publisher


def complete(publisher: Part, members: list[Part]) -> bool:
    """Whether both services have every post."""
    published = set(publisher.posts)
    notifications, *analytics = members
    counted = {number for member in analytics for number in member.posts}
    return bool(published) and published <= set(notifications.posts) and published <= counted


def account(publisher: Part, members: list[Part], *, competing: bool) -> bool:
    """Print who got what; whether it is what was promised."""
    notifications, first, second = members
    published = set(publisher.posts)
    services = {"notifications": notifications.posts, "analytics": first.posts + second.posts}
    good = True
    print(f"\n{len(published)} posts were published.")
    for name, posts in services.items():
        missing, again = published - set(posts), len(posts) - len(set(posts))
        good = good and not missing
        print(
            f"{name:<13} got {len(set(posts))} of them"
            + (f", MISSED {sorted(missing)}" if missing else ", each one")
            + (f", {again} more than once" if again else "")
            + "."
        )
    shares = f"{len(set(first.posts))} and {len(set(second.posts))}"
    if competing:
        good = good and bool(first.posts and second.posts)
        print(f"The two members of analytics shared the work: {shares}.")
    else:
        print(f"One member of analytics worked and the other stood by, as this broker has it: {shares}.")
    return good


def show(pubsub: PubSub) -> bool:
    """Start everybody, let people post, end everybody; whether all went as promised."""
    members: list[Part] = []
    pubsub.declare("social.post.created", subscription="notifications")
    pubsub.declare("social.post.*", subscription="analytics")
    try:
        publisher = play(members)
        codes = {member.name: member.end() for member in members}
    finally:
        for member in members:
            if member.process.poll() is None:
                member.end()
        pubsub.delete("notifications")
        pubsub.delete("analytics")
    good = account(publisher, members, competing=pubsub.capabilities.competing)
    for name, code in codes.items():
        if code != 0:
            good = False
            print(f"{name} ended with exit code {code}.")
    return good


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        try:
            environment(directory)
            with PubSub() as pubsub:
                settings = pubsub.settings
                print(
                    f"The social network on {settings.backend}, namespace {settings.namespace}\n", flush=True
                )
                good = show(pubsub)
        except (Failed, PubSubError) as error:
            print(error, file=sys.stderr)
            return 1
    print(
        f"{'All is well' if good else 'That is NOT what was promised'}, after {time.monotonic() - began:.1f} s."
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
