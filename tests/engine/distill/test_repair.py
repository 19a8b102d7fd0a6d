"""Repair: what is learned beside a network against its definition, and what must stay as it was."""

from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from engine import artifacts, methods
from engine.distill._added import Adapter, Codes, InsteadOfWeight, Scales, matrix
from engine.errors import BadRecipe
from engine.methods import Context
from engine.models import blocks, linears, load
from engine.packing import LARGEST_FLOAT8, QuantizedWeight
from engine.places import DEMO
from engine.quantize._grid import Grid, GridParams, round_to_nearest
from engine.records import Recipe
from tests.conftest import in_memory
from tests.engine.distill.test_methods_of_distillation import apply
from tests.families import FAMILIES


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_adapters_merge_to_what_was_trained_and_keep_zeros(family: str, context: Context) -> None:
    model = in_memory(FAMILIES[family], torch.float32)
    prefix, modules = blocks(model.network)
    path, linear = next(linears(modules[0]))
    matrix(linear)[:, ::2] = 0
    model.pruned = {f"{prefix}.0.{path}"}
    embeddings = model.network.get_input_embeddings().weight.clone()
    before = matrix(linear).clone()
    apply("distill/repair", model, context, scope="lora", rank=2, learning_rate=1e-2, steps=6)
    after = matrix(linear)
    assert bool((after[:, ::2] == 0).all())
    assert not after.equal(before)
    other = matrix(list(linears(modules[1]))[-1][1])
    original = matrix(list(linears(blocks(in_memory(FAMILIES[family], torch.float32).network)[1][1]))[-1][1])
    assert int(torch.linalg.matrix_rank((other - original).double(), atol=1e-6)) == 2
    torch.testing.assert_close(model.network.get_input_embeddings().weight, embeddings, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_learned_beside_a_linear_has_the_gradients_of_the_whole_weight(masked: bool, transposed: bool) -> None:
    dice = torch.Generator().manual_seed(0)
    linear = Conv1D(12, 20) if transposed else torch.nn.Linear(20, 12)
    linear.requires_grad_(False)
    mask = torch.rand(12, 20, generator=dice) < 0.5 if masked else None
    adapter = Adapter(linear, 3, mask)
    adapter.up.data.normal_(generator=dice)
    check_gradients(adapter, torch.randn(2, 5, 20, generator=dice))


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_have_the_gradients_of_the_whole_weight(symmetric: bool) -> None:
    linear = torch.nn.Linear(64, 12, bias=False).requires_grad_(False)
    grid = GridParams(bits=4, group_size=32, symmetric=symmetric)
    learned = Scales(linear, round_to_nearest(linear.weight, grid, "it", torch.float32))
    check_gradients(learned, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "masked", "transposed", "float"])
def test_codes_are_those_of_the_weight_that_learned(kind: str, rank: int) -> None:
    """Against `round_to_nearest`'s own grid, and FP8's cast; what is merged is what was computed with."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 12, bias=False).requires_grad_(False)
    if kind == "float":
        scale = linear.weight.abs().amax(1, keepdim=True) / LARGEST_FLOAT8
        as_bytes = (linear.weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        given = QuantizedWeight(as_bytes, scale, torch.zeros_like(scale, dtype=torch.uint8), 8, True, kind="float")
    else:
        grid = GridParams(bits=3, group_size=32, symmetric=kind != "asymmetric")
        given = round_to_nearest(linear.weight, grid, "it", torch.float32)
    module = Conv1D(12, 64).requires_grad_(False) if kind == "transposed" else linear
    matrix(module).copy_(given.dequantize())
    mask = linear.weight.abs() > linear.weight.abs().median() if kind == "masked" else None
    learned = Codes(module, given, mask, rank)
    kept = torch.ones_like(linear.weight) if mask is None else mask.float()
    torch.testing.assert_close(learned.weight(), given.dequantize() * kept)
    with torch.no_grad():
        for value in learned.parameters():
            value.add_(0.05 * torch.randn_like(value))
    check_gradients(learned, torch.randn(3, 64))
    found, exact, scale = learned.quantized(), learned.exact(), learned.stored()
    torch.testing.assert_close(found.dequantize(), learned.weight(), rtol=0, atol=0)
    assert not found.codes.equal(given.codes)
    if kind == "float":
        steps = (exact / scale).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).view(torch.uint8)
        assert found.codes.equal(steps)
    else:
        group = torch.arange(64) // 32
        wanted = Grid(scale, given.zero.float(), 3, kind != "asymmetric").encode(exact, group)
        assert found.codes.equal(wanted.to(torch.uint8))
    if mask is not None:
        assert bool((found.dequantize()[~mask] == 0).all())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e-3), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_has_learned_nothing_is_what_was_given(dtype: torch.dtype, size: float, symmetric: bool) -> None:
    """Scales of 8 bits are below the smallest normal number of float16, and bfloat16 tells no 256 codes apart."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 12, bias=False).requires_grad_(False).to(dtype)
    grid = GridParams(bits=8, group_size=32, symmetric=symmetric)
    given = round_to_nearest(size * (torch.randn(12, 64) + 2), grid, "it", dtype)
    matrix(linear).copy_(given.dequantize())
    for learned in (Scales(linear, given), Codes(linear, given, None), Codes(linear, given, None, rank=2)):
        found = learned.quantized()
        assert found.scale.equal(given.scale)
        assert found.codes.equal(given.codes)


def test_gradients_of_codes_pass_rounding_and_end_where_the_grid_does() -> None:
    """LSQ: a weight's is the level's; the scale's is what rounding adds inside, and the last level outside."""
    linear = torch.nn.Linear(8, 1, bias=False).requires_grad_(False)
    given = round_to_nearest(linear.weight, GridParams(bits=3, group_size=8), "it", torch.float32)
    learned = Codes(linear, given, None)
    assert learned.free is not None
    scale = float(given.scale)
    with torch.no_grad():
        learned.free.copy_(scale * torch.tensor([[0.3, -0.4, 1.2, 2.9, 3.4, -4.2, -9.0, 9.0]]))
    with torch.enable_grad():
        learned.weight().sum().backward()  # type: ignore[no-untyped-call]
    assert learned.free.grad is not None
    assert learned.change.grad is not None
    assert learned.free.grad.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    inside = (0 - 0.3) + (0 + 0.4) + (1 - 1.2) + (3 - 2.9)
    assert float(learned.change.grad) == pytest.approx(scale * (inside + 3 - 4 - 4 + 3), rel=1e-4)


def check_gradients(learned: InsteadOfWeight, x: torch.Tensor) -> None:
    """Those of `product` are those of its definition."""
    x.requires_grad_(True)
    wanted = [x, *learned.parameters()]
    with torch.enable_grad():
        found, exact = learned.product(x), torch.nn.functional.linear(x, learned.weight())
        torch.testing.assert_close(found, exact)
        gradients = [torch.autograd.grad(each.square().sum(), wanted) for each in (found, exact)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "scope"),
    [(False, "norms and scales"), (False, "all"), (False, "lora"), (True, "norms and scales"), (True, "all")],
)
def test_what_is_quantized_heals_on_its_grid(inputs: bool, scope: str, context: Context, tmp_path: Path) -> None:
    name = "quantize/zeroquant" if inputs else "quantize/rtn"
    given = {"bits": 3, "group_size": 32, "symmetric": inputs}
    rate = {"norms and scales": 1e-3, "all": 4e-3, "lora": 2e-3}[scope]
    steps, batch = (60, 8) if scope == "lora" else (20, 4)  # what is in units of the scale moves few codes at first
    model = load(DEMO / "model")
    with torch.no_grad():
        model = methods.get(name).apply(model, methods.get(name).check(given), context)  # type: ignore[arg-type]
    codes = {name: weight.codes.clone() for name, weight in model.quantized.items()}
    found = apply(
        "distill/repair", model, context, scope=scope, steps=steps, batch=batch, sequence_length=32, learning_rate=rate
    )
    said = [float(str(d["value"])) for k, d in context.emit.said if d.get("series") == "kl_heldout"]  # type: ignore[attr-defined]
    assert said[-1] < said[0]
    assert len(found.quantized) == 28
    moved = 0
    for name, weight in found.quantized.items():
        assert isinstance(weight, QuantizedWeight)
        moved += not weight.codes.equal(codes[name])
        torch.testing.assert_close(found.network.get_submodule(name).weight, weight.dequantize(), rtol=0, atol=0)
    assert (moved > 0) == (scope != "norms and scales")
    ids = torch.arange(3, 90)[None]
    artifacts.write(found, Recipe.model_validate({}), tmp_path / "artifact")
    again = load(tmp_path / "artifact")
    with torch.inference_mode():
        ours, theirs = found.network(ids).logits.float(), again.network(ids).logits.float()
    assert float((ours - theirs).norm() / ours.norm()) < 0.02


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_of_every_family_are_learned(family: str, context: Context) -> None:
    model = in_memory(FAMILIES[family])
    before = {name: each.clone() for name, each in model.network.named_parameters()}
    apply("distill/repair", model, context, scope="norms and scales", learning_rate=0.1, label_weight=1.0)
    after = dict(model.network.named_parameters())
    assert {each.dtype for each in after.values()} == {torch.bfloat16}
    assert {name for name in before if not after[name].equal(before[name])} <= {
        n for n in before if before[n].dim() == 1
    }
    assert any("norm" in name or "ln_" in name for name in before if not after[name].equal(before[name]))


def test_repair_may_follow_quantization_and_nothing_else_may() -> None:
    def recipe(*steps: object) -> Recipe:
        return Recipe.model_validate({"steps": list(steps)})

    healed = {"distill/repair": {"scope": "lora"}}
    methods.check(recipe({"quantize/rtn": {}}, healed))
    methods.check(recipe({"quantize/rtn": {}}, {"distill/repair": {}}))
    methods.check(recipe({"quantize/rtn": {}}, healed, {"quantize/kv_cache": {}}))
    for steps in (
        [{"quantize/rtn": {}}, {"distill/logits": {"student": "current"}}],
        [{"quantize/rtn": {}}, healed, {"prune/magnitude": {}}],
        [{"quantize/bitsandbytes": {}}, healed],
    ):
        with pytest.raises(BadRecipe):
            methods.check(recipe(*steps))


@pytest.mark.parametrize("later", ["prune/magnitude", "distill/logits", "distill/repair", "quantize/rtn"])
def test_behind_a_librarys_weights_nothing_is_advised_that_is_refused(later: str) -> None:
    def recipe(*names: str) -> Recipe:
        return Recipe.model_validate({"steps": [{name: {}} for name in names]})

    with pytest.raises(BadRecipe, match="whose weights are a library's") as refused:
        methods.check(recipe("quantize/bitsandbytes", later))
    assert "may follow" not in str(refused.value)
    if "Put quantize/bitsandbytes last" in str(refused.value):
        methods.check(recipe(later, "quantize/bitsandbytes"))
    else:
        assert later == "quantize/rtn"
