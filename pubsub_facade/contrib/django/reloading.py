"""``runsubscribers --reload``: Django's reloader, but one that outlives a file that was saved half done.

Django's own ends for good when the code does not import; only ``runserver`` has a way around that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from django.apps import apps
from django.utils import autoreload

CHANGED: Final = 3  # exit code of a child whose code has changed
SIGNALLED: Final = 128  # exit codes above say that a signal ended it
LOOK: Final = 0.5  # s between looks at the files of code that does not start

log = logging.getLogger("pubsub_facade")


def run_with_reloader(function: Callable[..., None], *args: Any) -> None:
    """Call ``function`` in a child process, a new one whenever code changes; end with a child that is told to end."""
    if os.environ.get(autoreload.DJANGO_AUTORELOAD_ENV) == "true":
        autoreload.run_with_reloader(function, *args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(_children())


def _children() -> int:
    environment = {**os.environ, autoreload.DJANGO_AUTORELOAD_ENV: "true"}
    while True:
        before = _files()
        code = subprocess.run(
            autoreload.get_child_arguments(), env=environment, close_fds=False, check=False
        ).returncode
        if code <= 0 or code > SIGNALLED:
            return code
        if code != CHANGED:
            log.error("the code does not start (exit code %d): waiting for it to change", code)
            while _files() == before:
                time.sleep(LOOK)


def _files() -> dict[Path, float]:
    """When each file was changed: of the code that started last, and of the applications' folders."""
    watched = autoreload.StatReloader()
    for config in apps.get_app_configs():
        watched.watch_dir(config.path, "**/*.py")
    return dict(watched.snapshot_files())
