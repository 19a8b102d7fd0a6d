"""What a student is taught with: how far its predictions are from its teacher's and from the text, in nats a token.

With z the teacher's and y the student's logits of a token, p = softmax(z / T) and q = softmax(y / T):

    forward   KL(p || q)                                    Hinton et al., 2015, arXiv 1503.02531
    reverse   KL(q || p)                                    MiniLLM, Gu et al., 2023, arXiv 2306.08543
    js        b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q    GKD, Agarwal et al., 2023, arXiv 2306.13649

    loss = (1 - label_weight) * T² * divergence + label_weight * -log softmax(y)[label]

T² keeps the gradient's size when T changes. Forward KL makes the student cover all that the teacher may say, reverse
KL makes it keep to what the teacher is likely to say, Jensen-Shannon lies between them (b = `beta`, near 0 forward).

A teacher can be known by its k most probable tokens and the mass of the rest, its tail. Both distributions then have
k + 1 classes, the last for all other tokens. They are softened first and merged then: the tail is the mass of the rest
at temperature T, which grows with T. By hand: p = (.7, .2, .06, .04) and k = 2 give (.7, .2, .1). Merging classes can
only lower a divergence; it stays zero exactly where the classes agree.

Vocabulary products are large: 8,192 tokens x 128,000 logits in float32 are 4 GiB, several times over with their
gradients. `chunked` therefore computes logits, loss and gradients for some tokens at a time and keeps the gradients
of the hidden states and of the head alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from engine.forward_kl import ForwardKl

Divergence = Literal["forward", "reverse", "js"]
CHUNK = 1 << 20  # logits that exist at once on a CPU: 4 MiB in float32
FEWEST = 128
CHUNK_CUDA = 1 << 27  # and on a GPU, where few large products are fast


@dataclass(frozen=True)
class Full:
    """A teacher's log-probabilities (n, V) for n tokens."""

    logp: Tensor


@dataclass(frozen=True)
class TopK:
    """Of n tokens a teacher's k largest log-probabilities (n, k), their ids (n, k), the log of the tail (n,).

    All of them are those of the distribution that `temperature` softened.
    """

    ids: Tensor
    logp: Tensor
    tail: Tensor
    temperature: float = 1.0


Target = Full | TopK


@dataclass(frozen=True)
class Objective:
    """Which divergence, at which temperature, and how much the true labels count."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    label_weight: float = 0.0
    beta: float = 0.5

    @property
    def closer(self) -> bool:
        """Whether KL(teacher || student) falls for who learns by it, whatever the text.

        Not by the reverse KL, which leaves much that the teacher says aside; nor where labels of a text that the
        teacher does not know weigh more than the divergence holds.
        """
        held = self.divergence == "forward" and self.temperature == 1 and self.label_weight <= 0.5
        return self.divergence != "reverse" and (held or self.label_weight == 0)

    def __call__(self, logits: Tensor, labels: Tensor | None, target: Target | None) -> Tensor:
        """The sum of the losses of n tokens.

        logits: (n, V), where V may be larger than the teacher's by padding, which counts to a tail. labels: (n,),
        needed unless label_weight is 0. target: needed unless label_weight is 1; a TopK is one of this objective's
        temperature.
        """
        assert labels is not None or self.label_weight == 0
        dtype = torch.promote_types(logits.dtype, torch.float32)
        loss, together = logits.new_zeros((), dtype=dtype), False
        if target is not None and self.label_weight < 1:
            theirs, ids = self._said(target, dtype)
            if self.divergence == "forward":
                together = self.temperature == 1 and (ids is not None or theirs.shape[1] == logits.shape[1])
                true = labels if together and self.label_weight > 0 else None
                loss = ForwardKl.apply(  # type: ignore[no-untyped-call]
                    logits, theirs, ids, self.temperature, true, self.label_weight
                )
            else:
                wide = logits.to(dtype)
                soft = wide if self.temperature == 1 else wide / self.temperature
                classes = soft[:, : theirs.shape[1]] if ids is None else coarse(soft, ids)
                ours = functional.log_softmax(classes, -1)
                loss = (1 - self.label_weight) * self.temperature**2 * self.distance(ours, theirs)
        if labels is not None and self.label_weight > 0 and not together:
            loss = loss + self.label_weight * functional.cross_entropy(logits.to(dtype), labels, reduction="sum")
        return loss

    def _said(self, target: Target, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The softened log-probabilities of the classes that a teacher tells apart, and what all but the last stand for
        where this is a tail."""
        if isinstance(target, Full):
            return softened(target.logp.to(dtype), self.temperature), None
        assert target.temperature == self.temperature
        kept = torch.cat([target.logp, target.tail[:, None]], -1).to(dtype)
        return functional.log_softmax(kept, -1), target.ids  # they are kept in few digits: their sum becomes 1 again

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The sum of the divergences of rows of log-probabilities (n, classes)."""
        if self.divergence == "forward":
            return functional.kl_div(ours, theirs, log_target=True, reduction="sum")
        if self.divergence == "reverse":
            return functional.kl_div(theirs, ours, log_target=True, reduction="sum")
        both = torch.logaddexp(theirs + math.log(self.beta), ours + math.log1p(-self.beta))
        of_theirs = functional.kl_div(both, theirs, log_target=True, reduction="sum")
        of_ours = functional.kl_div(both, ours, log_target=True, reduction="sum")
        return self.beta * of_theirs + (1 - self.beta) * of_ours


def coarse(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits (n, k + 1): those of `ids` (n, k), and one for all others together, their log-sum-exp."""
    rest = logits.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], -1)


def softened(logp: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (n, V) at a temperature: p^(1/T) over its sum."""
    return logp if temperature == 1 else functional.log_softmax(logp / temperature, -1)


def top_k(logp: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """What is kept of log-probabilities (n, V), softened: the k largest, V - 1 at most, and the rest's mass."""
    logp = softened(logp, temperature)
    values, ids = logp.topk(min(k, logp.shape[1] - 1), dim=-1)
    return TopK(ids, values, logp.scatter(1, ids, -math.inf).logsumexp(-1), temperature)


def averaged(logps: Sequence[Tensor]) -> Tensor:
    """The log of the mean of several distributions, given as log-probabilities (n, V)."""
    if len(logps) == 1:
        return logps[0]
    return torch.stack(list(logps)).logsumexp(0) - math.log(len(logps))


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits are computed at once; `FEWEST` at least: each piece adds to the head's gradient."""
    return max(FEWEST, (CHUNK_CUDA if device.type == "cuda" else CHUNK) // vocabulary)


def chunked(
    hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], parameters: Sequence[Tensor], size: int
) -> Tensor:
    """The sum of `loss_of(hidden[piece], piece)` over pieces of `size` tokens, each with its backward pass at once.

    hidden: (n, H). `parameters`: what else the loss depends on and is to be trained (the head's). The gradients are
    kept until `backward`, the logits never are.
    """
    trained = [each for each in parameters if each.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        total: Tensor = _Chunked.apply(hidden, loss_of, size, *trained)  # type: ignore[no-untyped-call]
        return total
    return torch.stack([loss_of(hidden[piece], piece) for piece in pieces(len(hidden), size)]).sum()


def pieces(count: int, size: int) -> list[slice]:
    """Consecutive slices of `size` that cover `count`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Chunked(torch.autograd.Function):
    """Computes the gradients where the loss is computed; `backward` only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, loss_of: Callable[[Tensor, slice], Tensor], size: int, *parameters: Tensor
    ) -> Tensor:
        sums: list[Tensor | None] = [None] * len(parameters)
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        total = torch.zeros((), device=hidden.device, dtype=torch.float64)
        for piece in pieces(len(hidden), size):
            part = hidden[piece].detach().requires_grad_(of_hidden is not None)
            wanted = [part, *parameters] if of_hidden is not None else list(parameters)
            with torch.enable_grad():
                loss = loss_of(part, piece)
                found = list(torch.autograd.grad(loss, wanted))
            total += loss.detach()
            if of_hidden is not None:
                of_hidden[piece] = found.pop(0)
            for number, gradient in enumerate(found):
                before = sums[number]
                sums[number] = gradient if before is None else before.add_(gradient)
        ctx.of_hidden, ctx.sums = of_hidden, sums
        return total.to(hidden.dtype if hidden.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        scale = scales[0]
        of_hidden = None if ctx.of_hidden is None else ctx.of_hidden * scale
        return of_hidden, None, None, *(None if each is None else each * scale for each in ctx.sums)
