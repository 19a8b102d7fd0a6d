"""Which weights become zero: the settings of sparsity, and the choice by scores, unstructured or N of M.

Below the families, for pruning alone and quantization with zeros choose alike. By magnitude there is no copy of a
weight: float32 magnitudes are ordered as their bits are, so the upper 16 bits of a threshold come from one count over
all weights, the lower from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.errors import BadParams

Pattern = Literal["unstructured", "2:4", "4:8"]
HALF = 1 << 16  # values of half the bits of a float32
COUNTED = 1 << 20  # weights that are looked at at a time


def span_of(pattern: Pattern) -> tuple[int, int] | None:
    """N and M of a pattern N:M, None where the zeros may fall anywhere."""
    if pattern == "unstructured":
        return None
    zeros, span = map(int, pattern.split(":"))
    return zeros, span


def check_pattern(pattern: Pattern, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a pattern that does not divide the inputs of a linear (out, in).

    Raises:
        BadParams: names the linear.
    """
    if (parts := span_of(pattern)) is not None:
        for name, (_, inputs) in linears.items():
            if inputs % parts[1]:
                raise BadParams(
                    f"the pattern {pattern} does not divide the {inputs} inputs of {name}. Choose `unstructured`, or "
                    "leave it out with the setting `ignore`."
                )


def drop(score: Tensor, count: int) -> Tensor:
    """Per row of `score`, False for the `count` smallest; ties are cut in the order of the row."""
    order = torch.argsort(score, dim=1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)


def by_magnitude(weight: Tensor, sparsity: float, pattern: Pattern = "unstructured") -> Tensor:
    """False for the smallest weights (N, K): round(sparsity * size) of the matrix, or N in each M consecutive inputs.

    Ties are cut in the order of the inputs.
    """
    if (parts := span_of(pattern)) is not None:
        zeros, span = parts
        return torch.cat([drop(rows.abs().reshape(-1, span), zeros).view(rows.shape) for rows in _stretches(weight)])
    return find_cut(lambda: (("", bits) for bits in magnitude_bits(weight)), sparsity).keep("", weight)


@dataclass(frozen=True)
class Cut:
    """Weights whose magnitude has smaller bits go, and so many of each linear whose magnitude has the same."""

    bits: int
    equal: Mapping[str, int]

    def keep(self, name: str, weight: Tensor) -> Tensor:
        """A mask (N, K) of a linear's weight, True for those to keep."""
        left, found = self.equal[name], list[Tensor]()
        for bits in magnitude_bits(weight):
            keep = bits > self.bits
            same = (bits == self.bits).nonzero().flatten()
            keep[same[left:]] = True
            left = max(0, left - len(same))
            found.append(keep)
        return torch.cat(found).view(weight.shape)


def find_cut(passes: Callable[[], Iterable[tuple[str, Tensor]]], sparsity: float) -> Cut:
    """The threshold below which exactly round(sparsity * all) weights go, of the equal ones the first.

    passes: gives, each time anew, names of linears with magnitude bits (n,) of some of their weights, in order.
    """
    upper, total = torch.zeros(HALF // 2, dtype=torch.int64), 0
    for _, bits in passes():
        upper += torch.bincount(bits // HALF, minlength=HALF // 2).cpu()
        total += bits.numel()
    wanted = round(sparsity * total)
    high, below = _kth(upper, wanted)
    lower = torch.zeros(HALF, dtype=torch.int64)
    for _, bits in passes():
        lower += torch.bincount(bits[bits // HALF == high] % HALF, minlength=HALF).cpu()
    low, under = _kth(lower, wanted - below)
    cut, left = high * HALF + low, wanted - below - under
    equal: dict[str, int] = {}
    for name, bits in passes():
        taken = min(left, int((bits == cut).sum()))
        equal[name] = equal.get(name, 0) + taken
        left -= taken
    return Cut(cut, equal)


def magnitude_bits(weight: Tensor) -> Iterator[Tensor]:
    """The magnitudes of a weight (N, K) as int32 numbers in the same order, flat, some rows at a time."""
    return (rows.float().abs().contiguous().view(torch.int32).flatten() for rows in _stretches(weight))


def _stretches(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, COUNTED // weight.shape[1]))


def _kth(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th smallest lies, the first one counted 0, and how many lie in the bins before."""
    sums = counts.cumsum(0)
    found = min(int(torch.searchsorted(sums, wanted, right=True)), len(counts) - 1)
    return found, int(sums[found] - counts[found])
