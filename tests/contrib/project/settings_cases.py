"""Which settings a Django process has where they are given in several places."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pubsub_facade import ConfigError
from pubsub_facade.contrib.django.clients import load_settings, settings_of


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> Path:
    """``BASE_DIR``, beside the current folder; both are empty, and the environment says nothing."""
    for name in [name for name in os.environ if name.startswith("PUBSUB_")]:
        monkeypatch.delenv(name)
    base, here = tmp_path / "site", tmp_path / "here"
    base.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    settings.BASE_DIR = base
    settings.PUBSUB = None
    return base


def give(file: Path, namespace: str) -> str:
    file.write_text(f'namespace = "{namespace}"\n')
    return str(file)


def test_base_dir_s_file_is_read_from_any_folder(site: Path) -> None:
    give(site / "pubsub.toml", "base")
    assert settings_of().namespace == "base"


def test_the_current_folder_s_file_comes_before_base_dir_s(site: Path) -> None:
    give(site / "pubsub.toml", "base")
    give(Path("pubsub.toml"), "here")
    assert settings_of().namespace == "here"


def test_base_dir_s_file_comes_before_the_current_folder_s_pyproject(site: Path) -> None:
    Path("pyproject.toml").write_text('[tool.pubsub]\nnamespace = "pyproject"\n')
    assert settings_of().namespace == "pyproject"
    give(site / "pubsub.toml", "base")
    assert settings_of().namespace == "base"


def test_a_file_that_the_environment_names_comes_before_both(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(site / "pubsub.toml", "base")
    monkeypatch.setenv("PUBSUB_CONFIG", give(site / "deployed.toml", "deployed"))
    assert settings_of().namespace == "deployed"
    give(Path("pubsub.toml"), "here")
    assert settings_of().namespace == "deployed"


def test_so_does_one_that_dotenv_names_after_the_environment(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(site / "pubsub.toml", "base")
    Path(".env").write_text(f"PUBSUB_CONFIG={give(site / 'dotenv.toml', 'dotenv')}\n")
    assert settings_of().namespace == "dotenv"
    Path(".env").rename("another.env")
    assert settings_of().namespace == "base"
    monkeypatch.setenv("PUBSUB_ENV_FILE", "another.env")
    assert settings_of().namespace == "dotenv"
    monkeypatch.setenv("PUBSUB_CONFIG", give(site / "deployed.toml", "deployed"))
    assert settings_of().namespace == "deployed"


def test_one_that_the_caller_names_comes_before_all_files(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUBSUB_CONFIG", give(site / "deployed.toml", "deployed"))
    named = give(site / "named.toml", "named")
    assert load_settings(None, named).namespace == "named"


def test_a_file_that_is_named_and_not_there_is_an_error_whatever_base_dir_has(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(site / "pubsub.toml", "base")
    monkeypatch.setenv("PUBSUB_CONFIG", "nowhere.toml")
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        settings_of()


def test_the_setting_comes_before_the_environment_and_that_before_any_file(
    site: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    give(site / "pubsub.toml", "base")
    monkeypatch.setenv("PUBSUB_NAMESPACE", "environment")
    assert settings_of().namespace == "environment"
    settings.PUBSUB = {"namespace": "setting"}
    assert settings_of().namespace == "setting"


def path_of(setting: Any, settings: Any, **overrides: Any) -> Path:
    settings.PUBSUB = setting
    return load_settings(setting, **overrides).sqlite.path


def test_the_embedded_file_is_the_same_from_every_folder(site: Path, settings: Any) -> None:
    assert path_of(None, settings) == site / "pubsub.db"
    assert (
        path_of({"backend": "sqlite", "sqlite": {"path": "data/mine.db"}}, settings) == site / "data/mine.db"
    )
    assert path_of("sqlite:///url.db", settings) == site / "url.db"
    assert path_of({"sqlite": {"path": "/srv/pubsub.db"}}, settings) == Path("/srv/pubsub.db")
    settings.BASE_DIR = str(site)
    assert path_of(None, settings) == site / "pubsub.db"
    del settings.BASE_DIR
    assert path_of(None, settings) == Path("pubsub.db")


def test_a_path_that_django_s_settings_do_not_give_is_left_as_it_is(
    site: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert path_of(None, settings, url="sqlite:///typed.db") == Path("typed.db")
    (site / "pubsub.toml").write_text('[sqlite]\npath = "toml.db"\n')
    assert path_of(None, settings) == Path("toml.db")
    monkeypatch.setenv("PUBSUB_SQLITE__PATH", "environment.db")
    assert path_of(None, settings) == Path("environment.db")
    monkeypatch.delenv("PUBSUB_SQLITE__PATH")
    give(site / "pubsub.toml", "base")  # names no path
    assert path_of(None, settings) == site / "pubsub.db"


def test_where_a_value_came_from_is_told(site: Path, settings: Any) -> None:
    origins = load_settings({"namespace": "mine", "sqlite": {"path": "a.db"}}, publish_timeout=3).origins
    assert origins["namespace"] == "PUBSUB: namespace"
    assert origins["sqlite.path"] == "PUBSUB: sqlite.path, in BASE_DIR"
    assert origins["publish_timeout"] == "code: publish_timeout"
    assert load_settings(None).origins == {"sqlite.path": "default, in BASE_DIR"}


def test_aliases_without_a_default_are_refused(site: Path, settings: Any) -> None:
    settings.PUBSUB = {"audit": "kafka://localhost:9092", "feed": {"backend": "sqlite"}}
    for alias in ("default", "audit"):
        with pytest.raises(ConfigError, match="aliases need a 'default': it has audit, feed"):
            settings_of(alias)
    settings.PUBSUB = {"rabitmq": {}}
    with pytest.raises(ConfigError, match="did you mean 'rabbitmq'"):
        settings_of()
