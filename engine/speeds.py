"""What earlier runs have found of this machine's speed, by probes and by their steps, for estimates of later ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from engine.pace import Rates
from engine.records import Event, Run
from engine.store import Store

LOOKED_AT = 20  # newest runs


def learned(store: Store, runs: Iterable[Run]) -> Rates:
    """The usual rates, with what is newest of each method among some runs, newest first: its probe, or what it took."""
    found: dict[str, float] = {}
    for run in itertools.islice((run for run in runs if run.recipe.steps), LOOKED_AT):
        for event in reversed(store.events(run.id, 0, kinds=("estimate", "took"))):
            for name, value in _rates(event).items():
                if isinstance(value, int | float) and value > 0:
                    found.setdefault(name, float(value))
    return Rates(steps=found)


def _rates(event: Event) -> Mapping[str, JsonValue]:
    if event.kind == "took":
        return {str(event.data.get("method")): event.data.get("rate")}
    rates = event.data.get("rates")
    return rates if isinstance(rates, dict) else {}
