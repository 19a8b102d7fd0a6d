"""The AutoGPTQ format, `quant_method: gptq`: what GPTQModel, vLLM and others read.

For a linear with N outputs, K inputs, G groups and b bits, all words int32, fields dense from the lowest bit:

    qweight (K b / 32, N)   codes, packed along the inputs
    qzeros  (G, N b / 32)   zero points, packed along the outputs
    scales  (G, N) float16
    g_idx   (K,) int32      the group of each input
    w[n, k] = (q[k, n] - z[g_idx[k], n]) s[g_idx[k], n]

At 3 bits, dense means that the fields 10 and 21 of each 32 straddle two words. The first version of the format, which
is written here and which everybody reads, stores z - 1 in qzeros; the second (`gptq_v2`) stores z itself. A reader that
takes one for the other is off by half a weight's size and says nothing; config.json names the version. z = 0 has no
place in the first: readers add 1 to whole words, and the carry damages the neighbour. By hand, 4 bits and a symmetric
grid, z = 8: qzeros are words of 0x77777777 in version 1, 0x88888888 in version 2.

Linears with other bits or groups than the rest, and those that stay dense, are named in `dynamic`, which GPTQModel
and vLLM read. GPTQModel reads asymmetric grids in the second version alone, unless it wrote them itself.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from pydantic import JsonValue

from engine.errors import InputError
from engine.export import _offer
from engine.export._folder import Artifact, Tensors, check_divisible, check_halves, pack_rows, write
from engine.packing import QuantizedWeight

BITS = _offer.BITS["gptq"]
WORD = 32  # rows and columns come in multiples of this, so that fields of any bits fill whole words
SETTINGS = ("bits", "group_size", "sym")


def export(artifact: Path, folder: Path) -> None:
    """Write an artifact of weight-only integers as `folder`, first version.

    Raises:
        InputError: the format cannot hold it, or `folder` exists; one line.
        BadArtifact: the artifact is damaged.
    """
    _export(artifact, folder, 1)


def export_v2(artifact: Path, folder: Path) -> None:
    """As `export`, second version."""
    _export(artifact, folder, 2)


def _export(source: Path, folder: Path, version: int) -> None:
    artifact = Artifact(source)
    check_divisible(artifact, WORD)
    check_halves(artifact)
    for about in artifact.packed.values():
        if about.bits not in BITS:
            raise InputError(
                f"{artifact.label}: {about.name} has {about.bits} bits; the GPTQ format has "
                f"{', '.join(map(str, BITS))}."
            )
        if version == 1 and int(artifact.grid(about.name)[1].min()) == 0:
            raise InputError(
                f"{artifact.label}: {about.name} has zero points of 0, which the first version of the GPTQ format "
                "cannot hold. Export it as gptq_v2."
            )
    body = quantization_config(artifact, version)
    write(artifact, folder, body, lambda weight: tensors(weight, version), {"quantize_config.json": body})


def tensors(weight: QuantizedWeight, version: int = 1) -> Tensors:
    """The tensors of one linear, as drawn above."""
    columns = weight.codes.shape[1]
    zero = weight.zero.t().contiguous() - (1 if version == 1 else 0)  # (G, N)
    return {
        "qweight": pack_rows(weight.codes, weight.bits).t(),
        "qzeros": pack_rows(zero, weight.bits),
        "scales": weight.scale.t().half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // weight.group_size,
    }


def quantization_config(artifact: Artifact, version: int) -> dict[str, JsonValue]:
    """The `quantization_config` of config.json: the most frequent grid, and in `dynamic` what differs from it."""
    size = artifact.usual_group_size()
    grids = {name: (about.bits, about.group_size(size), about.symmetric) for name, about in artifact.packed.items()}
    usual = Counter(grids.values()).most_common(1)[0][0]
    dynamic = artifact.dynamic()
    for name, grid in grids.items():
        differing = {key: value for key, value, other in zip(SETTINGS, grid, usual, strict=True) if value != other}
        if differing:
            dynamic[f"+:^{re.escape(name)}$"] = dict[str, JsonValue](differing)
    return {
        **dict[str, JsonValue](zip(SETTINGS, usual, strict=True)),
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic or None,
        "meta": {"quantizer": ["maquette"]},
    }
