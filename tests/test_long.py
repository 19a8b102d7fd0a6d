"""The tests that `make test` lets come last are there, under the names that it knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LONG

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", LONG)
def test_a_long_test_is_one(name: str) -> None:
    file, _, test = name.partition("::")
    written = "".join(path.read_text() for path in HERE.rglob(file))
    assert f"def {test.partition('[')[0] or 'test_'}" in written
