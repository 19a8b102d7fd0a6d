"""Answers that differ between two models, question by question, and whether they could be chance.

Every accuracy keeps which questions were right, so any two runs that answered the same questions can be paired. Where
that is not known, what the run itself counted against its original stands in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from engine.records import Measurement
from engine.significance import mcnemar


@dataclass(frozen=True)
class Flips:
    """From A to B, of `total` questions: answers that went from right to wrong, and back."""

    lost: int
    won: int
    total: int

    @property
    def changed(self) -> int:
        return self.lost + self.won

    @property
    def p(self) -> float:
        """How often chance alone splits as many flips at least as unevenly (McNemar, exact, two-sided)."""
        return mcnemar(self.lost, self.won)


def between(a: Mapping[str, Measurement], b: Mapping[str, Measurement]) -> Flips | None:
    """The flips from A to B; None where they did not answer the same questions."""
    lost = won = total = 0
    for task in sorted(key for key in a if key.startswith("accuracy.") and key in b):
        before, after = a[task].details.get("right"), b[task].details.get("right")
        if isinstance(before, str) and isinstance(after, str) and len(before) == len(after):
            pairs = list(zip(before, after, strict=True))
            lost += pairs.count(("1", "0"))
            won += pairs.count(("0", "1"))
            total += len(pairs)
    if total:
        return Flips(lost, won, total)
    if "flips" in a or "flips" not in b:  # what B counted is against its original, which A then is not
        return None
    counted = b["flips"].details
    if not {"right_to_wrong", "wrong_to_right", "items"} <= counted.keys():
        return None
    return Flips(*(_count(counted[key]) for key in ("right_to_wrong", "wrong_to_right", "items")))


def _count(value: JsonValue) -> int:
    return value if isinstance(value, int) else 0
