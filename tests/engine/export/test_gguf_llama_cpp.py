"""GGUF in llama.cpp itself, where a Python that has it is named: predictions, and tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.methods import Context
from engine.models import LoadedModel, load
from engine.places import DEMO
from engine.quantize import rtn
from tests.conftest import in_memory
from tests.engine.export.gguf_files import (
    IDS,
    KNOWN,
    SPLITS,
    TEXTS,
    VARIANTS,
    logits_of,
    made,
    splitting,
    uneven,
    varied,
    with_bytes,
)

LLAMA_CPP = "MAQUETTE_LLAMA_CPP_PYTHON"  # the interpreter of an environment that has llama_cpp
READER = """
import json, sys
import numpy as np
from llama_cpp import Llama
asked = json.load(open(sys.argv[1]))
for path, ids in asked["files"].items():
    model = Llama(model_path=path, logits_all=True, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.reset()
    model.eval(asked["begins"].get(path, ids[:1]))
    written = []
    for _ in range(12):
        written.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(written[-1:])
    tokens = [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
    np.save(path + ".npy", logits)
    json.dump({"written": written, "tokens": tokens}, open(path + ".json", "w"))
"""


@torch.inference_mode()
def sure(model: LoadedModel) -> tuple[list[int], list[int]]:
    """The beginning of a text that a model goes on with for twelve tokens without hesitating, and how it does."""
    for line in (DEMO / "text.txt").read_text().splitlines():
        ids, written = model.tokenizer(line).input_ids[:16], list[int]()
        while len(ids) == 16 and len(written) < 12:
            two = model.network(torch.tensor([ids + written]), use_cache=False).logits[0, -1].topk(2)
            if two.values[0] - two.values[1] < 0.5:
                break
            written.append(int(two.indices[0]))
        if len(written) == 12:
            return ids, written
    raise AssertionError("it hesitates always")


@pytest.mark.skipif(LLAMA_CPP not in os.environ, reason=f"{LLAMA_CPP} names no Python that has llama_cpp")
@pytest.mark.timeout(900)
def test_llama_cpp_computes_the_same(context: Context, tmp_path: Path) -> None:
    """Its own graphs and kernels, which round inputs to 8 bits: near, not equal; the same text on the demo."""
    four: dict[str, object] = {"bits": 4, "group_size": 64}
    demos: dict[str, dict[str, object] | None] = {
        "dense": None, "4": four, "4, zero points": four | {"symmetric": False}, "8": {"bits": 8, "group_size": 64},
        "3": {"bits": 3, "group_size": 128}, "all": four | {"head": True, "embeddings": True},
        "2 in K": {"bits": 2, "granularity": "channel", "targets": "*.0.*.[qkvo]_proj"},
    }  # fmt: skip
    models = {f"demo {name}": (load(DEMO / "model"), grid) for name, grid in demos.items()}
    for family, config in KNOWN.items():
        models |= {
            f"{family} {bits}": (uneven(in_memory(config)), bits and {"bits": bits, "group_size": 32})
            for bits in (None, 4)
        }
    models |= {f"variant {case}": (uneven(in_memory(varied(case))), None) for case in VARIANTS}
    files, expected, begins, texts = {}, {}, {}, {}
    for name, (model, grid) in models.items():
        at = tmp_path / re.sub(r"\W+", "-", name)
        at.mkdir()
        if grid:
            rtn.apply(model, rtn.Params.model_validate(grid), dataclasses.replace(context, folder=at / "blocks"))
        file = str(made(model, at))
        ids = model.tokenizer(TEXTS[0]).input_ids[:100] if "demo" in name else IDS[0].tolist()
        files[file] = ids
        logits_of(model)  # which puts the exact weights in
        with torch.inference_mode():
            expected[file] = model.network(torch.tensor([ids]), use_cache=False).logits[0]
        if "demo" in name:
            begins[file], texts[file] = sure(model)
    (tmp_path / "asked.json").write_text(json.dumps({"files": files, "begins": begins, "texts": TEXTS}))
    subprocess.run([os.environ[LLAMA_CPP], "-c", READER, str(tmp_path / "asked.json")], check=True, cwd=tmp_path)
    tokens = [load(DEMO / "model").tokenizer(text).input_ids for text in TEXTS]
    for file, logits in expected.items():
        divergence = divergence_of(logits, file)
        # A token of a mixture whose experts are nearly alike goes to others; one of the demo's texts hangs by a hair.
        assert divergence.median() < 5e-4, file
        assert divergence.mean() < 1e-2, file
        if file in texts:
            said = json.loads(Path(f"{file}.json").read_text())
            assert said["written"] == texts[file], file
            assert said["tokens"] == tokens, file
    dense, four = (str(next((tmp_path / f"llama-{bits}" / "out").glob("*.gguf"))) for bits in (None, 4))
    assert divergence_of(expected[dense], four).median() > 5e-3  # what other weights would give


@pytest.mark.skipif(LLAMA_CPP not in os.environ, reason=f"{LLAMA_CPP} names no Python that has llama_cpp")
@pytest.mark.timeout(900)
def test_llama_cpp_splits_a_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    models = {name: splitting(name) for name in SPLITS}
    models |= {name: with_bytes(name) for name in ("Llama", "Gemma", "Phi-3")}
    files = {}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        files[name] = str(made(model, tmp_path / name))
    asked = {"files": {file: [1, 2, 3] for file in files.values()}, "begins": {}, "texts": TEXTS}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    subprocess.run([os.environ[LLAMA_CPP], "-c", READER, str(tmp_path / "asked.json")], check=True, cwd=tmp_path)
    for name, file in files.items():
        found = json.loads(Path(f"{file}.json").read_text())["tokens"]
        for text, tokens in zip(TEXTS, found, strict=True):
            spaced = name == "Llama" and text.startswith(" ")  # of which its notes say that one more is there
            assert tokens[spaced:] == models[name].tokenizer(text).input_ids, (name, text)


def divergence_of(logits: Tensor, file: str) -> Tensor:
    """KL in nat of what llama.cpp predicts to `logits`, token by token."""
    ours, theirs = (each.float().log_softmax(-1) for each in (logits, torch.from_numpy(np.load(f"{file}.npy"))))
    return (ours.exp() * (ours - theirs)).sum(-1)
