"""The audit of a quantized run: every number is written, every text escaped, and broken events do no harm."""

from __future__ import annotations

import re

import pytest
from pydantic import JsonValue

from engine.records import Recipe, Run, Status
from ui import audit, views
from ui.journal import Story

EVIL = "<img src=x onerror=alert(1)>"


def linear(name: str, error: float = 0.01, note: str = "", bits: int = 4, weights: int = 64) -> dict[str, JsonValue]:
    return {
        "name": name, "bits": bits, "group_size": 64, "weights": weights, "bits_per_weight": bits + 0.25,
        "error": error, "of": "output", "tokens": 100, "note": note,
        "histogram": {
            "low": -1.0, "high": 1.0, "before": [1, 4, 9, 4], "after": [0, 9, 0, 9], "levels": [-1.5, -0.5, 0.25, 1.0]
        },
    }  # fmt: skip


BUDGET: dict[str, JsonValue] = {
    "points": [[2.2, 0.5], [3.0, 0.1], [8.0, 0.001]], "chosen": [3.0, 0.1],
    "uniform": [[2, 32, 2.5, 0.6], [4, 64, 4.25, 0.05]],
}  # fmt: skip


def test_the_map_has_a_row_a_block_and_writes_every_number() -> None:
    names = [f"model.layers.{block}.{leaf}" for block in (0, 1) for leaf in ("attn.q", "mlp.up")]
    html = audit.heat_map([linear(name, 10.0**-n) for n, name in enumerate(names, 1)])
    assert html.count("<tr>") == 4
    for text in ("attn.q", "mlp.up", "10", "1.0", "0.10", "0.010", "4 bit"):
        assert f">{text}<" in html, text
    heats = [int(found) for found in re.findall(r"--heat: (\d+)%", html)]
    assert heats == sorted(heats, reverse=True)


def test_blocks_and_kinds_of_linears_are_summed_at_the_edges() -> None:
    some = [linear("a.0.q", 0.01, bits=2, weights=100), linear("a.0.up", 0.03, bits=8, weights=300)]
    some += [linear("a.1.q", 0.02, bits=4, weights=100)]  # block 1 has no `up` that was quantized
    sums = re.findall(r'class="sum">([^<]+)<small>([^<]+)<', audit.heat_map(some))
    assert [text for text, _ in sums] == ["4.0", "2.0", "3.0", "3.0", "6.0"]  # block 0, block 1, q, up, all
    # (2.25 * 100 + 8.25 * 300) / 400 = 6.75 bits a weight, in all 2700 bits.
    assert sums[0][1] == "6.75 bits, 338 B"
    assert sums[-1][1] == "6.25 bits, 391 B"
    assert audit.storage(some, 7.5) == (
        "They store 6.25 bits a weight, scales and zero points counted: 391 B. "
        "The whole model stores 7.5 bits a weight, for what was left alone keeps its width."
    )
    old = {key: value for key, value in some[0].items() if key != "weights"}  # of a version that did not count them
    assert audit.weights_of(old) == 18


def test_of_many_experts_the_worst_stands_for_all_and_all_are_summed() -> None:
    names = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(12)]
    html = audit.heat_map([linear(name, 0.01 * (number % 7 + 1)) for number, name in enumerate(names)])
    assert html.count(">mlp.experts.*.up_proj<") == 1
    assert ">7.0<" in html
    assert "experts.6.up_proj" in html  # which it is
    assert "stands for all" in html
    assert "stands for all" not in audit.heat_map([linear("model.layers.0.mlp.up_proj")])


def test_a_part_of_many_linears_is_called_a_part() -> None:
    many = [linear(f"model.layers.{number}.mlp.up_proj") for number in range(audit.MOST + 5)]
    assert f"Weights of the first {audit.MOST} of {audit.MOST + 5} linears" in str(audit.all_histograms(many))
    assert f"Weights of all {audit.MOST} linears" in str(audit.all_histograms(many[: audit.MOST]))


def test_outliers_are_shown_where_a_method_looked_for_them() -> None:
    assert audit.outlier_map([linear("a.0.q")]) is None
    found = [linear("a.0.q") | {"outliers": 0.04}, linear("a.0.up") | {"outliers": 0.0}]
    html = str(audit.outlier_map(found))
    assert ">4.0<" in html
    assert ">0<" in html
    assert html.count("--heat") == 1
    assert "On average 2.0 % of a linear" in html


def test_a_section_that_opens_is_not_there_where_nothing_is_drawn() -> None:
    bare = {key: value for key, value in linear("a.0.q").items() if key != "histogram"}
    assert audit.histograms([bare]) is None
    html = str(audit.report([bare], None))
    assert "<details" not in html
    assert "Weights of the linear with" in str(audit.histograms([bare, linear("a.0.q")]))


def test_what_was_unusual_is_listed_and_escaped() -> None:
    html = audit.report([linear("a.0.q", note=f"fell back {EVIL}"), linear(f"a.0.{EVIL}")], None)
    assert html is not None
    assert "One linear was not solved as asked" in html
    assert "<img" not in html
    assert audit.report([], None) is None
    assert "none fell back" in str(audit.report([linear("a.0.q")], None))


def test_what_was_left_as_it_is_is_listed_by_its_width() -> None:
    left: dict[str, JsonValue] = {"modules": {"16": ["lm_head", f"model.layers.*.{EVIL}"], "32": ["model.gate"]}}
    html = str(audit.report([linear("a.0.q")], None, left=left))
    assert "kept in 16 bit: <code>lm_head</code>, <code>model.layers.*.&lt;img" in html
    assert "kept in 32 bit: <code>model.gate</code></p>" in html
    for nothing in ({}, {"modules": {}}, {"modules": []}):
        assert "kept in" not in str(audit.report([linear("a.0.q")], None, left=nothing))


def test_the_curve_marks_what_was_chosen() -> None:
    html = audit.curve(BUDGET)
    assert html.count('class="equal"') == 2
    assert html.count('class="chosen"') == 1
    assert "Chosen: 3.00 stored bits" in html
    assert "4 bit, groups of 64" in html
    for text in ("2.2 stored bits a weight", "8", "expected KL, nats: 0.6", "0.001"):  # the axes carry numbers
        assert f">{text}</text>" in html, text


def test_a_histogram_draws_only_bins_that_hold_something() -> None:
    html = str(audit.histogram(linear("w")))
    assert html.count("<rect") == 2
    assert "4 levels" in html
    ticks = [float(x) for x in re.findall(r'<line x1="([\d.]+)"', html)]
    assert ticks == [90.0, 225.0, 360.0]  # -0.5, 0.25 and 1 of -1 .. 1; the level at -1.5 lies outside
    assert audit.histogram({"name": "w", "bits": 4}) is None


def test_names_are_split_at_the_block() -> None:
    assert audit.split("model.layers.3.mlp.up_proj") == ("3", "mlp.up_proj")
    assert audit.split("lm_head") == ("–", "lm_head")


def test_every_linear_has_its_histogram_once_the_run_is_done() -> None:
    linears = [linear(f"model.layers.{block}.{leaf}") for block in range(2) for leaf in ("q", "k", "v")]
    assert "Weights of all 6 linears" in str(audit.report(linears, None, whole=5.0))
    assert str(audit.all_histograms(linears)).count("<figure>") == 6
    assert "Weights of all" not in str(audit.report(linears, None))
    assert audit.all_histograms(linears[:3]) is None


@pytest.mark.parametrize(
    ("steps", "healed"),
    [
        (("quantize/gptq", "distill/repair"), True), (("prune/depth", "distill/repair", "quantize/gptq"), False),
        (("prune/wanda", "distill/repair"), False),
    ],
)  # fmt: skip
def test_a_map_from_before_a_repair_says_so(steps: tuple[str, ...], healed: bool) -> None:
    recipe = Recipe.model_validate({"steps": [{name: {}} for name in steps]})
    run = Run(id="abcd1234", recipe=recipe, status=Status.SUCCEEDED, created=1.0, started=1.0, attempt=1)
    story = Story(1, linears={"a.0.q": linear("a.0.q")})
    assert ("as quantization left them" in views.run_detail(run, story, (), None, None, None)) is healed
