"""What each peer made, as a folder that Maquette's measuring code reads, so that all are measured alike.

4-bit and 3-bit weights become dense by the rules of the format that they were written in: (q - z) s in float32,
rounded once to bfloat16. What rounds its inputs, too, is compressed-tensors from both, and measured as it is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.packing import unpack
from engine.runtime.load import Schemes
from engine.shards import PARTS, TensorFiles, read_quantized


def measurable(product: Path, original: Path, out: Path) -> Path:
    """The folder to measure: `product` itself, or its dense copy in `out`."""
    config = json.loads((product / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "gptq" and config["format"] != "pack-quantized":
        return product
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(original, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    files = TensorFiles.of_folder(product)
    tensors = from_gptq(files, config) if config["quant_method"] == "gptq" else from_compressed(files, config, product)
    known = set(TensorFiles.of_folder(original).names)
    assert known - {"lm_head.weight"} <= set(tensors) <= known | {"lm_head.weight"}, known ^ set(tensors)
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def from_gptq(files: TensorFiles, config: dict[str, int]) -> dict[str, Tensor]:
    """The dense tensors of an AutoGPTQ folder, first version: zero points are stored less 1."""
    assert config.get("checkpoint_format", "gptq") == "gptq"
    bits = config["bits"]
    packed = [name.removesuffix(".qweight") for name in files.names if name.endswith(".qweight")]
    parts = {f"{name}.{part}" for name in packed for part in ("qweight", "qzeros", "scales", "g_idx")}
    tensors = {name: files.read(name) for name in files.names if name not in parts}
    for name in packed:
        index = files.read(f"{name}.g_idx").long()
        scale = files.read(f"{name}.scales").float()  # (G, N)
        codes = unpack(files.read(f"{name}.qweight").t().contiguous(), bits, len(index))  # (N, K)
        zero = (unpack(files.read(f"{name}.qzeros"), bits, scale.shape[1]).int() + 1) % 2**bits  # (G, N)
        tensors[f"{name}.weight"] = (codes.int() - zero.t()[:, index]).float() * scale.t()[:, index]
    return tensors


def from_compressed(files: TensorFiles, config: dict[str, object], folder: Path) -> dict[str, Tensor]:
    """The dense tensors of a compressed-tensors `pack-quantized` folder."""
    schemes = Schemes(config, folder)
    packed = [name.removesuffix(".weight_packed") for name in files.names if name.endswith(".weight_packed")]
    parts = {f"{name}.{part}" for name in packed for part in PARTS}
    tensors = {name: files.read(name) for name in files.names if name not in parts}
    for name in packed:
        rows, columns = files.read(f"{name}.weight_shape").tolist()
        weight = read_quantized(files, name, rows, columns, schemes.of(name))
        index = torch.arange(columns) // weight.group_size
        steps = weight.codes.int() - weight.zero[:, index].int()
        tensors[f"{name}.weight"] = steps.float() * weight.scale.float()[:, index]
    return tensors
