"""GGUF: read back by others, a file gives the artifact's logits, its weights to the last bit, and its tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import logging

from engine import artifacts, export, methods
from engine.errors import BadArtifact, BadModel, InputError, TooBig
from engine.export import _folder, notes
from engine.export._gguf_blocks import blocks, exact
from engine.export._gguf_families import family_of
from engine.export._gguf_metadata import add_network
from engine.export._gguf_tokens import BEGINS, RULES, vocabulary
from engine.export._gguf_types import TYPES, Type, bits_at_most, fitting
from engine.methods import Context
from engine.models import LoadedModel, load, load_tokenizer
from engine.packing import QuantizedWeight
from engine.places import DEMO
from engine.quantize import rtn, smoothquant
from engine.records import Recipe
from engine.shards import TensorFiles
from engine.vocabulary import BYTES
from tests.conftest import in_memory, tiny_config
from tests.families import FAMILIES, MIXTURES
from ui import language
from ui.messages import translate

LLAMA_CPP = "MAQUETTE_LLAMA_CPP_PYTHON"  # the interpreter of an environment that has llama_cpp
IDS = torch.arange(5, 45)[None]


def changed(config: PretrainedConfig, **changes: object) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


KNOWN = {name: config for name, config in {**FAMILIES, **MIXTURES}.items() if name != "opt"}
# As llama.cpp's graphs have them, and the models that people have: not so the defaults of these configs.
KNOWN |= {
    "gemma2": changed(KNOWN["gemma2"], query_pre_attn_scalar=16),
    "gemma3": changed(KNOWN["gemma3"], query_pre_attn_scalar=16),
    "qwen3_moe": changed(KNOWN["qwen3_moe"], norm_topk_prob=True),
    "olmoe": changed(KNOWN["olmoe"], num_key_value_heads=4),
}
# Of which stock `transformers` reads no GGUF; Mixtral's it takes for a Llama and forgets the experts.
INCOMPLETE = ("qwen3", "gpt2", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe")  # whose sizes it does not read
UNREAD = ("smollm3", "olmo2", "gpt_neox", "gemma", "olmoe", "mixtral")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


def uneven(model: LoadedModel) -> LoadedModel:
    """With norms and biases that are not all alike, and weights large enough to be told apart."""
    dice = torch.Generator().manual_seed(1)
    for parameter in model.network.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.rand(parameter.shape, generator=dice).to(parameter.dtype) * 0.3)
        else:
            parameter.data.mul_(4)
    return model


def product(weight: QuantizedWeight) -> Tensor:
    """(code - zero) scale in float32, number by number: exact, for neither has more than twelve bits."""
    rows, groups = weight.codes.shape[0], weight.scale.shape[1]
    scale, zero = (part.float().expand(rows, groups).unsqueeze(-1) for part in (weight.scale, weight.zero))
    return ((weight.codes.float().view(rows, groups, -1) - zero) * scale).view(rows, -1)


@torch.inference_mode()
def logits_of(model: LoadedModel) -> Tensor:
    """Of the network in float32 with the products that codes and scales stand for."""
    network = model.network.float()
    for name, weight in model.quantized.items():
        held = network.get_submodule(name).weight
        full = product(weight)
        held.data = full.t().contiguous() if model.network.config.model_type == "gpt2" and ".h." in name else full
    found: Tensor = network(IDS, use_cache=False).logits[0]
    return found


def made(model: LoadedModel, at: Path, recipe: Recipe | None = None) -> Path:
    """The file of a model's export."""
    artifacts.write(model, recipe or Recipe(), at / "artifact")
    export.exporter("gguf")(at / "artifact", at / "out")
    artifacts.verify(at / "out")
    for note in notes(at / "out"):
        with language.use("zh-CN"):
            assert translate(note) != note
    (file,) = (at / "out").glob("*.gguf")
    return file


@functools.lru_cache(maxsize=1)
def reader(file: Path) -> GGUFReader:
    return GGUFReader(file)


def fields(file: Path) -> dict[str, Any]:
    """What a file says of its network, without the prefix of its architecture, and of its tokens."""
    found = {name: field.contents() for name, field in reader(file).fields.items()}
    return {name.removeprefix(f"{found['general.architecture']}."): value for name, value in found.items()}


def tensors(file: Path) -> dict[str, Tensor]:
    """All tensors in float32, as the `gguf` package reads them."""
    found = {}
    for each in reader(file).tensors:
        numbers = dequantize(each.data, each.tensor_type).reshape(tuple(reversed(each.shape.tolist())))
        found[each.name] = torch.from_numpy(np.array(numbers, dtype=np.float32))
    return found


def types(file: Path) -> dict[str, str]:
    return {each.name: each.tensor_type.name for each in reader(file).tensors}


def neighbours_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head as `transformers` has them: first the even ones of llama.cpp's, then the odd ones."""
    found = [torch.cat([head[0::2], head[1::2]]) for head in rows.chunk(heads)]
    return torch.cat(found)


LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
NEOX = {
    "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def by_hand(file: Path, config: PretrainedConfig) -> Mapping[str, Tensor]:
    """The weights of a network whose GGUF `transformers` does not read, by its names for them."""
    stored, kind = tensors(file), config.model_type
    neox, heads = kind == "gpt_neox", config.num_attention_heads
    top = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"}
    top = top if neox else {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    found = {}
    for name, tensor in stored.items():
        stem, _, leaf = name.rpartition(".")
        if stem in top:
            found[f"{top[stem]}.{leaf}"] = tensor - (1 if kind == "gemma" and "norm" in stem else 0)
            continue
        _, number, inner = stem.split(".")
        at = f"{'gpt_neox' if neox else 'model'}.layers.{number}"
        if inner.endswith("_exps"):
            continue
        if kind in ("mixtral", "smollm3") and inner in ("attn_q", "attn_k"):
            tensor = neighbours_apart(tensor, heads if inner == "attn_q" else config.num_key_value_heads)
        if inner == "attn_qkv":  # all queries, keys and values -> those of one head together
            parts = [part.chunk(heads) for part in tensor.chunk(3)]
            tensor = torch.cat([part[head] for head in range(heads) for part in parts])
        if kind == "gemma" and inner.endswith("norm"):
            tensor = tensor - 1
        found[f"{at}.{(NEOX if neox else LAYER)[inner]}.{leaf}"] = tensor
    for name in [name for name in stored if "gate_exps" in name]:
        at = f"model.layers.{name.split('.')[1]}.mlp.experts"
        found[f"{at}.gate_up_proj"] = torch.cat([stored[name], stored[name.replace("gate_exps", "up_exps")]], 1)
        found[f"{at}.down_proj"] = stored[name.replace("gate_exps", "down_exps")]
    return found


def read_back(file: Path, config: PretrainedConfig, family: str) -> Tensor:
    """The logits of what others read from a file; the config is given where `transformers` misses keys of it."""
    config = copy.deepcopy(config)
    if family in UNREAD:
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        lacking = network.load_state_dict(by_hand(file, config), strict=False)
        assert not lacking.unexpected_keys
        assert set(lacking.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
        network.tie_weights()
    else:
        network = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, config=config if family in INCOMPLETE else None
        ).eval()
    with torch.inference_mode():
        found: Tensor = network(IDS, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", KNOWN)
def test_others_read_the_logits_of_the_artifact(
    family: str, bits: int | None, context: Context, tmp_path: Path
) -> None:
    model = uneven(in_memory(KNOWN[family]))
    if bits is not None:
        rtn.apply(model, rtn.Params.model_validate({"bits": bits, "group_size": 32}), context)
    file = made(model, tmp_path)
    if bits is not None:
        assert re.search(r"^Tensors of 4 bits: \d+, exact in Q4_0", notes(file.parent)[0])
    torch.testing.assert_close(read_back(file, KNOWN[family], family), logits_of(model), rtol=0, atol=0)


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
# What some models of a family have and others not; all of them llama.cpp is asked about.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3's rotations": (
        "llama",
        {"rope_parameters": {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "yarn": ("qwen2", {"rope_parameters": {**SCALED, "rope_type": "yarn"}}),
    "linear": ("qwen3", {"rope_parameters": {**SCALED, "rope_type": "linear"}}),
    "fewer heads": ("qwen2", {"head_dim": 32}),
    "norms of each head": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    "grouped heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "all heads": ("falcon", {"multi_query": False}),
    "one after the other": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "parts of heads turn": (
        "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "no windows in Gemma 2": ("gemma2", {"layer_types": ["full_attention"] * 3}),
    "no windows in Gemma 3": ("gemma3", {"layer_types": ["full_attention"] * 7}),
    "other windows": ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
}  # fmt: skip


def varied(case: str) -> PretrainedConfig:
    family, changes = VARIANTS[case]
    return changed(KNOWN[family], **changes)


@pytest.mark.parametrize("case", ["biases", "fewer heads"])
def test_variants_come_back(case: str, tmp_path: Path) -> None:
    config = varied(case)
    model = uneven(in_memory(config))
    file = made(model, tmp_path)
    if case == "fewer heads":  # Qwen 2's graph has no room for them, Llama's with its rotary pairs has
        assert fields(file)["general.architecture"] == "llama"
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        network.load_state_dict(by_hand(file, changed(config, model_type="mixtral")))
    else:
        network = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=copy.deepcopy(config), dtype=torch.float32
        ).eval()
    with torch.inference_mode():
        found = network(IDS, use_cache=False).logits[0]
    torch.testing.assert_close(found, logits_of(model), rtol=0, atol=0)


def test_heads_that_share_keys_stand_apart(tmp_path: Path) -> None:
    """Falcon 40B's, whose rows `transformers` leaves in the file's order when it reads a GGUF."""
    model = uneven(in_memory(varied("grouped heads")))
    found = tensors(made(model, tmp_path))["blk.2.attn_qkv.weight"].split(16)  # by heads, as they stand in the file
    own = model.network.transformer.h[2].self_attention.query_key_value.weight.data.float().split(16)
    queries, keys, values = [own[0], own[1], own[4], own[5]], [own[2], own[6]], [own[3], own[7]]
    for ours, theirs in zip([*queries, *keys, *values], found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_norms_of_each_head_stand_in_one_tensor(tmp_path: Path) -> None:
    model = uneven(in_memory(varied("norms of each head")))
    found = tensors(made(model, tmp_path))["blk.1.attn_k_norm.weight"]
    norms = model.network.model.layers[1].self_attn.k_layernorm.norms
    torch.testing.assert_close(found, torch.stack([norm.weight.data.float() for norm in norms]), rtol=0, atol=0)


GROUPS = (32, 64, 256, 512)  # 512: all of a row


def random_weight(bits: int, symmetric: bool, size: int, *, halves: bool = True) -> QuantizedWeight:
    """Every code, and any zero points, somewhere in a (8, 512) weight; scales of bfloat16, or too fine for an f16."""
    dice = torch.Generator().manual_seed(100 * bits + size)
    codes = torch.randint(0, 2**bits, (8, 512), generator=dice, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (8, 512 // size), generator=dice, dtype=torch.uint8)
    scale = torch.rand(8, 512 // size, generator=dice).add_(0.01)
    scale = scale.bfloat16() if halves else scale
    return QuantizedWeight(codes, scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero, bits, symmetric)


def read_blocks(weight: QuantizedWeight, kind: Type) -> Tensor:
    return torch.from_numpy(dequantize(blocks(weight, kind).numpy(), GGMLQuantizationType[kind.name]).copy())


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_type_that_fits_holds_every_code(bits: int, symmetric: bool, size: int) -> None:
    weight = random_weight(bits, symmetric, size)
    fit = fitting(bits, symmetric, size)
    assert bool(fit) == (symmetric or bits < 8)
    for kind in fit:
        held = exact(weight.scale, weight.zero, kind)
        assert held or kind.minimum == "f16"
        assert torch.equal(read_blocks(weight, kind), product(weight)) == held, kind
    for kind in set(TYPES) - set(fit):
        if size % kind.weights == 0 and not kind.minimum:  # what does not fit is refused, and rightly
            assert not torch.equal(read_blocks(weight, kind), product(weight)), kind


def test_a_minimum_that_is_an_f16_takes_the_smaller_type() -> None:
    weight = random_weight(4, False, 32)
    small = next(kind for kind in TYPES if kind.name == "Q4_1")
    assert not exact(weight.scale, weight.zero, small)
    even = dataclasses.replace(weight, scale=torch.full_like(weight.scale, 0.25))
    assert exact(even.scale, even.zero, small)
    assert torch.equal(read_blocks(even, small), product(even))
    assert not exact(*(random_weight(4, True, 32, halves=False).scale, weight.zero), TYPES[-1])


def test_the_bytes_of_a_block_are_those_of_the_documents() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None]
    half = torch.tensor([[0.5]], dtype=torch.bfloat16)
    weight = QuantizedWeight(codes, half, torch.tensor([[16]], dtype=torch.uint8), 5, True)
    (kind,) = (each for each in TYPES if each.name == "Q5_0")
    expected = [0x00, 0x38, 0x00, 0x00, 0xFF, 0xFF, *(0x11 * number for number in range(16))]
    assert blocks(weight, kind)[0].tolist() == expected


def test_sizes_are_bounded_by_what_surely_holds_a_grid() -> None:
    assert [bits_at_most(bits, True, 64, 16) for bits in range(2, 9)] == [4.5, 4.5, 4.5, 5.5, 8.5, 8.5, 8.5]
    assert [bits_at_most(bits, False, 64, 16) for bits in range(2, 9)] == [4.5, 4.5, 5.5, 8.5, 8.5, 8.5, 16]
    assert [bits_at_most(bits, False, 256, 16) for bits in (2, 3, 4, 5)] == [2.625, 4.5, 4.5, 5.5]
    assert bits_at_most(4, True, 16, 16) == 16


STEPS: list[tuple[dict[str, object], str]] = [
    ({"bits": 2, "group_size": 64}, "Q4_0"),
    ({"bits": 3, "granularity": "channel"}, "Q3_K"),
    ({"bits": 4, "group_size": 64, "symmetric": False}, "Q5_0"),
    ({"bits": 4, "granularity": "channel", "symmetric": False}, "Q4_K"),
    ({"bits": 4, "granularity": "tensor", "symmetric": False}, "Q4_K"),
    ({"bits": 5, "group_size": 128}, "Q5_0"),
    ({"bits": 6, "group_size": 256}, "Q6_K"),
    ({"bits": 7, "group_size": 64, "symmetric": False}, "Q8_0"),
    ({"bits": 8, "granularity": "tensor"}, "Q8_0"),
    ({"bits": 4, "granularity": "channel", "head": True, "embeddings": True}, "Q4_0"),
]
ROOMY = tiny_config(hidden_size=256, intermediate_size=256, num_hidden_layers=1)


def check_weights(file: Path, model: LoadedModel) -> None:
    """Every weight of a Llama is in the file, to the last bit."""
    found, config = by_hand(file, changed(model.network.config, model_type="mixtral")), model.network.state_dict()
    assert set(found) | {"lm_head.weight"} == set(config) | {"lm_head.weight"}
    for name, tensor in found.items():
        weight = model.quantized.get(name.removesuffix(".weight"))
        torch.testing.assert_close(tensor, config[name].float() if weight is None else product(weight), rtol=0, atol=0)


@pytest.mark.parametrize(("grid", "kind"), STEPS, ids=str)
def test_every_grid_is_held_exactly(grid: dict[str, object], kind: str, context: Context, tmp_path: Path) -> None:
    model = in_memory(changed(ROOMY, tie_word_embeddings="head" not in grid))
    rtn.apply(model, rtn.Params.model_validate({"targets": "*.[qd]*_proj", **grid}), context)
    file = made(model, tmp_path)
    assert {types(file)[f"blk.0.{part}.weight"] for part in ("attn_q", "ffn_down")} == {kind}
    if "head" in grid:
        assert (types(file)["token_embd.weight"], types(file)["output.weight"]) == ("Q8_0", "Q4_0")
    check_weights(file, model)
    assert file.stat().st_size <= export.room(tmp_path / "artifact", "gguf")


FALLS: list[tuple[dict[str, object], str, str]] = [
    ({"bits": 8, "symmetric": False}, "BF16", "8 bits with zero points have more levels than a type of GGUF"),
    ({"bits": 4, "group_size": 16}, "BF16", "groups of 16 weights fill no blocks of 32"),
    ({"bits": 4, "group_size": 8, "targets": "*.down_proj"}, "BF16", "rows of 40 weights fill no blocks of 32"),
]


@pytest.mark.parametrize(("grid", "kind", "why"), FALLS, ids=str)
def test_what_no_type_holds_is_written_as_numbers_and_said(
    grid: dict[str, object], kind: str, why: str, context: Context, tmp_path: Path
) -> None:
    model = in_memory(tiny_config(intermediate_size=40) if "targets" in grid else tiny_config())
    rtn.apply(model, rtn.Params.model_validate(grid), context)
    file = made(model, tmp_path)
    (said,) = notes(file.parent)
    assert said.startswith(f"Written in {kind}, for {why}: model.layers.0.")
    assert said in (file.parent / "README.md").read_text()
    state, found = model.network.state_dict(), by_hand(file, changed(model.network.config, model_type="mixtral"))
    for name in model.quantized:
        torch.testing.assert_close(found[f"{name}.weight"], state[f"{name}.weight"].float(), rtol=0, atol=0)
    assert file.stat().st_size <= export.room(tmp_path / "artifact", "gguf")


def test_scales_that_no_f16_holds(context: Context, tmp_path: Path) -> None:
    model = in_memory(tiny_config(), torch.float32)
    rtn.apply(model, rtn.Params(bits=4, group_size=32), context)
    file = made(model, tmp_path)
    assert notes(file.parent)[0].startswith(
        "Written in F32, for their scales are not exact in float16: model.layers.0."
    )
    check_weights(file, model)
    assert file.stat().st_size <= export.room(tmp_path / "artifact", "gguf")


def test_experts_share_a_type(context: Context, tmp_path: Path) -> None:
    model = in_memory(KNOWN["mixtral"])
    rtn.apply(model, rtn.Params(bits=4, group_size=32, ignore="*.o_proj"), context)
    file = made(model, tmp_path)
    assert file.name == "demo-Q4_0.gguf"
    assert {types(file)[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q4_0"}
    found = tensors(file)["blk.1.ffn_down_exps.weight"]
    for number in range(4):
        weight = model.quantized[f"model.layers.1.mlp.experts.{number}.w2"]
        torch.testing.assert_close(found[number], product(weight), rtol=0, atol=0)


FEW = {"samples": 2, "sequence_length": 16}
MADE: dict[str, list[tuple[str, dict[str, object]]]] = {
    "BF16 of zeros": [("prune/magnitude", {"sparsity": 0.7, "storage": "bitmask"})],
    "BF16 of products": [("prune/low_rank", {**FEW, "multiple": 8})],
    "BF16 of floats": [("quantize/fp8", {})],
    "BF16 beside a cache": [("quantize/kv_cache", {"group_size": 16})],
    "Q4_0 of fewer blocks": [("prune/depth", {**FEW, "count": 1}), ("quantize/rtn", {"group_size": 32})],
    "Q4_0 of narrower ones": [
        ("prune/width", {**FEW, "neurons": 0.5, "heads": 0.5, "multiple": 32}), ("quantize/rtn", {"group_size": 32}),
    ],
    "Q4_0 solved": [("quantize/gptq", {**FEW, "group_size": 32, "targets": "*.0.*"})],
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_what_other_methods_make(case: str, context: Context, tmp_path: Path) -> None:
    steps, model = MADE[case], uneven(in_memory(tiny_config()))
    for number, (name, params) in enumerate(steps):
        method = methods.get(name)
        with torch.no_grad():
            place = dataclasses.replace(context, folder=context.folder / str(number))
            model = method.apply(model, method.check(params), place)
    file = made(model, tmp_path)
    assert types(file)["blk.0.ffn_down.weight"] == case.split()[0]
    if steps[0][0] in ("prune/magnitude", "prune/low_rank"):
        export.exporter("dense")(tmp_path / "artifact", tmp_path / "dense")
        model = load(tmp_path / "dense")
    if steps[0][0] == "quantize/fp8":
        model.quantized = {}  # what the network holds is what the codes stand for
    torch.testing.assert_close(read_back(file, model.network.config, "llama"), logits_of(model), rtol=0, atol=0)


TEXTS = [
    (DEMO / "text.txt").read_text()[:2000],
    "Ünï¢ødé 🚀 12345 3.14\n\n  don't DON'T we'll   x\t\ty <|endoftext|> end",
    " leading and trailing  ",
    "年12月，三",
]


def by_rule(file: Path) -> Tokenizer:
    """The tokenizer of a file, split as llama.cpp's source has the rule `smollm`: first digits, then words."""
    said = fields(file)
    vocab = {text: number for number, text in enumerate(said["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    found = Tokenizer(models.BPE(vocab, merges))
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (r"\p{N}", words)]
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.add_special_tokens(
        [text for text, kind in zip(vocab, said["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    )
    return found


def test_the_demos_tokens_come_back(tmp_path: Path) -> None:
    model = load(DEMO / "model")
    file = made(model, tmp_path)
    said = fields(file)
    assert file.name == "demo-BF16.gguf"
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert [said[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [0, 0, 0]
    assert "tokenizer.ggml.unknown_token_id" not in said
    sizes = ("block_count", "context_length", "attention.head_count_kv", "vocab_size")
    assert [said[name] for name in sizes] == [4, 512, 2, 1280]
    assert (said["general.file_type"], said["general.quantization_version"]) == (32, 2)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    own = by_rule(file)
    for text in TEXTS:
        expected = model.tokenizer(text, add_special_tokens=False).input_ids
        assert own.encode(text).ids == expected
        words = re.sub(r"\d+", "", text)  # `transformers` does not know the rule for digits
        expected = model.tokenizer(words, add_special_tokens=False).input_ids
        assert theirs(words, add_special_tokens=False).input_ids == expected


def sentencepiece(name: str, *, changed_merges: bool = False) -> LoadedModel:
    """A model with a tokenizer as Llama 2's, Gemma's or Phi-3's: all merges that its tokens make."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=340, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator(TEXTS[0].splitlines(), trainer)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] if name == "Gemma" else ["<unk>", "<s>", "</s>"]
    learnt = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocab = {token: number for number, token in enumerate([*special, *BYTES, *learnt])}
    merges = generate_merges(vocab, {token: -float(vocab[token]) for token in learnt})
    if changed_merges:
        merges = merges[:-5]
    fast: PreTrainedTokenizerFast
    if name == "Gemma":
        fast = GemmaTokenizer(vocab=vocab, merges=merges)
    elif name == "Llama":
        fast = LlamaTokenizer(vocab=vocab, merges=merges)
    else:
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.add_special_tokens(special)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id, "pad_token_id": None}
    model = in_memory(changed(KNOWN["gemma" if name == "Gemma" else "llama"], vocab_size=640, **ids))
    fast.chat_template = "{{ messages[0].content }}"
    model.tokenizer = fast
    return model


def merged(file: Path, text: str, spaces: bool) -> list[int]:
    """The ids of a text by SentencePiece's rule: the best neighbours merge, the first of equals, to the end."""
    said = fields(file)
    tokens = {each: number for number, each in enumerate(said["tokenizer.ggml.tokens"])}
    scores = said["tokenizer.ggml.scores"]
    parts = list(("▁" if spaces else "") + text.replace(" ", "▁"))
    while True:
        both = enumerate(itertools.pairwise(parts))
        pairs = [(scores[tokens[a + b]], -place) for place, (a, b) in both if a + b in tokens]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    bytewise = [[f"<0x{byte:02X}>" for byte in part.encode()] if part not in tokens else [part] for part in parts]
    return [tokens[each] for part in bytewise for each in part]


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi-3"])
def test_sentencepieces_tokens_come_back(name: str, tmp_path: Path) -> None:
    model = sentencepiece(name)
    file = made(model, tmp_path)
    said = fields(file)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.add_space_prefix"]) == ("llama", name != "Gemma")
    assert (notes(file.parent) == [BEGINS]) == (name == "Llama")
    assert said["tokenizer.ggml.bos_token_id"] == model.tokenizer.bos_token_id
    assert said["tokenizer.ggml.eos_token_id"] == model.tokenizer.eos_token_id
    assert said["tokenizer.chat_template"] == model.tokenizer.chat_template
    kinds = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<0x41>"], kinds["[PAD639]"]) == (2, 6, 5)
    assert kinds["<bos>" if name == "Gemma" else "<s>"] == 3
    for text in [*(line for line in TEXTS[0].splitlines() if line), "Ünï 🚀 x  y"]:
        expected = model.tokenizer(text, add_special_tokens=False).input_ids
        assert merged(file, text, name != "Gemma") == expected


Spoil = Callable[[dict[str, Any]], object]
BPE: dict[str, tuple[Spoil, str]] = {
    "its rule": (lambda body: body["pre_tokenizer"]["pretokenizers"].pop(0), ""),
    "another rule": (
        lambda body: body.update(pre_tokenizer={"type": "Whitespace"}), "no rule that splits a text as it does",
    ),
    "a prefix": (
        lambda body: body["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "no rule that splits",
    ),
    "a normalizer": (lambda body: body.update(normalizer={"type": "Lowercase"}), "it changes a text first (Lowercase)"),
    "whole words": (lambda body: body["model"].update(ignore_merges=True), "only with ignore_merges = False"),
    "another kind": (
        lambda body: body.update(model={"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}),
        "it is WordLevel",
    ),
    "too many": (
        lambda body: body["added_tokens"].append({**body["added_tokens"][0], "id": 1280, "content": "<more>"}),
        "it has the token 1280, and there are embeddings of 1280 alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BPE)
def test_tokenizers_that_llama_cpp_would_read_otherwise(case: str, tmp_path: Path) -> None:
    spoil, why = BPE[case]
    body = json.loads(load_tokenizer(DEMO / "model").backend_tokenizer.to_str())
    spoil(body)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(body))).save_pretrained(tmp_path)
    if not why:  # without the rule for digits it is GPT-2's
        assert vocabulary(tmp_path, "x", 1280).rule == "gpt-2"
        return
    with pytest.raises(BadModel) as caught:
        vocabulary(tmp_path, "x", 1280)
    assert why in one_line(caught.value)


@pytest.mark.parametrize("name", ["dbrx", "qwen2"])
def test_others_split_by_the_rule_that_is_named(name: str, tmp_path: Path) -> None:
    model = splitting(name)
    file = made(model, tmp_path)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        expected = model.tokenizer(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == expected


def test_merges_that_sentencepiece_would_not_make(tmp_path: Path) -> None:
    artifacts.write(sentencepiece("Llama", changed_merges=True), Recipe(), tmp_path / "artifact")
    assert "its merges are not those that SentencePiece makes" in refusal(tmp_path / "artifact")


def refusal(artifact: Path) -> str:
    """The one line; nothing is left behind."""
    with pytest.raises(InputError) as caught:
        export.exporter("gguf")(artifact, artifact.parent / "out")
    assert [path.name for path in artifact.parent.iterdir() if "out" in path.name] == []
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    """What an error says, which is in Chinese, too."""
    said = str(error)
    assert "\n" not in said
    with language.use("zh-CN"):
        assert translate(said) != said
    return said


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8, "short_factor": [1.5] * 8, "factor": 4.0,
        "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64}  # fmt: skip
SAYS: list[tuple[str, dict[str, object], dict[str, object]]] = [
    ("llama", {"rope_parameters": LINEAR}, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    ("llama", {"rope_parameters": YARN},
     {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
    ("mistral", {"sliding_window": 100, "max_position_embeddings": 4096}, {"context_length": 100}),
    ("qwen2", {"use_sliding_window": False, "max_position_embeddings": 4096}, {"context_length": 4096}),
    ("qwen3", {}, {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}),
    ("gpt_neox", {}, {"rope.dimension_count": 4, "use_parallel_residual": True}),
    ("gpt2", {}, {"feed_forward_length": 256, "context_length": 256}),
    ("falcon", {}, {"attention.head_count_kv": 1, "feed_forward_length": 256}),
    ("gemma2", {}, {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
     {"attention.sliding_window_pattern": [False, True, False]}),
    ("gemma3", {}, {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 8}),
    ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 256, "original_max_position_embeddings": 64},
     {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64}),
    ("qwen2_moe", {}, {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64,
                       "expert_shared_feed_forward_length": 96}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "expected"), SAYS, ids=str)
def test_what_a_file_says_of_a_network(kind: str, changes: dict[str, object], expected: dict[str, object]) -> None:
    config = changed(KNOWN[kind], **changes).to_dict()
    family = family_of(config, "x")
    writer = GGUFWriter(None, family.arch)
    for note in add_network(writer, config, family):
        with language.use("zh-CN"):
            assert translate(note) != note
    said = {name.removeprefix(f"{family.arch}."): each.value for name, each in writer.kv_data[0].items()}
    assert {name: getattr(said.get(name), "value", said.get(name)) for name in expected} == expected


def test_the_factors_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    config = changed(KNOWN["llama"], rope_parameters=LLAMA3)
    found = tensors(made(in_memory(config), tmp_path))["rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(found, plain / scaled)
    assert found.unique().numel() > 2  # some as they were, some slower, some between


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ("qwen3", {"rope_parameters": LLAMA3}, "rope_type llama3"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "attention_factor = 1.5"),
    ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast = 16.0"),
    ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar = 144 for 3 blocks"),
    ("gemma2", {"attn_logit_softcapping": None}, "that are not capped"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers = [1, 0, 1]"),
    ("falcon", {"alibi": True}, "alibi = True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("olmoe", {"num_key_value_heads": 2}, "shared keys and values"),
    ("stablelm", {"head_dim": 8, "num_attention_heads": 4}, "heads of 8 that are not the hidden size 64 together"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "why"), REFUSED, ids=str)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(kind: str, changes: dict[str, object], why: str) -> None:
    with pytest.raises(BadModel) as caught:
        family_of({**KNOWN[kind].to_dict(), **changes}, "x")
    assert why in one_line(caught.value)


def test_what_has_no_gguf(context: Context, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    assert "no artifact of a run" in refusal(tiny_folder())
    artifacts.write(in_memory(FAMILIES["opt"]), Recipe(), tmp_path / "opt" / "artifact")
    assert "no GGUF of opt models" in refusal(tmp_path / "opt" / "artifact")
    artifacts.write(
        in_memory(changed(KNOWN["qwen3_moe"], norm_topk_prob=False)), Recipe(), tmp_path / "moe" / "artifact"
    )
    assert "norm_topk_prob" in refusal(tmp_path / "moe" / "artifact")
    assert export.offered(tmp_path / "moe" / "artifact") == []
    artifacts.write(
        in_memory(changed(KNOWN["gemma2"], tie_word_embeddings=False)), Recipe(), tmp_path / "gemma" / "artifact"
    )
    assert "this one has a head of its own" in refusal(tmp_path / "gemma" / "artifact")
    apart = dataclasses.replace(context, folder=tmp_path / "apart")
    model = in_memory(tiny_config())
    smoothquant.apply(model, smoothquant.Params(samples=2, sequence_length=16), apart)
    artifacts.write(model, Recipe(), tmp_path / "w8a8" / "artifact")
    assert "inputs of its linears are rounded" in refusal(tmp_path / "w8a8" / "artifact")
    assert export.offered(tmp_path / "w8a8" / "artifact") == []


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    config = changed(KNOWN["qwen3"], attention_bias=True)
    artifacts.write(in_memory(config), Recipe(), tmp_path / "artifact")
    assert "qwen3 models have no model.layers.0.self_attn.o_proj.bias" in refusal(tmp_path / "artifact")


def test_an_export_replaces_nothing_and_leaves_nothing(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    write = export.exporter("gguf")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "artifact", tmp_path / "artifact")
    with pytest.raises(InputError, match="no folder"):
        write(tmp_path / "artifact", tmp_path / "a" / "b")
    monkeypatch.setattr(_folder, "room", lambda *asked: 1 << 60)
    with pytest.raises(TooBig):
        write(tmp_path / "artifact", tmp_path / "out")
    monkeypatch.undo()

    def full(*asked: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "artifact", tmp_path / "out")
    monkeypatch.undo()
    (damaged,) = (tmp_path / "artifact").glob("model-00002-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(BadArtifact):
        write(tmp_path / "artifact", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact"]


def test_few_numbers_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    artifacts.write(in_memory(config), Recipe(), tmp_path / "artifact")
    alive: list[weakref.ref[Tensor]] = []
    most, read = 0, TensorFiles.read

    def counted(files: TensorFiles, name: str) -> Tensor:
        nonlocal most
        tensor = read(files, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each.nbytes for ref in alive if (each := ref()) is not None))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", counted)
    export.exporter("gguf")(tmp_path / "artifact", tmp_path / "out")
    largest = 2 * 1280 * 256
    assert largest <= most < 3 * largest < sum(file.stat().st_size for file in (tmp_path / "out").glob("*.gguf"))


READER = """
import json, sys
import numpy as np
from llama_cpp import Llama
asked = json.load(open(sys.argv[1]))
for path, ids in asked["files"].items():
    model = Llama(model_path=path, logits_all=True, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.reset()
    model.eval(asked["begins"].get(path, ids[:1]))
    written = []
    for _ in range(12):
        written.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(written[-1:])
    tokens = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    np.save(path + ".npy", logits)
    json.dump({"written": written, "tokens": tokens}, open(path + ".json", "w"))
"""


@torch.inference_mode()
def sure(model: LoadedModel) -> tuple[list[int], list[int]]:
    """The beginning of a text that a model goes on with for twelve tokens without hesitating, and how it does."""
    for line in (DEMO / "text.txt").read_text().splitlines():
        ids, written = model.tokenizer(line).input_ids[:16], list[int]()
        while len(ids) == 16 and len(written) < 12:
            two = model.network(torch.tensor([ids + written]), use_cache=False).logits[0, -1].topk(2)
            if two.values[0] - two.values[1] < 0.5:
                break
            written.append(int(two.indices[0]))
        if len(written) == 12:
            return ids, written
    raise AssertionError("it hesitates always")


@pytest.mark.skipif(LLAMA_CPP not in os.environ, reason=f"{LLAMA_CPP} names no Python that has llama_cpp")
@pytest.mark.timeout(900)
def test_llama_cpp_computes_the_same(context: Context, tmp_path: Path) -> None:
    """Its own graphs and kernels, which round inputs to 8 bits: near, not equal; the same text on the demo."""
    four: dict[str, object] = {"bits": 4, "group_size": 64}
    demos: dict[str, dict[str, object] | None] = {
        "dense": None, "4": four, "4, zero points": four | {"symmetric": False}, "8": {"bits": 8, "group_size": 64},
        "3": {"bits": 3, "group_size": 128}, "all": four | {"head": True, "embeddings": True},
        "2 in K": {"bits": 2, "granularity": "channel", "targets": "*.0.*.[qkvo]_proj"},
    }  # fmt: skip
    models = {f"demo {name}": (load(DEMO / "model"), grid) for name, grid in demos.items()}
    for family, config in KNOWN.items():
        models |= {
            f"{family} {bits}": (uneven(in_memory(config)), bits and {"bits": bits, "group_size": 32})
            for bits in (None, 4)
        }
    models |= {f"variant {case}": (uneven(in_memory(varied(case))), None) for case in VARIANTS}
    files, expected, begins, texts = {}, {}, {}, {}
    for name, (model, grid) in models.items():
        at = tmp_path / re.sub(r"\W+", "-", name)
        at.mkdir()
        if grid:
            rtn.apply(model, rtn.Params.model_validate(grid), dataclasses.replace(context, folder=at / "blocks"))
        file = str(made(model, at))
        ids = model.tokenizer(TEXTS[0]).input_ids[:100] if "demo" in name else IDS[0].tolist()
        files[file] = ids
        logits_of(model)  # which puts the exact weights in
        with torch.inference_mode():
            expected[file] = model.network(torch.tensor([ids]), use_cache=False).logits[0]
        if "demo" in name:
            begins[file], texts[file] = sure(model)
    (tmp_path / "asked.json").write_text(json.dumps({"files": files, "begins": begins, "texts": TEXTS}))
    subprocess.run([os.environ[LLAMA_CPP], "-c", READER, str(tmp_path / "asked.json")], check=True, cwd=tmp_path)
    tokens = [load(DEMO / "model").tokenizer(text).input_ids for text in TEXTS]
    for file, logits in expected.items():
        divergence = divergence_of(logits, file)
        # A token of a mixture whose experts are nearly alike goes to others; one of the demo's texts hangs by a hair.
        assert divergence.median() < 5e-4, file
        assert divergence.mean() < 1e-2, file
        if file in texts:
            said = json.loads(Path(f"{file}.json").read_text())
            assert said["written"] == texts[file], file
            assert said["tokens"] == tokens, file
    dense, four = (str(next((tmp_path / f"llama-{bits}" / "out").glob("*.gguf"))) for bits in (None, 4))
    assert divergence_of(expected[dense], four).median() > 5e-3  # what other weights would give


WORDS = pre_tokenizers.ByteLevel(False)
BYTEWISE = pre_tokenizers.ByteLevel(False, use_regex=False)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# The rules of tokenizer.json files of the hub, with the names that llama.cpp has for them.
SPLITS: dict[str, tuple[list[pre_tokenizers.PreTokenizer], bool]] = {
    "gpt-2": ([WORDS], False),
    "smollm": ([pre_tokenizers.Digits(True), WORDS], False),
    "falcon": (
        [pre_tokenizers.Punctuation("contiguous"), WORDS, pre_tokenizers.Digits(), split_by("[0-9][0-9][0-9]")], False,
    ),
    "bloom": ([split_by(" ?[^(\\s|[.,!?…。，、।۔،])]+"), BYTEWISE], False),
    **{name: ([split_by(GGUF_PRE_TOKENIZER_SPLITS[name]), BYTEWISE], name in ("llama-bpe", "tekken"))
       for name in ("llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o")},
}  # fmt: skip


def splitting(name: str) -> LoadedModel:
    """A model whose tokenizer splits a text by a rule."""
    parts, whole = SPLITS[name]
    model = in_memory(tiny_config())
    backend = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.model.ignore_merges = whole
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    return model


def test_every_rule_has_its_name(tmp_path: Path) -> None:
    assert {name for names in RULES.values() for name in names.values()} == set(SPLITS)
    for name in SPLITS:
        splitting(name).tokenizer.save_pretrained(tmp_path / name)
        assert vocabulary(tmp_path / name, "x", 1280).rule == name


@pytest.mark.skipif(LLAMA_CPP not in os.environ, reason=f"{LLAMA_CPP} names no Python that has llama_cpp")
@pytest.mark.timeout(900)
def test_llama_cpp_splits_a_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    models = {name: splitting(name) for name in SPLITS}
    models |= {name: sentencepiece(name) for name in ("Llama", "Gemma", "Phi-3")}
    files = {}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        files[name] = str(made(model, tmp_path / name))
    asked = {"files": {file: [1, 2, 3] for file in files.values()}, "begins": {}, "texts": TEXTS}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    subprocess.run([os.environ[LLAMA_CPP], "-c", READER, str(tmp_path / "asked.json")], check=True, cwd=tmp_path)
    for name, file in files.items():
        found = json.loads(Path(f"{file}.json").read_text())["tokens"]
        for text, tokens in zip(TEXTS, found, strict=True):
            spaced = name == "Llama" and text.startswith(" ")  # of which its notes say that one more is there
            assert tokens[spaced:] == models[name].tokenizer(text).input_ids, (name, text)


def divergence_of(logits: Tensor, file: str) -> Tensor:
    """KL in nat of what llama.cpp predicts to `logits`, token by token."""
    ours, theirs = (each.float().log_softmax(-1) for each in (logits, torch.from_numpy(np.load(f"{file}.npy"))))
    return (ours.exp() * (ours - theirs)).sum(-1)
