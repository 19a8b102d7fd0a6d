"""The tables of the README, of docs/results.md and of the demo model, and the comparison that the page shows first.

    python -m benchmarks.results --again    # everything: about ten minutes on two free cores
    python -m benchmarks.results stored     # only the stored comparison

Every figure comes from a run of the real pipeline on the bundled model: compressed, saved, reloaded by stock
`transformers`, then measured in a process of its own. Nothing here is typed by hand.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time

from pydantic import JsonValue

from benchmarks.sections import RESULTS, ROOT, write_section
from benchmarks.trials import Trial, forget, table, trial
from engine import hardware
from engine.methods import methods
from engine.presets import PRESETS
from engine.records import Run, Status

DEMO = ROOT / "assets" / "demo"
STUDENT: dict[str, JsonValue] = {"student": "current", "steps": 600, "batch": 16, "learning_rate": 0.002}
RECIPES: dict[str, list[object]] = {
    "original": [],
    "GPTQ 4 bit": [{"quantize/gptq": {"bits": 4}}],
    "AWQ 4 bit": [{"quantize/awq": {"bits": 4}}],
    "HQQ 4 bit": [{"quantize/hqq": {"bits": 4}}],
    "RTN 4 bit": [{"quantize/rtn": {"bits": 4}}],
    "RTN 4 bit, clipped": [{"quantize/rtn": {"bits": 4, "clipping": "mse"}}],
    "RTN 4 bit, asymmetric": [{"quantize/rtn": {"bits": 4, "symmetric": False}}],
    "SmoothQuant, 8-bit weights and inputs": [{"quantize/smoothquant": {}}],
    "SmoothQuant, one scale for all inputs": [{"quantize/smoothquant": {"activations": "tensor"}}],
    "ZeroQuant, 4-bit weights, 8-bit inputs": [{"quantize/zeroquant": {"bits": 4}}],
    "ZeroQuant, blocks taught by the original's": [{"quantize/zeroquant": {"bits": 4, "distill_steps": 100}}],
    "FP8 weights": [{"quantize/fp8": {}}],
    "FP8 weights and inputs": [{"quantize/fp8": {"activations": "token"}}],
    "bitsandbytes NF4": [{"quantize/bitsandbytes": {}}],
    "bitsandbytes FP4": [{"quantize/bitsandbytes": {"scheme": "fp4"}}],
    "bitsandbytes LLM.int8()": [{"quantize/bitsandbytes": {"scheme": "int8"}}],
    "KV cache 8 bit": [{"quantize/kv_cache": {"bits": 8}}],
    "KV cache 4 bit": [{"quantize/kv_cache": {"bits": 4}}],
    "GPTQ 3 bit": [{"quantize/gptq": {"bits": 3}}],
    "AWQ 3 bit": [{"quantize/awq": {"bits": 3}}],
    "HQQ 3 bit": [{"quantize/hqq": {"bits": 3}}],
    "RTN 3 bit": [{"quantize/rtn": {"bits": 3}}],
    "RTN 3 bit, clipped": [{"quantize/rtn": {"bits": 3, "clipping": "mse"}}],
    "Mixed, 3.25 bits a weight": [{"quantize/mixed": {"budget": 3.25}}],
    "GPTQ 2 bit": [{"quantize/gptq": {"bits": 2}}],
    "RTN 2 bit": [{"quantize/rtn": {"bits": 2}}],
    "Mixed, 2.25 bits a weight": [{"quantize/mixed": {"budget": 2.25}}],
    "GPTQ 3 bit, healed: norms and scales": [
        {"quantize/gptq": {"bits": 3}},
        {"distill/repair": {"scope": "norms and scales"}},
    ],
    "GPTQ 3 bit, healed: low-rank additions": [{"quantize/gptq": {"bits": 3}}, {"distill/repair": {"scope": "lora"}}],
    "GPTQ 3 bit, healed: all, on the grid": [{"quantize/gptq": {"bits": 3}}, {"distill/repair": {}}],
    "GPTQ 2 bit, healed: all, on the grid": [{"quantize/gptq": {"bits": 2}}, {"distill/repair": {}}],
    "Magnitude 50 %": [{"prune/magnitude": {"sparsity": 0.5}}],
    "Wanda 50 %": [{"prune/wanda": {"sparsity": 0.5}}],
    "Magnitude 70 %": [{"prune/magnitude": {"sparsity": 0.7}}],
    "Three of four blocks, distilled": [{"prune/depth": {"share": 0.25}}, {"distill/logits": {**STUDENT}}],
    "Three of four blocks, labels alone": [
        {"prune/depth": {"share": 0.25}},
        {"distill/logits": {**STUDENT, "label_weight": 1.0}},
    ],
    "Prune 50 %, distill, 4 bit": [
        {"prune/wanda": {"sparsity": 0.5}},
        {"distill/logits": {"student": "current", "steps": 100, "batch": 16}},
        {"quantize/gptq": {"bits": 4}},
    ],
}
README = (  # of these, and what of each; docs/results.md has all
    "original", "SmoothQuant, 8-bit weights and inputs", "FP8 weights", "bitsandbytes LLM.int8()", "GPTQ 4 bit",
    "AWQ 4 bit", "HQQ 4 bit", "RTN 4 bit", "bitsandbytes NF4", "GPTQ 3 bit", "Mixed, 3.25 bits a weight", "RTN 3 bit",
    "GPTQ 2 bit", "GPTQ 2 bit, healed: all, on the grid", "Mixed, 2.25 bits a weight", "RTN 2 bit", "Wanda 50 %",
    "Three of four blocks, distilled", "Prune 50 %, distill, 4 bit",
)  # fmt: skip
BRIEF = ("size.bytes", "size.bits_per_weight", "perplexity", "kl", "accuracy")
DAMAGE = ("original", "GPTQ 4 bit", "RTN 3 bit", "GPTQ 2 bit", "Magnitude 50 %", "Magnitude 70 %")
SHIPPED = "gptq4"  # the folder beside the demo model of the second one's artifact: it writes for a first visitor
STORED: dict[str, list[object]] = {  # the first two are compared first
    "original": [],
    "GPTQ 4 bit": [*PRESETS["gptq4"]],
    "Mixed 3.25 bit": [*PRESETS["mixed"]],
    "GPTQ 2 bit": [{"quantize/gptq": {"bits": 2}}],
    "Wanda 50 %": [{"prune/wanda": {"sparsity": 0.5}}],
    **{name: [*PRESETS[name]] for name in ("half", "quarter", "tenth")},
}

log = logging.getLogger("results")


def stored_comparison() -> None:
    """Measure the runs that a first visitor finds, with everything a run measures."""
    everything = ("size", "memory", "latency", "perplexity", "accuracy", "divergence", "outputs")
    runs = [trial(name, steps, everything) for name, steps in STORED.items()]
    shutil.rmtree(DEMO / SHIPPED, ignore_errors=True)
    shutil.copytree(runs[1].artifact, DEMO / SHIPPED)
    body = ",\n".join(
        f'{{"run": {_as_run(number, r).model_dump_json()}, '
        f'"measurements": [{", ".join(m.model_dump_json() for m in r.measured.values())}], '
        f'"outputs": [{", ".join(o.model_dump_json() for o in r.outputs)}]}}'
        for number, r in enumerate(runs)
    )
    (DEMO / "comparison.json").write_text(f'{{"machine": "{hardware.machine()}", "runs": [\n{body}\n]}}\n')


def _as_run(number: int, result: Trial) -> Run:
    return Run(
        id=f"stored-{number}", recipe=result.recipe, status=Status.SUCCEEDED, attempt=1, created=result.began,
        started=result.began, finished=result.ended, artifact=SHIPPED if number == 1 else None,
    )  # fmt: skip


def method_table() -> str:
    """The table of methods, from their files."""
    rows = ["| method | what it does | what gets better |", "| --- | --- | --- |"]
    for method in methods().values():
        better = ", ".join(method.changes) or "nothing by itself"
        rows.append(f"| `{method.name}` | {method.summary} | {better} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "stored", "methods"), default="all")
    parser.add_argument("--again", action="store_true", help="run what was run before once more")
    options = parser.parse_args()
    part = options.part
    if options.again:
        forget()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    write_section(ROOT / "README.md", "methods", method_table())
    if part == "methods":
        return
    stored_comparison()
    if part == "stored":
        return
    results = {name: trial(name, steps) for name, steps in RECIPES.items()}
    about = f"Measured {time.strftime('%Y-%m-%d')} on {hardware.machine()}; ± is one standard error."
    write_section(RESULTS, "results", f"{table(list(results.values()))}\n\n{about}")
    write_section(ROOT / "README.md", "results", f"{table([results[name] for name in README], BRIEF)}\n\n{about}")
    write_section(DEMO / "README.md", "damage", f"{table([results[name] for name in DAMAGE])}\n\n{about}")


if __name__ == "__main__":
    main()
