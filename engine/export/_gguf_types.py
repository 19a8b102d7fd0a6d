"""Which of ggml's block types hold an integer grid exactly: by its bits, its symmetry and its groups alone.

A grid is w = (code - zero) scale. A block of ggml's has 32 weights with one f16 scale d (types of the first kind), or
256 with d, a second f16 and small integers for each 16 or 32 of them (the K-types):

    Q4_0, Q5_0, Q8_0   w = d q, q signed with 4, 5, 8 bits: any grid whose code - zero fits, zero points and all
    Q4_1, Q5_1         w = d q + m, q unsigned: where m = -scale zero is an f16
    Q2_K, Q4_K, Q5_K   w = d sc q - dmin m: with sc = 1, d = dmin = scale and m = zero any zero point is exact
    Q3_K, Q6_K         w = d sc q, q signed with 3, 6 bits: with sc = 1

So an asymmetric grid of b bits, whose differences need b + 1, goes into a wider type where no f16 holds its minimum;
and only where 256 inputs share a scale are 2, 3 and 6 bits stored in about as many.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK, LARGE = 32, 256  # weights


@dataclass(frozen=True)
class Type:
    """A block type: what it is called, the weights of a block and its bytes, and the q that it holds.

    minimum: of blocks that have one beside their scale, whether it is an `f16` or so many times the `scale`.
    """

    name: str
    weights: int
    bytes: int
    lowest: int
    highest: int
    minimum: str = ""

    @property
    def bits(self) -> float:
        """Stored bits of a weight."""
        return 8 * self.bytes / self.weights

    def fits(self, bits: int, symmetric: bool) -> bool:
        """Whether it holds all codes of a grid."""
        if self.minimum:
            return (self.minimum == "scale" or not symmetric) and (1 << bits) - 1 <= self.highest
        top = (1 << bits) - 1
        low, high = (-(1 << bits - 1), top >> 1) if symmetric else (-top, top)
        return self.lowest <= low and high <= self.highest


TYPES = (  # by size; of two alike the one that is faster everywhere first
    Type("Q2_K", LARGE, 84, 0, 3, "scale"),
    Type("Q3_K", LARGE, 110, -4, 3),
    Type("Q4_0", BLOCK, 18, -8, 7),
    Type("Q4_K", LARGE, 144, 0, 15, "scale"),
    Type("Q4_1", BLOCK, 20, 0, 15, "f16"),
    Type("Q5_0", BLOCK, 22, -16, 15),
    Type("Q5_K", LARGE, 176, 0, 31, "scale"),
    Type("Q5_1", BLOCK, 24, 0, 31, "f16"),
    Type("Q6_K", LARGE, 210, -32, 31),
    Type("Q8_0", BLOCK, 34, -128, 127),
)


def fitting(bits: int, symmetric: bool, group_size: int) -> list[Type]:
    """The types that hold a grid, the smallest first; where a minimum is an f16 its values decide whether they do.

    group_size: inputs that share a scale; where all of a row do, its width.
    """
    return [each for each in TYPES if group_size % each.weights == 0 and each.fits(bits, symmetric)]


def bits_at_most(bits: int, symmetric: bool, group_size: int, otherwise: int) -> float:
    """Stored bits of a weight on a grid, whatever its values are; `otherwise` where no type surely holds it."""
    sure = [each.bits for each in fitting(bits, symmetric, group_size) if each.minimum != "f16"]
    return min(sure, default=float(otherwise))
