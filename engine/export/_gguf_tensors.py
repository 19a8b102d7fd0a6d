"""Which tensors a GGUF of a network has: their names there, what they are made of, and the order of their rows.

Names come from the `gguf` package's table of an architecture. Rows change places in q and k of Llama-like families,
whose rotary pairs llama.cpp has as neighbours, and in fused q, k and v, which it has one after the other; with a row go
its codes, scales and zero points alike, so this costs no precision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import gguf
import torch
from pydantic import JsonValue
from torch import Tensor

from engine.errors import BadModel, short
from engine.export._gguf_families import Family, Sizes, rotation, sizes
from engine.headers import HEADS

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
MIXTRALS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
PER_HEAD = re.compile(r"(.*\.[qk]_layernorm)\.norms\.(\d+)\.weight")  # StableLM's
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
WIDE = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "attn_q_norm", "attn_k_norm")  # in F32 whatever shape
LONGEST = 63  # bytes of a name


@dataclass(frozen=True)
class Planned:
    """A tensor of the file. sources: one of the artifact's, or several that are stacked. rows: where each comes from.

    add: what is added to each number. wide: written in F32. made: its numbers, where no source has them.
    """

    name: str
    sources: tuple[str, ...]
    rows: Tensor | None = None
    add: float = 0.0
    wide: bool = False
    stacked: bool = False
    made: Tensor | None = None


def plan(config: Mapping[str, JsonValue], family: Family, names: Iterable[str], label: str) -> list[Planned]:
    """The tensors of a file in the order of the artifact's blocks.

    Raises:
        BadModel: one of the artifact's has no place in llama.cpp's graph, or one that it needs is not there.
    """
    found = sizes(config)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, found.blocks)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_together(name), []).append(name)
    planned = [_planned(own, table, family, found, label, groups[own]) for own in groups]
    planned = sorted(planned, key=lambda each: (_block(each.name), each.name))
    there = {each.name for each in planned}
    if HEAD not in there and family.headed:  # tied, where the graph wants one
        (embedded,) = (each for each in planned if each.name == EMBEDDINGS)
        planned.append(Planned(HEAD, embedded.sources))
    return [*_factors(config, family), *planned]


def _together(name: str) -> str:
    """The tensor of which another is a part: all experts' by one name, all heads' norms too."""
    if found := EXPERT.fullmatch(name):
        return f"{found[1]}.{MIXTRALS.get(found[3], found[3])}.weight"
    if found := PER_HEAD.fullmatch(name):
        return f"{found[1]}.weight"
    return name


def _number(name: str) -> int:
    found = EXPERT.fullmatch(name) or PER_HEAD.fullmatch(name)
    return int(found[2]) if found else -1


def _planned(
    own: str, table: gguf.TensorNameMap, family: Family, found: Sizes, label: str, parts: Sequence[str]
) -> Planned:  # fmt: skip
    known = own.removeprefix("transformer.") if family.arch == "bloom" else own
    name = table.get_name(known, try_suffixes=(".weight", ".bias"))
    leaf = own.rpartition(".")[2]
    stem = "" if name is None else name.removesuffix(f".{leaf}").rpartition(".")[2]
    if name is None and own in HEADS:
        raise BadModel(
            f"{label}: llama.cpp computes the logits of {family.arch} models with their embeddings, and this one has a "
            "head of its own. Quantize with `head` and `embeddings` off."
        )
    if name is None or leaf not in ("weight", "bias") or (leaf == "bias" and stem not in family.biases):
        raise BadModel(f"{label}: llama.cpp's {family.arch} models have no {short(own)}, so no GGUF of it is written.")
    assert len(name.encode()) <= LONGEST
    return Planned(
        name, tuple(sorted(parts, key=_number)), _rows(stem, family, found),
        1.0 if family.arch.startswith("gemma") and stem.endswith("norm") else 0.0,
        leaf == "bias" or stem in WIDE or stem.endswith("norm"), len(parts) > 1 or _number(parts[0]) >= 0,
    )  # fmt: skip


def _rows(stem: str, family: Family, found: Sizes) -> Tensor | None:
    """For each row of a tensor in the file the one of the artifact's that it is; None: they stay."""
    if family.rows == "rotary" and stem in ("attn_q", "attn_k"):
        heads = found.heads if stem == "attn_q" else found.shared
        order = torch.arange(heads * found.head).view(heads, 2, found.head // 2)
        return order.transpose(1, 2).reshape(-1)
    if stem != "attn_qkv" or family.rows not in ("heads", "groups"):
        return None
    shared = found.heads if family.rows == "heads" else found.shared
    each = found.heads // shared  # queries of a key
    order = torch.arange((each + 2) * shared * found.head).view(shared, each + 2, found.head)
    return torch.cat([order[:, :each].reshape(-1), order[:, each].reshape(-1), order[:, each + 1].reshape(-1)])


def _block(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _factors(config: Mapping[str, JsonValue], family: Family) -> list[Planned]:
    """By what rotations are slower than usual, number by number, where a config says so."""
    found, said = sizes(config), rotation(config)
    kind = said.get("rope_type")
    if kind == "llama3":
        return [Planned("rope_freqs.weight", (), wide=True, made=_llama3(said, found.rotary))]
    if kind == "longrope":
        both = (("rope_factors_long.weight", "long_factor"), ("rope_factors_short.weight", "short_factor"))
        return [Planned(name, (), wide=True, made=torch.tensor(said[key], dtype=torch.float32)) for name, key in both]
    return []


def _llama3(said: Mapping[str, JsonValue], rotary: int) -> Tensor:
    """The factors (rotary / 2,) of Llama 3.1's scaling, as `transformers` computes the frequencies."""
    number: Callable[[str], float] = lambda key: float(str(said[key]))  # noqa: E731
    frequencies = 1.0 / number("rope_theta") ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    lengths = 2 * math.pi / frequencies
    factor, low, high = (number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = number("original_max_position_embeddings")
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(lengths > original / low, factor, between)
    return torch.where(lengths < original / high, 1.0, factors)
