"""What stands between the products of a training step, with our own kernels: one pass each, forward and backward.

Numbers are float32 or bfloat16, computed in float32 and rounded once. Every function expects that `library` is there.
"""

from __future__ import annotations

from ctypes import c_long

import torch
from torch import Tensor

from engine.runtime.native.library import Some, library

WIDTHS = (torch.float32, torch.bfloat16)
GATES = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight x / sqrt(mean of squares + epsilon) in `dtype`, and the roots' inverses, for x (..., K) contiguous.

    weight: (K,), float32. What is bfloat16 is rounded before it is multiplied by the weight, as in `transformers`.
    """
    rows, out = x.numel() // x.shape[-1], torch.empty_like(x, dtype=dtype)
    inverse = torch.empty(rows)
    _call("rms_norm", some(x), weight.data_ptr(), rows, x.shape[-1], epsilon, some(out), inverse.data_ptr())
    return out, inverse


def rms_norm_back(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, in its dtype, and, where it learns, of the weight (K,), float32."""
    gradient, of_x = gradient.contiguous(), torch.empty_like(x)
    of_weight = torch.empty_like(weight) if learns else None
    _call(
        "rms_norm_back", some(gradient), some(x), weight.data_ptr(), inverse.data_ptr(), len(inverse), x.shape[-1],
        some(of_x), None if of_weight is None else of_weight.data_ptr(),
    )  # fmt: skip
    return of_x, of_weight


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, for two contiguous tensors of one shape and dtype; kind: one of `GATES`."""
    out = torch.empty_like(gate)
    _call("gate", GATES.index(kind), some(gate), up.data_ptr(), gate.numel(), out.data_ptr())
    return out


def gated_back(kind: str, gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gradient = gradient.to(gate.dtype).contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _call(
        "gate_back", GATES.index(kind), some(gate), up.data_ptr(), gradient.data_ptr(), gate.numel(),
        of_gate.data_ptr(), of_up.data_ptr(),
    )  # fmt: skip
    return of_gate, of_up


def rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False) -> Tensor:
    """x cos + rotate_half(x) sin, written to `out`; or, with `back`, the gradient of x from that of the result.

    x, out: (B, heads, T, D), whose channels are beside each other. cos, sin: (B or 1, T, R) contiguous, of one dtype;
    of more than R channels those that follow are copied.

    Raises:
        IndexError: the angles are not those of as many tokens and channels.
    """
    if not turns(x, cos, sin) or out.shape != x.shape:
        raise IndexError(f"angles of {tuple(cos.shape)} are not those of heads of {tuple(x.shape)}")
    apart = 0 if cos.shape[0] == 1 else cos.stride(0)
    _call(
        "rotate", some(x), _steps(x), some(cos), some(sin), apart, _longs((*x.shape, cos.shape[-1])), back, some(out),
        _steps(out),
    )  # fmt: skip
    return out


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether cos and sin (B or 1, T, R) are the angles of heads x (B, heads, T, D), or of a part of their channels."""
    if x.dim() != 4 or cos.dim() != 3:
        return False
    sequences, tokens, turning = cos.shape
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype
    return alike and sequences in (1, len(x)) and tokens == x.shape[2] and turning <= x.shape[3] and turning % 2 == 0


def soften_(scores: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Scores (B, heads, T, S) contiguous become softmax(scale scores) over the keys that each token sees, else zero.

    first, end: (B or 1, T), int32: the first key that is seen, and the one after the last.
    """
    _call("soften", some(scores), _longs(scores.shape), *_seen(first, end), scale)
    return scores


def soften_back_(gradients: Tensor, weights: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Gradients (B, heads, T, S) of as many weights become those of the scores; both contiguous and of one dtype."""
    _call("soften_back", some(gradients), weights.data_ptr(), _longs(gradients.shape), *_seen(first, end), scale)
    return gradients


def _call(name: str, *arguments: object) -> None:
    kernels = library()
    assert kernels is not None
    getattr(kernels, f"maquette_{name}")(*arguments, torch.get_num_threads())


def some(x: Tensor) -> Some:
    """A tensor as kernels take those of either width."""
    assert x.dtype in WIDTHS
    return Some(x.data_ptr(), x.dtype == torch.bfloat16)


def _longs(values: torch.Size | tuple[int, ...]) -> object:
    return (c_long * len(values))(*values)


def _steps(x: Tensor) -> object:
    assert x.stride(-1) == 1
    return _longs(x.stride()[:3])


def _seen(first: Tensor, end: Tensor) -> tuple[int, int, int]:
    return first.data_ptr(), end.data_ptr(), 0 if first.shape[0] == 1 else first.stride(0)
