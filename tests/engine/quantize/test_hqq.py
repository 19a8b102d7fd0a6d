"""HQQ: its grid forgives outliers, and its steps are those of the half-quadratic split."""

import pytest
import torch

from engine.quantize._grid import round_to_nearest
from engine.quantize.hqq import Params, quantize_weight, shrink


def heavy_tailed() -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    return torch.randn(16, 128, generator=dice) * (1 + 3 * (torch.rand(16, 128, generator=dice) > 0.97))


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_its_own_error_is_below_round_to_nearest(bits: int, symmetric: bool, granularity: str) -> None:
    weight = heavy_tailed()
    params = Params.model_validate({"bits": bits, "symmetric": symmetric, "granularity": granularity, "group_size": 64})
    ours, nearest = (
        (found.dequantize() - weight).abs().pow(params.norm).sum()
        for found in (
            quantize_weight(weight, params, "w", torch.float32),
            round_to_nearest(weight, params, "w", torch.float32),
        )
    )
    assert ours < 0.98 * nearest


def test_the_scale_step_is_the_one_worked_out_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.3]])
    # So small a penalty leaves no sparse error.
    params = Params(bits=3, granularity="channel", turns=1, penalty=1e-3)
    first = round_to_nearest(weight, params, "w", torch.float32)
    assert first.scale.item() == pytest.approx(3.3 / 3.5)
    assert (first.codes.float() - 4).tolist() == [[1.0, 2.0, 3.0]]
    found = quantize_weight(weight, params, "w", torch.float32)
    assert found.scale.item() == pytest.approx((1 * 1 + 2 * 2 + 3 * 3.3) / (1 + 4 + 9))


def test_shrinking_takes_small_errors_away_and_large_ones_nearly_not() -> None:
    errors = torch.tensor([0.01, -0.1, 0.5, -8.0])
    shrunk = shrink(errors, 0.7, 10.0)
    assert shrunk[:2].tolist() == [0.0, 0.0]
    assert shrunk[2].item() == pytest.approx(0.5 - 0.1 * 0.5**-0.3)
    assert shrunk[3].item() == pytest.approx(-8.0, abs=0.06)


def test_a_group_of_zeros_stays_zero() -> None:
    found = quantize_weight(torch.zeros(4, 64), Params(group_size=32), "w", torch.bfloat16)
    torch.testing.assert_close(found.dequantize().float(), torch.zeros(4, 64))
