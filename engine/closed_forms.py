"""What stands between the products of a network, each part with its gradient in closed form, while it trains on a CPU.

Autograd takes small sums apart: each operation reads and writes all of the hidden states, and keeps some. Norms and
gates are one pass forward and one backward (`engine.runtime.norms_and_gates`); so are rotations and attention here. Of
a softmax p of scores s, with g the gradient of p, it is dL/ds = p (g - g · p). Attention keeps its weights beside
queries, keys and values, and knows for each token the first and the last key that it sees, so what is masked is never
added, softened or copied.

A part is taken over only where it is seen to compute the same: a family's own norm, gate and rotation are asked with
random numbers, and the whole network with two documents in a row. Everything else stays as `transformers` has it.
Rounding to bfloat16 stands where it stood, or is less, but for hidden states' gradients: those of linears that read
the same norm are added in bfloat16. (Twelve trainings of the demo model's half ended at a KL of 3.68 with it, of 3.68
with norms that give float32, and eleven at 3.68 as `transformers` computes.)
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.body import CLOSE, PROBE, Body, distance, eager
from engine.models import LoadedModel
from engine.runtime.native import between
from engine.runtime.native.library import library
from engine.runtime.norms_and_gates import let_go, same, take_over

ATTENTION = "maquette"  # the name by which `transformers` knows ours
# Tokens of a row up to which attention trains faster than by the fused kernel, in closed form or plainly. In closed
# form it is faster at more, too (a step of the demo model: 1.25 times at 512, 1.3 at 1,024), but keeps all weights.
SHORT, SHORT_PLAIN = 512, 256
HARMLESS = {"position_ids", "sliding_window", "is_causal", "use_cache", "output_attentions", "output_hidden_states"}
ROTATION = "apply_rotary_pos_emb"  # in the modules of families that have one
Rotate = Callable[..., tuple[Tensor, Tensor]]  # of queries, keys, cos and sin


class Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin for x (B, heads, T, D), cos and sin (B or 1, T, R); contiguous, in `dtype`.

    Where a head has more than R channels, those that follow stay as they are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return between.rotated(x, cos, sin, torch.empty(x.shape, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        batch, heads, tokens, size = gradient.shape
        out = torch.empty(batch, tokens, heads, size, dtype=ctx.dtype).transpose(1, 2)  # as linears make them
        return between.rotated(gradient, cos, sin, out, back=True), None, None, None


class Attention(torch.autograd.Function):
    """softmax(scale q kᵀ) v (B, T, H, D), for q (B, H, T, D), k and v (B, S, T, D), S dividing H, all of one dtype.

    first, end: (B or 1, T), int32: the first key that each token sees, and the one after the last.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, scale: float) -> Tensor:
        batch, shared, keys, _ = k.shape
        ctx.shape, ctx.scale = (*q.shape[:3], keys), scale
        q, k, v = (each.reshape(batch * shared, -1, each.shape[-1]) for each in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))  # heads that share keys stand one below the other
        between.soften_(weights.view(ctx.shape), first, end, scale)
        ctx.save_for_backward(q, k, v, weights, first, end)
        return torch.bmm(weights, v).view(*ctx.shape[:3], -1).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, first, end = ctx.saved_tensors
        batch, heads, tokens, _ = ctx.shape
        gradient = gradients[0].to(v.dtype).transpose(1, 2).reshape(len(v), -1, v.shape[-1])
        of_scores = torch.bmm(gradient, v.transpose(1, 2))
        between.soften_back_(of_scores.view(ctx.shape), weights, first, end, ctx.scale)
        of_q = torch.bmm(of_scores, k).view(batch, heads, tokens, -1)
        of_k, of_v = torch.bmm(of_scores.transpose(1, 2), q), torch.bmm(weights.transpose(1, 2), gradient)
        return of_q, of_k.view(batch, -1, *k.shape[1:]), of_v.view(batch, -1, *v.shape[1:]), None, None, None


@contextlib.contextmanager
def closed_forms(model: LoadedModel) -> Iterator[None]:
    """Let a network on a CPU compute norms, gates and rotations in closed form meanwhile, where ours are the same.

    Several processes that train give the model another network, a copy of this one; that is let go then.
    """
    take_over(model.network)
    try:
        with _rotations(model.network):
            yield
    finally:
        let_go(model.network)


@contextlib.contextmanager
def short_attention(body: Body, length: int) -> Iterator[None]:
    """Let a network on a CPU attend so that rows of a length train fast: in closed form, plainly, or as it does.

    One that computes attention plainly stays as it is: somebody looks at its maps, or it can do nothing else.
    """
    network = body.network
    with contextlib.ExitStack() as stack:
        if network.config._attn_implementation != "eager" and length <= SHORT:
            if library() is not None and _attends_alike(body):
                stack.enter_context(_attention(network))
            elif length <= SHORT_PLAIN:
                stack.enter_context(eager(network))
        yield


@contextlib.contextmanager
def _rotations(network: PreTrainedModel) -> Iterator[None]:
    """Let all networks of a family, by its files, rotate in closed form meanwhile."""
    files = {type(module).__module__ for module in network.modules()} if library() is not None else set()
    with contextlib.ExitStack() as stack:
        for file in (sys.modules[name] for name in sorted(files)):
            theirs: Rotate | None = getattr(file, ROTATION, None)
            if theirs is not None and _rotates_alike(theirs, 8):
                setattr(file, ROTATION, partial(_rotate, theirs, _rotates_alike(theirs, 4)))
                stack.callback(setattr, file, ROTATION, theirs)
        yield


def _rotates_alike(theirs: Rotate, turning: int) -> bool:
    """Whether a family's rotation of so many channels of heads of eight is ours."""
    if list(inspect.signature(theirs).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    dice = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=dice), torch.randn(2, 2, 3, 8, generator=dice)
    cos, sin = torch.randn(2, 2, 3, turning, generator=dice)
    ours = [Rotation.apply(x, cos, sin, x.dtype) for x in (q, k)]  # type: ignore[no-untyped-call]
    return same(lambda *given: torch.cat(theirs(*given), 1), (q, k, cos, sin), torch.cat(ours, 1))


def _rotate(
    theirs: Rotate, parts: bool, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """As `theirs`, in closed form where it can be; it gives what attention's products take.

    parts: whether some of a head's channels may stay as they are.
    """
    tensors = (q, k, cos, sin)
    known = all(x.dtype in between.WIDTHS and x.device.type == "cpu" and x.stride(-1) == 1 for x in tensors)
    fits = all(between.turns(x, cos, sin) for x in (q, k))
    if others or more or not known or not fits or not (parts or cos.shape[-1] == q.shape[-1] == k.shape[-1]):
        return theirs(q, k, cos, sin, *others, **more)
    autocast = torch.is_autocast_enabled("cpu")
    cos, sin = cos.contiguous(), sin.contiguous()
    dtypes = [torch.get_autocast_dtype("cpu") if autocast else torch.promote_types(x.dtype, cos.dtype) for x in (q, k)]
    found = [Rotation.apply(x, cos, sin, dtype) for x, dtype in zip((q, k), dtypes, strict=True)]  # type: ignore[no-untyped-call]
    return found[0], found[1]


@contextlib.contextmanager
def _attention(network: PreTrainedModel) -> Iterator[None]:
    """Let a network take our attention meanwhile."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _seen)
    before = network.config._attn_implementation
    network.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _attends_alike(body: Body) -> bool:
    """Whether a network that trains computes the same of two documents in a row with our attention.

    In 16 bits about as nearly as with the fused kernel.
    """
    network, training = body.network, body.network.training
    network.train()
    half = PROBE // 2
    ids = torch.arange(3, 3 + PROBE, device=network.device)[None] % body.vocabulary
    positions = torch.arange(half, device=network.device).repeat(2)[None]
    try:
        with torch.no_grad():
            with eager(network):
                plain = body.hidden(ids, positions)
            with _attention(network):
                ours = body.hidden(ids, positions)
            rounding = distance(body.hidden(ids, positions), plain)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # there is more to it than ours does, or it drops some of its weights
    finally:
        network.train(training)
    return distance(ours, plain) <= max(CLOSE, 3 * rounding)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as `transformers` asks for it: query (B, H, T, D), key and value (B, S, T, D); (B, T, H, D).

    Raises:
        NotImplementedError: more is asked for than ours does.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in HARMLESS)
    if dropout or unknown or seen is None or seen.dim() != 3:
        raise NotImplementedError(f"attention in closed form has no dropout, mask of numbers, or {unknown}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else dtype
    if dtype not in between.WIDTHS:
        raise NotImplementedError(f"attention in closed form has no {dtype}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    states = (each.to(dtype) for each in (query, key, value))
    return Attention.apply(*states, *seen, scale), None  # type: ignore[no-untyped-call]


def _seen(*arguments: Any, **settings: Any) -> Tensor | None:
    """The keys that each token sees, (2, B or 1, T) int32: the first, and the one after the last.

    Where a token sees none, or some are left out in between, or all see all, what `transformers` has for a mask, which
    our attention refuses; a family may ask for one that no block needs.
    """
    mask = sdpa_mask(*arguments, **{**settings, "allow_is_causal_skip": False})
    if mask is None:
        return None
    mask = mask[:, 0]
    count, first = mask.sum(-1), mask.int().argmax(-1)
    end = mask.shape[-1] - mask.flip(-1).int().argmax(-1)
    if not torch.equal(end - first, count) or not bool((count > 0).all()):
        return mask[:, None]
    return torch.stack([first, end]).int()
