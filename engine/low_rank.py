"""A linear as the product of two smaller ones, in the network and on disk.

    <name>.down.weight   (r, K)
    <name>.up.weight     (N, r), and the linear's bias as <name>.up.bias
    <name>.weight        a tensor without numbers, shape (0,): readers who do not know the format refuse the folder

config.json says under `RANKS_KEY` which linears are stored so, with r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.errors import BadModel, short
from engine.orientation import rows_and_columns

RANKS_KEY = "maquette_low_rank"  # of config.json


class Factored(nn.Module):
    """y = up(down(x)): two linears in the place of one."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    @property
    def rank(self) -> int:
        return self.down.out_features

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(self.down(x))
        return result


def pays(rank: int, shape: tuple[int, int]) -> bool:
    """Whether two linears of that rank are smaller than one of that (out, in)."""
    return rank * sum(shape) < shape[0] * shape[1]


def ranks(network: nn.Module) -> dict[str, int]:
    """The rank of each linear that is a product, by name."""
    return {name: module.rank for name, module in network.named_modules() if isinstance(module, Factored)}


def factor(network: nn.Module, wanted: object) -> None:
    """Make products of the linears that `wanted`, a dictionary of name and rank, names; their weights are empty.

    Raises:
        BadModel: there is no such linear, or the rank is no number that it can have.
    """
    if not isinstance(wanted, Mapping):
        raise BadModel(f"config.json says {RANKS_KEY} = {short(wanted)}; it must name linears with their ranks.")
    for name, rank in wanted.items():
        linear = network.get_submodule(name) if _has(network, name) else None
        if isinstance(linear, Factored) and linear.rank == rank:
            continue
        if (
            not isinstance(linear, nn.Linear | Conv1D)
            or type(rank) is not int
            or not 0 < rank <= min(rows_and_columns(linear))
        ):
            raise BadModel(f"config.json says {RANKS_KEY} = {short(rank)} for {short(name)}, which cannot be.")
        network.set_submodule(name, empty_factors(linear, rank))


def _has(network: nn.Module, name: object) -> bool:
    try:
        network.get_submodule(str(name))
    except AttributeError:
        return False
    return True


def empty_factors(linear: nn.Linear | Conv1D, rank: int) -> Factored:
    """A product of the linear's shape and dtype, where it is, without weights; its bias is the linear's."""
    outputs, inputs = rows_and_columns(linear)
    device, dtype = linear.weight.device, linear.weight.dtype
    with torch.device("meta"):
        down = nn.Linear(inputs, rank, bias=False, dtype=dtype)
        up = nn.Linear(rank, outputs, bias=linear.bias is not None, dtype=dtype)
    for each in (down, up):
        each.weight = nn.Parameter(torch.empty_like(each.weight, device=device))
    if linear.bias is not None:
        up.bias = nn.Parameter(linear.bias.detach())
    made = Factored(down, up)
    made.requires_grad_(False)
    return made.train(linear.training)
