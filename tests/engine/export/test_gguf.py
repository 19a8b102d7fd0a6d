"""GGUF: read back by others, a file gives the artifact's logits, and its weights to the last bit."""

from __future__ import annotations

import copy
import dataclasses
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
)  # fmt: skip
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine import artifacts, export, methods
from engine.errors import BadArtifact, BadModel, InputError, TooBig
from engine.export import _folder, notes
from engine.export._gguf_blocks import blocks, exact
from engine.export._gguf_families import family_of
from engine.export._gguf_metadata import add_network
from engine.export._gguf_types import TYPES, Type, bits_at_most, fitting
from engine.methods import Context
from engine.models import LoadedModel, load
from engine.packing import QuantizedWeight
from engine.quantize import rtn, smoothquant
from engine.records import Recipe
from engine.shards import TensorFiles
from tests.conftest import in_memory, tiny_config
from tests.engine.export.gguf_files import (
    IDS,
    KNOWN,
    changed,
    fields,
    logits_of,
    made,
    one_line,
    product,
    reader,
    refusal,
    uneven,
    varied,
)
from tests.families import FAMILIES
from ui import language
from ui.messages import translate

# Of which stock `transformers` reads no GGUF; Mixtral's it takes for a Llama and forgets the experts.
INCOMPLETE = ("qwen3", "gpt2", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe")  # whose sizes it does not read
UNREAD = ("smollm3", "olmo2", "gpt_neox", "gemma", "olmoe", "mixtral")


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
