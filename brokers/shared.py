"""The brokers that the tests, benchmarks and demos of one checkout share, in its ``.brokers`` folder.

Brings up what is not up, natively or by compose, and writes a ready ``pubsub.{form}.toml`` for each backend form.
Takes down exactly what it brought up. One command at a time: the folder has a lock.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from brokers import compose, install, ports
from brokers.broker import STATE, Broker, BrokerError
from brokers.native import BROKERS


def select(text: str | None) -> list[str]:
    """The brokers of a comma-separated list: all where it is None, none where it is empty."""
    if text is None:
        return list(BROKERS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in BROKERS]
    if unknown:
        raise BrokerError(f"no such broker: {', '.join(unknown)} (there are {', '.join(BROKERS)})")
    return [name for name in BROKERS if name in names]


def native(name: str) -> Broker:
    """The shared native instance, running or not."""
    directory = STATE / name
    broker = BROKERS[name](directory, ports.recorded(directory) or ports.for_shared(name, directory))
    return broker if broker.running() else BROKERS[name](directory, ports.for_shared(name, directory))


def by_compose() -> bool:
    """Is it compose that starts what is not up? ``BROKERS_BY=native|compose`` decides, else a daemon's answer."""
    wish = os.environ.get("BROKERS_BY", "")
    if wish not in ("", "native", "compose"):
        raise BrokerError(f"BROKERS_BY={wish}: native or compose")
    return wish == "compose" or (wish == "" and compose.available())


@contextmanager
def _locked() -> Iterator[None]:
    STATE.mkdir(exist_ok=True)
    with (STATE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_settings(name: str, at: dict[str, int]) -> None:
    """``.brokers/pubsub.{form}.toml`` for each form of the broker behind these ports."""
    for form, text in BROKERS[name].settings(at).items():
        (STATE / f"pubsub.{form}.toml").write_text(text)


def _remove_settings(name: str) -> None:
    for form in BROKERS[name].settings(dict.fromkeys(ports.DEFAULTS[name], 0)):
        (STATE / f"pubsub.{form}.toml").unlink(missing_ok=True)


def _up_natively(names: Sequence[str]) -> list[str]:
    brokers = [native(name) for name in names]
    down = [broker for broker in brokers if not broker.running()]
    if down:
        install.ensure([broker.name for broker in down])

    def bring_up(broker: Broker) -> None:
        began = time.monotonic()
        broker.start()
        write_settings(broker.name, broker.ports)
        took = f"up after {time.monotonic() - began:.1f} s" if broker in down else "was up"
        print(f"{broker.name}: {took}, ports {broker.ports}", flush=True)

    with ThreadPoolExecutor(max_workers=len(brokers) or 1) as pool:
        outcomes = [pool.submit(bring_up, broker).exception for broker in brokers]
        failures = [str(error) for outcome in outcomes if (error := outcome()) is not None]
    if failures:
        raise BrokerError("\n\n".join(failures))
    return [broker.name for broker in down]


def up(names: Sequence[str]) -> list[str]:
    """Bring these up; the names of those that were not. Those that were are left as they are."""
    with _locked():
        missing = [name for name in names if not native(name).running()]
        if not missing or not by_compose():
            return _up_natively(names)
        before = compose.running()
        for name, at in compose.up(missing).items():
            write_settings(name, at)
            print(f"{name}: up by compose, ports {at}", flush=True)
        _up_natively([name for name in names if name not in missing])
        return [name for name in missing if name not in before]


def down(names: Sequence[str]) -> None:
    """Stop those of these that `up` started here."""
    with _locked():
        for name in names:
            broker = native(name)
            if compose.started(name):
                compose.down(name)
                print(f"{name}: stopped by compose", flush=True)
            elif broker.running():
                print(f"{name}: stopping", flush=True)
            broker.stop()  # of a killed one, too: what runs beside it may be left
            _remove_settings(name)


def status(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each broker with what can be said of it now."""
    return [(name, _state(name)) for name in names]


def _state(name: str) -> str:
    at = compose.started(name)
    if at:
        return f"{'up' if BROKERS[name].answers(at) else 'not ready'} by compose, ports {at}"
    broker = native(name)
    if not broker.running():
        return "down"
    return f"{'up' if broker.ready() else 'not ready'}, process {broker.daemon.pid()}, ports {broker.ports}"


def left_out(names: Sequence[str]) -> None:
    """Say aloud which brokers were left out by name."""
    without = [name for name in BROKERS if name not in names]
    if without:
        print(f"LEFT OUT by BROKERS={','.join(names)}: {', '.join(without)}", file=sys.stderr, flush=True)
