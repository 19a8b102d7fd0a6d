"""One run in this process: check, load, apply the steps, save, verify, measure; everything said as events.

Saving is only believed once a fresh process has loaded the folder with stock `transformers`, as a stranger
would, and found the logits of the model that was in memory. Measuring also has a process of its own, so
that its memory is that of the compressed model and of nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import save_file

from engine import (
    artifacts,
    cradle,
    hardware,
    headers,
    intermediate,
    methods,
    models,
    pace,
    places,
    preflight,
    ranks,
    untouched,
    verify,
)
from engine.attempts import cache_folder
from engine.children import event_kind, lines
from engine.errors import BadArtifact, InputError, RunError, TooBig, short
from engine.fit import Estimate
from engine.hub import Hub
from engine.methods import Context, Emit
from engine.models import LoadedModel
from engine.pace import Rates
from engine.records import EventKind, Recipe
from engine.runtime import load_dense
from engine.sizes import Holding

Check = Callable[[], None]
Request = dict[str, JsonValue]


def run(recipe: Recipe, folder: Path, emit: Emit, check_cancelled: Check, *, alone: bool = False) -> Path:
    """Execute one attempt below `folder`; returns the artifact's folder.

    alone: in this process only, where it may have no children; the measured memory then is that of everything.

    Raises:
        MaquetteError: refused, cancelled, interrupted or failed, each with its reason.
    """
    emit("phase", {"name": "checking"})
    hub = downloaded(folder)
    estimate = preflight.check(recipe, hub)
    do = within if alone else child
    emit("estimate", {"memory": estimate.total, "seconds": estimate.seconds})
    for note in estimate.notes:
        emit("log", {"text": note})
    device = choose_device(recipe.device)
    source = places.locate(recipe.model, hub)
    check_cancelled()
    if not alone and estimate.probed and not (folder / "blocks").exists():
        emit("phase", {"name": "probing one block"})
        asked: Request = {
            "recipe": places.located(recipe, hub).model_dump(mode="json"), "source": str(source), "device": device,
            "kind": "probe",
        }  # fmt: skip
        do(asked, folder, _refined(estimate, emit), check_cancelled)
    emit("phase", {"name": "loading"})
    model = apply_steps(recipe, folder, device, emit, check_cancelled)
    check_cancelled()
    emit("phase", {"name": "saving"})
    artifact = folder / "artifact"
    expected = folder / "expected.safetensors"
    with under_way() if recipe.steps else contextlib.nullcontext():
        artifacts.write(model, recipe, artifact)
        save_file(verify.probe(model), expected)
    streamed, size = model.parts is not None, model.network.num_parameters() * model.network.dtype.itemsize
    emit("phase", {"name": "verifying"})
    del model
    hardware.give_back_memory()  # to the processes that follow
    request: Request = {"folder": str(artifact), "device": device}
    saved: Request = {"expected": str(expected), "streamed": streamed, "bytes": size}
    do({**request, **saved, "kind": "verify"}, folder, emit, check_cancelled)
    emit("artifact", {"path": artifact.name})  # not before it is known to be good; the data folder may be moved
    if recipe.measure:
        baseline: JsonValue = str(source) if recipe.steps else None
        wanted: Request = {**request, "kind": "measure", "measures": list(recipe.measure), "baseline": baseline,
                           "calibration": recipe.calibration}  # fmt: skip
        do(wanted, folder, emit, check_cancelled)
    return artifact


def downloaded(folder: Path) -> Hub:
    """The models of the hub that an attempt finds on this machine: its worker has brought here what it needs."""
    return Hub(cache_folder(folder) / "hub", offline=True)


def apply_steps(recipe: Recipe, folder: Path, device: str, emit: Emit, check_cancelled: Check) -> LoadedModel:
    """The model after all steps; those that a recipe that begins alike has done are not done again."""
    hardware.keep_memory()
    hub, cache = downloaded(folder), cache_folder(folder)
    steps, source = methods.check(places.located(recipe, hub)), places.locate(recipe.model, hub)
    model, done = intermediate.find(recipe, source, steps, cache, folder / "blocks" / "kept", device)
    if model is None:
        model = (models.stream if steps else load_dense)(source, recipe.model.dtype, device)
        if steps and model.network.dtype == torch.float16:
            verify.probe(model)  # before all the work: many a model overflows
    elif done:
        titles = ", ".join(method.title for method, _ in steps[:done])
        emit("log", {"text": f"reused what an earlier run has done: {titles}"})
    first = Holding(headers.inspect(source), model.network.dtype.itemsize)
    held = functools.reduce(lambda held, step: held.after(step[1]), steps[:done], first)
    for number, (method, params) in enumerate(steps[done:], done):
        check_cancelled()
        emit("phase", {"name": method.title})
        blocks = folder / "blocks" / f"step-{number}"
        text = places.calibration_file(recipe.calibration)
        context = Context(device, recipe.seed, blocks, cache, text, _numbered(emit, number), check_cancelled)
        torch.manual_seed(recipe.seed + number)  # of this step alone: the ones before may have been reused
        whole, began = not blocks.exists(), time.monotonic()
        with torch.no_grad(), contextlib.nullcontext() if number == done and whole else under_way():
            if (processes := ranks.wanted(params, model, context)) > 1:
                model = ranks.apply(method, params, model, context, processes, original=number == 0)
            else:
                model = method.apply(model, params, context)
        if whole:  # nothing of it was done before
            took = time.monotonic() - began
            rate = took / pace.step_seconds(held, params, Rates(), first)
            emit("took", {"method": method.name, "seconds": took, "rate": rate})
        held = held.after(params)
        if getattr(params, "steps", 0):
            hardware.give_back_memory()  # gradients and moments of a training
        if number + 1 < len(steps):
            intermediate.keep(model, recipe, source, steps[: number + 1], cache, device)
    if any(method.family == "quantize" and params.cache_grid() is None for method, params in steps):
        emit("kept", untouched.kept(model))
    return model


@contextlib.contextmanager
def under_way() -> Iterator[None]:
    """What refuses a run now comes after some of its work: the run has failed, and can go on from what it has done.

    Raises:
        RunError: in the place of an InputError, which says that nothing was done.
    """
    try:
        yield
    except InputError as error:
        raise RunError(str(error)) from error


def _numbered(emit: Emit, number: int) -> Emit:
    """Says with a divergence which step of the recipe it was in."""

    def tell(kind: EventKind, data: dict[str, JsonValue]) -> None:
        emit(kind, {**data, "number": number} if kind == "diverged" else data)

    return tell


def _refined(estimate: Estimate, emit: Emit) -> Emit:
    """Passes the probe's estimate on, with the time and memory of what comes after from the first estimate.

    Raises:
        TooBig: one block alone took more memory than there is.
    """

    def tell(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind == "estimate":
            memory, seconds = int(str(data["memory"])), float(str(data["seconds"]))
            if memory > estimate.available:
                raise TooBig(
                    f"One block took {memory / 2**30:.1f} GiB, {estimate.available / 2**30:.1f} were free. "
                    "Use fewer or shorter calibration sequences."
                )
            data = {
                **data,
                "memory": max(memory, estimate.after),
                "seconds": seconds + estimate.seconds - estimate.working,
            }
        emit(kind, data)

    return tell


def choose_device(wanted: str) -> str:
    """The device of a run: `auto` is the GPU where torch has one.

    Raises:
        InputError: CUDA was asked for and is not there.
    """
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise InputError("There is no CUDA device here. Choose the device `cpu` or `auto`.")
    return "cpu"


def measure(request: Request, emit: Emit) -> None:
    """Take the measurements that a request asks for; runs in a process of its own."""
    from engine.measure import suite

    baseline = request["baseline"]
    names = request["measures"]
    assert isinstance(names, list)
    suite.measure(
        Path(str(request["folder"])),
        tuple(map(str, names)),
        None if baseline is None else Path(str(baseline)),
        str(request["device"]),
        emit,
        str(request["calibration"]),
    )


def measure_folder(
    folder: Path, measures: tuple[str, ...], baseline: Path | None, emit: Emit, check_cancelled: Check, device: str
) -> None:
    """Measure any model folder, in this process.

    Raises:
        BadModel: it is no model folder.
    """
    from engine.measure import suite

    headers.inspect(folder)
    check_cancelled()
    suite.measure(folder, measures, baseline, choose_device(device), emit)


def within(request: Request, folder: Path, emit: Emit, check_cancelled: Check) -> None:
    """Do a child's request in this process.

    Raises:
        BadArtifact: the saved model is not the one that was in memory.
    """
    check_cancelled()
    if request["kind"] == "verify":
        emit("log", {"text": verify.verify(request)})
    else:
        measure(request, emit)


def child(request: Request, folder: Path, emit: Emit, check_cancelled: Check) -> None:
    """Do a request in a fresh process of this process's group and pass on its events.

    Raises:
        RunError: it did not succeed; the reason is the child's.
        InputError: a probe was refused; nothing has been done yet.
    """
    kind = str(request["kind"])
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(request))
    process = cradle.start(path)
    finished: dict[str, JsonValue] = {
        "status": "failed", "reason": f"The process for {kind} ended without a word; memory may have run out.",
    }  # fmt: skip
    try:
        assert process.stdout is not None
        for line in lines(process.stdout, check_cancelled):
            event = json.loads(line)
            if event["kind"] == "finished":
                finished = event["data"]
            else:
                emit(event_kind(event["kind"]), event["data"])
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if finished["status"] != "succeeded":
        refused = kind == "probe" and finished["status"] == "refused"
        error = InputError if refused else BadArtifact if kind == "verify" else RunError
        raise error(short(finished["reason"], 400))
