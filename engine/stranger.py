"""Read an artifact part by part with nothing that wrote it: tensors by their names, packed ones by the library.

The compressed-tensors library defines the format; what it unpacks is what the file says to others. The codes, scales
and zero points of our own format (`engine.own_packed`) are laid out as its are, so it unpacks them, too. What
bitsandbytes wrote becomes its own modules again, those that `transformers` would make by config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from engine import bnb, models
from engine.bnb import Kind
from engine.checkpoint import part_of
from engine.errors import BadArtifact
from engine.models import LoadedModel, linears, put_tensor
from engine.orientation import rows_and_columns, turned
from engine.own_packed import PACKED_KEY
from engine.packing import InputGrid
from engine.shards import TensorFiles


class Stranger:
    """The parts of a network in an artifact's files, read without anything that wrote them."""

    def __init__(self, folder: Path, network: PreTrainedModel, parts: list[str]) -> None:
        self._files = TensorFiles.of_folder(folder)
        config = json.loads((folder / "config.json").read_text())
        body = config.get("quantization_config") or config.get(PACKED_KEY)
        self._theirs: list[str] = []
        if body is not None and body.get("quant_method") == "bitsandbytes":
            self._theirs, body = _replaced(network, body), None
        self._config = None if body is None else QuantizationConfig.model_validate(body)
        self._keys: dict[str, list[str]] = {part: [] for part in parts}
        for name in self._files.names:
            self._keys[part_of(name, parts)].append(name)
        present = {name.replace(".weight_packed", ".weight") for name in self._files.names}
        self.tied: Mapping[str, str] = {
            t: source for t, source in (network.all_tied_weights_keys or {}).items() if t not in present
        }
        for name, module in network.named_modules():
            activations = None if f"{name}.weight_scale" not in self._files.names else self._scheme(name, module)[1]
            if activations is not None:
                scale = None if activations.dynamic else float(self._files.read(f"{name}.input_scale"))
                models.quantize_inputs(module, InputGrid(scale, "float" if activations.type == "float" else "int"))

    def fill(self, model: LoadedModel, part: str) -> None:
        """Give the part its weights."""
        modules: dict[str, dict[str, Tensor]] = {}
        theirs = [name for name in self._theirs if name == part or name.startswith(f"{part}.")]
        for name in theirs:
            self._files.fill_library(name, model.network.get_submodule(name), model.device)
        for key in self._keys[part]:
            if any(key.startswith(f"{name}.") for name in theirs):
                continue
            path, _, leaf = key.rpartition(".")
            modules.setdefault(path, {})[leaf] = self._files.read(key).to(model.device)
        for path, tensors in modules.items():
            module = model.network.get_submodule(path)
            if "weight_scale" in tensors:
                tensors = self._unpacked(path, module, tensors)
            for leaf, tensor in tensors.items():
                put_tensor(module, leaf, tensor)

    def prefetch(self, part: str) -> None:
        """Nothing: the files were written a moment ago."""

    def _unpacked(self, path: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight that a module's packed tensors stand for, and its bias."""
        scheme = self._scheme(path, module)[0]
        library = BaseCompressor.get_value_from_registry(str(scheme.format))
        packed = {leaf: tensor for leaf, tensor in tensors.items() if leaf != "bias"}
        if scheme.format == "float-quantized" and "weight_packed" in packed:  # our own name for what it calls so
            packed["weight"] = packed.pop("weight_packed")
        weight = library.decompress(packed, scheme)["weight"]
        found = {"weight": turned(module, weight).contiguous()}
        return found | ({"bias": tensors["bias"]} if "bias" in tensors else {})

    def _scheme(self, path: str, module: nn.Module) -> tuple[QuantizationScheme, QuantizationArgs | None]:
        """How config.json says that a module is packed, and how its inputs are rounded."""
        assert self._config is not None
        for scheme in self._config.config_groups.values():
            if is_match(path, module, scheme.targets, self._config.ignore):
                return scheme, scheme.input_activations
        raise BadArtifact(f"config.json does not say how {path} is packed.")


def _replaced(network: PreTrainedModel, config: Mapping[str, JsonValue]) -> list[str]:
    """Put closed modules of bitsandbytes where a `quantization_config` has them; their names."""
    skipped = config["llm_int8_skip_modules"]
    assert isinstance(skipped, list)
    scheme = str(config["bnb_4bit_quant_type"]) if config["load_in_4bit"] else "int8"
    kind = Kind(scheme, float(str(config["llm_int8_threshold"])))
    names = [name for name, _ in linears(network) if should_convert_module(name, [str(each) for each in skipped])]
    for name in names:
        linear = network.get_submodule(name)
        bias = linear._parameters.get("bias") is not None
        made = bnb.hollow(*rows_and_columns(linear), kind, network.dtype, bias=bias)
        network.set_submodule(name, made)
    return names
