"""Take the measurements that a recipe asks for, in the order in which they do not disturb each other.

Size needs no model. Memory and latency come first after loading, before a baseline shares the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.measure import _text, accuracy, divergence, outputs, perplexity, size
from engine.methods import Emit
from engine.models import LoadedModel
from engine.records import Measurement


def measure(folder: Path, measures: tuple[str, ...], baseline: Path | None, device: str, emit: Emit) -> None:
    """Measure the model in `folder`, beside the model in `baseline` where that is given; emits what it finds."""
    wanted = set(measures)
    if "size" in wanted:
        emit("phase", {"name": "measuring size"})
        for measurement in size.measure(folder):
            emit("measurement", measurement.model_dump(mode="json"))
    if wanted <= {"size"}:
        return
    raise NotImplementedError
