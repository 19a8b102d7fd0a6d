"""Refuse what cannot work, and estimate the rest, before any work.

Knows a model by its config and headers alone (`engine.headers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine import fit, hardware, headers, methods, own_packed, patterns, processor, suitability, ways
from engine.configs import check_tokenizer, read_object
from engine.errors import BadModel, BadText, InputError, TooBig, short
from engine.fit import Estimate, Machine
from engine.headers import Shape
from engine.hub import Hub
from engine.methods import Method, Params, Selection
from engine.origin import FolderOrigin, Origin
from engine.pace import Rates
from engine.records import Model, Recipe
from engine.sizes import WIDTHS
from engine.sources import BUNDLED, WAYS, Folder, Repo, classify, named, place, written
from engine.text import documents, is_long, too_short
from engine.ways import Way

DEMO = Path(__file__).parent.parent / "assets" / "demo"
SENSED = 128  # tokens of each sequence of the calibration text on which sensitivity is measured


def resolve(source: str) -> Path:
    """The folder of a model that is on this machine: `demo`, or a path to a folder.

    Raises:
        BadModel: there is no such folder.
    """
    if source == "demo":
        return DEMO / "model"
    if "\0" in source or not source.strip():
        raise BadModel("The model is empty or holds a NUL character. Give `demo` or the path of a folder.")
    try:
        path = place(source)
        if path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError):  # a name that is too long; a home of nobody
        pass
    raise BadModel(f"There is no model folder {short(source)!r}. {WAYS}")


def locate(model: Model, hub: Hub | None = None) -> Path:
    """The folder from which a model is loaded: the bundled one, a folder, or the downloaded snapshot of a repo.

    Raises:
        BadModel: it is not on this machine.
    """
    found = classify(model)
    if isinstance(found, Repo):
        if hub is None:
            raise BadModel(f"There is no model folder {short(model.source)!r}, and no hub is at hand. {WAYS}")
        return hub.folder_of(model)
    return resolve(model.source)


def pin(model: Model, hub: Hub | None = None, token: str = "") -> Model:
    """The model as it is stored with a run: a repo at a commit, a folder by its whole path.

    Raises:
        MaquetteError: it cannot be found.
    """
    found = classify(model)
    if isinstance(found, Repo) and hub is not None:
        return hub.pin(model, token)
    if isinstance(found, Folder) and not Path(model.source).is_absolute():
        return model.model_copy(update={"source": str(resolve(model.source))})
    return model


def settle(recipe: Recipe, hub: Hub | None = None, token: str = "") -> Recipe:
    """The recipe as it is stored with a run: its models pinned, other files and folders by their whole paths.

    Raises:
        MaquetteError: a step cannot be read, or a model not be found.
    """
    steps = []
    for step, (_, params) in zip(recipe.steps, methods.check(recipe), strict=True):
        rooted = {key: value for key, value in params.rooted().items() if key in step.params}
        pinned = params.renamed(lambda text: written(pin(named(text), hub, token)))
        steps.append(step.model_copy(update={"params": {**step.params, **rooted, **pinned}}))
    changed = {"model": pin(recipe.model, hub, token), "calibration": whole(recipe.calibration), "steps": tuple(steps)}
    return recipe.model_copy(update=changed)


def models(recipe: Recipe) -> list[Model]:
    """All models that a run of the recipe reads: its own, then those that its steps name.

    Raises:
        InputError: a step cannot be read, or names no model.
    """
    return [recipe.model, *(named(text) for _, params in methods.check(recipe) for text in params.models())]


def repos(recipe: Recipe) -> list[Repo]:
    """Those of its models that are of the hub; of a recipe that cannot be read any more, its own alone."""
    try:
        wanted = models(recipe)
    except InputError:
        wanted = [recipe.model]
    found = []
    for model in wanted:
        with suppress(BadModel):
            if isinstance(repo := classify(model, folders=False), Repo):
                found.append(repo)
    return list(dict.fromkeys(found))


def located(recipe: Recipe, hub: Hub) -> Recipe:
    """The recipe whose steps name the folders in which their models are on this machine.

    Raises:
        BadModel: one is not here.
    """
    steps = []
    for step, (_, params) in zip(recipe.steps, methods.check(recipe), strict=True):
        here = params.renamed(lambda text: str(locate(named(text), hub)))
        steps.append(step.model_copy(update={"params": {**step.params, **here}}))
    return recipe.model_copy(update={"steps": tuple(steps)})


def checked(recipe: Recipe, hub: Hub | None = None, token: str = "") -> list[tuple[Method, Params]]:
    """The recipe's methods with settings that know where the models they name can be read.

    Raises:
        MaquetteError: a step cannot be read, or a model not be found.
    """
    return [
        (method, params.knowing({text: open_model(named(text), hub, token) for text in params.models()}))
        for method, params in methods.check(recipe)
    ]


def whole(source: str) -> str:
    """The whole path of a file or folder that a recipe names; `demo`, and what is not there, stay as they are."""
    try:
        path = place(source)
        return str(path) if source not in ("", BUNDLED) and path.exists() else source
    except (OSError, RuntimeError, ValueError):  # a name that is too long or holds a NUL; a home of nobody
        return source


def open_model(model: Model, hub: Hub | None = None, token: str = "") -> Origin:
    """Where what is asked of a model can be read, before anything is downloaded.

    Raises:
        MaquetteError: it cannot be found, or the hub does not answer.
    """
    if hub is not None and isinstance(classify(model), Repo):
        return hub.origin(model, token)
    return FolderOrigin(locate(model, hub))


def calibration_file(source: str) -> Path:
    """The file of a recipe's calibration text: `demo`, or a path.

    Raises:
        BadText: there is no such file.
    """
    return text_file(source, "calibration file")


def text_file(source: str, called: str) -> Path:
    """The file of a text: `demo`, or a path. `called`: what an error says that it is.

    Raises:
        BadText: there is no such file.
    """
    try:
        path = DEMO / "text.txt" if source == "demo" else place(source)
        if "\0" not in source and path.is_file():
            return path.resolve()
    except (OSError, RuntimeError):  # a name that is too long; a home of nobody
        pass
    raise BadText(f"There is no {called} {short(source)!r}. Give `demo` or a text or JSONL file.")


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
    origin = open_model(recipe.model, hub, token)
    shape, steps = headers.inspect(origin), checked(recipe, hub, token)
    check_tokenizer(origin)
    if steps and not headers.QUANTIZED.isdisjoint(shape.config):
        raise BadModel(f"{short(recipe.model.source)} is already quantized. Start from the original model.")
    suitability.check_steps(steps, shape, 8 * WIDTHS[recipe.model.dtype])
    suitability.check_measures(recipe, shape)
    folder = shape.folder if shape.here else None  # once it is, the worker looks again
    for _, params in steps:
        params.check_models(origin)
        params.check_sources(folder)
    text = calibration_file(recipe.calibration)
    for length in _lengths(recipe, steps, shape):
        check_text(text, folder, length)
    where = machine(recipe, spare)
    found = _estimate(recipe, shape, steps, where, _to_download(models(recipe), hub, token, room))
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
    shape = headers.inspect(open_model(recipe.model, hub, token))
    download = _to_download(models(recipe), hub, token, room)
    where = machine(recipe, spare)
    where = where if rates is None else replace(where, rates=rates)
    return _estimate(recipe, shape, checked(recipe, hub, token), where, download)


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
    shape, where = headers.inspect(open_model(recipe.model, hub, token)), machine(recipe, spare)
    return ways.out(recipe, shape, where, found, lambda changed: checked(changed, hub, token))


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
        origin = open_model(model, hub, token)
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
