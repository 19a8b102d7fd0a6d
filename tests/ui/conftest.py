"""A fake scheduler over a real store in a fresh folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ui.fakes import FakeScheduler


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[FakeScheduler]:
    made = FakeScheduler(tmp_path)
    yield made
    made.store.close()
