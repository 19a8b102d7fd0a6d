"""How many bytes the parts of a model take, by its config and headers alone: weights, keys and values, statistics.

Plain arithmetic, so that anybody can check it by hand:

    weights     parameters x bytes of each         GPT-3: 175e9 x 4 = 700 GB in float32
    KV cache    2 x blocks x heads of keys and values x numbers of a head x batch x tokens x bytes of each
                118 x 48 x 128, 512 sequences of 2,048 tokens in 16 bit: 3.04 TB
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import JsonValue

from engine.configs import read_object
from engine.headers import EMBEDDINGS, HEADS, Header, Shape, integer, plain, read_header, weight_files
from engine.methods import Params, Selection, StoredBits
from engine.origin import FolderOrigin
from engine.packing import CacheGrid

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a linear of a block is called that reads what another linear (or its gate) has made; the others of a module
# with as many inputs read the same tensor, and share its statistics.
OWN_INPUT = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "w2", "fc2", "dense_4h_to_h")
# Families whose decoder keeps a copy of the prompt's keys and values with room for the new ones.
DECODED_BY_US = (
    "bloom", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2",
    "olmoe", "opt", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm",
)  # fmt: skip


def kv_bytes(blocks: int, heads: int, size: int, batch: int, tokens: int, width: float = 2) -> int:
    """Bytes of the keys and values of `batch` sequences of `tokens` tokens; `heads` are those of keys and values."""
    return math.ceil(2 * blocks * heads * size * batch * tokens * width)


def attention_sizes(config: Mapping[str, JsonValue]) -> tuple[int, int, int]:
    """Blocks, heads of keys and values, and numbers of a head, under the names that the families have for them."""
    hidden = _first(config, "hidden_size", "n_embd") or 768
    heads = query_heads(config)
    shared = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon
        shared = 1
    return blocks_of(config), shared, _first(config, "v_head_dim", "head_dim") or hidden // heads


def blocks_of(config: Mapping[str, JsonValue]) -> int:
    """How many blocks a model has."""
    return _first(config, "num_hidden_layers", "n_layer") or 12


def query_heads(config: Mapping[str, JsonValue]) -> int:
    """How many heads ask."""
    return _first(config, "num_attention_heads", "n_head") or 12


def hidden_size(config: Mapping[str, JsonValue]) -> int:
    """Numbers of a token's hidden state."""
    return _first(config, "hidden_size", "n_embd") or 768


def vocabulary_size(shape: Shape) -> int:
    """How many tokens a model tells apart: by its config, else by its embeddings."""
    return integer(shape.config.get("vocab_size")) or max(
        (s[0] for s in shape.tensors.values() if len(s) == 2), default=0
    )


def context_length(config: Mapping[str, JsonValue]) -> int:
    """Tokens that a model reads at most; 2048 where its config names no limit."""
    return longest_text(config) or 2048


def longest_text(config: Mapping[str, JsonValue]) -> int:
    """Tokens that a model has positions for, 0 where its config names no limit."""
    return _first(config, "max_position_embeddings", "n_positions", "seq_length")


def cache_bytes(
    config: Mapping[str, JsonValue], grid: CacheGrid | None, width: int, batch: int = 8, tokens: int = 256
) -> int:
    """Bytes of the keys and values of some sequences; by default as many as latency is measured with, at most.

    Blocks with a sliding window keep its tokens alone. Where they are packed: codes, scales, newest tokens, and what
    one block unpacks for attention.
    """
    blocks, heads, size = attention_sizes(config)
    if grid is not None:
        return blocks * batch * heads * grid.bytes(tokens, size, width) + kv_bytes(1, heads, size, batch, tokens, width)
    window = integer(config.get("sliding_window"))
    kinds = config.get("layer_types")
    sliding = 0
    if window and isinstance(kinds, list):
        sliding = sum(kind == "sliding_attention" for kind in kinds)
    elif window and config.get("model_type") == "mistral":
        sliding = blocks
    near = min(tokens, window)
    return kv_bytes(blocks - sliding, heads, size, batch, tokens, width) + kv_bytes(
        sliding, heads, size, batch, near, width
    )


def cache_copies(config: Mapping[str, JsonValue], grid: CacheGrid | None) -> int:
    """How often keys and values stand in memory while a model writes: what read the prompt, and what decodes."""
    return 2 if grid is None and config.get("model_type") in DECODED_BY_US else 1


@dataclass(frozen=True)
class Holding:
    """A model between two steps: its shape, and how the modules that no longer are dense are stored.

    width: bytes of a dense weight. bits: by module name. grid: of the KV cache.
    packs: whether kernels compute on codes, as they do in bfloat16 alone.
    """

    shape: Shape
    width: int
    bits: Mapping[str, StoredBits] = field(default_factory=dict)
    grid: CacheGrid | None = None
    packs: bool = True

    @classmethod
    def of(cls, shape: Shape, dtype: str) -> Holding:
        """A model as it is, in one of the dtypes of `WIDTHS`."""
        return cls(shape, WIDTHS[dtype], grid=shape.cache_grid, packs=dtype == "bfloat16")

    @property
    def dense(self) -> int:
        """Bytes of all weights where all are dense."""
        return self.shape.parameters * self.width

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.shape.parameters

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings, and of the head where it has its own."""
        return sum(math.prod(shape) for name, shape in self.shape.tensors.items() if name.endswith(EMBEDDINGS + HEADS))

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings."""
        return not any(name.endswith(HEADS) for name in self.shape.tensors)

    def file_bytes(self) -> int:
        """Bytes of the weights in a file."""
        return self._bytes({name: bits.stored for name, bits in self.bits.items()})

    def packed(self) -> int:
        """Bytes of the weights in the memory of a process that computes on packed ones."""
        return self._bytes(self._held())

    def packed_embeddings(self) -> int:
        """The embeddings' part of `packed`."""
        return self._bytes(self._held(), only=EMBEDDINGS + HEADS)

    def _held(self) -> dict[str, float]:
        """Bits of each weight in memory, of the modules that are not dense in files."""
        return {
            n: bits.held if self.packs or bits.dense is not None else 8 * self.width for n, bits in self.bits.items()
        }

    @property
    def largest(self) -> int:
        """Numbers of the largest tensor."""
        return max(map(math.prod, self.shape.tensors.values()), default=0)

    def parts(self) -> tuple[int, int]:
        """Parameters of the largest block, and of the largest part beside the blocks."""
        found = self.shape.parts
        inside = [size for name, size in found.items() if name.rpartition(".")[2].isdigit()]
        beside = [size for name, size in found.items() if not name.rpartition(".")[2].isdigit()]
        return max(inside, default=0), max(beside, default=0)

    def after(self, params: Params) -> Holding:
        """What a step with these settings makes of it."""
        shape, params = self._parted(params), params.on(self.shape, self.width)
        bits = dict(self.bits)
        for name, (outputs, inputs) in shape.linears.items():
            chosen = not isinstance(params, Selection) or params.selects(name)
            if chosen and (stored := params.of(name).stored_bits(outputs, inputs)) is not None:
                bits[name] = stored
        bits |= _beyond(shape, params)
        config, tensors = params.reshaped(shape.config, shape.tensors)
        return replace(
            self, shape=replace(shape, config=config, tensors=tensors), bits=bits,
            grid=params.cache_grid() or self.grid,
        )  # fmt: skip

    def trained(self, params: Params, original: Shape) -> list[Holding]:
        """The models that a step with these settings trains, each the teacher of the next; `original` before any."""
        found = params.trained(self.shape.config, self.shape.tensors, original)
        return [replace(self, shape=replace(self.shape, config=config, tensors=tensors)) for config, tensors in found]

    def _parted(self, params: Params) -> Shape:
        """The shape with a head of its own, where one that is the embeddings is chosen."""
        if not params.beyond_blocks()[0] or not self.tied:
            return self.shape
        own = [size for name, size in self.shape.tensors.items() if name.endswith(EMBEDDINGS)]
        return replace(self.shape, tensors={**self.shape.tensors, **dict(zip(HEADS, own, strict=False))})

    def _bytes(self, bits: Mapping[str, float], only: tuple[str, ...] = ()) -> int:
        total = 0.0
        for name, shape in self.shape.tensors.items():
            if not only or name.endswith(only):
                total += math.prod(shape) * bits.get(name.removesuffix(".weight"), 8 * self.width) / 8
        return round(total)


def head_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of the output head by its name, or by that of the embeddings it is."""
    own = [name for name in shape.tensors if name.endswith(HEADS)]
    found = own or [name for name in shape.tensors if name.endswith(EMBEDDINGS)]
    return {name.removesuffix(".weight"): (shape.tensors[name][0], shape.tensors[name][1]) for name in found}


def chosen(shape: Shape, params: Params) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear that a step with these settings is to change: of the blocks, and the head if chosen."""
    found = {n: size for n, size in shape.linears.items() if not isinstance(params, Selection) or params.selects(n)}
    return found | (head_of(shape) if params.beyond_blocks()[0] else {})


def counted_parameters(shape: Shape, params: Params, width: int) -> int:
    """The weights of a model with the linears as they are, as so many of `width` bits.

    A head that a step parts from its embeddings is counted; embeddings in 8 bits are fewer, by what they save.
    """
    head, embeddings = params.beyond_blocks()
    total = shape.parameters
    for name, size in shape.tensors.items():
        if name.endswith(EMBEDDINGS):
            total += math.prod(size) if head and not any(each.endswith(HEADS) for each in shape.tensors) else 0
            total -= saved_in_embeddings(size[0], size[1], width) if embeddings else 0
    return total


def saved_in_embeddings(rows: int, columns: int, width: int) -> int:
    """How many weights of `width` bits fewer embeddings are in 8 bits, with a scale in 16 for each row."""
    return round(rows * columns - rows * (8 * columns + 16) / width)


def _beyond(shape: Shape, params: Params) -> dict[str, StoredBits]:
    """The head and the embeddings, where they are chosen."""
    head, embeddings = params.beyond_blocks()
    found = {}
    for name, size in shape.tensors.items():
        module = name.removesuffix(".weight")
        if embeddings and name.endswith(EMBEDDINGS):
            found[module] = StoredBits(8, 16 / size[1])
        if head and name.endswith(HEADS) and (stored := params.of(module).stored_bits(size[0], size[1])) is not None:
            found[module] = stored
    return found


def readers(shape: Shape, together: bool = False) -> list[int]:
    """The inputs of each tensor that linears of the first block read, one entry for those who read the same.

    together: the experts of a mixture read the same, each token.
    """
    found: dict[tuple[str, int], int] = {}
    for name, inputs in first_block(shape):
        module, _, leaf = name.rpartition(".")
        own = name if leaf in OWN_INPUT else module
        if together and own == module and ".experts." in module:
            own = module.rpartition(".")[0]
        found[own, inputs] = inputs
    return sorted(found.values(), reverse=True)


def first_block(shape: Shape) -> Iterable[tuple[str, int]]:
    """Names and inputs of the linears of the first block."""
    for name, (_, inputs) in shape.linears.items():
        numbers = [word for word in name.split(".") if word.isdigit()]
        if numbers[:1] == ["0"]:
            yield name, inputs


def loaded_bytes(folder: Path) -> int:
    """Bytes that the weights of a model folder take in the memory of a CPU process that computes with them.

    By the headers alone: codes of 2 to 4 bits in 4, others in 8, where kernels compute on them; 8-bit floats, what is
    stored as a bitmask, and codes in other dtypes than bfloat16 are numbers of the model's dtype.

    Raises:
        BadModel: it is no model folder, or damaged.
    """
    config = read_object(FolderOrigin(folder), "config.json")
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    width, packs, total = WIDTHS.get(dtype, 2), dtype == "bfloat16", 0
    for file in weight_files(folder):
        stored = plain(read_header(file), file)
        for name, header in stored.items():
            count, shape = math.prod(header.shape), stored.get(f"{name.rpartition('.')[0]}.weight_shape")
            if header.dtype == "I32" and name.endswith(".weight_packed") and shape is not None:
                rows, columns = _numbers(file, shape)
                bits = 32 * header.shape[1] // max(1, columns)
                total += rows * columns * (8 * width if not packs else 4 if bits <= 4 else 8) // 8
            elif header.dtype.startswith(("F", "BF")) or (header.dtype == "I8" and not packs):
                total += count * width
            else:
                total += header.length
    return total


def _numbers(file: Path, header: Header) -> tuple[int, int]:
    """The two int64 of a tensor."""
    with file.open("rb") as stream:
        stream.seek(header.start)
        first, second = struct.unpack("<2q", stream.read(16))
    return first, second


def _first(config: Mapping[str, JsonValue], *keys: str) -> int:
    return next((number for key in keys if (number := integer(config.get(key)))), 0)
