"""Each deliberate break still has something to break; ``python -m tests.mutations`` shows what notices it."""

from __future__ import annotations

from pathlib import Path

import pytest

import pubsub_facade
import tests.chaos.mutations
import tests.mutations

PACKAGE = Path(pubsub_facade.__file__).parent


@pytest.mark.parametrize(
    ("file", "old"),
    [
        pytest.param(each.file, each.old, id=name)
        for name, each in (
            *((broken.what, broken) for broken in tests.chaos.mutations.BREAKS),
            *((mutation.rule, mutation) for mutation in tests.mutations.MUTATIONS),
        )
    ],
)
def test_its_text_is_there(file: str, old: str) -> None:
    assert old in (PACKAGE / file).read_text()
