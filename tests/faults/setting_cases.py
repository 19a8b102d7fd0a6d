"""Bad settings, recipes and texts."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults.scene import Case, Scene, config, folder, recipe, step, text

NAN = float("nan")
LONG = b"The goat of Ada likes the bread of Ben very much. " * 200_000  # 10 MB in one line


def odd_widths(folder: Path) -> None:
    """Feed-forward rows of 130."""
    config(intermediate_size=130)(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        out, into = (130 if size == 128 else size for size in tensor.shape) if tensor.dim() == 2 else (0, 0)
        if out:
            tensors[name] = torch.zeros(out, into, dtype=tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


SETTINGS = [
    step("0 bits", "bits", "quantize/gptq", bits=0),
    step("3.5 bits", "got 3.5", "quantize/gptq", bits=3.5),
    step("bits in words", "got '4'", "quantize/gptq", bits="4"),
    step("NaN bits", "bits", "quantize/gptq", bits=NAN),
    step("bits that are true", "bits", "quantize/gptq", bits=True),
    step("a list of bits", "bits", "quantize/gptq", bits=[4]),
    step("no bits", "bits", "quantize/gptq", bits=None),
    step("more bits than numbers reach", "bits", "quantize/gptq", bits=10**400),
    step("groups of 0", "group_size", "quantize/rtn", group_size=0),
    step("groups of 7", "group_size", "quantize/rtn", group_size=7),
    step("groups below zero", "group_size", "quantize/rtn", group_size=-64),
    step("groups that do not divide", "does not divide", "quantize/rtn", group_size=48),
    step("groups longer than a row", "does not divide", "quantize/rtn", group_size=4096),
    step("all zeros", "sparsity", "prune/wanda", sparsity=1.0),
    step("less than no zeros", "sparsity", "prune/wanda", sparsity=-0.1),
    step("NaN zeros", "sparsity", "prune/wanda", sparsity=NAN),
    step("infinitely many zeros", "sparsity", "prune/wanda", sparsity=float("inf")),
    step("3 of 4", "pattern", "prune/wanda", pattern="3:4"),
    step("all blocks removed", "blocks", "prune/depth", count=3),
    step("no temperature", "temperature", "distill/logits", temperature=0),
    step("a rate below zero", "learning_rate", "distill/logits", learning_rate=-1.0),
    step("steps without end", "steps", "distill/logits", steps=10**12),
    step("samples without end", "samples", "quantize/gptq", samples=10**9),
    step("a pattern that is none", "is no regular expression", "quantize/rtn", targets="re:("),
    step("a pattern for nothing", "no linear is left", "quantize/rtn", targets="*.nothing"),
    step("a setting that does not exist", "Did you mean bits", "quantize/gptq", bitz=4),
    step("a method that does not exist", "Did you mean quantize/gptq", "quantize/gtpq"),
    step("a method like a path", "Unknown method", "../../etc/passwd"),
    step("a method of the interpreter", "Unknown method", "__class__"),
    folder(
        "2:4 on odd widths",
        "refused",
        "does not divide",
        odd_widths,
        steps=[{"prune/wanda": {"pattern": "2:4"}}],
    ),
    recipe("steps after quantization", "refused", "Put quantization last", steps=["quantize/rtn", "prune/magnitude"]),
    recipe("17 steps", "refused", "at most 16", steps=["prune/magnitude"] * 17),
    recipe("a seed below zero", "refused", "seed", seed=-1),
    recipe("a seed beyond 32 bits", "refused", "seed", seed=2**40),
    recipe("a seed in words", "refused", "seed", seed="one"),
    recipe("a measurement that does not exist", "refused", "Did you mean size", measure=["sise"]),
    recipe("a device that does not exist", "refused", "device", device="tpu"),
    recipe("a dtype that does not exist", "refused", "dtype", model={"source": "demo", "dtype": "int3"}),
    recipe("a key that does not exist", "refused", "Unknown key", zeal=1),
    recipe("a model that is a list", "refused", "model", model=["demo"]),
    recipe("steps that are a word", "refused", "steps must be a list", steps="quantize/rtn"),
    recipe("a step that is a number", "refused", "A step must be", steps=[4]),
    recipe("a step of two methods", "refused", "names one method", steps=[{"quantize/rtn": {}, "prune/wanda": {}}]),
    recipe("settings that are a list", "refused", "must be a mapping", steps=[{"quantize/rtn": [4]}]),
    recipe("a GPU that is not there", "failed", "no CUDA device", device="cuda"),
    recipe(
        "a loss that diverges",
        "failed",
        "Training diverged",
        steps=[{"distill/repair": {"learning_rate": 1e8, "steps": 40, "batch": 1, "sequence_length": 16}}],
    ),
]
TEXTS = [
    text("an empty text", "refused", "is empty", b""),
    text("a text of blanks", "refused", "is empty", b" \n\n \n"),
    text("a text of two words", "refused", "one sequence needs 32", b"Two words"),
    text("a binary text", "refused", "is a binary file", b"\x7fELF\0\1" * 9999),
    text("a text that is no UTF-8", "refused", "is not UTF-8", b"\xff\xfe\xfa" * 500),
    text("JSON lines without a text", "refused", 'a JSON object with a "text"', b'{"body": "x"}\n' * 9, "a.jsonl"),
    text("JSON lines that nest without end", "refused", "a JSON object with", b"[" * 100_000, "a.jsonl"),
    text("10 MB in one line", "handled", "", LONG),
    text("a folder instead of a text", "refused", "There is no calibration file", lambda path: path.mkdir()),
    text("a pipe that nobody fills", "refused", "There is no calibration file", lambda path: os.mkfifo(path)),
    recipe("a text that is not there", "refused", "There is no calibration file", calibration="nowhere.txt"),
    recipe("a text with a NUL", "refused", "There is no calibration file", calibration="a\0b"),
    recipe("a device as text", "refused", "There is no calibration file", calibration="/dev/urandom"),
    recipe("a text in nobody's home", "refused", "There is no calibration file", calibration="~nobody-here/a.txt"),
]


def paste(name: str, says: str, content: str) -> Case:
    """A case that is a recipe's text."""

    def act(scene: Scene, place: Path, patch: object) -> str:
        (line,) = scene.page.visitor.start(content)
        return line

    return Case(f"recipe: {name}", "refused", says, act=act)


PASTED = [
    paste("empty", "must be a mapping", ""),
    paste("no YAML", "not valid YAML", "model: ["),
    paste("a list", "must be a mapping", "- demo"),
    paste("aliases that mean gigabytes", "aliases", "a: &a [x,x]\nb: &b [*a,*a]\nmodel: *b"),
    paste("an object of Python's", "not valid YAML", "model: !!python/object/apply:os.system ['touch /tmp/evil']"),
    paste("brackets without end", "nested more than 32 deep", "[" * 19_000),
    paste("lists without end", "nested more than 32 deep", "- " * 9_000),
    paste("a date that does not exist", "not valid YAML", "seed: 2026-99-99"),
    paste("control characters", "not valid YAML", "model: \x07demo"),
    paste("too long", "the limit is", "# " + "x" * 20_001),
    paste("keys that are no words", "Unknown key", "{1: 2, null: 3}"),
    paste("markup", "Unknown key", "<script>alert(1)</script>: 1"),
]
CASES = [*SETTINGS, *TEXTS, *PASTED]
