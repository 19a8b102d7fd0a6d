"""What a probe has found of this machine's speed, the next estimate heeds."""

from __future__ import annotations

from pathlib import Path

from engine import preflight, speeds
from engine.records import Recipe
from engine.store import Store
from tests.ui import fakes
from tests.ui.fakes import FakeScheduler


def test_the_newest_probe_of_a_method_counts(tmp_path: Path) -> None:
    scheduler = FakeScheduler(tmp_path)
    for factor in (9.0, 3.0, "bad"):
        run = scheduler.store.begin_attempt(scheduler.store.add_run(fakes.GPTQ, "anna").id)
        found = {"quantize/gptq": factor, "quantize/rtn": -1}
        fakes.say(scheduler, run, ("estimate", {"memory": 1, "seconds": 2.0, "probed": True, "rates": found}))
        fakes.say(scheduler, run, ("finished", {"status": "succeeded", "reason": ""}), start=9)
    scheduler.store.add_run(Recipe(), "anna")
    scheduler.store.close()
    store = Store(tmp_path / "maquette.db", read_only=True)
    learned = speeds.probed(store, store.runs())
    assert dict(learned.steps) == {"quantize/gptq": 3.0}
    assert speeds.probed(store, []).steps == {}
    usual, slow = preflight.estimate(fakes.GPTQ), preflight.estimate(fakes.GPTQ, rates=learned)
    assert slow.working == 3 * usual.working
    assert slow.times["save"] == usual.times["save"]
