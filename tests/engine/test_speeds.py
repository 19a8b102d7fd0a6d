"""What runs have found of this machine's speed, the next estimate heeds."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue

from engine import preflight, speeds
from engine.records import Recipe
from engine.store import Store
from tests.ui import fakes
from tests.ui.fakes import FakeScheduler


def test_the_upper_median_of_a_methods_newest_rates_counts(tmp_path: Path) -> None:
    scheduler = FakeScheduler(tmp_path)
    for factor in (90.0, 80.0, 3.0, 9.0, "bad", 0.1, 9.0, 0.1):
        run = scheduler.store.begin_attempt(scheduler.store.add_run(fakes.GPTQ, "anna").id)
        rates = {"quantize/gptq": factor, "quantize/rtn": -1}
        fakes.say(scheduler, run, ("estimate", {"memory": 1, "seconds": 2.0, "probed": True, "rates": rates}))
        fakes.say(scheduler, run, ("finished", {"status": "succeeded", "reason": ""}), start=9)
    scheduler.store.add_run(Recipe(), "anna")
    scheduler.store.close()
    store = Store(tmp_path / "maquette.db", read_only=True)
    found = speeds.learned(store, store.runs())
    assert dict(found.steps) == {"quantize/gptq": 3.0}
    assert speeds.learned(store, []).steps == {}
    usual, slow = preflight.estimate(fakes.GPTQ), preflight.estimate(fakes.GPTQ, rates=found)
    assert slow.working == 3 * usual.working
    assert slow.times["save"] == usual.times["save"]


def test_what_a_step_took_counts_more_than_its_probe(tmp_path: Path) -> None:
    scheduler = FakeScheduler(tmp_path)
    run = scheduler.store.begin_attempt(scheduler.store.add_run(fakes.GPTQ, "anna").id)
    rates: dict[str, JsonValue] = {"quantize/gptq": 5.0, "quantize/rtn": 4.0}
    fakes.say(
        scheduler, run, ("estimate", {"memory": 1, "seconds": 2.0, "probed": True, "rates": rates}),
        ("took", {"method": "quantize/gptq", "seconds": 1.0, "rate": 2.0}),
        ("took", {"method": "distill/logits", "seconds": 1.0, "rate": 0.2}),
    )  # fmt: skip
    found = speeds.learned(scheduler.store, scheduler.store.runs())
    assert dict(found.steps) == {"quantize/gptq": 2.0, "quantize/rtn": 4.0, "distill/logits": 0.2}
