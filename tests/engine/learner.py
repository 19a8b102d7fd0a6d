"""Learns by one method after the other and keeps what was said: alone, or as one of several processes.

python -m tests.engine.learner FOLDER      # with the variables of `torchrun`; FOLDER/asked.json names the work
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch

from engine import distributed, methods, training, wide
from engine.methods import Context
from engine.models import load
from engine.places import DEMO
from tests.conftest import Recorder

Losses = dict[str, dict[str, list[float]]]


def learn(model: Path, steps: dict[str, dict[str, object]], folder: Path) -> Losses:
    """By method: the loss and the held-out KL of each step.

    All in float32: what is sampled would become another token now and then where odds are bfloat16.
    """
    found: Losses = {}
    for name, params in steps.items():
        said = Recorder()
        context = Context("cpu", 0, folder / name, folder / "cache", DEMO / "text.txt", said, lambda: None)
        method = methods.get(name)
        with (
            torch.no_grad(),
            mock.patch.object(training, "SAID_EVERY", 1),
            mock.patch.object(wide, "multiplies_bfloat16", return_value=False),
        ):
            method.apply(load(model, "float32"), method.check(params), context)  # type: ignore[arg-type]
        samples = [data for kind, data in said.said if kind == "sample"]
        found[name] = {
            series: [float(str(data["value"])) for data in samples if data["series"] == series]
            for series in ("loss", "kl_heldout")
        }
    return found


if __name__ == "__main__":
    here = Path(sys.argv[1])
    asked = json.loads((here / "asked.json").read_text())
    torch.set_num_threads(1)
    with distributed.joined("cpu", f"file://{here / 'meeting'}"):
        losses = learn(Path(asked["model"]), asked["steps"], here)
        if distributed.rank() == 0:
            (here / "losses.json").write_text(json.dumps(losses))
