"""Every snippet of README.md and docs/ is run as a reader would run it, a page in one empty directory.

Fenced blocks run from top to bottom: ``python`` as a script (``<!-- continues -->`` before it: after the block
above, in one script; ``<!-- file: app.py -->``: written to that file), ``toml`` is loaded as settings (with
``<!-- file: pubsub.toml -->`` it stays for what follows), ``console`` is typed line by line and its output
compared (``…`` stands for anything; ``<!-- background -->``: goes on until the page ends, and must end well; what
it shows is compared once it receives).
``<!-- tested by: path -->`` names the test that runs a block elsewhere. Blocks in ``sh`` are for machines that
are being set up, and are not run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pubsub_facade import Settings

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<kind>[a-z]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
MARKS = re.compile(r"continues|background|file: [\w./-]+|tested by: [\w./-]+(, in the background)?")
NOT_RUN = frozenset({"", "sh", "text", "ini", "json", "sql", "html", "xml", "mermaid", "yaml", "dockerfile"})
DEADLINE = 30.0  # s


@dataclass
class Block:
    """A fenced block and what the comment above it says."""

    kind: str
    text: str
    line: int
    mark: str = ""

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        yield Block(match["kind"], body, text[: match.start("kind")].count("\n") + 1, match["mark"] or "")


class Reader:
    """Somebody who follows a page, in a directory of their own."""

    def __init__(self, page: Path, place: Path) -> None:
        self.page = page
        self.place = place
        self.script = ""
        self.background: list[subprocess.Popen[str]] = []
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PUBSUB_")}
        self.environment = {
            **kept,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(place),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "error",
        }

    def fail(self, block: Block, what: str) -> None:
        pytest.fail(f"{self.page.relative_to(ROOT)}, line {block.line}: {what}", pytrace=False)

    def read(self, block: Block) -> None:
        if block.mark and not MARKS.fullmatch(block.mark):
            return self.fail(block, f"unknown mark {block.mark!r}")
        if block.mark.startswith("tested by: "):
            path = ROOT / block.mark.removeprefix("tested by: ").removesuffix(", in the background")
            if not path.is_file() or self.page.name not in path.read_text():
                self.fail(block, f"{path} does not run this page")
            return None
        if block.file is not None:
            (self.place / block.file).parent.mkdir(parents=True, exist_ok=True)
            (self.place / block.file).write_text(block.text)
        if block.kind == "python":
            self.run_python(block)
        elif block.kind == "toml":
            self.load_toml(block)
        elif block.kind == "console":
            self.start(block) if block.mark == "background" else self.type(block)
        elif block.kind not in NOT_RUN:
            self.fail(block, f"blocks of kind {block.kind!r} are not run: see {Path(__file__).name}")
        return None

    def run_python(self, block: Block) -> None:
        if block.file is not None:
            code = f"import runpy; runpy.run_path({block.file!r})"
        else:
            self.script = self.script + block.text if block.mark == "continues" else block.text
            code = self.script
        done = self.run([sys.executable, "-c", code])
        if done.returncode != 0:
            self.fail(block, f"exit code {done.returncode}\n{done.stdout}{done.stderr}")

    def load_toml(self, block: Block) -> None:
        name = block.file or "snippet.toml"
        (self.place / name).write_text(block.text)
        Settings.load(self.place / name)

    def type(self, block: Block) -> None:
        """Type each ``$ …`` line, and compare what comes with what the page shows until the next one."""
        for command, shown in typed(block.text):
            done = self.run(["bash", "-c", command])
            got = (done.stdout + done.stderr).rstrip("\n")
            if done.returncode not in (0, 141) and not shown.startswith("pubsub: "):
                self.fail(block, f"$ {command}\nexit code {done.returncode}: {got}")
            if not matches(shown, got):
                self.fail(block, f"$ {command}\nshown:\n{shown}\ngot:\n{got}")

    def start(self, block: Block) -> None:
        """Start a member and let it receive before the page goes on."""
        for command, shown in typed(block.text):
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.place,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.background.append(process)
            assert process.stderr is not None
            said = ""
            while "receiving" not in said:
                line = process.stderr.readline()
                if not line:
                    self.fail(block, f"$ {command}\n{said}")
                said += line
            if not matches(shown, said.rstrip("\n")):
                self.fail(block, f"$ {command}\nshown:\n{shown}\ngot:\n{said}")

    def end(self) -> None:
        for process in self.background:
            process.send_signal(signal.SIGTERM)
            out, error = process.communicate(timeout=DEADLINE)
            assert process.returncode in (0, 143), f"{self.page}: {out}{error}"

    def kill(self) -> None:
        for process in self.background:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.place,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )


def typed(text: str) -> Iterator[tuple[str, str]]:
    """Each command and the output shown below it; lines that end in a backslash go on."""
    command, shown = "", []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            if command:
                yield command, "\n".join(shown)
            command, shown = line[2:], []
        elif line:
            shown.append(line)
    if command:
        yield command, "\n".join(shown)


def matches(shown: str, got: str) -> bool:
    """Whether the output is as shown; no output shown promises nothing."""
    if not shown:
        return True
    pattern = ".*".join(re.escape(part) for part in shown.split("…"))
    return re.fullmatch(pattern, got, re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_snippet_of_the_page_works(page: Path, tmp_path: Path) -> None:
    reader = Reader(page, tmp_path)
    try:
        for block in blocks_of(page):
            reader.read(block)
        reader.end()
    finally:
        reader.kill()


def test_a_snippet_that_fails_is_seen(tmp_path: Path) -> None:
    for number, (text, complaint) in enumerate(
        [
            ("```python\n1 / 0\n```\n", "ZeroDivisionError"),
            ("```console\n$ echo a\nb\n```\n", "got:\na"),
            ("```console\n$ false\n```\n", "exit code 1"),
            ("```toml\nbackendd = 'x'\n```\n", "did you mean"),
            ("```ruby\n```\n", "'ruby'"),
            ("<!-- tested by: README.md -->\n```python\n```\n", "does not run this page"),
        ]
    ):
        page = ROOT / f"docs/{number}.md"
        reader = Reader(page, tmp_path)
        with pytest.raises(BaseException, match=re.escape(complaint)):
            for match in FENCE.finditer(text):
                reader.read(Block(match["kind"], match["text"], 1, match["mark"] or ""))


def test_generated_pages_are_up_to_date() -> None:
    from docs.generate import pages

    for path, text in pages().items():
        assert (ROOT / path).read_text() == text, f"{path} is old: run python -m docs.generate"


def test_every_page_is_in_the_navigation_and_every_entry_is_there() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)

    def entries(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            for each in node:
                yield from entries(each)
        elif isinstance(node, dict):
            for each in node.values():
                yield from entries(each)

    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(entries(config["nav"])) == there


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_to_a_file_of_ours_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
