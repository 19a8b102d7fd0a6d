"""Whether a count could be chance: an interval for a share, a test for changed answers, and what few values can tell.

Wilson's interval (Wilson, 1927) stays inside 0 and 1 and holds for few votes, where the usual one does not. McNemar's
test (McNemar, 1947) looks only at the answers that changed: if nothing got better or worse, a change is as likely to
be from right to wrong as back, and the exact binomial tells how odd the split is.
"""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # standard errors to either side of a mean that hold 95 % of a normal distribution


def tells(count: int, percentile: int) -> bool:
    """Whether `count` values are enough for a percentile above the median: one of them at least has to lie beyond it.

    The 95th takes 20 values and the 99th 100; of fewer it would be their largest under another name.
    """
    return count * (100 - percentile) >= 100


def wilson(count: int, total: int, z: float = Z95) -> tuple[float, float]:
    """The interval in which the share behind `count` of `total` lies; 0 to 1 where nothing was counted.

    Raises:
        ValueError: more were counted than there are.
    """
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no share")
    if total == 0:
        return 0.0, 1.0
    share, weight = count / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (0.0 if count == 0 else middle - half), (1.0 if count == total else middle + half)


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p value of McNemar's exact test; 1 where nothing changed.

    lost, won: answers that went from right to wrong, and back.

    Raises:
        ValueError: a negative count.
    """
    if min(lost, won) < 0:
        raise ValueError("counts are not negative")
    changed = lost + won
    tail = sum(math.comb(changed, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / (1 << changed))
