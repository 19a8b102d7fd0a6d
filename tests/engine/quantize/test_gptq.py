"""GPTQ against column-by-column OBQ that inverts the Hessian again after each column."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from engine import observing, solver
from engine.methods import Context
from engine.models import LoadedModel
from engine.observing import accumulate_hessian, make_empty_hessian, mirror
from engine.quantize import gptq, rtn
from engine.quantize._grid import LEAST_RANGE, make_grid, round_to_nearest
from engine.quantize.gptq import Params, quantize
from engine.solver import Solver, turned_factor
from tests.conftest import Recorder


def correlated(tokens: int, size: int, seed: int = 0) -> Tensor:
    """Inputs whose columns depend on each other and differ in scale."""
    dice = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=dice) / size**0.5 + torch.eye(size)
    scale = torch.rand(size, generator=dice) * 3 + 0.1
    return (torch.randn(tokens, size, generator=dice) @ mixing) * scale


def hessian_of(inputs: Tensor) -> Tensor:
    hessian = make_empty_hessian(inputs.shape[1], inputs.device)
    accumulate_hessian(hessian, 0, inputs)
    mirror(hessian)
    return hessian


def of(hessian: Tensor, params: Params, span: int = 1) -> Solver:
    return Solver(hessian.clone(), params.damping, sort=params.activation_order, span=span)


def slow_obq(weight: Tensor, hessian: Tensor, params: Params, dtype: torch.dtype) -> Tensor:
    """Optimal brain quantization in the order that GPTQ uses; H⁻¹ of what is left is computed anew each time."""
    grid = make_grid(weight, params, "w", dtype, hessian.diagonal(), LEAST_RANGE)
    columns = weight.shape[1]
    hessian = hessian.double().clone()
    hessian.diagonal().add_(params.damping * hessian.diagonal().mean())
    order = list(range(columns))
    if params.activation_order:
        order = torch.argsort(hessian.diagonal().float(), descending=True, stable=True).tolist()
    left, work, codes = list(order), weight.double().clone(), torch.zeros_like(weight)
    size = columns // grid.scale.shape[1]
    for column in order:
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale, zero = grid.scale[:, column // size].double(), grid.zero[:, column // size].double()
        code = (torch.round(work[:, column] / scale) + zero).clamp(0, 2**params.bits - 1)
        error = (work[:, column] - (code - zero) * scale) / inverse[0, 0]
        work[:, left] -= torch.outer(error, inverse[0])
        codes[:, column] = code.float()
        left = left[1:]
    return codes


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(192, 48), (160, 32), (96, 96)])
def test_codes_agree_with_the_slow_reference(
    monkeypatch: pytest.MonkeyPatch, columns: int, group: int, symmetric: bool, activation_order: bool
) -> None:
    monkeypatch.setattr(solver, "SLICE", 64)  # group boundaries away from slice boundaries
    monkeypatch.setattr(solver, "SPAN", 128)
    monkeypatch.setattr(solver, "SOLVED", 10 * columns)  # rows that are solved at a time
    dice = torch.Generator().manual_seed(3)
    weight = torch.randn(24, columns, generator=dice)
    hessian = hessian_of(correlated(4 * columns, columns))
    params = Params(bits=3, group_size=group, symmetric=symmetric, activation_order=activation_order)
    found = quantize(of(hessian, params), weight, params, "w", torch.float32)
    expected = slow_obq(weight, hessian, params, torch.float32)
    # A sum that lands on a rounding boundary may fall either way; one wrong update changes many codes.
    assert (found.codes.float() != expected).float().mean() < 0.002


def test_identity_hessian_gives_round_to_nearest() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    params = Params(bits=4, group_size=32)
    found = quantize(of(torch.eye(128), params), weight, params, "w", torch.bfloat16)
    torch.testing.assert_close(found.codes, round_to_nearest(weight, params, "w", torch.bfloat16).codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_error_is_below_round_to_nearest(bits: int) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    inputs = correlated(512, 128)
    params = Params(bits=bits, group_size=32)
    found = quantize(of(hessian_of(inputs), params), weight, params, "w", torch.float32)
    nearest = round_to_nearest(weight, params, "w", torch.float32)
    error, baseline = ((inputs @ (q.dequantize() - weight).t()).square().sum() for q in (found, nearest))
    assert error < 0.9 * baseline


def test_pruned_weights_stay_zero_and_the_others_make_up_for_it() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    keep = torch.rand(16, 64, generator=torch.Generator().manual_seed(4)) > 0.5
    inputs = correlated(256, 64)
    params = Params(bits=8, group_size=32)
    found = quantize(of(hessian_of(inputs), params), weight, params, "w", torch.float32, keep)
    values = found.dequantize()
    assert bool((values[~keep] == 0).all())
    error = (inputs @ (values - weight).t()).square().sum()
    assert error < (inputs @ (weight * keep - weight).t()).square().sum()


def test_damping_is_raised_until_the_factorization_succeeds() -> None:
    flat = correlated(512, 24).double()
    hessian = (flat.t() @ flat / 512).float()
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(24)  # no longer positive definite
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    lower, damping = turned_factor(hessian.clone(), order, 0.001)
    factor = lower.flip(0, 1)
    assert damping > 0.001
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor @ factor.t(), damped[order][:, order])
    torch.testing.assert_close(factor, factor.triu())


@pytest.mark.parametrize(("panel", "strip"), [(5, 7), (512, 1024)])
def test_a_hessian_that_cannot_be_factorized_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, panel: int, strip: int
) -> None:
    monkeypatch.setattr(solver, "PANEL", panel)
    for module in (solver, observing):
        monkeypatch.setattr(module, "STRIP", strip)
    hessian = hessian_of(correlated(512, 24))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    factor = turned_factor(hessian.clone(), order, 0.01)[0].flip(0, 1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor @ factor.t(), damped[order][:, order])
    hessian[20, 3] = hessian[3, 20] = 1e6
    given = hessian.clone()
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        turned_factor(given, order, 0.01)
    torch.testing.assert_close(given, hessian, rtol=0, atol=0)


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    inputs = correlated(256, 64)
    inputs[:, 7] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    params = Params(bits=4, group_size=64)
    found = quantize(of(hessian_of(inputs), params), weight, params, "w", torch.float32)
    assert bool((found.dequantize()[:, 7] == 0).all())


def test_a_linear_that_cannot_be_solved_is_logged(
    tiny: LoadedModel, context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(solver, "turned_factor", fail)
    gptq.apply(tiny, Params(samples=4, sequence_length=16, group_size=32), context)
    assert sum("rounded to nearest instead" in line for line in recorder.logs()) == 3 * 7
    assert len(tiny.quantized) == 3 * 7


def test_the_network_holds_what_the_codes_say(tiny: LoadedModel, context: Context) -> None:
    rtn.apply(tiny, rtn.Params(bits=4, group_size=32), context)
    for name, weight in tiny.quantized.items():
        torch.testing.assert_close(tiny.network.get_submodule(name).weight.data, weight.dequantize(), rtol=0, atol=0)


def test_linears_that_read_one_input_are_factorized_once(
    tiny: LoadedModel, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    monkeypatch.setattr(solver, "turned_factor", lambda *given: solved.append(given) or turned_factor(*given))
    gptq.apply(tiny, Params(samples=4, sequence_length=16, group_size=32), context)
    assert len(solved) == 3 * 4  # q, k and v; o; gate and up; down


def test_some_linears_get_other_bits(tiny: LoadedModel, context: Context) -> None:
    params = Params.model_validate({"group_size": 32, "samples": 4, "overrides": "*.1.mlp.down_proj=3 *.down_proj=8"})
    gptq.apply(tiny, params, context)
    bits = {name.removeprefix("model.layers."): weight.bits for name, weight in tiny.quantized.items()}
    assert bits["1.mlp.down_proj"] == 3
    assert bits["0.mlp.down_proj"] == bits["2.mlp.down_proj"] == 8
    assert {bit for name, bit in bits.items() if "down_proj" not in name} == {4}
    assert params.of("lm_head").bits == 4
    for wrong in ("*.down_proj", "*.down_proj=9", "=4", "*.down_proj=four"):
        with pytest.raises(ValidationError, match="is no pattern with 2 to 8 bits"):
            Params.model_validate({"overrides": wrong})
    with pytest.raises(ValidationError, match="is no regular expression"):
        Params.model_validate({"overrides": "re:(=4"})
