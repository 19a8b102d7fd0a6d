"""SparseGPT against optimal brain surgery that inverts what is left of the Hessian again after each column."""

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from engine import solver
from engine.errors import BadParams
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune import sparsegpt, wanda
from engine.prune._masks import SparsityParams, keep_largest
from engine.prune.sparsegpt import Params, prune
from engine.quantize import gptq
from engine.quantize._grid import Grid, make_grid
from engine.solver import Solver, Zeros
from engine.sparsity import by_magnitude
from tests.conftest import Recorder, in_memory
from tests.engine.quantize.test_gptq import correlated, hessian_of
from tests.families import FAMILIES, MIXTURES


def slow_obs(
    weight: Tensor, hessian: Tensor, zeros: Zeros, width: int, damping: float, grid: Grid | None = None,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Zeros, and rounding where there is a grid, in slices of `width` columns; H⁻¹ of what is left anew each time."""
    rows, columns = weight.shape
    hessian = hessian.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    work = weight.double().clone()
    mask = torch.ones(rows, columns, dtype=torch.bool)
    span = width if zeros.span is None else zeros.span[1]
    for column in range(columns):
        if column % span == 0:
            some = range(column, min(column + span, columns))
            cost = torch.stack([work[:, j].square() / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in some], 1)
            if keep is not None:
                cost[~keep[:, some.start : some.stop]] = -1
            if zeros.span is None:
                found = cost.flatten().argsort()[: round(zeros.sparsity * cost.numel())]
                for place in found.tolist():
                    mask[place // len(some), column + place % len(some)] = False
            else:
                for n in range(rows):
                    for j in cost[n].argsort()[: zeros.span[0]].tolist():
                        mask[n, column + j] = False
        inverse = torch.linalg.inv(hessian[column:, column:])
        value = work[:, column].clone()
        if grid is not None:
            group = column // (columns // grid.scale.shape[1])
            value = grid.decode(grid.encode(value[:, None].float(), group), group)[:, 0].double()
        value[~mask[:, column]] = 0
        if keep is not None:
            value[~keep[:, column]] = 0
        error = (work[:, column] - value) / inverse[0, 0]
        work[:, column:] -= torch.outer(error, inverse[0])
        work[:, column] = value
    return work


def setting(columns: int, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    inputs = correlated(4 * columns, columns)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)), inputs, hessian_of(inputs)


@pytest.mark.parametrize(
    "zeros", [Zeros(0.5), Zeros(0.3), Zeros(0.5, "2:4"), Zeros(0.5, "4:8")], ids=["50", "30", "2:4", "4:8"]
)
@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("columns", [64, 88])
def test_weights_agree_with_the_slow_reference(
    zeros: Zeros, already: bool, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "SLICE", 32)
    monkeypatch.setattr(solver, "SPAN", 64)
    weight, _, hessian = setting(columns)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) > 0.2 if already else None
    found = prune(Solver(hessian.clone(), 0.01, sort=False), weight, zeros, keep)
    torch.testing.assert_close(
        found.double(), slow_obs(weight, hessian, zeros, 32, 0.01, keep=keep), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("zeros", [Zeros(0.5), Zeros(0.5, "2:4")], ids=["50", "2:4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_with_zeros_agree_with_the_slow_reference(
    zeros: Zeros, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "SLICE", 32)
    monkeypatch.setattr(solver, "SPAN", 64)
    weight, _, hessian = setting(96, rows=16)
    params = gptq.Params(bits=4, group_size=24, symmetric=symmetric, activation_order=False, clipping="none")
    quantized = gptq.quantize(
        Solver(hessian.clone(), params.damping, sort=False), weight, params, "w", torch.float32, zeros=zeros
    )
    grid = make_grid(weight, params, "w", torch.float32)
    expected = slow_obs(weight, hessian, zeros, 32, params.damping, grid)
    # A sum that lands on a rounding boundary may fall either way; one wrong update changes many values.
    assert ((quantized.dequantize() - expected).abs() > 1e-3).float().mean() < 0.005


def test_the_identity_prunes_the_smallest_of_each_slice() -> None:
    weight = torch.randn(10, 256, generator=torch.Generator().manual_seed(0))
    found = prune(Solver(torch.eye(256), 0.01, sort=False), weight, Zeros(0.4))
    for part in (slice(0, 128), slice(128, 256)):
        keep = by_magnitude(weight[:, part], 0.4)
        torch.testing.assert_close(found[:, part], weight[:, part] * keep)


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
def test_each_slice_loses_exactly_its_share(sparsity: float) -> None:
    weight, _, hessian = setting(160)
    found = prune(Solver(hessian.clone(), 0.01, sort=False), weight, Zeros(sparsity))
    for part in (found[:, :128], found[:, 128:]):
        assert int((part == 0).sum()) == round(sparsity * part.numel())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("joint", [False, True])
def test_patterns_have_exactly_n_zeros_of_m_also_in_activation_order(pattern: str, joint: bool) -> None:
    weight, _, hessian = setting(160)
    zeros = Zeros(0.5, pattern)  # type: ignore[arg-type]
    assert zeros.span is not None
    dropped, span = zeros.span
    solver = Solver(hessian.clone(), 0.01, sort=joint, span=span)
    if joint:
        params = gptq.Params(bits=8, group_size=32)
        found = gptq.quantize(solver, weight, params, "w", torch.float32, zeros=zeros).dequantize()
    else:
        found = prune(solver, weight, zeros)
    counts = (found == 0).view(-1, span).sum(1)
    # Rounding may make a zero of its own.
    assert bool((counts >= dropped).all())
    assert joint or bool((counts == dropped).all())


@pytest.mark.parametrize("zeros", [Zeros(0.5), Zeros(0.7), Zeros(0.5, "2:4")], ids=["50", "70", "2:4"])
def test_the_output_error_is_below_wandas(zeros: Zeros) -> None:
    weight, inputs, hessian = setting(128, rows=32)
    params = SparsityParams(sparsity=zeros.sparsity, pattern=zeros.pattern)
    masked = weight * keep_largest(wanda.score(weight, inputs.norm(dim=0)), params, "w")
    found = prune(Solver(hessian.clone(), 0.01, sort=False), weight, zeros)
    error, theirs = ((inputs @ (each - weight).t()).square().sum() for each in (found, masked))
    assert error < 0.95 * theirs


def test_zeros_in_the_pass_are_better_than_zeros_before_rounding() -> None:
    weight, inputs, hessian = setting(128, rows=32)
    params = gptq.Params(bits=4, group_size=32, activation_order=False)
    solver = Solver(hessian.clone(), 0.01, sort=False)
    together = gptq.quantize(solver, weight, params, "w", torch.float32, zeros=Zeros(0.5)).dequantize()
    keep = by_magnitude(weight, 0.5)
    apart = gptq.quantize(solver, weight, params, "w", torch.float32, keep).dequantize()
    error, other = ((inputs @ (each - weight).t()).square().sum() for each in (together, apart))
    assert error < other
    assert float((together == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon", "mixtral"])
def test_it_prunes_every_family(family: str, context: Context, recorder: Recorder) -> None:
    model = in_memory((FAMILIES | MIXTURES)[family])
    with torch.no_grad():
        sparsegpt.apply(model, Params(samples=4, sequence_length=16, pattern="2:4"), context)
    assert model.pruned
    for name in model.pruned:
        module = model.network.get_submodule(name)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all()), name


def test_what_cannot_be_solved_is_pruned_by_magnitude_and_said(
    tiny: LoadedModel, context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(solver, "turned_factor", fail)
    before = tiny.network.get_submodule("model.layers.0.mlp.up_proj").weight.clone()
    sparsegpt.apply(tiny, Params(samples=4, sequence_length=16), context)
    assert sum("pruned by magnitude instead, not positive definite" in line for line in recorder.logs()) == 3 * 7
    found = tiny.network.get_submodule("model.layers.0.mlp.up_proj").weight
    keep = by_magnitude(before, 0.5)
    torch.testing.assert_close(found, before * keep, rtol=0, atol=0)


def test_joint_zeros_and_rounding_of_a_model(tiny: LoadedModel, context: Context) -> None:
    params = gptq.Params(samples=4, sequence_length=16, group_size=32, pattern="2:4")
    gptq.apply(tiny, params, context)
    assert tiny.pruned == set(tiny.quantized)
    for name in tiny.pruned:
        weight = tiny.network.get_submodule(name).weight
        assert bool(((weight.view(-1, 4) == 0).sum(1) >= 2).all())
    with pytest.raises(BadParams, match="pattern 2:4 does not divide the 66 inputs of up"):
        gptq.Params(pattern="2:4", group_size=66).check_model({"up": (8, 66)}, 0)
