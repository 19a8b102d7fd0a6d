"""A network without data, and the checkpoint that fills it part by part.

A model can be larger than memory: what stands in memory are the *parts* in use. The parts are the decoder blocks and
every module beside them that has tensors of its own: embeddings, final norm, head. Names and layouts in checkpoints
differ from those in the network (prefixes, renamed or merged tensors); `transformers` knows the rules of every family,
and its own code applies them here too.

The experts of a mixture, which `transformers` 5 fuses into two three-dimensional tensors, stand apart again, as linears
under the names that checkpoints have for them: so every method sees them as the linears that they are.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine import bnb
from engine.bitmask import MASK, SHAPE, VALUES, unpack_bitmask
from engine.errors import BadModel, short
from engine.experts import separate
from engine.files import read_ahead
from engine.headers import Header, plain, read_header, weight_files
from engine.low_rank import RANKS_KEY, factor
from engine.wide import widen

CHUNK = 1 << 24  # bytes of two tensors that are compared at a time


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    assert isinstance(config, PretrainedConfig)
    return config


def attention(config: PretrainedConfig) -> str:
    """`sdpa`, or `eager` for the families that have no other (Gemma 2). Never a kernel that a config names."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "sdpa" if getattr(family, "_supports_sdpa", False) else "eager"


def shell(config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The network in evaluation mode with all parameters on the meta device, its experts apart, each a linear.

    Buffers that no file holds because they follow from the config (rotary frequencies) are on `device`.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attention(config), trust_remote_code=False
        )
        assert isinstance(network, PreTrainedModel)
        separate(network)
        factor(network, getattr(config, RANKS_KEY, {}))
    widen(network)
    _derive_buffers(network, torch.device(device))
    network.requires_grad_(False)
    return network.eval()  # type: ignore[no-untyped-call,no-any-return]


def _derive_buffers(network: PreTrainedModel, device: torch.device) -> None:
    """Let the family's own initialisation compute the buffers that no file holds, and nothing else."""
    for parameter in network.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in network.modules():
        module._is_hf_initialized = not module._non_persistent_buffers_set  # type: ignore[assignment]
        for leaf in module._non_persistent_buffers_set:
            if (buffer := module._buffers[leaf]) is not None and buffer.is_meta:
                empty = torch.zeros_like(buffer, device="cpu")
                module._buffers[leaf] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
    with torch.no_grad():
        network.initialize_weights()  # type: ignore[no-untyped-call]
        if left := _not_derived(network):  # Falcon-H1's body computes them for what is in its blocks
            for path in (part for name in left for part in itertools.accumulate(name.split("."), "{}.{}".format)):
                network.get_submodule(path.rpartition(".")[0])._is_hf_initialized = False  # type: ignore[assignment]
            network.initialize_weights()  # type: ignore[no-untyped-call]
        left = _not_derived(network)
    assert not left, f"{left[0]} was not derived from the config"
    for module in network.modules():
        for leaf in module._non_persistent_buffers_set:
            if (buffer := module._buffers[leaf]) is not None:
                module._buffers[leaf] = buffer.to(device)


def _not_derived(network: PreTrainedModel) -> list[str]:
    """The buffers that no file holds, and that are no numbers yet."""
    return [name for name, each in network.named_non_persistent_buffers() if not torch.isfinite(each).all()]


def part_names(network: PreTrainedModel, prefix: str) -> list[str]:
    """The parts of a network by module name: its blocks, below `prefix`, and every module that has tensors of its own.

    In the order of the network, so that a tensor belongs to the last part whose name it begins with.
    """
    found = []
    for path, module in network.named_modules():
        within = path.startswith(f"{prefix}.")
        stored = [leaf for leaf in module._buffers if leaf not in module._non_persistent_buffers_set]
        if path.rpartition(".")[0] == prefix or (not within and (module._parameters or stored)):
            found.append(path)
    return found


def part_of(name: str, parts: list[str]) -> str:
    """The part that a tensor of that name belongs to, "" where none."""
    return max((part for part in parts if name.startswith(f"{part}.")), key=len, default="")


class Checkpoint:
    """The tensors of a folder's safetensors files, sorted by the part of a network that they belong to.

    tied: names of weights that are another's, and not in the files or there once more, with the other's name.
    sparse: names of the modules whose weight is stored as a bitmask.

    Raises:
        BadModel: a file is damaged, or tensors are missing or of another shape than the config says.
    """

    def __init__(self, folder: Path, network: PreTrainedModel, parts: list[str]) -> None:
        self.folder = folder
        self._parts = parts
        self._mapping = [rule for rule in get_model_conversion_mapping(network) if not _fuses_experts(rule)]
        self._tensors: dict[str, tuple[Path, Header]] = {}
        self.sparse: set[str] = set()
        self._keys: dict[str, list[str]] = defaultdict(list)
        expected = network.state_dict()
        renamings = [rule for rule in self._mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._mapping if isinstance(rule, WeightConverter)]
        found: dict[str, str] = {}  # of names in the network, those in the files
        for file in weight_files(folder):
            stored = read_header(file)
            for key, header in plain(stored, file).items():
                if key.removesuffix("weight") + MASK in stored:
                    self.sparse.add(key.removesuffix(".weight"))
                name, pattern = rename_source_key(key, renamings, converters, network.base_model_prefix, expected)
                self._tensors[key] = file, header
                self._keys[part_of(name, parts)].append(key)
                found[name] = key
                if pattern is None and name in expected and expected[name].shape != header.shape:
                    raise self._bad(
                        f"{key} has the shape {header.shape}, the config says {tuple(expected[name].shape)}"
                    )
        self.tied: dict[str, str] = {}
        for name, source in (network.all_tied_weights_keys or {}).items():
            copy = found.get(name)
            if copy is not None and source in found and self._alike(copy, found[source]):
                self._keys[part_of(name, parts)].remove(copy)
                del self._tensors[copy]
            if copy is None or copy not in self._tensors:
                self.tied[name] = source
        missing = sorted(set(expected) - set(found) - set(self.tied))
        if missing and not converters:  # what a converter makes shows when it has worked
            raise self._bad(f"the weights do not fit the config (missing: {missing[0]})")

    def _alike(self, *keys: str) -> bool:
        """Whether two tensors have the same bytes, as weights that are one have where both are stored."""
        (file, header), (other_file, other) = (self._tensors[key] for key in keys)
        if (header.dtype, header.shape, header.length) != (other.dtype, other.shape, other.length):
            return False
        with file.open("rb") as first, other_file.open("rb") as second:
            first.seek(header.start)
            second.seek(other.start)
            sizes = [min(CHUNK, header.length - start) for start in range(0, header.length, CHUNK)]
            return all(first.read(size) == second.read(size) for size in sizes)

    def check_finite(self) -> None:
        """Read every tensor once.

        Raises:
            BadModel: one holds NaN or infinite values.
        """
        for file in sorted({file for file, _ in self._tensors.values()}):
            with safe_open(file, framework="pt", backend="pread") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no dict
                    if not finite(opened.get_tensor(key)):
                        raise self._bad(f"{key} holds NaN or infinite values; the checkpoint is damaged")

    def fill(self, network: PreTrainedModel, part: str, device: torch.device) -> None:
        """Give every parameter and buffer of a part its values, but for those that are another part's.

        Raises:
            BadModel: a tensor is missing or has another shape than the config says.
        """
        files = {self._tensors[key][0] for key in self._keys[part]}
        opened = {file: safe_open(file, framework="pt", backend="pread") for file in files}
        slices = {key: self._tensor(opened[self._tensors[key][0]], key) for key in self._keys[part]}
        mapping: list[WeightConverter | WeightRenaming] = list(self._mapping)  # type: ignore[arg-type]
        if str(device) == "cuda":  # it is read by threads, for which that is the first GPU
            device = torch.device("cuda", torch.cuda.current_device())
        wanted = LoadStateDictConfig(device_map={"": str(device)}, dtype=network.dtype, weight_mapping=mapping)
        info, _ = convert_and_load_state_dict_in_model(network, slices, wanted)
        for name, got, needed in info.mismatched_keys:
            raise self._bad(f"{name} has the shape {tuple(got)}, the config says {tuple(needed)}")
        missing = {name for name in info.missing_keys if part_of(name, self._parts) == part} - set(self.tied)
        if missing:
            raise self._bad(f"the weights do not fit the config (missing: {min(missing)})")
        network.requires_grad_(False)

    def _tensor(self, opened: Any, key: str) -> object:
        """The tensor of an open file, to be read when it is needed; at once where it is stored as a bitmask."""
        module = key.removesuffix(".weight")
        if module == key or module not in self.sparse:
            return Unread(opened, key)
        try:
            return unpack_bitmask(*(opened.get_tensor(f"{module}.{leaf}") for leaf in (MASK, VALUES, SHAPE)))
        except ValueError as error:
            raise self._bad(f"{key}: {error}") from None

    def prefetch(self, part: str) -> None:
        """Ask the system to read the part's bytes ahead; returns at once and takes none of our memory."""
        for key in self._keys[part]:
            file, header = self._tensors[key]
            read_ahead(file, header.start, header.length)

    def _bad(self, problem: str) -> BadModel:
        return BadModel(f"{short(self.folder.name)}: {problem}.")


@dataclass(frozen=True)
class Unread:
    """A tensor of an open safetensors file; indexing reads it whole. The library's own slices read it twice."""

    file: Any
    key: str

    def __getitem__(self, index: object) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.key)
        return tensor[index]  # type: ignore[index]


def finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values; takes no memory for large ones."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats have no sum
    # The sum is not finite where a value is not; the look that needs room only where it says so.
    return bool(wide.sum().isfinite()) or bool(wide.isfinite().all())


def _fuses_experts(rule: object) -> bool:
    return isinstance(rule, WeightConverter) and any("experts" in target for target in rule.target_patterns)


def empty(network: PreTrainedModel, part: str, parts: list[str]) -> None:
    """Forget the values of a part's parameters and stored buffers; shapes and dtypes stay."""
    for path, owner in network.get_submodule(part).named_modules(prefix=part):
        if part_of(f"{path}.", parts) != part:
            continue
        if bnb.is_library(owner):
            bnb.close(owner, network.dtype)
            continue
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                hollow = torch.empty_like(parameter, device="meta")
                owner._parameters[leaf] = nn.Parameter(hollow, requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = torch.empty_like(buffer, device="meta")
