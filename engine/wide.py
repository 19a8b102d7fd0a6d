"""Products of bfloat16 numbers on processors that have no instructions for them.

There torch multiplies one pair of numbers after another: a tenth of the speed of float32 (AVX2, measured: 512 x 1,024
times 1,024 x 1,024 takes 60 ms in bfloat16, 9 in float32 and 10 with all numbers widened and the result rounded). So
the linears of networks that this project loads widen there: the weights stay bfloat16 in memory, a stretch of them and
some rows of inputs are float32 while they are multiplied, sums are float32 as ever, results bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

FEW = 8  # rows: up to here reading the weights takes the time, which are half as long in bfloat16
ROWS = 512  # of inputs that are widened at once
STRETCH = 1 << 20  # weights that are


@functools.cache
def multiplies_bfloat16(kind: str) -> bool:
    """Whether devices of a kind ("cpu", "cuda") have instructions for products of bfloat16."""
    operator = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return kind != "cpu" or (operator is not None and bool(operator()))


def mixed_precision(network: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Training's products in bfloat16; in float32 where bfloat16 is no faster and all parameters are float32."""
    kind = next(network.parameters()).device.type
    if not multiplies_bfloat16(kind) and all(each.dtype == torch.float32 for each in network.parameters()):
        return contextlib.nullcontext()
    return torch.autocast(kind, torch.bfloat16)


def widen(network: nn.Module) -> None:
    """Let the linears of a network compute in float32 where bfloat16 has no instructions; changes no weight."""
    for module in network.modules():
        kind = type(module)
        if kind.__name__ == "FalconLinear":
            module.__class__ = _wide_falcon(kind)  # type: ignore[arg-type]  # mypy: classes of modules have no hash
        elif kind in WIDE:
            module.__class__ = WIDE[kind]


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is an `nn.Linear` and nothing that computes otherwise."""
    return type(module) in (nn.Linear, WideLinear)


def bare(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a linear computes for rows (B, K); one row without what stands around the product, where nothing hooks in.

    (64 x 64 on one core of Zen 3, beside other work: GPT-2's 48 us as they are, 9 bare; plain ones 48 and 18.)
    """
    if linear._forward_pre_hooks or linear._forward_hooks:
        return linear
    if is_plain(linear) and linear.weight.is_contiguous():
        return OneRow(linear, functools.partial(F.linear, weight=linear.weight, bias=linear.bias))
    if is_falcons(linear):
        weight, bias = linear.weight, linear.bias
        return OneRow(linear, lambda x: F.linear(x, weight) if bias is None else F.linear(x, weight) + bias)
    if type(linear) in (Conv1D, WideConv1D):
        weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        if weight.dtype == torch.bfloat16 and not multiplies_bfloat16(weight.device.type):
            return OneRow(linear, lambda x: torch.addmv(bias, weight.t(), x[0])[None])
        return OneRow(linear, lambda x: torch.addmm(bias, x, weight))
    return linear


@dataclass(frozen=True)
class OneRow:
    """A linear that knows a shorter way for one row (1, K)."""

    linear: nn.Module
    product: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, K) to (B, N)."""
        found: Tensor = self.product(x) if x.shape[0] == 1 else self.linear(x)
        return found


def is_falcons(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear of `transformers`' Falcon, dense."""
    return type(module).__name__ in ("FalconLinear", "WideFalconLinear")


class WideLinear(nn.Linear):
    """A linear whose bfloat16 products are computed in float32 on a CPU without instructions for them."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        return linear(x, self.weight, self.bias)


class WideConv1D(Conv1D):
    """As `WideLinear`, for GPT-2's linears, whose weight is (K, N)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        return product(x, self.weight.t(), self.bias) if _slow(x) else super().forward(x)  # type: ignore[no-untyped-call]


class WideFalcon(nn.Linear):
    """As `WideLinear`, for Falcon's, which rounds before it adds the bias; `_wide_falcon` makes it one of Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        if not _slow(x):
            return super().forward(x)
        y = product(x, self.weight)
        return y if self.bias is None else y + self.bias


@functools.cache
def _wide_falcon(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of linears of `transformers`' Falcon, which is not imported before one is there, widened."""
    return type("WideFalconLinear", (WideFalcon, kind), {})


class Everywhere(TorchFunctionMode):
    """While it lasts every linear is one of these, whoever made it and whatever else it does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and _slow(args[0]):
            return product(*args, **(kwargs or {}))
        if func is torch.addmm and args[0].dim() == 1 and not kwargs and _slow(args[1]):  # `Conv1D`'s
            return product(args[1], args[2].t(), args[0])
        if func is torch.Tensor.matmul and args[1].dim() == 2 and _slow(args[0]):  # Falcon's
            return product(args[0], args[1].t())
        return func(*args, **(kwargs or {}))


WIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: WideLinear, Conv1D: WideConv1D}


def _slow(x: Tensor) -> bool:
    """Whether a product of these inputs would be one of bfloat16 numbers without instructions for it."""
    if x.device.type != "cpu" or multiplies_bfloat16("cpu"):
        return False
    return x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) plus bias (N,), by whichever way is fast here."""
    return product(x, weight, bias) if _slow(x) else F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) plus bias (N,), in bfloat16 from sums in float32."""
    rows = x.reshape(-1, x.shape[-1])
    # Even to switch off what is off takes longer than some products of one row.
    with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext():
        if rows.shape[0] <= FEW and x.dtype == weight.dtype == torch.bfloat16:
            y = F.linear(rows, weight, bias) if weight.is_contiguous() else _row_by_row(rows, weight, bias)
        else:
            y = _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
            y = (y if bias is None else y.add_(bias)).to(torch.bfloat16)
    return y.view(*x.shape[:-1], weight.shape[0])


def _row_by_row(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.linear`, for a weight that lies the other way round, as GPT-2's does; rounds before it adds the bias.

    `F.linear` takes 18 times as long (one row of 768 times 3,072 x 768, one core of Zen 3: 4.9 ms, this 0.27).
    """
    found = [weight @ row if bias is None else torch.addmv(bias, weight, row) for row in rows]
    return torch.stack(found) if found else F.linear(rows, weight, bias)


class _Product(torch.autograd.Function):
    """Float32 (M, N) of x (M, K) and weight (N, K), some rows of each at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_x = _multiply(gradient, weight.t()).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weight = _multiply(gradient.t(), x.t()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) times weight (N, K), both of any dtype, in float32."""
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    step = max(64, STRETCH // max(1, weight.shape[1]))
    for first in range(0, len(x), ROWS):
        some = x[first : first + ROWS].float()
        for start in range(0, len(weight), step):
            torch.mm(some, weight[start : start + step].float().t(), out=y[first : first + ROWS, start : start + step])
    return y
