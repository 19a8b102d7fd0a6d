"""Refuse what cannot work, and estimate the rest, before any work.

Knows a model by its config and headers alone (`engine.headers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from engine import fit, hardware, headers, methods, own_packed, patterns, places, processor, suitability, ways
from engine.configs import check_tokenizer, read_object
from engine.errors import BadModel, TooBig, short
from engine.fit import Estimate, Machine
from engine.headers import Shape
from engine.hub import Hub
from engine.methods import Method, Params, Selection
from engine.origin import FolderOrigin
from engine.pace import Rates
from engine.records import Model, Recipe
from engine.sizes import WIDTHS
from engine.sources import BUNDLED
from engine.text import documents, is_long, too_short
from engine.ways import Way

SENSED = 128  # tokens of each sequence of the calibration text on which sensitivity is measured


def check(
    recipe: Recipe, hub: Hub | None = None, token: str = "", spare: int = 0, room: Callable[[], int] = lambda: 0
) -> Estimate:
    """Refuse what cannot work and estimate the rest. Of a repo that is not here yet only headers are read.

    spare: bytes of memory that are not free and would be, were the run to begin. room: tells the same of the disk,
    where a download needs more than is free.

    Raises:
        InputError: a bad model, step, setting or text, or too little memory or disk; one helpful line.
        HubError: the hub does not answer.
    """
    methods.check(recipe)  # what needs no hub comes first
    origin = places.open_model(recipe.model, hub, token)
    shape, steps = headers.inspect(origin), places.checked(recipe, hub, token)
    check_tokenizer(origin)
    if steps and not headers.QUANTIZED.isdisjoint(shape.config):
        raise BadModel(f"{short(recipe.model.source)} is already quantized. Start from the original model.")
    suitability.check_steps(steps, shape, 8 * WIDTHS[recipe.model.dtype])
    suitability.check_measures(recipe, shape)
    folder = shape.folder if shape.here else None  # once it is, the worker looks again
    for _, params in steps:
        params.check_models(origin)
        params.check_sources(folder)
    text = places.calibration_file(recipe.calibration)
    for length in _lengths(recipe, steps, shape):
        check_text(text, folder, length)
    where = machine(recipe, spare)
    found = _estimate(recipe, shape, steps, where, _to_download(places.models(recipe), hub, token, room))
    if not found.fits:
        raise TooBig(_too_big(found, way_out(recipe, found, hub, token, spare)))
    return found


def estimate(
    recipe: Recipe, hub: Hub | None = None, token: str = "", rates: Rates | None = None, spare: int = 0,
    room: Callable[[], int] = lambda: 0,
) -> Estimate:  # fmt: skip
    """The estimate alone, also for what does not fit; `rates`: the speeds that earlier runs have found.

    spare, room: as in `check`.

    Raises:
        InputError: the recipe or its model cannot be read.
        HubError: the hub does not answer.
    """
    shape = headers.inspect(places.open_model(recipe.model, hub, token))
    download = _to_download(places.models(recipe), hub, token, room)
    where = machine(recipe, spare)
    where = where if rates is None else replace(where, rates=rates)
    return _estimate(recipe, shape, places.checked(recipe, hub, token), where, download)


def _estimate(
    recipe: Recipe, shape: Shape, steps: list[tuple[Method, Params]], where: Machine, download: int
) -> Estimate:
    """With what each method has to say of itself."""
    found = fit.estimate(recipe, shape, steps, where, download=download)
    said = [
        f"{method.title}: {note}"
        for method, params in steps
        for note in (
            *params.notes(shape, where.device),
            *_for_maquette_alone(method, params, shape),
            *_rounded_otherwise(params, shape),
            *_ignored_for_nothing(params, shape),
            *_of_a_toy_world(params, recipe.model),
            *(params.notes_at_first(shape) if params is steps[0][1] else ()),
        )
    ]
    return replace(found, notes=(*said, *found.notes))


def _for_maquette_alone(method: Method, params: Params, shape: Shape) -> list[str]:
    """That the packed files of a family are in a format of our own, and how others come to read them."""
    kind = shape.config.get("model_type")
    packs = method.family == "quantize" and params.leaves_codes() and params.cache_grid() is None
    if kind not in own_packed.FAMILIES or not packs:
        return []
    said = f"Packed linears of {kind} are in a format of Maquette's own, which stock `transformers` refuses."
    if params.rounds_inputs():
        return [f"{said} No export holds rounded inputs: for other programs use a weight-only method."]
    return [f"{said} The Runs tab or `export --format dense` writes a folder that it loads, in 16 bit."]


def _rounded_otherwise(params: Params, shape: Shape) -> list[str]:
    """That other programs round the inputs of a family's linears in another way."""
    if not params.rounds_inputs() or shape.config.get("model_type") != "opt":
        return []
    return [
        "Elsewhere it computes something else than is measured here: compressed-tensors rounds the inputs of OPT's MLP "
        "number by number, not by token."
    ]


def _of_a_toy_world(params: Params, model: Model) -> list[str]:
    """That what a model learns from, or whose tokens it keeps, is the demo's text, where it is another model."""
    if model.source == BUNDLED or getattr(params, "text", "") != BUNDLED:
        return []
    return [
        "It reads the demo's text alone, which tells of a small made-up world. Give a text of your own; a shared "
        "server takes none: run Maquette on your own machine."
    ]


def _ignored_for_nothing(params: Params, shape: Shape) -> list[str]:
    """That patterns of `ignore` fit no linear of the blocks; a misspelt one would leave none alone in silence."""
    asked = params.ignore.split() if isinstance(params, Selection) else ()
    linears = shape.linears
    unfit = [short(each) for each in asked if not any(patterns.matches(each, name) for name in linears)]
    return [f"`{' '.join(unfit)}` of ignore fits no linear of the blocks, so it leaves none alone."] if unfit else []


def way_out(
    recipe: Recipe, found: Estimate, hub: Hub | None = None, token: str = "", spare: int = 0
) -> Way | None:  # fmt: skip
    """What to change in a recipe that needs more than there is, and what it needs then; None where nothing helps.

    Raises:
        MaquetteError: the recipe or its model cannot be read.
    """
    shape, where = headers.inspect(places.open_model(recipe.model, hub, token)), machine(recipe, spare)
    return ways.out(recipe, shape, where, found, lambda changed: places.checked(changed, hub, token))


def machine(recipe: Recipe, spare: int = 0) -> Machine:
    """Where the recipe would run, and what is free there, with what is spare."""
    if recipe.device != "cpu" and hardware.gpu() is not None:
        return Machine(hardware.free_on("cuda") + spare, "cuda")
    return Machine(hardware.free_memory() + spare, wide=not processor.multiplies_bfloat16())


def _too_big(found: Estimate, way: Way | None) -> str:
    """`needs 9.1 GiB, 7.8 free: 4 bit needs 5.2`"""
    said = f"The run needs {found.total / 2**30:.1f} GiB, {found.available / 2**30:.1f} are free"
    close = "Close other programs, or choose a smaller model."
    if way is None:
        return f"{said}. {close}"
    return f"{said}: {way.phrase}.{'' if way.fits else f' That is too much, too. {close}'}"


def _to_download(wanted: Iterable[Model], hub: Hub | None, token: str, room: Callable[[], int]) -> int:
    """Bytes of these models that have to come from the hub first, where the disk has room for them.

    Raises:
        TooBig: it has not.
    """
    needed, names = 0, list[str]()
    for model in dict.fromkeys(wanted):
        origin = places.open_model(model, hub, token)
        if hub is not None and (missing := hub.missing(model, origin)):
            needed, names = needed + missing, [*names, short(origin.name)]
    if hub is not None and needed and needed > (free := hub.here.free()):
        free += room()
        if needed > free:
            raise TooBig(
                f"{', '.join(names)} needs {needed / 2**30:.2f} GiB on the disk, {max(0, free) / 2**30:.2f} are free. "
                "Delete old runs, or choose another folder with MAQUETTE_HOME."
            )
    return needed


def _lengths(recipe: Recipe, steps: Iterable[tuple[Method, Params]], shape: Shape) -> list[int]:
    """Tokens of each sequence that some part of a run reads of the calibration text; none where it is not read."""
    found = {params.calibration_length() for _, params in steps}
    packs = any(method.family == "quantize" and params.cache_grid() is None for method, params in steps)
    if "sensitivity" in recipe.measure and not packs and headers.QUANTIZED.isdisjoint(shape.config):
        found.add(SENSED)
    return sorted(length for length in found if length is not None)


def check_text(text: Path, folder: Path | None, length: int) -> None:
    """Refuse a text that is no text, empty, or certainly shorter than one sequence of `length` tokens.

    All of it that can be read is looked at. folder: that of the model, whose tokenizer counts, where it is here.
    """
    if is_long(text) or folder is None:
        return
    file = folder / "tokenizer.json"
    if not file.is_file():
        return  # only the worker can count
    read_object(FolderOrigin(folder), file.name)  # a damaged one is an exception of no kind in the library
    from tokenizers import Tokenizer

    tokenizer, counted = Tokenizer.from_file(str(file)), 0
    tokenizer.no_truncation()  # which a file may ask for
    for number, document in enumerate(documents(text), 1):
        counted += len(tokenizer.encode(document).ids)
        if counted + number >= length:  # each document may get a token that ends it
            return
    raise too_short(text, counted, length)
