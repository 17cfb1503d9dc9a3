"""The Django how-to (``django.md``), followed as a new user would, in an empty folder.

A python block goes to the file that its first line names; a console block marked ``in the background`` says what it
shows before the page goes on, goes on until that ends, and must have handled what the page published.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_docs import ROOT, Reader, blocks_of, matches, typed

PAGE = ROOT / "docs" / "howto" / "django.md"
NAMED = re.compile(r"# (?P<path>[\w./]+)(?P<add> \(add at the end\))?\n")


class Newcomer(Reader):
    """Somebody with one terminal for commands and one for the handlers."""

    def __init__(self, place: Path) -> None:
        super().__init__(PAGE, place)
        self.handlers = place / "handlers.log"
        self.environment["PYTHONDONTWRITEBYTECODE"] = "1"  # files change within a second here

    def follow(self) -> None:
        for block in blocks_of(PAGE):
            if block.kind == "python":
                self._write(block.text)
            elif block.kind == "console":
                for command, shown in typed(block.text):
                    if block.mark.endswith("in the background"):
                        self._start(command, shown)
                    else:
                        self._type(command, shown)

    def _write(self, text: str) -> None:
        named = NAMED.match(text)
        assert named, text
        with (self.place / named["path"]).open("a" if named["add"] else "w") as file:
            file.write("\n" + text if named["add"] else text)

    def _start(self, command: str, shown: str) -> None:
        with self.handlers.open("w") as log:
            self.background.append(
                subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.place,
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    text=True,
                )
            )
        for line in shown.splitlines():
            self.wait_for(line.removeprefix("…"))

    def _type(self, command: str, shown: str) -> None:
        done = self.run(["bash", "-c", command])
        got = (done.stdout + done.stderr).rstrip("\n")
        assert done.returncode == 0, f"$ {command}\n{got}"
        assert matches(shown, got), f"$ {command}\nshown:\n{shown}\ngot:\n{got}"

    def wait_for(self, text: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.handlers.read_text():
            assert self.background[0].poll() is None, self.handlers.read_text()
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.handlers.read_text()}"
            time.sleep(0.05)


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    newcomer = Newcomer(tmp_path)
    yield newcomer
    newcomer.kill()


@pytest.mark.timeout(200)
def test_the_django_page_works_from_an_empty_folder(newcomer: Newcomer) -> None:
    newcomer.follow()
    newcomer.wait_for("user 42 posted 'hello'")
    newcomer.wait_for("user 7 posted 'by the outbox'")
    newcomer.end()
    counted = newcomer.run(
        ["python", "manage.py", "shell", "-v0", "-c",
         "from django.contrib.auth.models import User; print(User.objects.get(username='user7').last_name)"]
    )  # fmt: skip
    assert counted.stdout == "1\n", counted.stderr
