"""The loss that students mostly learn by, forward KL and true labels, with its gradient in closed form.

With y the student's logits, q = softmax(y / T), and p what the teacher says,

    d/dy of T² KL(p || q)               is  T (q - p)
    d/dy of -log softmax(y)[label]      is  softmax(y) - 1 at the label

and where the last class is the tail, all tokens that the teacher does not name, each of these has its share of it:
T (q_j - p_tail q_j / q_tail). So what autograd would keep of the (n, V) numbers, and go through once more for each
operation, need not be there: one tensor (n, V) becomes the gradient where it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from engine.runtime.native.divergence import forward_kl

TINY = 1e-30  # of the student's odds; what is below has lost digits


class ForwardKl(torch.autograd.Function):
    """(1 - weight) T² KL(p || q) - weight log softmax(y)[label], summed over n tokens.

    logits: y (n, V), in whose dtype the gradient is; sums are float32 at least. theirs: log p, of the first tokens
    (n, at most V) where `ids` is None; else of the tokens `ids` (n, k) and their tail (n, k + 1). labels: (n,), at
    temperature 1 alone and where p is of all V or has a tail; None leaves the second part out.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, theirs: Tensor, ids: Tensor | None, temperature: float, labels: Tensor | None,
        weight: float,
    ) -> Tensor:  # fmt: skip
        taught, told = (1 - weight) * temperature, 0.0 if labels is None else weight
        if (found := forward_kl(logits, theirs, ids, temperature, taught, labels, told)) is not None:
            losses, gradient = found
            ctx.save_for_backward(gradient)
            return losses.sum().to(theirs.dtype)
        wide = logits.to(theirs.dtype)
        soft = wide if temperature == 1 else wide / temperature
        places = None if labels is None else labels[:, None]
        if ids is None:
            divergence, surprise, gradient = _of_all(soft, theirs, places, taught, told)
        else:
            divergence, surprise, gradient = _of_some(soft, theirs, ids, places, taught, told)
        if places is not None:
            gradient.scatter_add_(1, places, gradient.new_full(places.shape, -told))
        ctx.save_for_backward(gradient.to(logits.dtype))
        return taught * temperature * divergence + told * surprise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scales[0], None, None, None, None, None


Parts = tuple[Tensor, Tensor | float, Tensor]  # KL(p || q), -log softmax(y)[label], taught (q - p) + told q


def _of_all(soft: Tensor, theirs: Tensor, places: Tensor | None, taught: float, told: float) -> Parts:
    count = theirs.shape[1]
    ours, p = functional.log_softmax(soft[:, :count], -1), theirs.exp()
    surprise = 0.0 if places is None else -ours.gather(1, places).sum()
    divergence = (theirs - ours).mul_(p).sum()
    gradient = ours.exp_() if taught + told == 1 else ours.exp_().mul_(taught + told)
    gradient.sub_(p, alpha=taught)
    unknown = soft.shape[1] - count  # tokens of the student alone
    return divergence, surprise, functional.pad(gradient, (0, unknown)) if unknown else gradient


def _of_some(
    soft: Tensor, theirs: Tensor, ids: Tensor, places: Tensor | None, taught: float, told: float
) -> Parts:  # fmt: skip
    highest = soft.amax(-1, keepdim=True)
    found = (soft - highest).exp_()
    named = soft.gather(1, ids) - highest
    found.scatter_(1, ids, 0.0)
    tail = found.sum(-1, keepdim=True)
    log_tail = tail.log()
    lost = tail[:, 0] < TINY
    if bool(lost.any()):  # the student is all but sure that it is none of these: among themselves they still differ
        rest = soft[lost].scatter(1, ids[lost], -torch.inf)
        log_tail[lost] = rest.logsumexp(-1, keepdim=True) - highest[lost]
        found[lost], tail[lost] = rest.softmax(-1), 1.0
    classes = torch.cat([named, log_tail], -1)
    total = classes.logsumexp(-1, keepdim=True)
    ours = classes - total
    q, p = ours.exp(), theirs.exp()
    of_classes = (taught + told) * q - taught * p
    gradient = found.mul_(of_classes[:, -1:] / tail).scatter_(1, ids, of_classes[:, :-1])
    surprise = 0.0 if places is None else (total + highest - soft.gather(1, places)).sum()
    return functional.kl_div(ours, theirs, log_target=True, reduction="sum"), surprise, gradient
