"""Forward KL and its gradient with our own kernel, which reads logits as their product left them."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.runtime.native.between import WIDTHS, some
from engine.runtime.native.library import library


def forward_kl(
    logits: Tensor, theirs: Tensor, ids: Tensor | None, temperature: float, taught: float, labels: Tensor | None,
    told: float,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """taught T KL(p || q) - told log softmax(y)[label] of each of n rows (n,), float64, and the gradient of y.

    Arguments are as those of `ForwardKl`; None where our kernel is not there, or sums are wanted in float64.

    Raises:
        IndexError: a token is none of the logits', or what is said is not of their rows: both may come from a file.
    """
    if logits.device.type != "cpu" or logits.dtype not in WIDTHS or theirs.dtype != torch.float32:
        return None
    if (kernels := library()) is None:
        return None
    logits, theirs = logits.contiguous(), theirs.contiguous()
    ids, labels = (None if each is None else each.long().contiguous() for each in (ids, labels))
    (rows, size), classes = logits.shape, theirs.shape[1]
    fits = classes <= size if ids is None else ids.shape == (rows, classes - 1)
    if not fits or len(theirs) != rows or (labels is not None and labels.shape != (rows,)):
        raise IndexError(f"what is said of {tuple(theirs.shape)} classes does not fit logits of {tuple(logits.shape)}")
    for tokens, known in ((ids, size), (labels, classes if ids is None else size)):
        if tokens is not None and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
            raise IndexError(f"there are logits of {known} tokens")
    losses, gradient = torch.empty(len(logits), dtype=torch.float64), torch.empty_like(logits)
    kernels.maquette_forward_kl(
        some(logits), *logits.shape, theirs.data_ptr(), theirs.shape[1],
        None if ids is None else ids.data_ptr(), 0 if ids is None else ids.shape[1],
        None if labels is None else labels.data_ptr(), temperature, taught, told, gradient.data_ptr(),
        losses.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return losses, gradient
