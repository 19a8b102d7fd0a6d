"""How long things take: the seconds of a run by parts, and how fast a model can decode at best.

Decoding reads all weights and the cache once for each token of all sequences, so its time is at least those bytes over
the memory's speed (the roofline's left side); prefill and training are bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from engine import rescue, sizes
from engine.headers import integer
from engine.methods import Method, Params, calibrates
from engine.sizes import Holding

TIMES = ("download", "load", "steps", "save", "verify", "measure")


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, where nothing better is known; the demo on two cores gave the figures.

    steps: by method, how many times as long it took here as these figures say, from earlier runs.
    """

    download: float = 2e7  # B
    disk: float = 1e9  # B, read, looked at and written
    arithmetic: float = 5e10  # floating-point operations
    start: float = 3.0  # seconds that a process takes to start
    steps: Mapping[str, float] = field(default_factory=dict)


def seconds(
    first: Holding, last: Holding, steps: Sequence[tuple[Method, Params]], measures: Collection[str], rates: Rates,
    download: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each part of a run that takes `first` to `last`."""
    work, held = 0.0, first
    for method, params in steps:
        work += rates.steps.get(method.name, 1.0) * step_seconds(held, params, rates, first)
        held = held.after(params)
    text = min(1.0, 5e7 / max(1, first.shape.parameters))  # of large models, and of what is made of them, less is read
    reads = 2e5 * last.shape.parameters * text * bool(set(measures) - {"size"})
    found = {
        "download": download / rates.download,
        "load": rates.start + first.dense / rates.disk * (1 if steps else 2),
        "steps": work,
        "save": last.file_bytes() / rates.disk,
        "verify": rates.start + last.file_bytes() / rates.disk,
        "measure": (rates.start + reads / rates.arithmetic + last.file_bytes() / rates.disk) * bool(measures),
    }
    return {name: found[name] for name in TIMES if found[name] > 0}


def step_seconds(held: Holding, params: Params, rates: Rates, first: Holding | None = None) -> float:
    """A step's own seconds: reading and writing each weight, the method's work, tokens of calibration and training.

    first: the model before any step, where others came before this one: it is who teaches.
    """
    parameters, original = held.shape.parameters, (first or held).shape
    work = params.work(held.shape)
    if calibrates(params):
        work += 6.0 * params.samples * params.sequence_length * parameters
    if survey := params.survey(held.shape, held.width):
        work += survey.operations
    if steps := integer(getattr(params, "steps", 0)):
        tokens = integer(getattr(params, "batch", 16)) * integer(getattr(params, "sequence_length", 128))
        own = 8.0 if getattr(params, "gradient_checkpointing", False) else 6.0
        teacher, chain = original.parameters, held.trained(params, original)
        end = rescue.end(rescue.read(str(getattr(params, rescue.SETTING, ""))), steps)
        for each in chain:  # each learns from the one before; only the last one's training may end early
            done = end if each is chain[-1] else steps
            work += done * tokens * (own * each.parameters + 2.0 * teacher)
            teacher = each.parameters
    return 4 * held.dense / rates.disk + work / rates.arithmetic


def bytes_read(held: Holding, batch: int, tokens: int) -> int:
    """Bytes that a step of decoding reads: all weights but the embeddings' table, and the cache at `tokens` tokens."""
    looked_up = 0 if held.tied else held.packed_embeddings() // 2
    return held.packed() - looked_up + sizes.cache_bytes(held.shape.config, held.grid, held.width, batch, tokens)


def token_seconds(held: Holding, batch: int, tokens: int, bandwidth: float, arithmetic: float) -> float:
    """Seconds of a step of decoding for `batch` sequences at best: the larger of its bytes' time and its products'."""
    products = 2.0 * held.shape.parameters * batch
    return max(bytes_read(held, batch, tokens) / bandwidth, products / arithmetic)
