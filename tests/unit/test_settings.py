"""Where a setting comes from, who outranks whom, what a typo is told, and that no text shows a secret."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pubsub_facade import AsyncPubSub, ConfigError, PubSub, Settings
from pubsub_facade.settings import RabbitmqSettings

SECRET = "hunter2-9fe1"

Give = Callable[[Path, pytest.MonkeyPatch, dict[str, str]], dict[str, Any]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no ``PUBSUB_`` variable from outside."""
    for name in list(os.environ):
        if name.lower().startswith("pubsub_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def variable(key: str) -> str:
    return "pubsub_" + key.replace(".", "__")


def toml(values: dict[str, str], table: str = "") -> str:
    lines = [f"[{table}]"] if table else []
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""])


# -- one way to give values for each source: writes what is needed, returns what code gives -----------


def by_code(place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for key, value in values.items():
        *outer, last = key.split(".")
        inner = given
        for word in outer:
            inner = inner.setdefault(word, {})
        inner[last] = value
    return given


def by_environment(place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> dict[str, Any]:
    for key, value in values.items():
        monkeypatch.setenv(variable(key).upper(), value)
    return {}


def by_dotenv(place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> dict[str, Any]:
    lines = [f"{variable(key).upper()}='{value}'\n" for key, value in values.items()]
    (place / ".env").write_text("OTHER_SETTING=1\n" + "".join(lines))
    return {}


def by_secrets(place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> dict[str, Any]:
    directory = place / "secrets"
    directory.mkdir()
    (directory / "other_secret").write_text("x")
    for key, value in values.items():
        (directory / variable(key)).write_text(value + "\n")
    monkeypatch.setenv("PUBSUB_SECRETS_DIR", str(directory))
    return {}


def by_toml(place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> dict[str, Any]:
    (place / "pubsub.toml").write_text(toml(values))
    return {}


def by_pyproject(place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> dict[str, Any]:
    (place / "pyproject.toml").write_text('[project]\nname = "app"\n' + toml(values, "tool.pubsub"))
    return {}


SOURCES: list[Give] = [by_code, by_environment, by_dotenv, by_secrets, by_toml, by_pyproject]
PAIRS = list(itertools.combinations(SOURCES, 2))


def pair_name(value: Any) -> str:
    return getattr(value, "__name__", "").removeprefix("by_")


# -- precedence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("higher", "lower"), PAIRS, ids=pair_name)
@pytest.mark.parametrize("key", ["namespace", "rabbitmq.username", "activemq.tls.hostname"])
def test_a_higher_source_outranks_a_lower_one(
    higher: Give, lower: Give, key: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {**lower(place, monkeypatch, {key: "low"}), **higher(place, monkeypatch, {key: "high"})}
    value: Any = Settings.load(**code)
    for word in key.split("."):
        value = getattr(value, word)
    assert value == "high"


@pytest.mark.parametrize(("higher", "lower"), [*PAIRS[:-1]], ids=pair_name)
def test_what_a_higher_source_leaves_open_a_lower_one_fills(
    higher: Give, lower: Give, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {
        **lower(place, monkeypatch, {"rabbitmq.username": "low", "rabbitmq.heartbeat": "7"}),
        **higher(place, monkeypatch, {"rabbitmq.username": "high"}),
    }
    settings = Settings.load(**code)
    assert (settings.rabbitmq.username, settings.rabbitmq.heartbeat) == ("high", 7)


@pytest.mark.parametrize("source", SOURCES, ids=pair_name)
def test_each_source_outranks_the_default(source: Give, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = source(place, monkeypatch, {"publish_timeout": "2.5", "sqlite.path": "other.db"})
    settings = Settings.load(**code)
    assert settings.publish_timeout == 2.5
    assert settings.sqlite.path == Path("other.db")
    assert settings.connect_timeout == 10.0


def test_pubsub_toml_replaces_the_table_in_pyproject(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_pyproject(place, monkeypatch, {"rabbitmq.username": "project"})
    by_toml(place, monkeypatch, {"namespace": "file"})
    settings = Settings.load()
    assert (settings.namespace, settings.rabbitmq.username) == ("file", None)


def test_a_pyproject_without_the_table_says_nothing(place: Path) -> None:
    (place / "pyproject.toml").write_text('[project]\nname = "app"\n')
    assert Settings.load().backend == "sqlite"


@pytest.mark.parametrize("source", SOURCES, ids=pair_name)
def test_each_value_knows_where_it_came_from(
    source: Give, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = source(place, monkeypatch, {"rabbitmq.heartbeat": "5"})
    spelled = {
        "by_code": "code: rabbitmq.heartbeat",
        "by_environment": "environment: PUBSUB_RABBITMQ__HEARTBEAT",
        "by_dotenv": ".env: PUBSUB_RABBITMQ__HEARTBEAT",
        "by_secrets": f"{place}/secrets: pubsub_rabbitmq__heartbeat",
        "by_toml": "pubsub.toml: rabbitmq.heartbeat",
        "by_pyproject": "pyproject.toml: rabbitmq.heartbeat",
    }
    assert Settings.load(**code).origins == {"rabbitmq.heartbeat": spelled[source.__name__]}


# -- where the sources are ----------------------------------------------------------------------------


def test_the_config_file_can_be_named_in_code_in_the_environment_and_in_dotenv(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (place / f"{name}.toml").write_text(f'namespace = "{name}"\n')
    (place / ".env").write_text("PUBSUB_CONFIG=c.toml\n")
    assert Settings.load().namespace == "c"
    monkeypatch.setenv("PUBSUB_CONFIG", "b.toml")
    assert Settings.load().namespace == "b"
    assert Settings.load("a.toml").namespace == "a"
    assert Settings.load(place / "a.toml", namespace="code").namespace == "code"


def test_dotenv_can_be_another_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "prod.env").write_text("PUBSUB_NAMESPACE=prod\n")
    monkeypatch.setenv("PUBSUB_ENV_FILE", "prod.env")
    assert Settings.load().namespace == "prod"


@pytest.mark.parametrize("name", ["PUBSUB_CONFIG", "PUBSUB_ENV_FILE", "PUBSUB_SECRETS_DIR"])
def test_a_place_that_is_named_must_be_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "nowhere")
    with pytest.raises(ConfigError, match="'nowhere'"):
        Settings.load()


@pytest.mark.parametrize("name", ["PUBSUB_CONFIG", "PUBSUB_ENV_FILE", "PUBSUB_SECRETS_DIR"])
def test_a_place_that_is_named_empty_is_not_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert Settings.load().origins == {}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pubsub.toml", b"backend ="),
        ("pubsub.toml", b'backend = "\xff"'),
        (".env", b"PUBSUB_NAMESPACE=\xff\n"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(file: str, content: bytes, place: Path) -> None:
    (place / file).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{file}'"):
        Settings.load()


def test_variables_of_a_kubernetes_service_called_pubsub_are_no_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PUBSUB_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("PUBSUB_PORT_5672_TCP_ADDR", "10.0.0.1")
    assert Settings.load().origins == {}


# -- lists, sections, subscriptions -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["one:1, two:2", '["one:1", "two:2"]'])
def test_a_list_in_the_environment_is_text_with_commas_or_json(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUBSUB_KAFKA__BOOTSTRAP_SERVERS", text)
    monkeypatch.setenv("PUBSUB_SUBSCRIPTIONS__ANALYTICS__TOPICS", "social.post.*,social.#")
    settings = Settings.load()
    assert settings.kafka.bootstrap_servers == ["one:1", "two:2"]
    assert settings.subscriptions["analytics"].topics == ["social.post.*", "social.#"]


def test_a_section_in_the_environment_is_json_below_its_single_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PUBSUB_RABBITMQ", '{"heartbeat": 5, "ordered_queues": 2, "tls": {"verify": false}}')
    monkeypatch.setenv("PUBSUB_RABBITMQ__HEARTBEAT", "6")
    monkeypatch.setenv("PUBSUB_RABBITMQ__TLS__HOSTNAME", "broker")
    settings = Settings.load()
    assert (settings.rabbitmq.heartbeat, settings.rabbitmq.ordered_queues) == (6, 2)
    assert (settings.rabbitmq.tls.verify, settings.rabbitmq.tls.hostname) == (False, "broker")
    assert settings.origins["rabbitmq.ordered_queues"] == "environment: PUBSUB_RABBITMQ"
    assert settings.origins["rabbitmq.heartbeat"] == "environment: PUBSUB_RABBITMQ__HEARTBEAT"


def test_subscriptions_are_tuned_from_every_source_field_by_field(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "pubsub.toml").write_text(
        '[subscriptions.analytics]\ntopics = ["social.post.*"]\nmax_attempts = 8\nconcurrency = 3\n'
    )
    monkeypatch.setenv("PUBSUB_SUBSCRIPTIONS__ANALYTICS__MAX_ATTEMPTS", "9")
    tuned = Settings.load(subscriptions={"analytics": {"concurrency": 4}}).subscriptions["analytics"]
    assert (tuned.topics, tuned.max_attempts, tuned.concurrency) == (["social.post.*"], 9, 4)


def test_models_in_code_count_for_the_fields_they_were_given(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_toml(place, monkeypatch, {"rabbitmq.heartbeat": "5"})
    settings = Settings.load(rabbitmq=RabbitmqSettings(username="app"))
    assert (settings.rabbitmq.heartbeat, settings.rabbitmq.username) == (5, "app")


def test_settings_cannot_be_changed() -> None:
    settings = Settings.load()
    with pytest.raises(Exception, match="frozen"):
        settings.namespace = "other"  # type: ignore[misc]
    with pytest.raises(Exception, match="frozen"):
        settings.rabbitmq.heartbeat = 3  # type: ignore[misc]


# -- typos --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=pair_name)
@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("namespce", "namespace"),
        ("rabbitmq.hearbeat", "rabbitmq.heartbeat"),
        ("rabitmq.heartbeat", "rabbitmq"),
        ("kafka.tls.hostnam", "kafka.tls.hostname"),
        ("subscriptions.analytics.max_atempts", "subscriptions.analytics.max_attempts"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_key(
    source: Give, typo: str, meant: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = source(place, monkeypatch, {typo: "5"})
    with pytest.raises(ConfigError) as raised:
        Settings.load(**code)
    text = str(raised.value)
    assert "did you mean" in text
    hint = text.partition("did you mean")[2].lower().replace("__", ".")
    assert meant in hint
    where = {
        "by_code": "code",
        "by_environment": "environment",
        "by_dotenv": ".env",
        "by_secrets": "/secrets",
        "by_toml": "pubsub.toml",
        "by_pyproject": "pyproject.toml",
    }
    assert where[source.__name__] in text.partition("did you mean")[0]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PUBSUB_RABBITMQ_URL", "PUBSUB_RABBITMQ__URL"),
        ("PUBSUB_BACKEN", "PUBSUB_BACKEND"),
        ("PUBSUB_KAFKA_TLS_CA", "PUBSUB_KAFKA__TLS__CA"),
        ("PUBSUB_NAMESPACE__X", "PUBSUB_NAMESPACE"),
        ("PUBSUB_URL__HOST", "PUBSUB_URL"),
        ("PUBSUB_ORIGINS", "known are"),
    ],
)
def test_a_misspelled_variable_is_answered_with_the_one_meant(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"{name} is no setting") as raised:
        Settings.load()
    assert hint in str(raised.value)


def test_a_key_like_no_other_is_answered_with_what_is_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown setting 'zzz' \(code: zzz\): known are activemq, backend"
    ):
        Settings.load(zzz=1)


def test_a_misspelled_backend_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rabbitmq'"):
        PubSub(backend="rabitmq")


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        Settings.load(namespce="x", publish_timeout=-1, rabbitmq={"hearbeat": 1})
    for key in ("namespce", "publish_timeout", "rabbitmq.hearbeat"):
        assert repr(key) in str(raised.value)


# -- values that cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"publish_timeout": 0}, ["publish_timeout", "greater than 0"]),
        ({"namespace": "a b"}, ["namespace", "'a b'"]),
        ({"namespace": "x" * 61}, ["namespace", "60"]),
        ({"reconnect_min": 5, "reconnect_max": 1}, ["reconnect_min"]),
        ({"rabbitmq": {"heartbeat": "often"}}, ["rabbitmq.heartbeat", "'often'", "integer"]),
        ({"rabbitmq": "localhost"}, ["rabbitmq", "section", "rabbitmq.FIELD"]),
        ({"rabbitmq": {"url": "http://localhost"}}, ["rabbitmq.url", "amqp://"]),
        ({"rabbitmq": {"url": "amqp://localhost:70000"}}, ["localhost:70000", "host:port"]),
        ({"rabbitmq": {"url": "amqp://"}}, ["names no host"]),
        ({"rabbitmq": {"url": "amqp://h?heartbeat=3"}}, ["query", "beside"]),
        ({"rabbitmq": {"url": "amqps://h", "tls": {"enabled": False}}}, ["rabbitmq", "tls.enabled"]),
        ({"rabbitmq": {"tls": {"key": "k.pem"}}}, ["rabbitmq.tls", "key without cert"]),
        ({"kafka": {"bootstrap_servers": []}}, ["kafka.bootstrap_servers"]),
        ({"kafka": {"bootstrap_servers": ["PLAINTEXT://h:1"]}}, ["kafka.bootstrap_servers", "host:port"]),
        ({"kafka": {"sasl_mechanism": "MD5"}}, ["kafka.sasl_mechanism", "SCRAM-SHA-256"]),
        ({"activemq": {"flavor": "artemiss"}}, ["activemq.flavor", "'artemis'"]),
        ({"activemq": {"url": "tcp://localhost:61616"}}, ["activemq.url", "stomp://"]),
        ({"subscriptions": {"a b": {}}}, ["subscriptions", "'a b'"]),
        ({"subscriptions": {"a": {"topics": ["x..y"]}}}, ["subscriptions.a.topics", "x..y"]),
        ({"subscriptions": {"a": {"topics": []}}}, ["subscriptions.a.topics"]),
        ({"subscriptions": {"a": {"filter": "n >"}}}, ["subscriptions.a.filter"]),
        ({"subscriptions": {"a": {"max_attempts": 0}}}, ["subscriptions.a.max_attempts", "0"]),
        ({"subscriptions": {"a": {"backoff_initial": 9, "backoff_maximum": 1}}}, ["backoff_initial"]),
        ({"origins": {"a": "b"}}, ["unknown setting 'origins'"]),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        Settings.load(**values)
    for word in words:
        assert word in str(raised.value)


def test_a_section_variable_that_is_no_json_says_how_to_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_RABBITMQ", f"amqp://u:{SECRET}@h")
    with pytest.raises(ConfigError, match="PUBSUB_RABBITMQ__FIELD") as raised:
        Settings.load()
    assert SECRET not in str(raised.value)


# -- the url ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "backend"),
    [
        ("kafka://host:9092", "kafka"),
        ("amqp://host", "rabbitmq"),
        ("amqps://host/vhost", "rabbitmq"),
        ("stomp://host", "activemq"),
        ("sqlite:///other.db", "sqlite"),
        ("memory://", "memory"),
    ],
)
def test_pubsub_url_alone_is_enough(url: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_URL", url)
    settings = Settings.load()
    assert settings.backend == backend
    assert set(settings.origins.values()) == {"environment: PUBSUB_URL"}


def test_pubsub_url_outranks_a_whole_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "pubsub.toml").write_text(
        'backend = "rabbitmq"\nnamespace = "social"\n[rabbitmq]\nurl = "amqp://u:p@file"\n'
    )
    monkeypatch.setenv("PUBSUB_URL", "kafka://host:9092")
    settings = Settings.load()
    assert (settings.backend, settings.namespace) == ("kafka", "social")
    assert settings.kafka.bootstrap_servers == ["host:9092"]


def test_a_backend_named_above_a_url_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_URL", "memory://hub")
    settings = Settings.load(backend="kafka")
    assert (settings.backend, settings.url) == ("kafka", None)


def test_an_address_drops_the_password_that_came_with_a_lower_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "pubsub.toml").write_text(f'url = "amqps://app:{SECRET}@file"\n')
    monkeypatch.setenv("PUBSUB_URL", "amqp://elsewhere")
    address = Settings.load().rabbitmq.address
    assert (address.hosts, address.username, address.secret) == ((("elsewhere", 5672),), None, None)


@pytest.mark.parametrize(
    ("section", "address", "elsewhere"),
    [
        ("rabbitmq", {"url": f"amqp://app:{SECRET}@file"}, {"url": "amqp://elsewhere"}),
        ("activemq", {"url": f"stomp://app:{SECRET}@file"}, {"url": "stomp://elsewhere"}),
    ],
)
def test_the_address_of_a_section_too(
    section: str, address: dict[str, str], elsewhere: dict[str, str], place: Path
) -> None:
    (place / "pubsub.toml").write_text(toml(address, section))
    assert getattr(Settings.load(), section).password.get_secret_value() == SECRET
    above: dict[str, Any] = {section: elsewhere}
    settings = Settings.load(**above)
    assert getattr(settings, section).password is None


def test_tls_asked_for_by_a_lower_kafka_url_goes_with_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "pubsub.toml").write_text(f'url = "kafkas://app:{SECRET}@file:9093"\n')
    assert Settings.load().kafka.tls.wanted
    monkeypatch.setenv("PUBSUB_KAFKA__BOOTSTRAP_SERVERS", "elsewhere:9092")
    kafka = Settings.load().kafka
    assert (kafka.username, kafka.password, kafka.tls.wanted) == (None, None, False)


def test_a_password_of_its_own_stays_with_another_sources_address(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_secrets(place, monkeypatch, {"rabbitmq.password": SECRET})
    by_toml(place, monkeypatch, {"url": "amqp://app@broker"})
    address = Settings.load().rabbitmq.address
    assert (address.hosts, address.username, address.secret) == ((("broker", 5672),), "app", SECRET)


def test_fields_beside_a_url_outrank_what_is_in_it() -> None:
    settings = Settings.load(url="amqp://app:wrong@host?heartbeat=5", rabbitmq={"password": "right"})
    assert settings.rabbitmq.address.secret == "right"
    assert (settings.rabbitmq.address.username, settings.rabbitmq.heartbeat) == ("app", 5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"url": "kafka://h", "backend": "rabbitmq"}, "disagree"),
        ({"url": "kafka://h", "backend": "memory"}, "disagree"),
        ({"url": "amqp://h", "rabbitmq": {"url": "amqp://other"}}, "two addresses"),
        ({"url": "kafka://h", "kafka": {"bootstrap_servers": ["other:1"]}}, "two addresses"),
        ({"url": "sqlite:///a.db", "sqlite": {"path": "b.db"}}, "two addresses"),
        ({"url": 3}, "int"),
        ({"url": "localhost"}, "scheme://host:port"),
        ({"url": "rabbitmq://h"}, "amqp://host"),
        ({"url": "artemis://h"}, "flavor=artemis"),
        ({"url": "amqp://h?hearbeat=3"}, "'rabbitmq.heartbeat'"),
        ({"url": "amqp://h?tls=1&tls.ca=x"}, "'tls'"),
        ({"url": "kafka://"}, "names no host"),
        ({"url": "kafka://h/topic"}, "path"),
        ({"url": "sqlite://pubsub.db"}, "sqlite:///pubsub.db"),
        ({"url": "amqp://h:x"}, "host:port"),
        ({"url": "amqp://[::1"}, "host:port"),
    ],
)
def test_a_url_that_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Settings.load(**values)
    assert words in str(raised.value)


def test_another_url_scheme_is_a_registered_drivers_name() -> None:
    settings = Settings.load(url=f"nats://u:{SECRET}@host")
    assert settings.backend == "nats"
    assert settings.url is not None
    assert settings.url.get_secret_value() == f"nats://u:{SECRET}@host"
    with pytest.raises(ConfigError, match="unknown backend 'nats'") as raised:
        PubSub(settings)
    assert SECRET not in str(raised.value)


def test_a_registered_driver_may_take_urls_of_another_name() -> None:
    settings = Settings.load(backend="kombu", url="redis://host")
    assert settings.backend == "kombu"
    assert str(settings.url) == "redis://host"


# -- several addresses, TLS, SASL ---------------------------------------------------------------------


def test_each_broker_takes_several_addresses() -> None:
    settings = Settings.load(
        rabbitmq={"url": "amqp://u:p@one,two:5673,[::1]:5674/vhost"},
        kafka={"bootstrap_servers": ["one", "two:9093", "[::1]:9094"]},
        activemq={"url": "stomps://u:p@one,two:61699"},
    )
    assert settings.rabbitmq.address.hosts == (("one", 5672), ("two", 5673), ("::1", 5674))
    assert settings.rabbitmq.address.path == "vhost"
    assert settings.kafka.bootstrap_servers == ["one:9092", "two:9093", "[::1]:9094"]
    assert settings.activemq.address.hosts == (("one", 61612), ("two", 61699))


@pytest.mark.parametrize("section", ["rabbitmq", "kafka", "activemq"])
def test_each_broker_takes_tls_user_and_password_from_every_kind_of_source(
    section: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_toml(place, monkeypatch, {f"{section}.tls.ca": "ca.pem", f"{section}.tls.cert": "cert.pem"})
    by_environment(place, monkeypatch, {f"{section}.tls.verify": "false", f"{section}.username": "app"})
    by_secrets(place, monkeypatch, {f"{section}.tls.key_password": SECRET, f"{section}.password": SECRET})
    code: dict[str, Any] = {section: {"tls": {"key": "key.pem", "hostname": "broker"}}}
    part = getattr(Settings.load(**code), section)
    assert part.tls.wanted
    assert (part.tls.ca, part.tls.cert, part.tls.key) == (Path("ca.pem"), Path("cert.pem"), Path("key.pem"))
    assert (part.tls.verify, part.tls.hostname) == (False, "broker")
    assert part.tls.key_password.get_secret_value() == part.password.get_secret_value() == SECRET
    assert part.username == "app"


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_kafka_takes_its_sasl_mechanism_by_url(mechanism: str) -> None:
    kafka = Settings.load(url=f"kafkas://app:pw@one:1,two:2?sasl_mechanism={mechanism}&tls.ca=ca.pem").kafka
    assert (kafka.sasl_mechanism, kafka.username, kafka.tls.wanted) == (mechanism, "app", True)
    assert kafka.tls.ca == Path("ca.pem")


def test_tls_files_alone_mean_tls_and_its_port() -> None:
    address = Settings.load(rabbitmq={"url": "amqp://host", "tls": {"ca": "ca.pem"}}).rabbitmq.address
    assert (address.secure, address.hosts) == (True, (("host", 5671),))


# -- secrets ------------------------------------------------------------------------------------------


def secret_settings() -> dict[str, Any]:
    return {
        "rabbitmq": {
            "url": f"amqp://app:{SECRET}@host",
            "password": SECRET,
            "tls": {"cert": "c", "key_password": SECRET},
        },
        "kafka": {"username": "app", "password": SECRET},
        "activemq": {"url": f"stomp://app:{SECRET}@host"},
        "options": {
            "api_token": SECRET,
            "nested": {"Password": SECRET},
            "url": f"redis://:{SECRET}@h",
            "hosts": [f"redis://u:{SECRET}@h"],
        },
    }


def test_no_text_of_settings_shows_a_secret() -> None:
    settings = Settings.load(**secret_settings())
    texts = [
        str(settings),
        repr(settings),
        f"{settings}",
        repr(settings.rabbitmq),
        str(settings.rabbitmq.url),
        repr(settings.activemq.url),
        repr(settings.rabbitmq.address),
        str(settings.rabbitmq.address),
        repr(settings.kafka.password),
        repr(settings.origins),
        settings.rabbitmq.model_dump_json(),
        str(settings.model_dump(exclude={"options"})),
        repr(vars(settings.rabbitmq)),
    ]
    for text in texts:
        assert SECRET not in text
    assert "'***'" in repr(settings)


def test_clients_show_no_secret_either() -> None:
    client = AsyncPubSub(Settings.load(backend="memory", **secret_settings()))
    assert SECRET not in repr(client) + str(client) + repr(client.capabilities)


def test_settings_that_are_copied_or_pickled_keep_their_secrets() -> None:
    settings = Settings.load(**secret_settings())
    for twin in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert twin.rabbitmq.address.secret == SECRET
        assert SECRET not in repr(twin)


WRONG = [
    {"url": f"amqp://app:{SECRET}@host:port"},
    {"url": f"amqp://app:{SECRET}/x@host"},
    {"url": f"amqp://app:x/{SECRET}@host"},
    {"url": f"amqp://app:{SECRET}?x@host"},
    {"url": f"amqp://app:{SECRET}#x@host"},
    {"url": f"amqp://app:x@{SECRET}@host:port"},
    {"url": f"amqp:app:{SECRET}@host"},
    {"url": f"app:{SECRET}@host"},
    {"url": f"rabbitmq://app:{SECRET}@host"},
    {"url": f"amqp://app:{SECRET}@"},
    {"url": f"amqp://app:{SECRET}@[::1"},
    {"url": f"sqlite://app:{SECRET}@x"},
    {"url": f"kafka://h?password={SECRET}&nope=1"},
    {"url": f"kafka://h/path?password={SECRET}"},
    {"url": f"amqp://app:{SECRET}@h", "backend": "kafka"},
    {"url": f"amqp://app:{SECRET}@h", "rabbitmq": {"url": "amqp://x"}},
    {"url": f"amqp://h?tls=1&tls.key_password={SECRET}"},
    {"rabbitmq": f"amqp://app:{SECRET}@host"},
    {"rabbitmq": {"url": f"http://app:{SECRET}@host"}},
    {"rabbitmq": {"url": f"amqp://app:{SECRET}@host:port"}},
    {"rabbitmq": {"url": f"amqp://h?password={SECRET}"}},
    {"rabbitmq": {"url": f"amqp://app:{SECRET}/@host"}},
    {"rabbitmq": {"url": [f"amqp://app:{SECRET}@host"]}},
    {"rabbitmq": {"password": [SECRET]}},
    {"rabbitmq": {"password": {"x": SECRET}}},
    {"rabbitmq": {"pasword": SECRET}},
    {"kafka": {"bootstrap_servers": f"app:{SECRET}@host:port"}},
    {"kafka": {"bootstrap_servers": [f"app:{SECRET}@host"]}},
    {"kafka": {"bootstrap_servers": {"password": SECRET}}},
    {"kafka": {"tls": {"key_password": SECRET, "key": "x"}}},
    {"backend": f"amqp://app:{SECRET}@host"},
]


@pytest.mark.parametrize("values", WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_no_error_or_traceback_shows_a_secret(
    values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError) as raised:
        PubSub(**values)
    error = raised.value
    shown = [str(error), repr(error), "".join(traceback.format_exception(error)), caplog.text]
    cause: BaseException | None = error.__context__
    while cause is not None:
        shown.append(repr(cause))
        cause = cause.__context__
    for text in shown:
        assert SECRET not in text


def test_wrong_variables_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_RABBITMQ__URL", f"http://app:{SECRET}@host")
    monkeypatch.setenv("PUBSUB_RABBITMQ__PASSWORD__X", SECRET)
    with pytest.raises(ConfigError, match="PUBSUB_RABBITMQ__URL") as raised:
        Settings.load()
    assert SECRET not in "".join(traceback.format_exception(raised.value))
