"""Find and check every method file; the types a method is written with.

A compression method is one Python file in `engine/quantize`, `engine/prune` or `engine/distill` with a
docstring, `TITLE`, `CHANGES`, a class `Params` and a function `apply`. There is nothing to register:
`methods()` reads the files, and refuses loudly what is incomplete.
"""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, ValidationError, field_validator

from engine import patterns
from engine.errors import BadParams, BadRecipe, UnknownName, short
from engine.fields import RARE, condition, field_kind
from engine.records import MEASURES, EventKind, Recipe, Step

if TYPE_CHECKING:
    from engine.headers import Shape
    from engine.models import LoadedModel
    from engine.origin import Origin
    from engine.packing import CacheGrid

FAMILIES = ("quantize", "prune", "distill")
Change = Literal["disk", "memory", "latency"]
Emit = Callable[[EventKind, dict[str, JsonValue]], None]


@dataclass(frozen=True)
class StoredBits:
    """How a weight of a linear is stored: bits of its code, and its share of scales and zero points.

    Kernels hold codes of 2 to 4 bits in 4 and others in 8: memory can be more than the file. `dense`: bits of each in
    memory where no kernel computes on the codes, or where they are known.
    """

    code: float
    share: float
    dense: float | None = None

    @property
    def stored(self) -> float:
        """Bits in the file."""
        return self.code + self.share

    @property
    def held(self) -> float:
        """Bits in the memory of a process that computes on them."""
        return (4 if self.code <= 4 else 8) + self.share if self.dense is None else self.dense


@dataclass(frozen=True)
class Survey:
    """What a step measures of a whole model before it changes anything, in floating-point operations, and its bytes.

    weighing: bytes beside a block and its statistics; reading: those beside a block, or what predicts, alone, later.
    units: of progress that it reports which do not grow with blocks as walks do, how many there are of each.
    """

    operations: float
    weighing: int
    reading: int
    units: Mapping[str, float]


class Params(BaseModel):
    """A method's typed settings: every field has a default, a bound where it is a number, a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    PATTERNS: ClassVar[frozenset[str]] = frozenset()  # settings that are patterns of linears, and name no file
    MODELS: ClassVar[frozenset[str]] = frozenset()  # settings that name models, as a recipe names its own
    _known: Mapping[str, Origin] = PrivateAttr(default_factory=dict)

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse what cannot work on a model with these (out, in) linears to change and so many parameters in all.

        width: bits of each parameter that stays as it is, and of scales.

        Raises:
            BadParams: one line that names the linear and what would work.
        """

    def patterns(self) -> Mapping[str, Sequence[str]]:
        """By setting, the patterns each of which is to fit a linear that is changed."""
        return {}

    def of(self, name: str) -> Self:
        """The settings for one linear, where they differ between linears."""
        return self

    def unfit_for(self, name: str, later: Params) -> str:
        """Why a later step, by its method's name and settings, cannot work on what this one leaves; empty: it can."""
        return ""

    def rounds_inputs(self) -> bool:
        """Whether the inputs of linears are rounded, too."""
        return False

    def rooted(self) -> dict[str, JsonValue]:
        """The settings that name files or folders, with whole paths: a run finds them wherever its worker stands."""
        return {}

    def models(self) -> Sequence[str]:
        """The models that the step reads beside the recipe's own, as they are named."""
        return ()

    def renamed(self, rename: Callable[[str], str]) -> dict[str, JsonValue]:
        """The settings that name these models, with other names for them."""
        return {}

    def beside(self) -> Sequence[Shape]:
        """The headers of those among them that are in memory beside the recipe's own model, where that is."""
        return ()

    def knowing(self, known: Mapping[str, Origin]) -> Self:
        """These settings, with where each of `models()` can be read: some may not be on this machine yet."""
        found = self.model_copy()
        found._known = known
        return found

    def beyond_blocks(self) -> tuple[bool, bool]:
        """Whether the output head, and whether the embeddings are to be changed beside the blocks."""
        return False, False

    def unfit_for_experts(self) -> str:
        """Why files cannot hold the experts of a mixture as these settings make them; "" where they can.

        `transformers` fuses experts when it loads them: they need one symmetric scheme, and inputs as they are.
        """
        return ""

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse what cannot work on a model with this config.json.

        Raises:
            BadParams: one line that names what would work.
            BadModel: one line that names the family.
        """

    def check_sources(self, folder: Path | None) -> None:
        """Refuse texts that these settings name and that cannot be used for the model in `folder`; None: not here yet.

        Raises:
            InputError: one line that names the text.
        """

    def check_models(self, origin: Origin) -> None:
        """Refuse models that these settings name and that cannot be used beside the recipe's own, by their headers.

        Raises:
            InputError: one line that names the model.
            HubError: the hub does not answer.
        """

    def notes(self, shape: Shape, device: str) -> Sequence[str]:
        """What a reader should know before a run with a model of this shape on `cpu` or `cuda`, as sentences."""
        return ()

    def notes_at_first(self, shape: Shape) -> Sequence[str]:
        """As `notes`, where no step before changes the model: then it begins with the original itself."""
        return ()

    def keeps_grids(self) -> bool:
        """Whether weights that an earlier step put on a grid stay on it, so that this may follow quantization."""
        return False

    def leaves_codes(self) -> bool:
        """Whether a quantizing step leaves integer codes of our own, which a step that `keeps_grids` goes on from."""
        return True

    def reshaped(
        self, config: dict[str, JsonValue], tensors: dict[str, tuple[int, ...]]
    ) -> tuple[dict[str, JsonValue], dict[str, tuple[int, ...]]]:
        """The config.json and the tensors' shapes of what the step makes: the next step is checked on them."""
        return config, tensors

    def trained(
        self, config: dict[str, JsonValue], tensors: dict[str, tuple[int, ...]], original: Shape
    ) -> Sequence[tuple[dict[str, JsonValue], dict[str, tuple[int, ...]]]]:
        """As `reshaped`, of every model that is trained, each the teacher of the next; the last is what comes out.

        original: the recipe's model, before any step.
        """
        return [self.reshaped(config, tensors)]

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits | None:
        """How a chosen linear (out, in) is stored after the step; None: as before."""
        return None

    def on(self, shape: Shape, width: int) -> Params:
        """These settings for a model of that shape and so many bytes a dense weight: bits may follow from its size."""
        return self

    def calibration_length(self) -> int | None:
        """Tokens that the recipe's calibration text must have at least, for one sequence; None: it is not read."""
        return None

    def work(self, shape: Shape) -> float:
        """Floating-point operations for the time estimate, or what takes as long, on the weights of such a model.

        What comes beside reading and writing each, the passes of calibration text, `survey`, and training's steps.
        """
        return 0.0

    def survey(self, shape: Shape, width: int) -> Survey | None:
        """What the step measures of a whole model, of that shape and `width` bytes a weight, before it changes it."""
        return None

    def whole(self) -> bool:
        """Whether all weights must be in memory at once, not only those of one block."""
        return False

    def told_by_a_block(self) -> bool:
        """Whether what the work takes on a model of one block tells what it takes on all."""
        return True

    def processes(self) -> int:
        """In how many processes, a GPU each, the step can train at most, the network in shards; 1: it cannot so."""
        return 1

    def cache_grid(self) -> CacheGrid | None:
        """How the model is to hold keys and values, for a step that says this and changes no weight."""
        return None


class Selection(Params):
    """Params of a method that works on some linears of the blocks: those of `targets` that `ignore` does not name.

    Patterns are of the shell's kind (`*.mlp.*`, `model.layers.0.*`) or, after `re:`, regular expressions that match
    from the start of the name. Several are separated by spaces. Names are those of the network, or of its files.
    """

    PATTERNS: ClassVar[frozenset[str]] = frozenset({"targets", "ignore"})

    targets: Annotated[str, RARE] = Field(
        "", max_length=2000, description="Which linears: patterns such as `*.mlp.*`; empty: all."
    )
    ignore: Annotated[str, RARE] = Field(
        "", max_length=2000, description="Linears to leave as they are, patterns as above."
    )

    @field_validator("targets", "ignore")
    @classmethod
    def _compile(cls, value: str) -> str:
        patterns.check(value)
        return value

    def patterns(self) -> Mapping[str, Sequence[str]]:
        return {"targets": self.targets.split()}

    def selects(self, name: str) -> bool:
        """Whether the linear of that full name is to be changed."""
        chosen = not self.targets.split() or patterns.matches(self.targets, name)
        return chosen and not patterns.matches(self.ignore, name)


class Calibrated(Params):
    """Params of a method that needs calibration text."""

    samples: Annotated[int, RARE] = Field(64, ge=1, le=4096, description="Calibration sequences that are read.")
    sequence_length: Annotated[int, RARE] = Field(
        128, ge=8, le=8192, description="Tokens of each calibration sequence."
    )

    def calibration_length(self) -> int | None:
        return self.sequence_length


def calibrates(params: Params) -> TypeGuard[Calibrated]:
    """Whether calibration text flows through the model with these settings."""
    return isinstance(params, Calibrated) and params.calibration_length() is not None


@dataclass(frozen=True)
class Context:
    """What a method may use of the run it is part of.

    `folder` keeps finished work for resuming, `cache` what is worth keeping for other runs; `calibration` is the
    text file that calibrates.
    """

    device: str
    seed: int
    folder: Path
    cache: Path
    calibration: Path
    emit: Emit = field(repr=False)
    check_cancelled: Callable[[], None] = field(repr=False)

    def progress(self, done: int, total: int, unit: str) -> None:
        """Say how far the work is: `done` of `total` in `unit`."""
        self.emit("progress", {"done": done, "total": total, "unit": unit})

    def sample(self, series: str, value: float, unit: str) -> None:
        """Add one point to a live chart."""
        self.emit("sample", {"series": series, "value": value, "unit": unit})

    def log(self, text: str) -> None:
        """Say something worth keeping."""
        self.emit("log", {"text": text})


@dataclass(frozen=True)
class Method:
    """One compression method, as its file describes it. `name` is `family/file`."""

    name: str
    title: str
    summary: str
    documentation: str
    changes: tuple[Change, ...]
    params: type[Params]
    apply: Callable[[LoadedModel, Params, Context], LoadedModel]

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    def check(self, params: Mapping[str, JsonValue]) -> Params:
        """Validated params.

        Raises:
            BadParams: a value is out of bounds or of another type; one line that names it.
            UnknownName: a key that this method does not have.
        """
        for key in params:
            if key not in self.params.model_fields:
                raise UnknownName(f"setting of {self.name}", str(key), self.params.model_fields)
        try:
            return self.params.model_validate_json(_json(params))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "params"
            got = "" if not problem["loc"] else f", got {short(repr(problem['input']))}"
            message = problem["msg"].removeprefix("Value error, ")
            raise BadParams(f"{self.name}: {where}: {message}{got}.") from None


@cache
def methods() -> Mapping[str, Method]:
    """Every method by name, in the order of the families and then of the alphabet.

    Raises:
        TypeError: a method file is incomplete; the message names the file and the part.
    """
    found: dict[str, Method] = {}
    for family in FAMILIES:
        package = importlib.import_module(f"engine.{family}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            if not info.name.startswith("_"):
                method = read(importlib.import_module(f"engine.{family}.{info.name}"), f"{family}/{info.name}")
                found[method.name] = method
    return types.MappingProxyType(found)


def read(module: types.ModuleType, name: str) -> Method:
    """The Method that a module describes.

    Raises:
        TypeError: something is missing or a field has no default, description or supported type.
    """
    documentation = (module.__doc__ or "").strip()
    if not documentation:
        raise TypeError(f"{name}: the file has no docstring")
    for part in ("TITLE", "CHANGES", "Params", "apply"):
        if not hasattr(module, part):
            raise TypeError(f"{name}: {part} is missing")
    if not (isinstance(module.Params, type) and issubclass(module.Params, Params)):
        raise TypeError(f"{name}: Params must derive from engine.methods.Params")
    unknown = set(module.CHANGES) - set(typing.get_args(Change))
    if unknown:
        raise TypeError(f"{name}: CHANGES has {sorted(unknown)}; allowed are {typing.get_args(Change)}")
    for key, info in module.Params.model_fields.items():
        if info.is_required() or not info.description:
            raise TypeError(f"{name}: {key} needs a default and a description")
        if field_kind(info) is None:
            raise TypeError(f"{name}: {key} has the unsupported type {info.annotation}")
        needed = condition(info)
        if needed is not None and needed.setting not in module.Params.model_fields:
            raise TypeError(f"{name}: {key} counts with {needed.setting}, which is no setting")
    return Method(
        name, module.TITLE, documentation.splitlines()[0], documentation, tuple(module.CHANGES), module.Params,
        module.apply,
    )  # fmt: skip


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in methods():
        raise UnknownName("method", name, methods())
    return methods()[name]


def check(recipe: Recipe) -> list[tuple[Method, Params]]:
    """The recipe's methods with validated params, in order.

    Raises:
        InputError: an unknown method, setting or measurement, a value out of bounds, or an impossible order.
    """
    for name in recipe.measure:
        if name not in MEASURES:
            raise UnknownName("measurement", name, MEASURES)
    steps = [_checked(step) for step in recipe.steps]
    quantized = False
    for (earlier, settings), (later, next_settings) in itertools.combinations(steps, 2):
        if reason := settings.unfit_for(later.name, next_settings):
            raise BadRecipe(f"{later.name} cannot follow {earlier.name}: {reason}")
    for (earlier, settings), (later, next_settings) in itertools.pairwise(steps):
        if settings.cache_grid() is not None:
            raise BadRecipe(f"{later.name} cannot follow {earlier.name}. Put {earlier.name} last, once.")
        quantized = quantized or earlier.family == "quantize"
        if quantized and next_settings.cache_grid() is None and not settings.leaves_codes():
            if later.family == "quantize":
                raise BadRecipe(
                    f"{later.name} cannot follow {earlier.name}, whose weights are a library's. Leave one out."
                )
            raise BadRecipe(
                f"{later.name} cannot follow {earlier.name}, whose weights are a library's. Put {earlier.name} last."
            )
        if quantized and next_settings.cache_grid() is None and not next_settings.keeps_grids():
            raise BadRecipe(
                f"{later.name} cannot follow {earlier.name}: it would change weights whose integer codes are "
                "already fixed. Put quantization last; distill/repair may follow it."
            )
    return steps


def _checked(step: Step) -> tuple[Method, Params]:
    method = get(step.method)
    return method, method.check(step.params)


def _json(params: Mapping[str, JsonValue]) -> str:
    return json.dumps(dict(params))
