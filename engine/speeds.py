"""What probes of earlier runs have found of this machine's speed, for the estimates of later ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from engine.pace import Rates
from engine.records import Run
from engine.store import Store

LOOKED_AT = 20  # newest runs


def probed(store: Store, runs: Iterable[Run]) -> Rates:
    """The usual rates, with what the newest probe of each method among some runs, newest first, has measured."""
    found: dict[str, float] = {}
    for run in itertools.islice((run for run in runs if run.recipe.steps), LOOKED_AT):
        for event in store.events(run.id, 0, kinds=("estimate",)):
            rates = event.data.get("rates")
            for name, value in rates.items() if isinstance(rates, dict) else ():
                if isinstance(value, int | float) and value > 0:
                    found.setdefault(name, float(value))
    return Rates(steps=found)
