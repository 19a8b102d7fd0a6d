"""Mixed precision: the knapsack against trying everything, the budget kept, the measurement reused."""

import contextlib
import dataclasses
import itertools
import random
from types import ModuleType

import pytest
import torch

from engine import artifacts, branches, headers, perturbation, scores
from engine.errors import BadParams
from engine.methods import Context, StoredBits
from engine.models import LoadedModel, blocks, linears
from engine.observing import BlockLinear
from engine.places import DEMO
from engine.quantize import mixed
from engine.quantize.mixed import CELLS, Candidate, Option, choose, curve
from tests.conftest import Recorder, in_memory, tiny_config

SMALL = {"samples": 8, "sequence_length": 32, "targets": "*.mlp.*"}


def candidates(seed: int) -> list[Candidate]:
    dice = random.Random(seed)
    found = []
    for number in range(5):
        weights = dice.choice((1000, 3000, 4000))
        options = tuple(
            Option(bits, 32, (bits + 0.5) * weights, dice.uniform(0.5, 1.5) * 4.0**-bits)  # type: ignore[arg-type]
            for bits in (2, 3, 4, 8)
        )
        found.append(Candidate(f"w{number}", weights, options))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [2.6, 3.1, 4.5, 9.0])
def test_the_cheapest_assignment_is_found(seed: int, budget: float) -> None:
    given = candidates(seed)
    weights = sum(c.weights for c in given)
    chosen = choose(given, budget)
    assert list(chosen) == [c.name for c in given]
    assert sum(o.stored for o in chosen.values()) <= budget * weights
    # Sizes are rounded up to cells: what is found is at least as good as the best within a budget so much smaller.
    room = budget * weights * (1 - len(given) / CELLS)
    best = min(
        sum(o.cost for o in pick)
        for pick in itertools.product(*(c.options for c in given))
        if sum(o.stored for o in pick) <= room
    )
    assert sum(o.cost for o in chosen.values()) <= best + 1e-12


@pytest.mark.parametrize("budget", [2.2, 3.5])
def test_many_linears_come_near_the_best_there_can_be(budget: float) -> None:
    """As many as a model of 70 B has; no assignment is below the dual of Lagrange."""
    dice = random.Random(0)
    given = []
    for number in range(560):
        weights, bears = dice.choice((1, 4, 14)) << 20, 10 ** dice.uniform(-2, 0)
        options = [(bits, size) for bits in mixed.WIDTHS for size in mixed.GROUP_SIZES]
        each = [Option(b, g, (b + 16 / g) * weights, bears * 4.0**-b * (1 + g / 500)) for b, g in options]
        given.append(Candidate(f"w{number}", weights, tuple(each)))
    room = budget * sum(c.weights for c in given)
    found = choose(given, budget).values()
    prices = [10 ** (-power / 10) for power in range(60, 110)]
    bound = max(sum(min(o.cost + p * o.stored for o in c.options) for c in given) - p * room for p in prices)
    assert 0.999 * room < sum(o.stored for o in found) <= room
    assert bound > 0
    assert sum(o.cost for o in found) <= 1.02 * bound


def test_the_very_smallest_budget_still_has_an_answer() -> None:
    given = candidates(0)
    assert {o.bits for o in choose(given, 2.5).values()} == {2}
    with pytest.raises(BadParams, match=r"2\.4 bits a weight are below the smallest that is possible, 2\.500"):
        choose(given, 2.4)


@pytest.mark.parametrize(("symmetric", "largest"), [(True, 8.5), (False, 8.75)])
def test_a_budget_above_the_largest_option_counts_as_that_and_says_so(symmetric: bool, largest: float) -> None:
    shape = headers.inspect(DEMO / "model")
    roomy, tight = (mixed.Params(budget=budget, symmetric=symmetric) for budget in (1e6, largest - 0.1))
    assert roomy.stored_bits(256, 256) == StoredBits(largest, 0)
    assert [f"from {largest:g} bits" in note for note in roomy.notes(shape, "cpu")] == [True]
    assert tight.stored_bits(256, 256) == StoredBits(largest - 0.1, 0)
    assert not tight.notes(shape, "cpu")


def test_the_curve_falls_and_holds_the_chosen_point() -> None:
    shown = curve(candidates(1), 3.0)
    points = shown["points"]
    assert isinstance(points, list)
    costs = [cost for _, cost in points]  # type: ignore[misc,union-attr]
    assert costs == sorted(costs, reverse=True)
    bits, _ = shown["chosen"]  # type: ignore[misc]
    assert bits <= 3.0  # type: ignore[operator]
    assert len(shown["uniform"]) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(("narrow", "off"), [(False, 1e-5), (True, 0.005)])
def test_the_error_of_a_linear_is_taken_from_half_of_its_moments(
    narrow: bool, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "multiplies_bfloat16", lambda: narrow)
    dice = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(n, 96, generator=dice) for n in (40, 200))
    moments = inputs.T @ inputs
    whole = float((weight @ moments @ weight.T).trace())
    half = moments.triu() + torch.randn(96, 96, generator=dice).tril(-1)  # what lies below the diagonal is overlooked
    for columns in (32, 40, 1024):
        monkeypatch.setattr(mixed, "COLUMNS", columns)
        assert mixed._energy(weight, half) == pytest.approx(whole, rel=off)
    assert mixed._energy(weight, None) == pytest.approx(float(weight.square().sum()))


def test_options_of_many_outputs_are_weighed_on_some(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = BlockLinear("up", torch.nn.Linear(64, 400))
    inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 64)
    linear.hessian = inputs.T @ inputs
    params = mixed.Params()
    whole, _ = mixed.options_of(linear, params)
    monkeypatch.setattr(mixed, "EXAMINED", 100)
    some, _ = mixed.options_of(linear, params)
    assert [each[:2] for each in some] == [each[:2] for each in whole]
    assert [each[2] for each in some] == pytest.approx([each[2] for each in whole])
    assert [each[3] for each in some] == pytest.approx([each[3] for each in whole], rel=0.15)


def test_the_measurement_is_kept_for_other_budgets(
    tiny: LoadedModel, context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed.apply(tiny, mixed.Params.model_validate(SMALL | {"budget": 3.0}), context)
    assert sum(w.bits_per_weight() * w.codes.numel() for w in tiny.quantized.values()) <= 3.0 * sum(
        w.codes.numel() for w in tiny.quantized.values()
    )
    assert len({w.bits for w in tiny.quantized.values()}) > 1
    monkeypatch.setattr(mixed, "measure", None)  # a second measurement would be a call of None
    again = in_memory(tiny_config())
    other = Context("cpu", 0, context.folder / "other", context.cache, context.calibration, recorder, lambda: None)
    mixed.apply(again, mixed.Params.model_validate(SMALL | {"budget": 5.0}), other)
    assert any("measured before" in line for line in recorder.logs())
    assert sum(w.bits for w in again.quantized.values()) > sum(w.bits for w in tiny.quantized.values())


@pytest.mark.parametrize(("module", "part", "known"), [(mixed, "options_of", 4), (perturbation, "kl_div", 3)])
def test_a_measuring_that_was_killed_goes_on_where_it_was(
    module: ModuleType, part: str, known: int, context: Context, recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(branches, "HELD", 1)  # the three linears of one block are known together
    params = mixed.Params.model_validate(SMALL | {"budget": 3.0})
    right = getattr(module, part)
    most, done = 4, list[object]()

    def counted(*given: object, **named: object) -> object:
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(given)
        return right(*given, **named)

    def measured(cache: str) -> list[Candidate]:
        there = dataclasses.replace(context, cache=context.cache / cache)
        return mixed.from_json(
            scores.measured(
                in_memory(tiny_config()), there, "mixed", {},
                lambda kept: mixed.as_json(mixed.measure(in_memory(tiny_config()), params, there, kept)),
            )
        )  # fmt: skip

    whole = measured("whole")
    monkeypatch.setattr(module, part, counted)
    with pytest.raises(KeyboardInterrupt):
        measured("cut")
    (pieces,) = (context.cache / "cut").glob("*.pieces")
    pieces.write_text(pieces.read_text() + '\n{"torn')
    most, done = 1000, []
    assert measured("cut") == whole
    assert len(done) == len(whole) - known
    assert any("pieces were measured before" in line for line in recorder.logs())
    assert not list((context.cache / "cut").glob("*.pieces"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 2.0}, r"2 bits a weight is below the smallest that is possible, 2\.125"),
        ({"budget": 0.01, "unit": "mib"}, r"0\.01 MiB is below the smallest that is possible"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_before_work(given: dict, message: str) -> None:
    params = mixed.Params.model_validate(given)
    with pytest.raises(BadParams, match=message):
        params.check_model({"up": (256, 128)}, 100_000)


@pytest.mark.parametrize(("symmetric", "unit"), [(True, "bits"), (False, "bits"), (False, "memory")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_budget_is_what_the_options_store(dtype: torch.dtype, symmetric: bool, unit: str) -> None:
    params = mixed.Params.model_validate({"symmetric": symmetric, "unit": unit, "budget": 1e-3})
    linear = BlockLinear("up", torch.nn.Linear(128, 32, dtype=dtype))
    found, _ = mixed.options_of(linear, params)
    candidate = Candidate("up", 32 * 128, tuple(Option(bits, size, stored, 0.0) for bits, size, stored, _ in found))
    width = 8 * dtype.itemsize
    least = min(option.stored for option in params.counted(candidate).options)
    for budget, ends in ((least + 1, True), (least - 1, False)):
        body = {"budget": (budget + width * 1000 * (unit != "bits")) / (2**23 if unit != "bits" else 32 * 128)}
        asked = params.model_copy(update=body)
        with contextlib.nullcontext() if ends else pytest.raises(BadParams, match="below the smallest"):
            asked.check_model({"up": (32, 128)}, 32 * 128 + 1000, width)


def test_a_budget_in_mebibytes_counts_what_is_not_quantized() -> None:
    params = mixed.Params.model_validate({"budget": 1.0, "unit": "mib"})
    assert params.budget_bits(1_000_000, 1_100_000, []) == pytest.approx((2**23 - 1_600_000) / 1_000_000)


def test_a_budget_in_mebibytes_holds_the_files_with_their_headers(tiny: LoadedModel, context: Context) -> None:
    weights = sum(each.weight.numel() for block in blocks(tiny.network)[1] for _, each in linears(block))
    budget = 5.5 * weights / 2**23 + (tiny.parameters - weights) * tiny.network.dtype.itemsize / 2**20
    params = mixed.Params.model_validate(SMALL | {"targets": "", "budget": budget, "unit": "mib"})
    mixed.apply(tiny, params, context)
    artifacts.write_weights(tiny, context.folder)
    size = sum(file.stat().st_size for file in context.folder.glob("model-*.safetensors")) / 2**20
    assert 0.97 * budget < size <= budget


def test_a_budget_of_memory_counts_codes_as_kernels_hold_them(tiny: LoadedModel, context: Context) -> None:
    weights = sum(w.numel() for name, w in tiny.network.named_parameters() if ".mlp." in name)
    dense = tiny.network.num_parameters() - weights
    budget = (8 * tiny.network.dtype.itemsize * dense + 5.5 * weights) / 2**23
    params = mixed.Params.model_validate(SMALL | {"budget": budget, "unit": "memory"})
    assert params.counted(mixed.Candidate("a", 10, (mixed.Option(3, 32, 35.0, 1.0),))).options[0].stored == 45.0
    mixed.apply(tiny, params, context)
    found = list(tiny.quantized.values())
    held = sum(w.codes.numel() * (w.bits_per_weight() - w.bits + (4 if w.bits <= 4 else 8)) for w in found)
    assert held <= 5.5 * weights
    assert {w.bits for w in found} == {4, 8}  # what is held in 4 or 8 may as well use them
    with pytest.raises(BadParams, match="MiB of memory is below the smallest"):
        mixed.Params.model_validate({"budget": 0.01, "unit": "memory"}).check_model({"up": (256, 128)}, 100_000)
