"""The model card of an artifact: README.md as the hub reads it, with what is true of the files for ever.

What was measured is left out when the pipeline writes it, because times differ from run to run and the manifest covers
this file; `text` takes the numbers as a section of their own where somebody downloads or pushes the model.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from pydantic import JsonValue

from engine import methods, rescue
from engine.headers import is_own
from engine.own_packed import rounds_inputs
from engine.recipes import dump_recipe
from engine.records import Recipe
from engine.sources import split

CARD = "README.md"
GGUF = "gguf"
REPO = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@[\w./-]{1,100})?")
SEVERAL = "teachers"  # the setting that names several models


def base_model(source: str) -> str | None:
    """The hub's name of a model's source; None for the demo and for folders, which the hub does not know."""
    found = REPO.fullmatch(source)
    return found[1] if found else None


def shareable(recipe: Recipe) -> Recipe:
    """The recipe without this machine's folders: paths keep their last part."""
    model = recipe.model
    if base_model(model.source) is None:
        model = model.model_copy(update={"source": _last(model.source)})
    steps = tuple(
        step.model_copy(update={"params": {key: _cut(key, value) for key, value in step.params.items()}})
        for step in recipe.steps
    )
    return recipe.model_copy(update={"model": model, "steps": steps, "calibration": _last(recipe.calibration)})


def _cut(key: str, value: JsonValue) -> JsonValue:
    """A setting; where it is an absolute path, its last part, and so of each of several models."""
    if not isinstance(value, str):
        return value
    if key == SEVERAL:
        with suppress(ValueError):  # a quote that is not closed
            return shlex.join(str(_cut("", each)) for each in split(value))
    return _last(value) if value.startswith(("/", "~", "\\")) else value


def _last(path: str) -> str:
    """The last part of a path; of an artifact's folder, which run it is of."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if len(parts) > 2 and parts[-1] == "artifact":
        return f"run-{parts[-3]}"
    return parts[-1] if parts else path


def text(recipe: Recipe, config: Mapping[str, JsonValue], results: str = "") -> str:
    """The card of a model made by `recipe`; `config` is its config.json, `results` Markdown with what was measured."""
    return _text(recipe, config, results.strip(), "")


def _text(recipe: Recipe, config: Mapping[str, JsonValue], results: str, file: str) -> str:
    """As `text`, of a folder with one GGUF `file`, where there is one."""
    quantization = config.get("quantization_config")
    kind = str(quantization.get("quant_method", "")) if isinstance(quantization, dict) else ""
    title = _plain(recipe.title())
    source = base_model(recipe.model.source)
    told = f"[{source}](https://huggingface.co/{source})" if source else f"`{_last(recipe.model.source)}`"
    parts = [
        f"---\n{yaml.safe_dump(front_matter(recipe, config, kind), sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"{told}, made smaller with Maquette: {title}.",
        results,
        "## How to load it",
        loading_gguf(file) if file else loading(config, kind),
        "## How it was made",
        f"```yaml\n{dump_recipe(shareable(recipe)).rstrip().replace('```', chr(39) * 3)}\n```",
        "## Limits",
        limits(recipe, kind),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(recipe: Recipe, config: Mapping[str, JsonValue], kind: str) -> dict[str, object]:
    """What the hub reads; its licence is the base model's and is not claimed here.

    The hub shows how the library it names loads the files.
    """
    families = list(dict.fromkeys(step.method.split("/")[0] for step in recipe.steps))
    library = "gguf" if kind == GGUF else "maquette" if is_own(config) else "transformers"
    found: dict[str, object] = {"library_name": library, "pipeline_tag": "text-generation"}
    if source := base_model(recipe.model.source):
        found["base_model"] = source
        if families:
            found["base_model_relation"] = "quantized" if "quantize" in families else "finetune"
    tags = ["maquette", *families, *(step.method.replace("/", "-") for step in recipe.steps)]
    bits = [f"{step.params['bits']}-bit" for step in recipe.steps if isinstance(step.params.get("bits"), int)]
    found["tags"] = list(dict.fromkeys([*tags, *bits, *([kind] if kind else [])]))
    return found


def loading(config: Mapping[str, JsonValue], kind: str) -> str:
    """How to load the files with stock `transformers`, or that it cannot."""
    if rounds_inputs(config):
        return (
            "These weights are in a format of Maquette's own, which also says that inputs are rounded. Stock "
            "`transformers` refuses them; Maquette computes with them."
        )
    if is_own(config):
        return (
            "These weights are in a format of Maquette's own, which stock `transformers` refuses. Write a folder that "
            "it loads with `python -m engine export FOLDER --format dense --to OTHER`."
        )
    needs = {
        "compressed-tensors": " compressed-tensors",
        "bitsandbytes": " bitsandbytes",
        "gptq": " gptqmodel",
        "awq": " gptqmodel",
    }.get(kind, "")
    return (
        f"```sh\npip install transformers torch{needs}\n```\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPO", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPO")\n```'
    )


def loading_gguf(file: str) -> str:
    """How to run a GGUF file with llama.cpp, or with Ollama."""
    name = file.removesuffix(".gguf").lower()
    return (
        f'```sh\nllama-cli -m {file} -p "Once upon a time"\n```\n\n'
        f'```sh\necho "FROM ./{file}" > Modelfile && ollama create {name} && ollama run {name}\n```'
    )


def limits(recipe: Recipe, kind: str) -> str:
    """What nobody should expect of it."""
    said = ["- It inherits what its base model can and cannot do, and its licence."]
    if kind == "compressed-tensors":
        said.append("- Stock `transformers` unpacks the weights to 16 bit: small on disk, not in memory. A packed "
                    "runtime such as Maquette keeps them small.")  # fmt: skip
    said += [f"- {line}" for line in rescue.effects(recipe)]
    if any("sparsity" in step.params or _is_sparse(step.method) for step in recipe.steps):
        said.append("- Zeros among the weights make nothing faster without a kernel that skips them.")
    said.append(
        "- What it can do was measured on short texts of one domain; measure it on yours before you rely on it."
    )
    return "\n".join(said)


def _is_sparse(method: str) -> bool:
    """Whether a method prunes single weights, which leaves zeros: not whole blocks, neurons or tokens."""
    return method.startswith("prune/") and "sparsity" in methods.get(method).params.model_fields


def write(folder: Path, recipe: Recipe) -> None:
    """Write the card into a finished artifact's folder, beside its config."""
    config: dict[str, JsonValue] = json.loads((folder / "config.json").read_text())
    (folder / CARD).write_text(text(recipe, config), encoding="utf-8")


def write_gguf(folder: Path, recipe: Recipe, file: str, notes: Sequence[str]) -> None:
    """Write the card of a GGUF into its folder; `notes` say what the file holds."""
    held = "\n".join(["## What the file holds\n", *(f"- {note}" for note in notes)]) if notes else ""
    card = _text(recipe, {"quantization_config": {"quant_method": GGUF}}, held, file)
    (folder / CARD).write_text(card, encoding="utf-8")


def _plain(words: str) -> str:
    """Text that begins no markup in Markdown."""
    cleaned = " ".join(words.split())
    for mark in "\\`*_[]<>|#":
        cleaned = cleaned.replace(mark, f"\\{mark}")
    return cleaned
