"""Norms and gates of a network on a CPU, each as one pass of our own kernels, and its gradient as another.

An RMS norm of the Llama family is eight operations forward and fourteen backward, each of which reads and writes all of
the hidden states. With r = 1 / sqrt(mean(x²) + eps), n channels, and g the gradient of the result, it is

    y = w r x        dL/dx = r g w - x r³ (g w · x) / n        dL/dw = sum over tokens of g r x

A module is taken over only where it is seen to compute the same: it is asked with random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from engine.runtime.native import between
from engine.runtime.native.library import library

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu, "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}  # fmt: skip
SAME = 1e-5  # relative distance of float32 results
Form = Callable[[nn.Module], Callable[..., Tensor]]  # of a module its `forward`


class RmsNorm(torch.autograd.Function):
    """(w + offset) x / sqrt(mean(x²) + eps) of x (..., K), w (K,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, epsilon: float, dtype: torch.dtype) -> Tensor:
        x, scale = x.contiguous(), weight.float() + offset
        out, inverse = between.rms_norm(x, scale, epsilon, dtype)
        ctx.save_for_backward(x, scale, inverse)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse = ctx.saved_tensors
        of_x, of_weight = between.rms_norm_back(gradients[0], x, scale, inverse, ctx.needs_input_grad[1])
        return of_x, None if of_weight is None else of_weight.to(ctx.dtype), None, None, None


class Gate(torch.autograd.Function):
    """act(gate) * up, for two tensors of one shape and dtype; kind: one of `ACTS`."""

    @staticmethod
    def forward(ctx: Any, kind: str, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.kind = kind
        ctx.save_for_backward(gate, up)
        return between.gated(kind, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *between.gated_back(ctx.kind, gradients[0], *ctx.saved_tensors)


def take_over(network: PreTrainedModel) -> None:
    """Put closed forms in the place of a network's norms and gates, where ours are the same."""
    if network.device.type != "cpu" or library() is None:
        return
    found: dict[object, Form | None] = {}
    for module in network.modules():
        own = tuple(name for name, _ in module.named_parameters(recurse=False))  # some norms of a kind have no weight
        key = (type(module), _epsilon(module), own, type(getattr(module, "act_fn", None)))
        if key not in found:
            found[key] = _norm_like(module) or _gate_like(module)
        if (form := found[key]) is not None and "forward" not in vars(module):  # where somebody else stands in
            module.forward = form(module)


def let_go(network: PreTrainedModel) -> None:
    """Let a network's norms and gates compute as their family does again."""
    for module in network.modules():
        if _is_taken(module):
            del module.forward


def _is_taken(module: nn.Module) -> bool:
    form = vars(module).get("forward")
    return isinstance(form, partial) and form.func in (_norm, _gated)


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _norm_like(module: nn.Module) -> Form | None:
    """How to compute a module that is an RMS norm, with a weight as it is or one less; None where it is none."""
    epsilon, weights = _epsilon(module), dict(module.named_parameters())
    if epsilon is None or list(weights) != ["weight"] or weights["weight"].dim() != 1 or weights["weight"].is_meta:
        return None
    x = torch.randn(3, len(weights["weight"]), generator=torch.Generator().manual_seed(0))
    for offset in (0.0, 1.0):
        with torch.no_grad():
            if same(module, (x,), RmsNorm.apply(x, weights["weight"], offset, epsilon, torch.float32)):  # type: ignore[no-untyped-call]
                return lambda norm, offset=offset: partial(_norm, norm, offset, epsilon)  # type: ignore[misc]
    return None


def _norm(norm: nn.Module, offset: float, epsilon: float, x: Tensor, *others: Any, **more: Any) -> Tensor:
    """An RMS norm; where products are bfloat16 it gives the hidden states, which are float32, as they take them.

    Some are given a gate beside them (of Mamba's blocks), and compute more than ours then.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if others or more or x.dtype not in between.WIDTHS or x.shape[-1:] != weight.shape:
        return type(norm).forward(norm, x, *others, **more)  # type: ignore[no-any-return]
    narrow = x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if narrow else torch.promote_types(x.dtype, weight.dtype)
    found: Tensor = RmsNorm.apply(x, weight, offset, epsilon, dtype)  # type: ignore[no-untyped-call]
    return found


def _gate_like(module: nn.Module) -> Form | None:
    """How to compute a module that is down(act(gate(x)) * up(x)); None where it is none."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    found = [each for each in parts if isinstance(each, nn.Module)]
    if len(found) < len(parts):
        return None
    gate, up, down, act = found
    numbers = torch.linspace(-9, 9, 64)
    kind = next((kind for kind, form in ACTS.items() if same(act, (numbers,), form(numbers))), None)
    if kind is None:
        return None
    weight, columns = next(gate.parameters(), None), getattr(gate, "in_features", None)
    if columns is None or (weight is not None and weight.is_meta):
        return None
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.bfloat16 if weight is None else weight.dtype)  # packed weights are multiplied by bfloat16
    with torch.no_grad():
        alike = same(module, (x,), down(act(gate(x)) * up(x)))
    return (lambda mlp: partial(_gated, kind, mlp)) if alike else None


def _gated(kind: str, mlp: nn.Module, x: Tensor, *others: Any, **more: Any) -> Tensor:
    if others or more:
        return type(mlp).forward(mlp, x, *others, **more)  # type: ignore[no-any-return]
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)  # type: ignore[operator]
    if gate.dtype not in between.WIDTHS or gate.dtype != up.dtype or gate.shape != up.shape:
        between_them = mlp.act_fn(gate) * up  # type: ignore[operator]
    else:
        between_them = Gate.apply(kind, gate, up)  # type: ignore[no-untyped-call]
    found: Tensor = mlp.down_proj(between_them)  # type: ignore[operator]
    return found


def same(theirs: Callable[..., Tensor], given: tuple[Tensor, ...], ours: Tensor) -> bool:
    """Whether something takes what it is given, and makes the same of it."""
    try:
        with torch.no_grad():
            found = theirs(*given)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    if not isinstance(found, Tensor) or found.shape != ours.shape:
        return False
    distance = (found.float() - ours.float()).norm() / found.float().norm()
    return float(distance) <= SAME  # false for what is no number
