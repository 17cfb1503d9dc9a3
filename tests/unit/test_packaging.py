"""What a user installs: the wheel's content, lazy drivers, extras that say how to get them, true names."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pubsub_facade
from pubsub_facade.backends import known_backends

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DRIVERS = {"rabbitmq": "pika", "kafka": "aiokafka", "activemq": "stomp"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    place = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = place.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pubsub_facade").rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert sources <= names
    assert "pubsub_facade/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("pubsub_facade/", "pubsub_facade-"))]


def test_the_wheel_brings_the_command_and_the_pytest_plugin(wheel: zipfile.ZipFile) -> None:
    [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(entry_points).decode()
    assert "pubsub = pubsub_facade.cli:main" in text
    assert "pubsub_facade = pubsub_facade.testing.plugin" in text


def test_the_version_is_told_once() -> None:
    assert importlib.metadata.version("pubsub-facade") == PROJECT["version"] == pubsub_facade.__version__


def test_every_public_name_is_there_and_every_name_there_is_public() -> None:
    assert pubsub_facade.__all__ == sorted(pubsub_facade.__all__, key=str)
    for name in pubsub_facade.__all__:
        assert getattr(pubsub_facade, name) is not None
    found = {
        name
        for name, value in vars(pubsub_facade).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("pubsub_facade")
    }
    assert found == set(pubsub_facade.__all__) - {"HeaderValue"}


def test_the_core_needs_no_broker_client() -> None:
    wanted = {re.split(r"[><=\[]", line)[0] for line in PROJECT["dependencies"]}
    assert wanted == {"pydantic-settings", "click", "rich"}


def test_importing_the_package_imports_no_driver_and_nothing_slow() -> None:
    code = (
        "import sys, pubsub_facade, pubsub_facade.cli;"
        "print([name for name in ('pika', 'aiokafka', 'stomp', 'rich', 'sqlite3', 'click', 'pytest')"
        " if name in sys.modules])"
    )
    done = python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(("backend", "module"), DRIVERS.items())
def test_a_missing_extra_says_how_to_get_it(backend: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from pubsub_facade import ConfigError, PubSub\n"
        f"try:\n    PubSub(backend={backend!r})\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = python(code)
    assert f'pip install "pubsub-facade[{backend}]"' in done.stdout, done.stderr
    assert backend in PROJECT["optional-dependencies"]


def test_the_extra_all_is_every_broker() -> None:
    [everything] = PROJECT["optional-dependencies"]["all"]
    assert everything == f"pubsub-facade[{','.join(DRIVERS)}]"


def test_every_backend_can_be_made_without_a_broker() -> None:
    assert known_backends() == ["activemq", "kafka", "memory", "rabbitmq", "sqlite"]
    for name in known_backends():
        client = pubsub_facade.AsyncPubSub(backend=name)
        assert client.state == "idle"


def test_a_driver_of_somebody_else_is_found_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "from pubsub_facade.backends.memory import MemoryBackend\n"
        "class OtherBackend(MemoryBackend):\n    name = 'other'\n"
    )
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pubsub_facade.backends]\nother = other:OtherBackend\nwrong = other:MemoryBackend.name\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pubsub_facade import ConfigError, PubSub\n"
        "with PubSub(url='other://somewhere', options={'x': 1}) as pubsub:\n"
        "    print(pubsub.publish('a', 1).topic, pubsub.settings.url)\n"
        "try:\n    PubSub(backend='wrong')\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = python(code)
    assert done.stdout.splitlines()[0] == "a other://somewhere", done.stderr
    assert "which is not a Backend class" in done.stdout


def test_no_backend_file_is_over_600_lines() -> None:
    for path in (ROOT / "pubsub_facade").rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 650, f"{path.name} has {lines} lines: about 600 is the limit"
