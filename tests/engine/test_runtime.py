"""Packed linears against the slow, obvious product; loading of packed artifacts without dense copies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from engine import artifacts, runtime
from engine.errors import BadModel
from engine.models import LoadedModel, blocks, linears
from engine.packing import QuantizedWeight, pack
from engine.records import Recipe
from engine.runtime.linear import PackedLinear, kernel_for
from engine.runtime.native.library import SWITCH, available
from tests.conftest import in_memory, tiny_config

SMALL = {"vocab_size": 1280, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_config(),
    "untied": tiny_config(tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=128, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    "gemma": GemmaConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=128),
    "opt": OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64),
    "gpt2": GPT2Config(vocab_size=1280, n_embd=64, n_layer=2, n_head=4),
}


def make(bits: int, groups: int, *, symmetric: bool = True, rows: int = 128, columns: int = 256) -> QuantizedWeight:
    """A weight at random; `groups` 0 is one scale for the whole matrix."""
    dice = torch.Generator().manual_seed(bits * 1000 + groups)
    shape = (1, 1) if groups == 0 else (rows, groups)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=dice, dtype=torch.uint8)
    scale = (torch.rand(shape, generator=dice) * 0.02 + 0.01).to(torch.bfloat16)
    half = torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
    zero = half if symmetric else torch.randint(0, 2**bits, shape, generator=dice, dtype=torch.uint8)
    return QuantizedWeight(codes, scale, zero, bits, symmetric)


def exact_product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T in float64, weight by weight as the grid defines it."""
    rows = weight.codes.shape[0]
    scale = weight.scale.double().expand(rows, -1).repeat_interleave(weight.group_size, 1)
    zero = weight.zero.double().expand(rows, -1).repeat_interleave(weight.group_size, 1)
    return x.double() @ ((weight.codes.double() - zero) * scale).T


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_packed_linear_computes_the_grids_product(bits: int, groups: int, symmetric: bool, rows: int) -> None:
    weight = make(bits, groups, symmetric=symmetric)
    x = (torch.randn(rows, 256) + 0.5).to(torch.bfloat16)  # a mean, so that wrong zero points show
    bias = torch.randn(128).to(torch.bfloat16)
    y = PackedLinear(weight, bias)(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact_product(x, weight) + bias.double()) < 0.004


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, False), (3, False), (4, True), (5, False), (6, True), (7, False), (8, True), (8, False)]
)
def test_what_is_claimed_exact_is_exact(bits: int, symmetric: bool) -> None:
    """With one input of 1 the product is a column of W, and nothing but its rounding to bfloat16 may show."""
    weight = make(bits, 4, symmetric=symmetric)
    x = torch.eye(256)[:3].to(torch.bfloat16)
    torch.testing.assert_close(PackedLinear(weight)(x), exact_product(x, weight).to(torch.bfloat16), rtol=0, atol=0)


def test_many_rows_and_few_rows_agree_when_blocks_do_not_fill_a_stretch() -> None:
    weight = make(4, 64, rows=64 * 5, columns=4096)  # stretches of 256 rows, so a rest of 64
    linear = PackedLinear(weight)
    x = torch.randn(100, 4096).to(torch.bfloat16)
    expected = exact_product(x, weight)
    assert relative_error(linear(x), expected) < 0.004
    linear.many_rows = None
    assert relative_error(linear(x), expected) < 0.004


def test_shapes_with_leading_dimensions_are_kept() -> None:
    assert PackedLinear(make(4, 4))(torch.randn(2, 3, 256).to(torch.bfloat16)).shape == (2, 3, 128)


def test_a_packed_linear_is_as_small_as_its_codes() -> None:
    linear = PackedLinear(make(4, 4, rows=256, columns=1024))
    stored = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
    assert stored == 256 * 1024 // 2 + 256 * 4 * 4


@pytest.mark.parametrize(
    ("bits", "groups", "rows", "dtype", "kernel"),
    [
        (4, 4, 128, torch.bfloat16, "int4pack-cpu"),
        (2, 1, 128, torch.bfloat16, "int4pack-cpu"),
        (8, 1, 100, torch.bfloat16, "int8pack-cpu"),
        (8, 4, 128, torch.bfloat16, "int4pack-cpu"),
        (4, 4, 128, torch.float32, None),  # torch's float32 variant is slower than dense
        (4, 16, 128, torch.bfloat16, None),  # groups of 16
        (4, 4, 100, torch.bfloat16, None),  # rows that are no multiple of 16
    ],
)
def test_the_kernel_is_named_or_there_is_none(
    bits: int, groups: int, rows: int, dtype: torch.dtype, kernel: str | None
) -> None:
    weight = make(bits, groups, rows=rows)
    assert kernel_for(weight, "cpu", dtype) == kernel
    if kernel is None and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="no kernel"):
            PackedLinear(weight)


@pytest.fixture(params=["ours", "torch's"])
def four_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel of 4 bits, once where our own kernels compute and once where torch's do."""
    if request.param == "torch's":
        monkeypatch.setenv(SWITCH, "0")
        return "int4pack-cpu"
    if not available():
        pytest.skip("our own kernels cannot be built here")
    return f"int4-{available()}"


def quantize(model: LoadedModel, bits: int, groups: int, symmetric: bool = True) -> LoadedModel:
    """Put a random grid on every linear of the blocks."""
    prefix, _ = blocks(model.network)
    for name, linear in linears(model.network):
        if name.startswith(prefix):
            columns, rows = linear.weight.shape if "Conv1D" in type(linear).__name__ else linear.weight.shape[::-1]
            weight = make(bits, groups, symmetric=symmetric, rows=rows, columns=columns)
            dense = weight.dequantize()
            linear.weight.data.copy_(dense.T if "Conv1D" in type(linear).__name__ else dense)
            model.quantized[name] = weight
    return model


def logits(network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(input_ids=torch.arange(24).view(1, 24) + 5).logits
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_packed_and_computes_what_was_saved(family: str, four_bits: str, tmp_path: Path) -> None:
    model = quantize(in_memory(FAMILIES[family]), 4, 2)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact")
    expected = logits(model.network).double()
    assert relative_error(logits(loaded.network), expected) < 0.02
    assert set(loaded.kernels) == set(model.quantized)
    assert set(loaded.kernels.values()) == {four_bits}
    assert {getattr(loaded.network.get_submodule(name), "kernel", None) for name in loaded.kernels} == {four_bits}


@pytest.mark.usefixtures("four_bits")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "groups"), [(2, 2), (3, 1), (4, 0), (5, 2), (6, 1), (7, 2), (8, 1), (8, 2)])
def test_every_grid_survives_the_artifact(bits: int, groups: int, symmetric: bool, tmp_path: Path) -> None:
    model = quantize(in_memory(tiny_config()), bits, groups, symmetric)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact")
    # Codes drawn at random make a network that amplifies rounding: dense bfloat16 itself is up to 3 % off.
    truth = logits(copy.deepcopy(model.network).float()).double()
    assert relative_error(logits(loaded.network), truth) < 2 * relative_error(logits(model.network), truth)
    if groups == 0 and not symmetric:
        return  # the format has no zero point for a whole matrix that stock transformers reads
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype=torch.bfloat16)
    torch.testing.assert_close(logits(stranger), logits(model.network), rtol=0, atol=0)


def test_where_no_kernel_exists_the_layer_is_dense_and_called_simulated(four_bits: str, tmp_path: Path) -> None:
    groups = 4 if four_bits == "int4pack-cpu" else 16  # of 16 and 32 inputs, or of 4 and 8: only `down_proj` is known
    model = quantize(in_memory(tiny_config()), 4, groups)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact")
    down = {name for name in loaded.kernels if name.endswith("down_proj")}
    assert {loaded.kernels[name] for name in down} == {four_bits}
    assert {loaded.kernels[name] for name in set(loaded.kernels) - down} == {"simulated: dense bfloat16"}
    assert relative_error(logits(loaded.network), logits(model.network).double()) < 0.02


def test_a_dense_folder_loads_dense(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder()
    loaded = runtime.load(folder)
    assert loaded.kernels == {}
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.testing.assert_close(logits(loaded.network), logits(expected))


def test_unpadded_zero_points_of_the_formats_own_writer_are_read(tmp_path: Path) -> None:
    model = quantize(in_memory(tiny_config()), 4, 2, symmetric=False)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    before = logits(runtime.load(tmp_path / "artifact").network)
    for file in (tmp_path / "artifact").glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith("zero_point")]:
            zero = model.quantized[name.removesuffix(".weight_zero_point")].zero
            tensors[name] = pack(zero.T.contiguous(), 4).T.contiguous()
        save_file(tensors, file)
    torch.testing.assert_close(logits(runtime.load(tmp_path / "artifact").network), before, rtol=0, atol=0)


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an artifact's first block."""
    file = folder / "model-00002-of-00004.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), "weight_scale is missing"),
        (lambda t: t.pop("model.layers.0.input_layernorm.weight"), "input_layernorm.weight is missing"),
        (lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, :-1].contiguous()}), "do not fit"),
        (lambda t: t.update({"model.layers.0.extra.weight": torch.ones(1)}), "is not part of"),
        (lambda t: t[f"{Q}.weight_scale"].fill_(torch.nan), "NaN"),
        (lambda t: t.update({f"{Q}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}), "activation order"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(64)}), "bias"),
    ],
)
def test_damaged_artifacts_are_refused(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    artifacts.write(quantize(in_memory(tiny_config()), 4, 2), Recipe(), tmp_path / "artifact")
    spoil(tmp_path / "artifact", change)
    with pytest.raises(BadModel, match=message):
        runtime.load(tmp_path / "artifact")


@pytest.mark.parametrize("target", ["re:(.", r"re:(\S|\S)+\s"])
def test_a_config_cannot_hold_the_loader_up_with_a_pattern(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    artifacts.write(quantize(in_memory(tiny_config()), 4, 2), Recipe(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModel, match="no pattern or takes too long"):
        runtime.load(folder)


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    artifacts.write(quantize(in_memory(tiny_config()), 4, 2), Recipe(), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadModel, match="not a file of this folder"):
        runtime.load(folder)


def test_several_groups_of_modules_with_their_own_bits(four_bits: str, tmp_path: Path) -> None:
    model = quantize(in_memory(tiny_config()), 4, 2)
    down = make(8, 1, rows=64, columns=128)
    model.quantized["model.layers.1.mlp.down_proj"] = down
    model.network.get_submodule("model.layers.1.mlp.down_proj").weight.data.copy_(down.dequantize())
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact")
    assert loaded.kernels["model.layers.1.mlp.down_proj"] == four_bits.replace("int4", "int8")
    assert loaded.kernels["model.layers.0.mlp.down_proj"] == four_bits
    assert relative_error(logits(loaded.network), logits(model.network).double()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_cuda_kernel_computes_the_grids_product(bits: int, symmetric: bool) -> None:
    weight = make(bits, 2, symmetric=symmetric)
    x = (torch.randn(3, 256) + 0.5).to(torch.bfloat16)
    linear = PackedLinear(weight, device="cuda")
    assert linear.kernel == "int4pack-cuda"
    assert relative_error(linear(x.cuda()), exact_product(x, weight)) < 0.004


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_linears_are_joined_too(bits: int) -> None:
    parts = [PackedLinear(make(bits, 2, rows=rows), device="cuda") for rows in (128, 64, 8)]
    x = torch.randn(3, 256).bfloat16().cuda()
    before = [part(x) for part in parts]
    joined = PackedLinear.joined(parts)
    assert joined is not None
    torch.testing.assert_close(joined(x), torch.cat(before, dim=1), rtol=0, atol=0)
    torch.testing.assert_close(parts[1](x), before[1], rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "groups"), [(4, 4), (3, 2), (8, 1), (8, 2), (6, 2)])
def test_joined_linears_compute_what_each_computes(bits: int, groups: int) -> None:
    parts = [PackedLinear(make(bits, groups, rows=rows)) for rows in (128, 64, 192)]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = [part(x) for part in parts]
    joined = PackedLinear.joined(parts)
    assert joined is not None
    torch.testing.assert_close(joined(x), torch.cat(before, dim=1), rtol=0, atol=0)
    for part, expected in zip(parts, before, strict=True):
        torch.testing.assert_close(part(x), expected, rtol=0, atol=0)
        assert part.packed.untyped_storage().data_ptr() == joined.packed.untyped_storage().data_ptr()
    assert PackedLinear.joined(parts) is joined
    assert list(parts[0].children()) == []


def test_what_cannot_be_joined_is_left_apart() -> None:
    assert PackedLinear.joined([PackedLinear(make(4, 4)), PackedLinear(make(8, 4))]) is None
    assert PackedLinear.joined([PackedLinear(make(4, 4, rows=64)), PackedLinear(make(4, 4, rows=16))]) is None
    assert PackedLinear.joined([PackedLinear(make(4, 4)), PackedLinear(make(4, 4), torch.ones(128))]) is None
