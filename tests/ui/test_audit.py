"""The audit of a quantized run: every number is written, every text escaped, and broken events do no harm."""

from __future__ import annotations

import re

from pydantic import JsonValue

from ui import audit

EVIL = "<img src=x onerror=alert(1)>"


def linear(name: str, error: float = 0.01, note: str = "", bits: int = 4) -> dict[str, JsonValue]:
    return {
        "name": name, "bits": bits, "group_size": 64, "bits_per_weight": bits + 0.25, "error": error, "of": "output",
        "tokens": 100, "note": note,
        "histogram": {"low": -1.0, "high": 1.0, "before": [1, 4, 9, 4], "after": [0, 9, 0, 9]},
    }  # fmt: skip


BUDGET: dict[str, JsonValue] = {
    "points": [[2.2, 0.5], [3.0, 0.1], [8.0, 0.001]], "chosen": [3.0, 0.1],
    "uniform": [[2, 32, 2.5, 0.6], [4, 64, 4.25, 0.05]],
}  # fmt: skip


def test_the_map_has_a_row_a_block_and_writes_every_number() -> None:
    names = [f"model.layers.{block}.{leaf}" for block in (0, 1) for leaf in ("attn.q", "mlp.up")]
    html = audit.heat_map([linear(name, 10.0**-n) for n, name in enumerate(names, 1)])
    assert html.count("<tr>") == 3
    for text in ("attn.q", "mlp.up", "10", "1.0", "0.10", "0.010", "4 bit"):
        assert f">{text}<" in html, text
    heats = [int(found) for found in re.findall(r"--heat: (\d+)%", html)]
    assert heats == sorted(heats, reverse=True)


def test_what_was_unusual_is_listed_and_escaped() -> None:
    html = audit.report([linear("a.0.q", note=f"fell back {EVIL}"), linear(f"a.0.{EVIL}")], None)
    assert html is not None
    assert "1 linears were not solved as asked" in html
    assert "<img" not in html
    assert audit.report([], None) is None
    assert "nothing fell back" in str(audit.report([linear("a.0.q")], None))


def test_the_curve_marks_what_was_chosen() -> None:
    html = audit.curve(BUDGET)
    assert html.count('class="equal"') == 2
    assert html.count('class="chosen"') == 1
    assert "Chosen: 3.00 stored bits" in html
    assert "4 bit, groups of 64" in html


def test_a_histogram_draws_only_bins_that_hold_something() -> None:
    html = str(audit.histogram(linear("w")))
    assert html.count("<rect") == 2
    assert "2 of 40 bins" in html
    assert audit.histogram({"name": "w", "bits": 4}) is None


def test_names_are_split_at_the_block() -> None:
    assert audit.split("model.layers.3.mlp.up_proj") == ("3", "mlp.up_proj")
    assert audit.split("lm_head") == ("–", "lm_head")
