"""Make every block narrower: remove the feed-forward neurons, attention heads or channels that matter least.

Importance by activation (Minitron, Muralidharan et al., 2024, arXiv 2407.14679): L2 norms over calibration text of what
neurons and heads give and of what norms leave in a channel. Or by first-order Taylor (Molchanov et al., 2019, arXiv
1906.10771; LLM-Pruner, Ma et al., 2023, arXiv 2305.11627): |sum of w dL/dw| over all weights of a structure, which
needs gradients, and so memory for the whole model in float32 twice.

Heads go by groups that share a key-value head (where all share one: single query heads). As many go in each block, for
a config has one number for all. The result is a plain model of its architecture, smaller and faster everywhere; the
damage wants repair by training after it (distillation with student `current`). Channels hurt most before training; of
the demo model half of them come back with it, and half of the heads do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import Field, JsonValue

from engine import anatomy, headers, importance, surgery
from engine.anatomy import Anatomy, Axis
from engine.errors import BadParams
from engine.importance import By, largest
from engine.methods import Calibrated, Context
from engine.models import LoadedModel
from engine.surgery import Kept, narrow

TITLE = "Width pruning"
CHANGES = ("disk", "memory", "latency")
LABELS: dict[Axis, str] = {"neurons": "feed-forward neurons", "heads": "attention units", "channels": "channels"}


class Params(Calibrated):
    """Settings of width pruning: how much goes of what, and how importance is measured."""

    neurons: float = Field(0.25, ge=0.0, lt=1.0, description="Share of each block's feed-forward neurons to remove.")
    heads: float = Field(0.0, ge=0.0, lt=1.0, description="Share of attention heads to remove, whole key-value groups.")
    channels: float = Field(0.0, ge=0.0, lt=1.0, description="Share of the model's channels (hidden size) to remove.")
    by: By = Field(
        "activation", description="Importance: norms of activations, or what the loss changes to first order."
    )
    multiple: int = Field(
        32, ge=1, le=1024,
        description="Widths stay multiples of it: kernels and packed formats want 32, GGUF's best formats 256.",
    )  # fmt: skip

    def sizes(self, body: Anatomy) -> dict[Axis, int]:
        """How many units stay along each axis from which some go.

        Raises:
            BadParams: nothing would go, or all, or no multiple fits, or the family cannot lose it.
        """
        shares: dict[Axis, float] = {"neurons": self.neurons, "heads": self.heads, "channels": self.channels}
        found = {axis: self._size(axis, share, body) for axis, share in shares.items() if share > 0}
        if not found:
            raise BadParams("nothing is to be removed. Set neurons, heads or channels above 0.")
        each = {axis: [range(size)] * body.blocks for axis, size in found.items()}
        surgery.check(
            body, Kept(each.get("neurons"), each.get("heads"), range(found["channels"]) if self.channels else None)
        )
        return found

    def _size(self, axis: Axis, share: float, body: Anatomy) -> int:
        if axis in body.fixed:
            raise BadParams(f"{axis} cannot be removed: {body.fixed[axis]}.")
        size, label = body.size(axis), LABELS[axis]
        width = body.heads_of_unit * body.head_size if axis == "heads" else 1
        step = self.multiple // math.gcd(self.multiple, width)  # units whose width is a multiple
        if step >= size:
            raise BadParams(
                f"no multiple of {self.multiple} is below the width of {size * width} that {size} {label} have. "
                f"Use a smaller multiple{' or leave them' if axis == 'heads' else ''}."
            )
        kept = math.floor(size * (1 - share) / step + 0.5) * step
        largest = (size - 1) // step * step
        if kept == 0:
            raise BadParams(
                f"a share of {share:g} would remove all {size} {label}; {1 - step / size:.4g} leaves the fewest."
            )
        if kept >= size:
            raise BadParams(
                f"a share of {share:g} of {size} {label} is none in steps of {step}; {1 - largest / size:.4g} is the "
                "smallest share that does, or use a smaller multiple."
            )
        return kept

    def whole(self) -> bool:
        """For gradients."""
        return self.by == "taylor"

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse families whose widths are tied, and shares that leave nothing or no multiple."""
        self.sizes(surgery.widths(config))

    def reshaped(
        self, config: dict[str, JsonValue], tensors: headers.Tensors
    ) -> tuple[dict[str, JsonValue], headers.Tensors]:
        """Narrower linears; which units stay, is not known yet, but how many."""
        return surgery.narrowed(config, tensors, self.sizes(surgery.widths(config)))


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Measure importance, or read what was measured before, and keep the most important of each block."""
    if params.whole():
        model.load_all()
    body = anatomy.of(model.network.config)
    sizes = params.sizes(body)
    matters = importance.measure(model, params.by, params.samples, params.sequence_length, context)
    kept: dict[Axis, list[list[int]]] = {}
    for axis, size in sizes.items():
        found = matters.of(axis)
        kept[axis] = [largest(row, size) for row in found]
        staying = sum(row[unit] for row, units in zip(found, kept[axis], strict=True) for unit in units)
        share = staying / (sum(map(sum, found)) or 1.0)
        of_each = "" if axis == "channels" else " in each block"
        context.log(f"{LABELS[axis]}: {size} of {body.size(axis)} stay{of_each}, with {share:.1%} of the importance")
    channels = kept["channels"][0] if "channels" in kept else None
    return narrow(model, Kept(kept.get("neurons"), kept.get("heads"), channels))
