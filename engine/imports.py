"""Importing torch, transformers and gradio, which takes seconds."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def swift_imports() -> Iterator[None]:
    """Import without looking for garbage, which thousands of modules leave none of: a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
