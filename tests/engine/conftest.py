"""The kinds of processors whose kernels this machine can run, each in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.runtime.native import library

KINDS = [kind.name for kind in library.PROCESSORS if kind.here()]  # the first is what this machine takes by itself
needs_kernels = pytest.mark.skipif(not library.available(), reason="our own kernels cannot be built here")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each kind of kernels that this processor can run, in turn."""
    monkeypatch.setenv(library.SWITCH, request.param)
    library._load.cache_clear()
    yield request.param
    library._load.cache_clear()
