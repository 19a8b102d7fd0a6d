"""Wilson's interval and McNemar's test, against values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from engine.significance import Z95, mcnemar, wilson


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (1, 1)])
def test_the_ends_of_the_interval_are_as_far_as_chance_reaches(count: int, total: int) -> None:
    for end in wilson(count, total):  # Wilson's ends solve |share - end| = z * the error at that end
        if 0 < end < 1:
            assert abs(count / total - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / total))


def test_known_intervals() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe, 1998, table I
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)


def test_mcnemar_counts_coins() -> None:
    assert mcnemar(0, 0) == mcnemar(4, 4) == mcnemar(3, 4) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert 0 < mcnemar(900, 700) < 1e-5
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)
