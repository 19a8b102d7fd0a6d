"""Take the measurements that a recipe asks for, in the order in which they do not disturb each other.

Size needs no model. Memory and latency come right after loading, before a baseline shares the process.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine import headers
from engine.measure import _text, accuracy, divergence, latency, memory, outputs, perplexity, sensitivity, size
from engine.methods import Context, Emit
from engine.models import LoadedModel, load_tokenizer
from engine.places import calibration_file
from engine.records import Measurement
from engine.runtime import load

Say = Callable[[list[Measurement]], None]


def measure(
    folder: Path, measures: tuple[str, ...], baseline: Path | None, device: str, emit: Emit, calibration: str = "demo"
) -> None:
    """Measure the model in `folder`, beside the model in `baseline` where that is given; emits what it finds.

    calibration: the text on which sensitivity is measured, `demo` or a file.
    """

    def say(found: list[Measurement]) -> None:
        for measurement in found:
            emit("measurement", measurement.model_dump(mode="json"))

    wanted = set(measures)
    if "size" in wanted:
        emit("phase", {"name": "measuring size"})
        say(size.measure(folder))
    if wanted <= {"size"}:
        return
    emit("phase", {"name": "loading packed weights"})
    prompt = _text.encode(load_tokenizer(folder), _text.prompts()[0])
    warm = functools.partial(latency.warm_up, prompt=prompt)
    model, loaded = memory.loading(lambda: load(folder, device), device, warm=warm)
    emit("log", {"text": "kernels: " + latency.kernels(model)})
    if wanted & {"memory", "latency"}:
        _speed(model, prompt, loaded, wanted, emit, say)
    other = None if baseline is None or not wanted & {"accuracy", "divergence", "outputs"} else load(baseline, device)
    # The same text and questions for an original and for all that was made of it, pruned or packed.
    parameters = headers.inspect(baseline or folder).parameters
    _fidelity(model, other, parameters, wanted, emit, say)
    if "sensitivity" in wanted:
        _sensitivity(model, device, calibration_file(calibration), emit, say)


def _sensitivity(model: LoadedModel, device: str, text: Path, emit: Emit, say: Say) -> None:
    """What each block can bear; of dense models only, for packed weights cannot be damaged and healed."""
    if model.kernels:
        emit("log", {"text": "sensitivity is measured before quantizing: this model's weights are packed"})
        return
    emit("phase", {"name": "measuring sensitivity"})
    with tempfile.TemporaryDirectory() as folder:
        context = Context(device, 0, Path(folder), Path(folder), text, emit, lambda: None)
        say([sensitivity.measure(model, context)])


def _speed(model: LoadedModel, prompt: list[int], loaded: Measurement, wanted: set[str], emit: Emit, say: Say) -> None:
    """Memory and latency of generation."""
    emit("phase", {"name": "measuring memory and latency"})
    found, peak = memory.generating(lambda: latency.measure(model, prompt, emit=emit), loaded)
    if "memory" in wanted:
        say([loaded, peak, memory.of_cache(model, prompt)])
    if "latency" in wanted:
        say(found)
        say(latency.measure(model, prompt, emit=emit, batches=latency.MORE))


def _fidelity(
    model: LoadedModel, baseline: LoadedModel | None, parameters: int, wanted: set[str], emit: Emit, say: Say
) -> None:  # fmt: skip
    """How well the model still predicts, answers and writes."""
    about = _text.about_cache(model)

    def tell(found: list[Measurement]) -> None:
        say([each.model_copy(update={"details": each.details | about}) for each in found])

    documents = _text.documents(model, parameters)
    if "perplexity" in wanted:
        emit("phase", {"name": "measuring perplexity"})
        tell(perplexity.measure(model, documents))
    if "accuracy" in wanted:
        emit("phase", {"name": "measuring accuracy"})
        items = _text.items(model, parameters)
        chosen = accuracy.choices(model, items)
        tell(accuracy.measure(items, chosen))
        if baseline is not None:
            tell([accuracy.flips(items, chosen, accuracy.choices(baseline, items))])
    if "divergence" in wanted and baseline is not None:
        emit("phase", {"name": "measuring divergence"})
        tell(divergence.measure(model, baseline, documents))
    if "outputs" in wanted:
        emit("phase", {"name": "writing outputs"})
        for output in outputs.measure(model, baseline, _text.prompts()):
            emit("output", output.model_dump(mode="json"))
