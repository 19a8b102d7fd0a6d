"""The grid: its levels, its bounds and what it refuses."""

import pytest
import torch

from engine.errors import BadParams
from engine.quantize._grid import GridParams, make_grid, round_to_nearest


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_weight_goes_to_its_nearest_level(bits: int, symmetric: bool, granularity: str) -> None:
    weight = torch.randn(12, 96, generator=torch.Generator().manual_seed(bits)) + 0.3
    params = GridParams.model_validate(
        {"bits": bits, "symmetric": symmetric, "granularity": granularity, "group_size": 32}
    )
    found = round_to_nearest(weight, params, "w", torch.float32)
    scale = found.scale.expand(12, -1).repeat_interleave(96 // found.scale.shape[1], 1)
    zero = found.zero.expand(12, -1).repeat_interleave(96 // found.scale.shape[1], 1).float()
    levels = torch.arange(2**bits).float()
    distances = ((levels - zero[..., None]) * scale[..., None] - weight[..., None]).abs()  # (12, 96, levels)
    torch.testing.assert_close((found.dequantize() - weight).abs(), distances.amin(-1))
    assert (
        found.scale.shape == {"group": (12, 3), "channel": (12, 1), "tensor": (1 if symmetric else 12, 1)}[granularity]
    )


def test_symmetric_scale_puts_the_largest_weight_half_a_step_off_at_most() -> None:
    weight = torch.tensor([[-7.5, 7.5, 0.0, 1.0]])
    grid = make_grid(weight, GridParams(bits=4, granularity="channel"), "w", torch.float32)
    assert grid.scale.item() == 1.0
    torch.testing.assert_close(grid.encode(weight, 0), torch.tensor([[0.0, 15.0, 8.0, 9.0]]))


def test_a_group_of_zeros_stays_zero() -> None:
    found = round_to_nearest(torch.zeros(4, 32), GridParams(group_size=32), "w", torch.bfloat16)
    torch.testing.assert_close(found.dequantize().float(), torch.zeros(4, 32))


def test_codes_are_computed_with_the_scale_that_is_stored() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weight, GridParams(bits=8, group_size=64), "w", torch.bfloat16)
    nearest = torch.round(weight / found.scale.float()) + 128
    torch.testing.assert_close(found.codes.float(), nearest.clamp(0, 255))


def test_a_group_size_that_does_not_divide_names_the_module_and_sizes_that_do() -> None:
    with pytest.raises(BadParams, match=r"does not divide the 96 inputs of mlp\.up.*16, 32\.") as caught:
        make_grid(torch.randn(4, 96), GridParams(group_size=64), "mlp.up", torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_lowers_the_squared_error_and_never_raises_it(bits: int, symmetric: bool, granularity: str) -> None:
    weight = torch.randn(12, 96, generator=torch.Generator().manual_seed(bits))
    weight[3, 5] = 9.0
    given = {"bits": bits, "symmetric": symmetric, "granularity": granularity, "group_size": 32}
    both = (GridParams.model_validate(given | {"clipping": kind}) for kind in ("mse", "none"))
    errors = [(round_to_nearest(weight, p, "w", torch.float32).dequantize() - weight).square() for p in both]
    mine, full = (error.view(12, -1, 32).sum(-1) if granularity == "group" else error.sum() for error in errors)
    assert bool((mine <= full + 1e-6).all())
    if bits < 4:
        assert mine.sum() < 0.95 * full.sum()


def test_clipping_spares_the_columns_that_count() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 9] *= 5
    importance = torch.ones(64)
    importance[9] = 1000
    params = GridParams(bits=3, group_size=64, clipping="mse")
    alike, spared = (
        (round_to_nearest(weight, params, "w", torch.float32, each).dequantize() - weight).square()
        for each in (None, importance)
    )
    assert spared[:, 9].sum() < 0.5 * alike[:, 9].sum()
    assert spared.sum() > alike.sum()
