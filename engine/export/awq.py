"""The AWQ GEMM format, `quant_method: awq`, 4 bit: what AutoAWQ made and vLLM, SGLang and GPTQModel read.

For a linear with N outputs, K inputs and G groups, all words int32 and packed along the outputs:

    qweight (K, N / 8)   codes
    qzeros  (G, N / 8)   zero points as they are
    scales  (G, N) float16
    w[n, k] = (q[k, n] - z[g, n]) s[g, n],   g the group of k

Nibble i of a word, from the lowest, holds the output that `ORDER` gives: by hand, codes 0..7 make 0x75316420. Any 4-bit
grid fits, whatever method found it; a symmetric one has zero points of 8. Scales that AWQ folded into norms and linears
are in the artifact already.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from engine.errors import InputError
from engine.export import _offer
from engine.export._folder import Artifact, Tensors, check_divisible, check_halves, pack_rows, write
from engine.packing import QuantizedWeight

(BITS,) = _offer.BITS["awq"]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def export(artifact: Path, folder: Path) -> None:
    """Write an artifact of 4-bit weights, all with groups of one size, as `folder`.

    Raises:
        InputError: the format cannot hold it, or `folder` exists; one line.
        BadArtifact: the artifact is damaged.
    """
    opened = Artifact(artifact)
    check_divisible(opened, 32 // BITS)
    check_halves(opened)
    usual = opened.usual_group_size()
    for about in opened.packed.values():
        if about.bits != BITS:
            raise InputError(f"{opened.label}: {about.name} has {about.bits} bits; the AWQ format has 4.")
        if about.group_size(usual) != usual:
            raise InputError(
                f"{opened.label}: {about.name} has groups of {about.group_size()}, most others of {usual}; the AWQ "
                "format has one size. Export it as gptq."
            )
    config: JsonValue = {
        "quant_method": "awq", "bits": BITS, "group_size": usual, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": list[JsonValue](opened.dense_linears()) or None,  # transformers, vLLM
        "dynamic": opened.dynamic() or None,  # the same for GPTQModel
    }  # fmt: skip
    write(opened, folder, config, tensors)


def tensors(weight: QuantizedWeight) -> Tensors:
    """The tensors of one linear, as drawn above."""
    return {
        "qweight": pack_rows(interleave(weight.codes.t()), BITS),
        "qzeros": pack_rows(interleave(weight.zero.t()), BITS),
        "scales": weight.scale.t().half(),
    }


def interleave(codes: Tensor) -> Tensor:
    """Codes (R, N) with each eight columns in the format's order."""
    rows = codes.shape[0]
    return codes.reshape(rows, -1, len(ORDER))[:, :, torch.tensor(ORDER)].reshape(rows, -1)
