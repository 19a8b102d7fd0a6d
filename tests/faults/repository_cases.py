"""Bad models: what is typed as one, and what lies in the folder."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults.scene import Body, Case, Scene, config, folder, recipe

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
NO_FOLDER = "There is no model folder"


def source(name: str, text: str, says: str = NO_FOLDER) -> Case:
    return recipe(f"model: {name}", "refused", says, model={"source": text})


SOURCES = [
    source("empty", "", "at least 1 character"),
    source("spaces", "   ", "empty or holds a NUL"),
    source("NUL", "demo\0x", "empty or holds a NUL"),
    source("traversal", "../../../../../../../../etc", "no config.json"),
    source("an absolute folder that is no model", "/etc", "no config.json"),
    source("a file", "/etc/passwd"),
    source("URL of elsewhere", "https://example.com/gpt2", "no address of a model"),
    source("file URL", "file:///etc/passwd", "no address of a model"),
    source("HTML", "<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
    source("too long for a field", "x" * 5000, "at most 4096 characters"),
    source("too long for a name", "x" * 4000, "is too long for a model of the hub"),
    source("three parts", "one/two/three", "more than one slash"),
    source("another user's home", "~nobody-of-that-name/model"),
    source("half a character", "mo\ud800del", "unicode"),
    source("two lines", "demo\nmodel", "cannot be the name of a model"),
    source("a device", "/dev/zero"),
]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A damage: other tensors in the file."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    """A damage: another header before the same bytes."""

    def edit(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        body = json.loads(raw[8 : 8 + length])
        change(body)
        text = json.dumps(body).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return edit


def index(**weight_map: object) -> Callable[[Path], None]:
    """A damage: an index instead of a file."""

    def edit(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A damage: other content of a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)  # type: ignore[func-returns-value]


def hole(name: str, size: int) -> Callable[[Path], None]:
    """A damage: a file of that size which takes no disk."""
    return lambda folder: os.truncate(folder / name, size)


def larger_than_memory(folder: Path) -> None:
    """A checkpoint of 4 TB, of which nothing is on the disk."""
    raw = json.dumps({UP: {"dtype": "BF16", "shape": [1 << 20, 1 << 21], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(folder / WEIGHTS, 8 + len(raw) + (1 << 42))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def own_code(folder: Path) -> None:
    """A repository that brings code; it must never run."""
    config(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.Evil"})(
        folder
    )
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'it-ran')!r}, 'w').close()\n")


def plain_tokens(folder: Path) -> None:
    """No pad token, no first token, no chat template."""
    for file in ("special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        (folder / file).unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    body = json.loads(path.read_text())
    for key in ("pad_token", "bos_token", "eos_token", "unk_token", "chat_template"):
        body.pop(key, None)
    path.write_text(json.dumps(body))
    config(bos_token_id=None, eos_token_id=None, pad_token_id=None)(folder)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = torch.zeros(7, 64, dtype=torch.bfloat16)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][0, 0] = float("nan")


def endless(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][0, 0] = float("inf")


def fewer_embeddings(folder: Path) -> None:
    """Rows are missing for half of the tokens."""
    config(vocab_size=640)(folder)
    name = "model.embed_tokens.weight"
    weights(lambda tensors: tensors.update({name: tensors[name][:640].clone()}))(folder)


def other_vocabulary(scene: Scene, place: Path) -> Body:
    """A teacher whose tokens are others."""
    teacher = scene.copy(place)
    path = teacher / "tokenizer.json"
    body = json.loads(path.read_text())
    vocabulary = body["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(body))
    return {**scene.good(), "steps": [{"distill/logits": {"teachers": str(teacher)}}]}


BROKEN = "is truncated or not a safetensors file"
ABSURD = "that cannot be right"
FILES = [
    folder("pickled weights only", "refused", "they can run code", pickled),
    folder("no weights at all", "refused", "has no model.safetensors", unlink(WEIGHTS)),
    folder("a truncated file", "refused", BROKEN, hole(WEIGHTS, 5000)),
    folder("a file of 3 bytes", "refused", BROKEN, write(WEIGHTS, b"abc")),
    folder("a web page instead of weights", "refused", BROKEN, write(WEIGHTS, b"<!doctype html>" * 99)),
    folder("a git-lfs pointer", "refused", BROKEN, write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n")),
    folder("a header of 8 exabytes", "refused", BROKEN, write(WEIGHTS, struct.pack("<Q", (1 << 63) - 1) + b"{}" * 99)),
    folder("a header that is a list", "refused", BROKEN, write(WEIGHTS, struct.pack("<Q", 2) + b"[]" + b"\0" * 99)),
    folder(
        "a header that nests without end",
        "refused",
        BROKEN,
        write(WEIGHTS, struct.pack("<Q", 200_000) + b"[" * 200_000),
    ),
    folder("bytes beyond the file", "refused", BROKEN, header(lambda h: h[UP].update(data_offsets=[0, 1 << 50]))),
    folder("bytes that run backwards", "refused", BROKEN, header(lambda h: h[UP].update(data_offsets=[900, 100]))),
    folder("a negative shape", "refused", BROKEN, header(lambda h: h[UP].update(shape=[-128, -64]))),
    folder("a shape that its bytes do not fill", "refused", BROKEN, header(lambda h: h[UP].update(shape=[512, 64]))),
    folder("a dtype that nobody knows", "refused", BROKEN, header(lambda h: h[UP].update(dtype="BF99"))),
    folder(
        "an index that points outside",
        "refused",
        "is not a file of this folder",
        index(**{UP: "../outside.safetensors"}),
    ),
    folder("an index with absolute paths", "refused", "is not a file of this folder", index(**{UP: "/etc/passwd"})),
    folder("an index of files that are not there", "refused", "is not a file of this folder", index(**{UP: "a.bin"})),
    folder("an index of numbers", "refused", "is not a file of this folder", index(**{UP: 7})),
    folder("a damaged index", "refused", "is damaged", lambda f: (index()(f), write(INDEX, "{")(f))),
    folder("an empty index", "refused", "names no file", index()),
    folder("NaN weights", "failed", "NaN or infinite", weights(not_a_number)),
    folder("infinite weights", "failed", "NaN or infinite", weights(endless)),
    folder("a missing tensor", "failed", "do not fit the config", weights(lambda t: t.pop(UP))),
    folder("a misshapen tensor", "failed", "shape", weights(fewer_rows)),
    folder("larger than memory", "refused", "are free", larger_than_memory, steps=[]),
    folder("no config", "refused", "has no config.json", unlink("config.json")),
    folder("an adapter", "refused", "holds only an adapter", adapter),
    folder("a config that is no JSON", "refused", "config.json is not JSON", write("config.json", "{")),
    folder("a config that is no text", "refused", "config.json is not JSON", write("config.json", b"\xff\xfe\x81")),
    folder("a config that is a list", "refused", "is not a JSON object", write("config.json", "[]")),
    folder("a config of 8 GiB", "refused", "config.json", hole("config.json", 8 << 30)),
    folder(
        "a config that nests without end", "refused", "config.json is not JSON", write("config.json", "[" * 200_000)
    ),
    folder("a million layers", "refused", ABSURD, config(num_hidden_layers=10**6)),
    folder("layers below zero", "refused", ABSURD, config(num_hidden_layers=-1)),
    folder("a width in words", "refused", ABSURD, config(hidden_size="64")),
    folder("a width of nothing", "refused", ABSURD, config(hidden_size=0)),
    folder("a vocabulary of a fraction", "refused", ABSURD, config(vocab_size=1280.5)),
    folder("more layers than numbers reach", "refused", ABSURD, config(num_hidden_layers=10**30)),
    folder("heads of a megabyte", "refused", ABSURD, config(head_dim=1 << 20)),
    folder("no heads for keys", "refused", ABSURD, config(num_key_value_heads=0)),
    folder("heads that do not divide", "refused", "do not divide", config(num_attention_heads=7, head_dim=None)),
    folder("shared heads that do not divide", "refused", "do not divide", config(num_key_value_heads=3)),
    folder("an unknown type", "refused", "is unknown to the installed transformers", config(model_type="nonsense")),
    folder("a type that is a list", "refused", "is unknown to the installed", config(model_type=["llama"])),
    folder("encoder and decoder", "refused", "not a causal language model", config(model_type="t5")),
    folder("an activation that nobody knows", "refused", "hidden_act", config(hidden_act="nonsense")),
    folder(
        "positions that nobody knows", "refused", "rope", config(rope_parameters={"rope_type": "nonsense", "factor": 2})
    ),
    folder("already quantized", "refused", "already quantized", config(quantization_config={"quant_method": "gptq"})),
    folder("a repository with code", "handled", "", own_code),
    folder(
        "a kernel for attention from elsewhere",
        "handled",
        "",
        config(_attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    ),
    folder("a tokenizer without any special token", "handled", "", plain_tokens),
    folder("no tokenizer", "refused", "tokenizer", lambda f: [each.unlink() for each in f.glob("*token*")]),
    folder("a damaged tokenizer", "failed", "tokenizer.json is not JSON", write("tokenizer.json", "{")),
    folder("a tokenizer of 4 GiB", "refused", "tokenizer.json", hole("tokenizer.json", 4 << 30)),
    folder(
        "more tokens than embeddings",
        "failed",
        "has 640 embeddings",
        fewer_embeddings,
        steps=[{"quantize/gptq": {"group_size": 32, "samples": 2, "sequence_length": 32}}],
    ),
    folder("generation settings that are no JSON", "handled", "", write("generation_config.json", "{")),
    Case("a teacher of other tokens", "refused", "has another tokenizer", make=other_vocabulary),
]

CASES = [*SOURCES, *FILES]
