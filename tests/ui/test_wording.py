"""Numbers, verdicts and the dictionary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.presets import PRESETS
from engine.recipes import dump_recipe, load_recipe
from engine.records import Measurement, Model, Recipe, Run
from tests.ui import fakes
from ui import language, wording
from ui.words import ENGLISH

UI = Path(__file__).parents[2] / "ui"


def named(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {m.name: m for m in measurements}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (7_780_000, "7.42 MiB"), (3 << 30, "3.00 GiB")],
)
def test_sizes_are_binary(count: int, text: str) -> None:
    assert wording.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00042, "420 µs"), (0.0312, "31.2 ms"), (4.2, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (60, "1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_the_verdict_names_gains_and_costs() -> None:
    text = wording.verdict(named(fakes.measured()), named(fakes.measured(3.2, 0.12)))
    assert text.startswith("3.2× smaller, 3.2× faster")
    assert "perplexity +2.9 %" in text
    assert "10 of 1000 answers flipped" in text


def test_the_verdict_claims_no_speed_within_the_error() -> None:
    a = Measurement(name="latency.tpot", value=0.010, error=0.001, unit="s", higher_is_better=False)
    b = a.model_copy(update={"value": 0.009})
    assert wording.verdict({"latency.tpot": a}, {"latency.tpot": b}) == "Same speed."


@pytest.mark.parametrize(
    ("code", "same", "said"),
    [
        ("en", "Same speed.", "Same speed, first token 1.5× slower, 1.6× slower at batch 16."),
        ("zh-CN", "速度相同。", "速度相同，首词变慢 1.5×，批大小 16 时变慢 1.6×。"),
    ],
)
def test_the_verdict_says_where_packed_is_slower(code: str, same: str, said: str) -> None:
    def taken(ttft: float, b1: float, b8: float, b16: float) -> dict[str, Measurement]:
        rates = {"throughput.b1": b1, "throughput.b8": b8, "throughput.b16": b16}
        return named([
            Measurement(name="latency.ttft", value=ttft, error=0.001, unit="s", higher_is_better=False),
            Measurement(name="latency.tpot", value=0.01, error=0.001, unit="s", higher_is_better=False),
            *(Measurement(name=key, value=rate, error=2.0, unit="1/s", higher_is_better=True)
              for key, rate in rates.items()),
        ])  # fmt: skip

    dense = taken(0.1, 50, 400, 800)
    with language.use(code):
        assert wording.verdict(dense, taken(0.15, 30, 300, 500)) == said
        assert wording.verdict(dense, taken(0.102, 60, 398, 796)) == same  # within the noise
        assert wording.verdict(taken(0.15, 50, 300, 500), dense) == same  # faster


def test_an_error_beyond_the_value_itself_gives_no_verdict() -> None:
    vague = Measurement(name="throughput.b8", value=33.3, error=664.0, unit="1/s", higher_is_better=True)
    fast = vague.model_copy(update={"value": 1632.0, "error": 10.0})
    assert wording.better(vague, fast) == 0
    assert wording.change(vague, fast) == ENGLISH["noise.inside"].format(change="49× faster")
    slow = Measurement(name="latency.tpot", value=0.03, error=0.02, unit="s", higher_is_better=False)
    step = slow.model_copy(update={"value": 0.3, "error": 0.001})
    assert wording.verdict({slow.name: slow}, {step.name: step}) == ENGLISH["verdict.unknown"]


@pytest.mark.parametrize(
    ("code", "down", "up", "plain"),
    [
        ("en", "2.5× less memory loaded, 1.3× more at its peak.", "2.5× more memory loaded, 1.3× less at its peak.",
         "2.5× less memory."),
        ("zh-CN", "加载后内存减少 2.5×，但峰值增加 1.3×。", "加载后内存增加 2.5×，但峰值减少 1.3×。",
         "内存减少 2.5×。"),
    ],
)  # fmt: skip
def test_the_verdict_says_when_the_peak_goes_the_other_way(code: str, down: str, up: str, plain: str) -> None:
    def taken(loaded: float, peak: float, error: float | None = None) -> dict[str, Measurement]:
        return named([
            Measurement(name="memory.loaded", value=loaded, unit="B", higher_is_better=False),
            Measurement(name="memory.peak", value=peak, error=error, unit="B", higher_is_better=False),
        ])  # fmt: skip

    a, b = taken(4.9e6, 6.8e6), taken(1.95e6, 9.17e6)
    with language.use(code):
        assert wording.verdict(a, b) == down
        assert wording.verdict(b, a) == up
        assert wording.verdict(a, taken(1.95e6, 6.9e6)) == plain
        assert wording.verdict(a, taken(1.95e6, 9.17e6, error=2e6)) == plain  # within the noise


def test_throughput_is_in_tokens() -> None:
    speed = Measurement(name="throughput.b8", value=3015.1, unit="1/s", higher_is_better=True)
    assert wording.value(speed) == "3015 tokens/s"


def test_the_verdict_says_when_it_grew() -> None:
    text = wording.verdict(named(fakes.measured(3.2)), named(fakes.measured()))
    assert text.startswith("3.2× larger, 3.2× slower")


def test_nothing_in_common_is_said() -> None:
    assert wording.verdict({}, {}) == ENGLISH["verdict.unknown"]


def test_better_needs_more_than_noise() -> None:
    a = Measurement(name="perplexity", value=4.0, error=0.1, unit="1", higher_is_better=False)
    assert wording.better(a, a.model_copy(update={"value": 4.2})) == 0
    assert wording.better(a, a.model_copy(update={"value": 4.5})) == -1
    assert wording.better(a, a.model_copy(update={"value": 3.5})) == 1


def test_every_word_that_is_used_exists() -> None:
    used = {key for file in UI.rglob("*.py") for key in re.findall(r'say\(\s*"([^"]+)"', file.read_text())}
    assert len(used) > 100
    assert used <= ENGLISH.keys()


def test_every_word_that_exists_is_used() -> None:
    source = "\n".join(file.read_text() for file in UI.rglob("*.py") if file.name != "words.py")
    families = {found.rstrip("{") for found in re.findall(r"""["']([a-z]+\.)[{"']""", source)}
    families |= {"verdict.", "ratio.", "sense.", "fit.", "stored.", "mixed.", "live.", "axis.", "name.", "field."}
    unused = {
        key
        for key in ENGLISH
        if f'"{key}"' not in source and f"'{key}'" not in source and not key.startswith(tuple(families))
    }
    assert unused == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "GPTQ 4 bit"),
        ("/models/llama-1b/", "GPTQ 4 bit · llama-1b"),
        ("/home/x/runs/34cd970c/attempt-1/artifact", "GPTQ 4 bit · model of run cd970c"),
    ],
)
def test_a_run_is_named_with_its_model_where_that_is_not_the_demo(source: str, name: str) -> None:
    recipe = fakes.GPTQ.model_copy(update={"model": Model(source=source)})
    run = Run(id="0123456789", recipe=recipe, created=1.0)
    assert wording.run_name(run) == name
    assert wording.run_label(run) == f"{name} · 456789"


def test_a_chain_with_a_name_goes_by_it_and_no_other_does() -> None:
    tenth = load_recipe(dump_recipe(Recipe(steps=PRESETS["tenth"])))
    assert wording.title(tenth) == "Tenth: pruned, distilled, 3 bit"
    assert wording.title(tenth.model_copy(update={"steps": tenth.steps[:-1]})).startswith("Depth 30% of blocks →")
    assert wording.title(Recipe(steps=PRESETS["gptq4"])) == "GPTQ 4 bit"
    before_the_cut = {"steps": [{"prune/l1": {"share": 0.3, "sparsity": 0.5}}]}  # a share of steps, of no blocks
    assert wording.title(Recipe.model_validate(before_the_cut)) == "L1 50%"
