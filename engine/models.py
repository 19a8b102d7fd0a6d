"""Load a causal LM from a folder, whole or a part at a time; its blocks and its linears.

Loads safetensors only, by absolute path, never a model's own code. A tensor that is missing, misshapen
or not finite is refused: `transformers` would fill it at random with a warning.

A model that is *streamed* has its weights in files. A part is opened when the network reaches it, or when somebody
works on it, and closed afterwards; so the network can be called as any other, whatever memory there is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip
from transformers.pytorch_utils import Conv1D

from engine import hardware
from engine.checkpoint import Checkpoint, attention, empty, finite, part_names, part_of, read_config, shell
from engine.configs import check_tokenizer, read_object
from engine.errors import BadModel, short
from engine.headers import is_own
from engine.origin import FolderOrigin
from engine.packing import CACHE_KEY, CacheGrid, InputGrid, QuantizedWeight
from engine.wide import widen

Linear = nn.Linear | Conv1D
LARGE = 1 << 22  # weights


class Part(Protocol):
    """Where the weights of a part are while it is closed."""

    def fill(self, model: LoadedModel, part: str) -> None:
        """Give the part its weights."""

    def prefetch(self, part: str) -> None:
        """Begin to read what `fill` will need."""


class Source(Part, Protocol):
    """Where all parts of a model are at first; `tied` names weights that are another's, with the other's name."""

    tied: Mapping[str, str]


class Original:
    """A checkpoint in `folder`, the model's own or one of what earlier steps made of it.

    Raises:
        BadModel: weights are missing, misshapen or not finite.
    """

    def __init__(self, folder: Path, network: PreTrainedModel, parts: list[str]) -> None:
        self.folder = folder
        self._checkpoint = Checkpoint(folder, network, parts)
        self._checkpoint.check_finite()
        self.tied: Mapping[str, str] = self._checkpoint.tied
        self.sparse = self._checkpoint.sparse

    def fill(self, model: LoadedModel, part: str) -> None:
        self._checkpoint.fill(model.network, part, model.device)

    def prefetch(self, part: str) -> None:
        self._checkpoint.prefetch(part)


@dataclass
class Parts:
    """The parts of a streamed model in order, where each is, and which are open.

    tied: names of the weights that are another's (the head's, where it is that of the embeddings), with its name.
    """

    device: torch.device
    where: dict[str, Part]
    tied: Mapping[str, str]
    opened: set[str] = field(default_factory=set)
    lingering: contextlib.ExitStack | None = None

    def fill(self, model: LoadedModel, part: str) -> None:
        """Give a part its weights, those too that are another's."""
        # What the part before has left, which grows with each.
        hardware.give_back_memory(collect=is_large(model.network.get_submodule(part)))
        self.where[part].fill(model, part)
        names = list(self.where)
        for target, source in self.tied.items():
            if part_of(target, names) == part:
                lender = part_of(source, names)
                if lender != part and lender not in self.opened:
                    self.where[lender].fill(model, lender)
                owner, _, leaf = target.rpartition(".")
                model.network.get_submodule(owner)._parameters[leaf] = model.network.get_parameter(source)
                if lender != part and lender not in self.opened:
                    empty(model.network, lender, names)


@dataclass
class LoadedModel:
    """A network with its tokenizer and what is known about its weights.

    quantized: integer codes by module name, as the solver found them, on the meta device while their part is closed.
        The network's dense weight of that module equals `codes.dequantize()` where the weight is dense.
    pruned: names of the linears whose zeros must be kept by later steps.
    sparse: names of the linears whose dense weights are to be stored as a bitmask, where that is smaller.
    kernels: by module name, the kernel that computes it; empty while all weights are dense.
    stored_as: the `quantization_config` of a library whose own modules stand in the network.
    parts: of a streamed model; None where all weights are in memory.
    kv_cache: how keys and values are held in generation; None: as they are.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Path
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    sparse: set[str] = field(default_factory=set)
    kernels: dict[str, str] = field(default_factory=dict)
    stored_as: dict[str, JsonValue] | None = None
    parts: Parts | None = None
    kv_cache: CacheGrid | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.network.device if self.parts is None else self.parts.device

    @property
    def parameters(self) -> int:
        """How many it has; a weight that is another's counts once, also while its part is closed."""
        tied, all_names = self.tied, self.network.named_parameters(remove_duplicate=False)
        return sum({id(each): each.numel() for name, each in all_names if name not in tied}.values())

    @contextlib.contextmanager
    def opened(self, part: str) -> Iterator[None]:
        """The part has its weights meanwhile; changes to them are lost at the end unless they were stored."""
        if self.parts is None or part in self.parts.opened:
            yield
            return
        self.parts.fill(self, part)
        self.parts.opened.add(part)
        try:
            yield
        finally:
            if self.parts is not None:  # else all was loaded meanwhile
                self.parts.opened.discard(part)
                empty(self.network, part, list(self.parts.where))
                inside = [name for name in self.quantized if name == part or name.startswith(f"{part}.")]
                self.quantized |= {name: self.quantized[name].to("meta") for name in inside}

    @contextlib.contextmanager
    def lingering(self) -> Iterator[None]:
        """Parts that are reached meanwhile stay open to the end, so that each is read once and not once a batch."""
        if self.parts is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            self.parts.lingering = stack
            try:
                yield
            finally:
                self.parts.lingering = None

    def prefetch(self, part: str) -> None:
        """Begin to read a part that will be opened soon."""
        if self.parts is not None and part not in self.parts.opened:
            self.parts.where[part].prefetch(part)

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of another; where that is a part, this one opens when it is reached, too."""
        self.network.set_submodule(name, module)
        if self.parts is not None and name in self.parts.where:
            _open_when_reached(self, name)

    def load_all(self) -> None:
        """Take all weights into memory, and keep them there."""
        if self.parts is None:
            return
        for part, place in self.parts.where.items():
            if part not in self.parts.opened:
                place.fill(self, part)
        if self.parts.tied:
            self.network.tie_weights()
        self.parts = None

    def untie(self, module: str) -> None:
        """Give a module whose weight is another's one of its own; streamed, while it is open or before it is read."""
        name = f"{module}.weight"
        if name not in self.tied:
            return
        if self.parts is not None:
            self.parts.tied = {target: source for target, source in self.parts.tied.items() if target != name}
        else:
            own = self.network.get_parameter(name).detach().clone()
            self.network.get_submodule(module)._parameters["weight"] = nn.Parameter(own, requires_grad=False)
        self.network.config.get_text_config().tie_word_embeddings = self.network.config.tie_word_embeddings = False

    @property
    def tied(self) -> frozenset[str]:
        """Names of the weights that are another's, and are stored once."""
        if self.parts is not None:
            return frozenset(self.parts.tied)
        parameter, pairs = self.network.get_parameter, self.network.all_tied_weights_keys or {}
        return frozenset(target for target, source in pairs.items() if parameter(target) is parameter(source))


def stream(
    folder: Path,
    dtype: str = "bfloat16",
    device: str = "cpu",
    source_of: Callable[[Path, PreTrainedModel, list[str]], Source] = Original,
) -> LoadedModel:
    """The model in `folder` with all parts closed, in evaluation mode, its experts as linears.

    `source_of` makes what reads the folder, for a network and the names of its parts.

    Raises:
        BadModel: weights are missing, misshapen or not finite.
    """
    model = _closed(folder, dtype, device, source_of)
    open_when_reached(model)
    return model


def _closed(
    folder: Path, dtype: str, device: str, source_of: Callable[[Path, PreTrainedModel, list[str]], Source] = Original
) -> LoadedModel:
    network = shell(read_config(folder), getattr(torch, dtype), device)
    names = part_names(network, blocks(network)[0])
    source = source_of(folder, network, names)
    if (generation := read_generation_config(folder)) is not None:
        network.generation_config = generation
    model = LoadedModel(network, load_tokenizer(folder), folder)
    model.parts = Parts(torch.device(device), dict.fromkeys(names, source), source.tied)
    if isinstance(source, Original):
        model.pruned, model.sparse = set(source.sparse), set(source.sparse)
    return model


def open_when_reached(model: LoadedModel) -> None:
    """Let each part of a model whose parts are closed be open for as long as its module computes."""
    assert model.parts is not None
    for part in model.parts.where:
        _open_when_reached(model, part)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The settings of generation in `folder`; None, for the family's own, where there are none or they are damaged."""
    if (folder / "generation_config.json").exists():
        with contextlib.suppress(OSError):  # as transformers does
            found: GenerationConfig = GenerationConfig.from_pretrained(folder, local_files_only=True)
            return found
    return None


def _open_when_reached(model: LoadedModel, part: str) -> None:
    module = model.network.get_submodule(part)
    stack = contextlib.ExitStack()

    def before(module: nn.Module, args: object) -> None:
        lingering = None if model.parts is None else model.parts.lingering
        (lingering or stack).enter_context(model.opened(part))

    def after(module: nn.Module, args: object, output: object) -> None:
        stack.close()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def load(folder: Path, dtype: str = "bfloat16", device: str = "cpu") -> LoadedModel:
    """The model in `folder` with dense weights, in evaluation mode.

    Raises:
        BadModel: weights are missing, misshapen or not finite.
    """
    config = read_config(folder)
    if is_own(vars(config)):
        model = _closed(folder, dtype, device)
        model.load_all()
        model.kv_cache = cache_grid(config, folder)
        return model
    network: PreTrainedModel
    info: dict[str, object]
    try:
        network, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # the stub knows no pair
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention(config),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
            raise BadModel(f"{short(folder.name)}: the weights have other shapes than the config says.") from None
        raise
    for problem in ("missing_keys", "mismatched_keys"):
        if names := info.get(problem):
            assert isinstance(names, set | list)
            example = sorted(map(str, names))[0]
            raise BadModel(f"{short(folder.name)}: the weights do not fit the config ({problem[:-5]}: {example}).")
    for name, weight in network.named_parameters():
        if not finite(weight):
            raise BadModel(f"{short(folder.name)}: {name} holds NaN or infinite values; the checkpoint is damaged.")
    widen(network)
    network.to(torch.device(device))  # type: ignore[arg-type]  # the stub takes the method for an unbound one
    network.eval()  # type: ignore[no-untyped-call]
    return LoadedModel(network, load_tokenizer(folder), folder, kv_cache=cache_grid(config, folder))


def cache_grid(config: PretrainedConfig, folder: Path) -> CacheGrid | None:
    """How the config of the model in `folder` says that keys and values are held.

    Raises:
        BadModel: it says so in a way that we do not write.
    """
    entry = getattr(config, CACHE_KEY, None)
    return None if entry is None else CacheGrid.read(entry, folder.name)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`.

    Raises:
        BadModel: there is none, or it is damaged.
    """
    origin = FolderOrigin(folder)
    check_tokenizer(origin)
    if "tokenizer.json" in origin.sizes:
        read_object(origin, "tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def quantize_inputs(linear: nn.Module, grid: InputGrid) -> None:
    """Let a linear round its inputs to `grid` from now on, before it computes as it did.

    A gradient passes the rounding as if it were not there.
    """

    def round_(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if torch.is_grad_enabled() and x.requires_grad:
            return (x + (grid.fake(x.detach()) - x.detach()), *args[1:])
        return (grid.fake(x), *args[1:])

    linear.register_forward_pre_hook(round_)


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let the parameter or buffer of that name, in a module or below it, be this tensor."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def is_large(module: nn.Module) -> bool:
    """Whether what work on a module leaves behind is worth the time that looking for it takes."""
    return sum(parameter.numel() for parameter in module.parameters()) > LARGE


def blocks(network: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and the name of the list that holds them (`model.layers`, `transformer.h`, ...)."""
    count = network.config.get_text_config().num_hidden_layers
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise BadModel(f"{type(network).__name__} has no list of {count} blocks; this family is not supported yet.")


def head(network: PreTrainedModel) -> tuple[str, nn.Module]:
    """The output head with its name."""
    return _named(network, network.get_output_embeddings())  # type: ignore[no-untyped-call]


def embeddings(network: PreTrainedModel) -> tuple[str, nn.Module]:
    """The token embeddings with their name."""
    return _named(network, network.get_input_embeddings())


def _named(network: PreTrainedModel, wanted: nn.Module) -> tuple[str, nn.Module]:
    return next((name, module) for name, module in network.named_modules() if module is wanted)


def linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear below `module` with its name relative to it, in order."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child
