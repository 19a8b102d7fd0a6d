"""Round each weight to the nearest level of a min-max grid.

Round-to-nearest, the baseline that every other scheme must beat: no calibration, hardly longer than the model takes to
read and write. Good at 8 bits, acceptable at 4 with small groups, poor below. With `clipping` each range is narrowed
where that lowers the squared error. See Nagel et al., 2021, "A White Paper on Neural Network Quantization", arXiv
2106.08295, section 2.
"""

from __future__ import annotations

from engine.methods import Context
from engine.models import LoadedModel
from engine.quantize._grid import GridParams, round_to_nearest
from engine.quantize._place import place, walk

TITLE = "Round to nearest"
CHANGES = ("disk", "memory", "latency")


class Params(GridParams):
    """Settings of round-to-nearest: those of the grid."""


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Quantize the linears of every block; embeddings, norms and the output head keep their dtype."""
    for block in walk(model, context, params):
        for linear in block.linears:
            quantized = round_to_nearest(linear.weight, params, linear.name, linear.weight.dtype)
            place(model, linear, quantized, context)
    return model
