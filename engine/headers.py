"""What a model's config.json and safetensors headers say, refused where it cannot be.

JSON and headers only: no tensor is loaded and nothing of the model is executed. The same for a folder of this machine
and for a repo of which nothing is here yet (`engine.origin`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from engine.bitmask import MASK, SHAPE, SPARSE_KEY, VALUES
from engine.configs import check_numbers, read_object, weight_names
from engine.errors import BadModel, short
from engine.low_rank import RANKS_KEY
from engine.origin import FolderOrigin, Origin, has_weights
from engine.own_packed import CONV1D, PACKED_KEY
from engine.packing import CACHE_KEY, CacheGrid

LARGEST = 100 << 20  # bytes of a safetensors header
OWN_KEYS = (SPARSE_KEY, RANKS_KEY, PACKED_KEY)  # of config.json: formats that only Maquette reads
Tensors = dict[str, tuple[int, ...]]  # shapes by name
BITS = {  # of the dtypes of safetensors
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16), **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}  # fmt: skip
PACKED = ("U8", "I32", "U32")  # dtypes in which files hold several weights in a number
BESIDE = ("g_idx", "zeros", "zero_point", "absmax", "quant_map")  # what has them too, and holds no weights
USUAL_BITS = 4  # of packed weights whose config does not say: MXFP4, NF4
ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight")  # which are no linears of the networks
MEDIA = (  # of config.json: the parts of a model that reads or makes more than text
    "text_config", "vision_config", "audio_config", "vq_config", "text_encoder", "audio_encoder_config",
)  # fmt: skip
QUANTIZED = {"quantization_config", "quantization", PACKED_KEY, CACHE_KEY}  # keys of a config; MLX has one of its own
REREADING = ("openai-gpt", "rwkv", "xlm")  # families of which transformers keeps no keys and values from token to token
HEADS = ("lm_head.weight", "embed_out.weight")  # names of an output head that is not its embeddings
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
NEOX = ("gpt_neox", "gpt_neox_japanese")  # whose configs say that they are no decoders, which they are
OF_EACH_BLOCK = (  # keys of config.json with an entry for each block
    "layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers", "layer_rope_theta",
    "intermediate_size", "activation_sparsity_pattern", "indexer_types", "num_attention_heads_per_layer",
)  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Shape:
    """What a model's headers say.

    linears: (out, in) of each linear in the blocks by module name, without routers. parameters: how many, in all.
    packed: how many weights each tensor holds that has several in a number.
    here: whether `folder` is on this machine; else it is only the model's name, and all that is known stands here.
    """

    folder: Path
    config: dict[str, JsonValue]
    tensors: Tensors
    bytes: int
    here: bool = True
    packed: Mapping[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(self.packed.get(name, math.prod(shape)) for name, shape in self.tensors.items())

    @property
    def parts(self) -> dict[str, int]:
        """Parameters of each block, and of each module beside the blocks."""
        found: dict[str, int] = {}
        for name, shape in self.tensors.items():
            *path, _ = name.split(".")
            number = next((place for place, word in enumerate(path) if word.isdigit()), None)
            part = ".".join(path if number is None else path[: number + 1])
            found[part] = found.get(part, 0) + self.packed.get(name, math.prod(shape))
        return found

    @property
    def cache_grid(self) -> CacheGrid | None:
        """How the model holds keys and values, where it says so."""
        return CacheGrid.read(self.config[CACHE_KEY], self.folder.name) if CACHE_KEY in self.config else None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        transposed = self.config.get("model_type") in CONV1D
        routers = ROUTERS if experts(self.config) > 1 else ()
        found = {}
        for name, shape in self.tensors.items():
            inside = any(part.isdigit() for part in name.split("."))
            if inside and name.endswith(".weight") and len(shape) == 2 and not name.endswith(routers):
                out, into = shape[::-1] if transposed else shape
                found[name.removesuffix(".weight")] = (out, into)
        return found


def inspect(place: Path | Origin) -> Shape:
    """The config and tensor shapes of a model.

    Raises:
        BadModel: not a causal LM in safetensors that this machine's transformers knows, or damaged.
        MaquetteError: the hub refuses a file, or does not answer.
    """
    origin = FolderOrigin(place) if isinstance(place, Path) else place
    config = _config(origin)
    headers: dict[str, Header] = {}
    total = 0
    for name in weight_names(origin):
        found = header_of(origin, name)
        total += sum(header.length for header in found.values())
        headers |= _plain(found, origin, name)
    tensors = _once(config, {name: header.shape for name, header in headers.items()})
    folder = origin.folder or Path(origin.name)
    return Shape(folder, config, tensors, total, origin.folder is not None, _packed(headers, config))


def _once(config: Mapping[str, JsonValue], tensors: Tensors) -> Tensors:
    """Tensors without a head that the config says is the embeddings, which many a checkpoint stores a second time."""
    shapes = [shape for name, shape in tensors.items() if name.endswith(EMBEDDINGS)]
    tied = bool(config.get("tie_word_embeddings"))
    return {name: each for name, each in tensors.items() if not (tied and name.endswith(HEADS) and each in shapes)}


def _encodes(kind: type, config: Mapping[str, JsonValue]) -> bool:
    """Whether a model with a kind of config reads a text in both directions, as BERT does, if the config agrees."""
    decodes = getattr(kind, "is_decoder", True) or vars(kind).get("model_type") in NEOX
    return not (decodes or config.get("is_decoder"))


def is_own(config: Mapping[str, JsonValue]) -> bool:
    """Whether a config.json says that the weights are in a format that only Maquette reads."""
    return any(key in config for key in OWN_KEYS)


class Header(NamedTuple):
    """What a safetensors file says of a tensor: its dtype and shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


def read_header(file: Path) -> dict[str, Header]:
    """The tensors of a safetensors file by name; none is read.

    Raises:
        BadModel: truncated, or not a safetensors file.
    """
    return header_of(FolderOrigin(file.parent), file.name)


def header_of(origin: Origin, file: str) -> dict[str, Header]:
    """As `read_header`, of a model's file wherever it is."""
    broken = BadModel(f"{short(file)} is truncated or not a safetensors file. Download it again.")
    size = origin.sizes.get(file, 0)
    length = int.from_bytes(origin.read(file, 0, 8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, LARGEST):
        raise broken
    try:
        header = json.loads(origin.read(file, 8, length))
    except (ValueError, RecursionError):
        raise broken from None
    result = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = map(int, entry["data_offsets"])
                shape = tuple(int(n) for n in entry["shape"])
                result[name] = Header(str(entry["dtype"]), shape, 8 + length + begin, end - begin)
                filled = -(-math.prod(shape) * BITS[entry["dtype"]] // 8)
                if not 0 <= begin <= end <= size - 8 - length or min(shape, default=0) < 0 or end - begin != filled:
                    raise broken
    except (KeyError, TypeError, ValueError, AttributeError):
        raise broken from None
    return result


def _config(origin: Origin) -> dict[str, JsonValue]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name, files = short(origin.name), origin.sizes
    if "adapter_config.json" in files and not ("config.json" in files and has_weights(files)):
        raise BadModel(f"{name} holds only an adapter. Merge it into its base model first.")
    try:
        config = read_object(origin, "config.json")
    except OSError:
        raise BadModel(f"{name} has no config.json: it is not a model folder.") from None
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):  # of a type that transformers knows, its own code computes, and none of the repo's
            raise BadModel(
                f"{name} brings code of its own (auto_map in config.json), which Maquette never runs. Choose a model "
                "that transformers knows by itself."
            )
        raise BadModel(f"{name}: model type {short(kind)!r} is unknown to the installed transformers.")
    if (
        config.get("is_encoder_decoder")
        or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or _encodes(CONFIG_MAPPING[kind], config)
    ):
        raise BadModel(f"{name}: a {kind} model is not a causal language model.")
    if any(part in CONFIG_MAPPING[kind].sub_configs or isinstance(config.get(part), dict) for part in MEDIA):
        raise BadModel(
            f"{name} is a {kind} model, which wraps a language model together with other media; Maquette compresses "
            "language models alone. Choose a text-only checkpoint of it."
        )
    if kind in REREADING:
        raise BadModel(
            f"{name}: transformers keeps no keys and values of {kind} models, so that each new token would read the "
            "whole text again. Choose a model of another type."
        )
    check_numbers(config, name)
    return config


def _packed(found: Mapping[str, Header], config: Mapping[str, JsonValue]) -> dict[str, int]:
    """Weights of each packed tensor, by the bits that config.json gives it: the fewest where it names several."""
    scheme = config.get("quantization_config") or config.get(PACKED_KEY) or config.get("quantization")  # MLX's
    if not isinstance(scheme, dict):
        return {}
    own: dict[str, list[JsonValue]] = {}
    for group in _objects(scheme.get("config_groups")):
        weights, targets = group.get("weights"), group.get("targets")
        if isinstance(weights, dict) and isinstance(targets, list):
            for target in targets:
                own.setdefault(str(target), []).append(weights.get("num_bits"))
    others = [each.get("bits") for each in (scheme, *_objects(scheme), *_objects(scheme.get("dynamic")))]
    others += [number for numbers in own.values() for number in numbers]
    return {
        name: header.length * 8 // _fewest(own.get(name.rpartition(".")[0], others))
        for name, header in found.items()
        if header.dtype in PACKED and not name.endswith(BESIDE)
    }


def _objects(value: JsonValue) -> list[dict[str, JsonValue]]:
    return [each for each in value.values() if isinstance(each, dict)] if isinstance(value, dict) else []


def _fewest(bits: Collection[JsonValue]) -> int:
    return min((number for number in bits if isinstance(number, int) and 1 <= number <= 8), default=USUAL_BITS)


def plain(found: Mapping[str, Header], file: Path) -> dict[str, Header]:
    """The tensors of a file by the names that a network has for them (`engine.bitmask`, `engine.low_rank`).

    Weights that are stored as a bitmask have the shape that they stand for, with the place of their values.

    Raises:
        BadModel: the parts of one do not fit.
    """
    return _plain(found, FolderOrigin(file.parent), file.name)


def _plain(found: Mapping[str, Header], origin: Origin, file: str) -> dict[str, Header]:
    result = dict(found)
    for name, header in found.items():
        module, _, leaf = name.rpartition(".")
        if leaf == MASK:
            parts = [result.pop(f"{module}.{part}", None) for part in (MASK, VALUES, SHAPE)]
            values, shape = parts[1:]
            if values is None or shape is None or shape.length != 16 or f"{module}.weight" not in result:
                raise BadModel(f"{short(file)}: the bitmask of {short(module)} is incomplete. Download it again.")
            size = origin.read(file, shape.start, 16)
            rows, columns = int.from_bytes(size[:8], "little"), int.from_bytes(size[8:], "little")
            if header.shape != (rows, -(-columns // 8)) or len(values.shape) != 1 or values.shape[0] > rows * columns:
                raise BadModel(f"{short(file)}: the bitmask of {short(module)} does not fit {rows} x {columns}.")
            result[f"{module}.weight"] = values._replace(shape=(rows, columns))
        elif leaf == "weight" and header.shape == (0,) and is_placeholder(name, found):
            del result[name]
    return result


def is_placeholder(name: str, names: Collection[str]) -> bool:
    """Whether the tensor of that name, among others, only says that its module is packed, or two linears."""
    module = name.removesuffix(".weight")
    instead = (f"{module}.weight_packed", f"{module}.down.weight", f"{module}.down.weight_packed")
    return module != name and any(each in names for each in instead)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        BadModel: there are none, or the index names others.
    """
    return [folder / name for name in weight_names(FolderOrigin(folder))]


def experts(config: Mapping[str, JsonValue]) -> int:
    """How many experts the blocks of a model have, by its config.json; 0 where it is no mixture."""
    return max((integer(config.get(key)) for key in EXPERTS), default=0)


def integer(value: object) -> int:
    """A whole number of a config, 0 where it is none."""
    return value if isinstance(value, int) else 0


def fewer_blocks(config: dict[str, JsonValue], tensors: Tensors, left: int) -> tuple[dict[str, JsonValue], Tensors]:
    """The config and the tensors of a model that keeps so many of its blocks, which are alike, or has as many anew."""
    numbers = {name: next((int(word) for word in name.split(".") if word.isdigit()), -1) for name in tensors}
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    each = {name: (kinds * left)[:left] for name in OF_EACH_BLOCK if isinstance(kinds := config.get(name), list)}
    return {**config, **each, key: left}, {name: shape for name, shape in tensors.items() if numbers[name] < left}
