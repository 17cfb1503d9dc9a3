"""Nothing that comes in a message is run, unpickled or imported: the package has nothing to do so with."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pubsub_facade

ROOT = Path(pubsub_facade.__file__).parent
UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
RUNNING = {"eval", "exec", "compile", "__import__"}
IMPORTERS = {  # by names from the command line, from the settings, or from us
    "backends/__init__.py",
    "cli/root.py",
    "cli/run.py",
}


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLING)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLING:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in RUNNING:
                yield name
            if "import_module" in (name, attribute):
                yield "import_module"


def test_this_test_would_see_it() -> None:
    assert [*offences("import pickle\nfrom marshal import loads\neval('1')\nx.import_module(y)")] == [
        "pickle",
        "marshal",
        "eval",
        "import_module",
    ]


def test_the_package_cannot_run_what_came_in_a_message() -> None:
    found = {
        (str(path.relative_to(ROOT)), what)
        for path in ROOT.rglob("*.py")
        for what in offences(path.read_text())
    }
    assert {each for each in found if each[1] != "import_module"} == set()
    assert {path for path, _ in found} == IMPORTERS
