"""Refuse what cannot work, and estimate the rest, before any work.

Knows a model by its config and headers alone (`engine.headers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from engine import hardware, headers, methods
from engine.configs import check_tokenizer, read_object
from engine.errors import BadModel, BadParams, BadText, TooBig, short
from engine.experts import NAMES
from engine.headers import Shape, integer
from engine.hub import Hub
from engine.methods import Calibrated, Method, Params, Selection
from engine.origin import FolderOrigin, Origin
from engine.packing import CACHE_KEY, CacheGrid
from engine.records import Model, Recipe
from engine.sources import WAYS, Folder, Repo, classify
from engine.text import read_bytes, read_documents, too_short

DEMO = Path(__file__).parent.parent / "assets" / "demo"
RUNTIME = 700 << 20  # resident bytes of Python, torch and transformers before a model is loaded
HELD = 1 << 30  # bytes of hidden states that calibration keeps in memory; more go to a file
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT_TEXT = 1 << 17  # bytes; the tokens of a calibration text below it are counted before any work
HEADS = ("lm_head.weight", "embed_out.weight")  # names of an output head that is not its embeddings


@dataclass(frozen=True)
class Estimate:
    """What a recipe will take: bytes by part, bytes that are free, seconds; notes for the reader.

    working: the seconds of the steps, among all seconds.
    """

    weights: int
    kv_cache: int
    activations: int
    runtime: int
    available: int
    seconds: float
    notes: tuple[str, ...] = ()
    working: float = 0.0
    download: int = 0  # bytes that have to come from the hub first

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.runtime

    @property
    def fits(self) -> bool:
        return self.total <= self.available


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
        path = Path(source).expanduser()
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
    if isinstance(found, Folder) and not found.path.is_absolute():
        return model.model_copy(update={"source": str(resolve(model.source))})
    return model


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
    try:
        path = DEMO / "text.txt" if source == "demo" else Path(source).expanduser()
        if "\0" not in source and path.is_file():
            return path.resolve()
    except (OSError, RuntimeError):  # a name that is too long; a home of nobody
        pass
    raise BadText(f"There is no calibration file {short(source)!r}. Give `demo` or a text or JSONL file.")


def check(recipe: Recipe, hub: Hub | None = None, token: str = "") -> Estimate:
    """Refuse what cannot work and estimate the rest. Of a repo that is not here yet only headers are read.

    Raises:
        InputError: a bad model, step, setting or text, or too little memory or disk; one helpful line.
        HubError: the hub does not answer.
    """
    steps = methods.check(recipe)
    origin = open_model(recipe.model, hub, token)
    shape = headers.inspect(origin)
    check_tokenizer(origin)
    if steps and ("quantization_config" in shape.config or CACHE_KEY in shape.config):
        raise BadModel(f"{short(recipe.model.source)} is already quantized. Start from the original model.")
    if steps:
        _check_experts(steps, shape)
    becoming = shape
    for method, params in steps:
        _check_shapes(method, params, becoming)
        if shape.here:  # else the worker does, once the model is
            params.check_sources(shape.folder)
        config, tensors = params.reshaped(becoming.config, becoming.tensors)
        becoming = replace(becoming, config=config, tensors=tensors)
    text = calibration_file(recipe.calibration)
    for _, params in steps:
        if isinstance(params, Calibrated):
            check_text(text, shape.folder, params.sequence_length)
    estimate = _with_download(_estimate(recipe, shape, steps), recipe.model, origin, hub)
    if not estimate.fits:
        raise TooBig(
            f"The run needs {estimate.total / 2**30:.1f} GiB, {estimate.available / 2**30:.1f} are free. "
            "Use fewer calibration samples or measurements (`size` alone needs least), or close other programs."
        )
    return estimate


def estimate(recipe: Recipe, hub: Hub | None = None, token: str = "") -> Estimate:
    """The estimate alone, also for what does not fit.

    Raises:
        InputError: the recipe or its model cannot be read.
    """
    origin = open_model(recipe.model, hub, token)
    found = _estimate(recipe, headers.inspect(origin), methods.check(recipe))
    return _with_download(found, recipe.model, origin, hub)


def _with_download(estimate: Estimate, model: Model, origin: Origin, hub: Hub | None) -> Estimate:
    """With what has to be downloaded first, where the disk has room for it.

    Raises:
        TooBig: it has not.
    """
    needed = 0 if hub is None else hub.missing(model, origin)
    if hub is not None and needed and needed > (free := hub.here.free()):
        raise TooBig(
            f"{origin.name} needs {needed / 2**30:.2f} GiB on the disk, {max(0, free) / 2**30:.2f} are free. "
            "Delete old runs, or choose another folder with MAQUETTE_HOME."
        )
    return replace(estimate, download=needed)


def _check_experts(steps: list[tuple[Method, Params]], shape: Shape) -> None:
    """Refuse mixtures whose layout is not known, and what a file cannot say of experts, which share one scheme."""
    count = headers.experts(shape.config)
    kind = str(shape.config["model_type"])
    if count < 2:
        return
    if kind not in NAMES:
        raise BadModel(
            f"{short(shape.folder.name)} is a mixture of {count} experts of the type {kind}; Maquette can compress "
            f"those of {', '.join(NAMES)}."
        )
    linears = [name for name in shape.linears if ".experts." in name]
    for method, params in steps:
        chosen = sum(params.selects(name) for name in linears) if isinstance(params, Selection) else len(linears)
        if method.family != "quantize" or not chosen:
            continue
        if chosen < len(linears):
            raise BadParams(
                f"{method.name}: {chosen} of {len(linears)} linears of experts are selected; files can hold all of "
                "them quantized or none. Ignore `*.experts.*`, or none of them."
            )
        if reason := params.unfit_for_experts():
            raise BadParams(f"{method.name}: {reason} Choose other settings, or ignore `*.experts.*`.")


def _check_shapes(method: Method, params: Params, shape: Shape) -> None:
    names = [name for name in shape.linears if not isinstance(params, Selection) or params.selects(name)]
    if not names and shape.linears and isinstance(params, Selection):
        raise BadParams(
            f"{method.name}: no linear is left by targets {short(params.targets)!r} and ignore "
            f"{short(params.ignore)!r}. Names are as in {next(iter(shape.linears))}."
        )
    _check_beyond_blocks(method, params, shape)
    try:
        params.check_model({name: shape.linears[name] for name in names}, shape.parameters)
        params.check_config(shape.config)
    except BadParams as error:
        raise BadParams(f"{method.name}: {error}") from None


def _check_beyond_blocks(method: Method, params: Params, shape: Shape) -> None:
    """Refuse to part a head from its embeddings where that would make the model larger."""
    head, embeddings = params.beyond_blocks()
    tied = not any(name.endswith(HEADS) for name in shape.tensors)
    if tied and head != embeddings:
        raise BadParams(
            f"{method.name}: the head of {short(shape.folder.name)} is its embeddings; quantized apart, they would be "
            "larger. Choose both, head and embeddings, or neither."
        )


def check_text(text: Path, folder: Path, length: int) -> None:
    """Refuse a text that is no text, empty, or certainly shorter than one sequence of `length` tokens."""
    if len(read_bytes(text, SHORT_TEXT)) == SHORT_TEXT:
        return
    documents = read_documents(text)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return  # only the worker can count
    read_object(FolderOrigin(folder), file.name)  # a damaged one is an exception of no kind in the library
    from tokenizers import Tokenizer

    counted = sum(len(each.ids) for each in Tokenizer.from_file(str(file)).encode_batch(documents))
    if counted + len(documents) < length:  # each document may get a token that ends it
        raise too_short(text, counted, length)


def _estimate(recipe: Recipe, shape: Shape, steps: list[tuple[Method, Params]]) -> Estimate:
    """Compressing and measuring follow each other: the larger of the two counts."""
    width = WIDTHS[recipe.model.dtype]
    config = shape.config.get
    hidden = integer(config("hidden_size", 768))
    dense = shape.parameters * width
    streamed = bool(steps) and not any(method.whole for method, _ in steps)
    weights = width * max(shape.parts.values()) if streamed else dense
    activations = 0
    notes = []
    device = "cuda" if recipe.device != "cpu" and hardware.gpu() is not None else "cpu"
    work = 0.0  # floating-point operations
    for method, params in steps:
        if isinstance(params, Calibrated):
            tokens = params.samples * params.sequence_length
            states = min(2 * tokens * hidden * width, HELD)
            activations = max(activations, states + _solving(shape, getattr(params, "collect", "norm")))
            work += 6.0 * tokens * shape.parameters
        if steps_to_train := integer(getattr(params, "steps", 0)):
            tokens = integer(getattr(params, "batch", 16)) * integer(getattr(params, "sequence_length", 128))
            activations = max(activations, 16 * shape.parameters)
            work += 8.0 * steps_to_train * tokens * shape.parameters
        notes += [f"{method.title}: {note}" for note in (params.notes(shape.folder, device) if shape.here else ())]
    kv_cache = 0
    if set(recipe.measure) - {"size"}:
        grid = next((found for _, params in steps if (found := params.cache_grid())), shape.cache_grid)
        # The lean decoder holds float32 on a CPU; a packed cache holds its newest tokens in the model's dtype.
        kv_cache = cache_bytes(shape.config, grid, width if grid or recipe.device == "cuda" else 4)
        weights = max(weights, dense + (dense if "divergence" in recipe.measure and recipe.steps else 0))
    elif streamed and dense > hardware.free_memory():
        notes.append("Larger than memory: one block at a time.")
    fidelity = 2e5 * min(shape.parameters, 5e7) * bool(set(recipe.measure) - {"size"})  # large models read less text
    working = (work / 5e10 + 4 * dense / 1e9) * bool(steps)  # solving; reading, rounding and writing each weight
    seconds = 8 + fidelity / 5e10 + working  # starting three processes; the demo model on two cores gives the rates
    runtime = 2 * RUNTIME  # the worker, and the process that verifies and measures
    return Estimate(weights, kv_cache, activations, runtime, hardware.free_memory(), seconds, tuple(notes), working)


def _solving(shape: Shape, collect: str) -> int:
    """Bytes of a block's statistics and of the factorization of the largest, in float32."""
    inputs = sorted({inputs for _, inputs in shape.linears.values()}, reverse=True) or [0]
    if collect not in ("hessian", "directions"):
        return 8 * sum(inputs)
    # One Hessian for each input that is read: of attention, of its output, of the feed-forward, of its output.
    return 4 * (sum(size * size for size in inputs) + 2 * inputs[-1] ** 2) + 8 * inputs[0] ** 2


def cache_bytes(config: Mapping[str, JsonValue], grid: CacheGrid | None, width: int) -> int:
    """Bytes of the keys and values of eight sequences of 256 tokens, as latency is measured.

    Where they are packed: codes, scales, newest tokens, and what one block unpacks for attention.
    """
    blocks, heads, size = attention_sizes(config)
    whole = 2 * 8 * heads * 256 * size * width  # of one block, in numbers of `width` bytes
    if grid is None:
        return blocks * whole
    return blocks * 8 * heads * grid.bytes(256, size, width) + whole


def attention_sizes(config: Mapping[str, JsonValue]) -> tuple[int, int, int]:
    """Blocks, heads of keys and values, and numbers of a head, under the names that the families have for them."""

    def first(*keys: str) -> int:
        return next((number for key in keys if (number := integer(config.get(key)))), 0)

    hidden = first("hidden_size", "n_embd") or 768
    heads = first("num_attention_heads", "n_head") or 12
    shared = first("num_key_value_heads", "num_kv_heads") or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon
        shared = 1
    return first("num_hidden_layers", "n_layer") or 12, shared, first("v_head_dim", "head_dim") or hidden // heads
