"""What earlier runs have found of this machine's speed, by probes and by their steps, for estimates of later ones."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from engine.pace import Rates
from engine.records import Event, Run
from engine.store import Store

LOOKED_AT = 20  # newest runs
NEWEST = 5  # of those that applied a method


def learned(store: Store, runs: Iterable[Run]) -> Rates:
    """The usual rates, with what some runs, newest first, have found of each method: what it took, or else its probe.

    The upper median of the newest: a run may have found a step's scores or its teacher's answers, or the machine busy.
    """
    found: dict[str, list[float]] = {}
    for run in itertools.islice((run for run in runs if run.recipe.steps), LOOKED_AT):
        own: dict[str, float] = {}
        for event in store.events(run.id, 0, kinds=("estimate", "took")):  # a probe comes before the steps
            for name, value in _rates(event).items():
                if isinstance(value, int | float) and value > 0:
                    own[name] = float(value)
        for name, rate in own.items():
            found.setdefault(name, []).append(rate)
    return Rates(steps={name: statistics.median_high(rates[:NEWEST]) for name, rates in found.items()})


def _rates(event: Event) -> Mapping[str, JsonValue]:
    if event.kind == "took":
        return {str(event.data.get("method")): event.data.get("rate")}
    rates = event.data.get("rates")
    return rates if isinstance(rates, dict) else {}
