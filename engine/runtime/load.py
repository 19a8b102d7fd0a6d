"""Load a saved model so that it computes on its packed weights.

The network is built on the meta device and filled tensor by tensor, so that no dense copy of the whole
ever exists and the memory of loading stays near the size of the files. Artifacts are
compressed-tensors `pack-quantized`; a folder without packed weights is loaded dense by `engine.models`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine import models
from engine.errors import BadModel, short
from engine.models import LoadedModel
from engine.packing import InputGrid, Kind, QuantizedWeight, unpack
from engine.runtime.linear import SIMULATED, Int8Linear, packed_linear
from engine.runtime.pages import use_large_pages

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale")
ROUNDED = "inputs rounded to 8 bits"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


def load(folder: Path, device: str = "cpu") -> LoadedModel:
    """The model in `folder` in its own dtype and in evaluation mode, with linears that compute on packed weights.

    `kernels` names, for each quantized linear, the kernel that computes it, or says that it is simulated.

    Raises:
        BadModel: tensors are missing, unexpected, misshapen or not finite, or packed in a way we do not read.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    files = TensorFiles(folder)
    marks = (".weight_packed", ".weight_scale")
    packed = sorted({name.rpartition(".")[0] for name in files.names if name.endswith(marks)})
    if not packed:
        model = models.load(folder, str(config.dtype or torch.bfloat16).removeprefix("torch."), device)
        model.kernels.update(library_kernels(model.network))
        use_large_pages(model.network)
        return model
    schemes = Schemes(getattr(config, "quantization_config", None), folder)
    network = _skeleton(config)
    kernels = {name: _fill_packed(network, name, files, schemes, device) for name in packed}
    for name in files.names:
        module, _, part = name.rpartition(".")
        if not (module in kernels and (part in PARTS or part in ("weight", "bias"))):
            _fill_dense(network, name, files, device)
    _finish(network, folder, device)
    network.train(False)
    use_large_pages(network)
    return LoadedModel(network, models.load_tokenizer(folder), folder, kernels=kernels)


def library_kernels(network: PreTrainedModel) -> dict[str, str]:
    """The modules that bitsandbytes computes, by name."""
    found = {}
    for name, module in network.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            scheme = getattr(module.weight, "quant_type", "int8")
            found[name] = f"bitsandbytes {scheme}"
    return found


class TensorFiles:
    """The tensors of a folder's safetensors files by name, in one file or in shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
        self._file_of: dict[str, Path] = {}
        for file in files or ["model.safetensors"]:
            path = folder / file
            if Path(file).name != file or not path.is_file():
                raise self.bad(f"the weight file {short(file)!r} is missing or outside the folder")
            try:
                with safe_open(path, framework="pt") as handle:
                    self._file_of |= dict.fromkeys(handle.keys(), path)
            except SafetensorError as error:
                raise self.bad(f"{file} is no complete safetensors file ({short(error)})") from None
        self.names = sorted(self._file_of)

    def read(self, name: str) -> Tensor:
        """A copy of a tensor; the file is mapped only meanwhile, so that none of it stays resident.

        Raises:
            BadModel: there is none of that name, or it holds NaN or infinite values.
        """
        if name not in self._file_of:
            raise self.bad(f"{name} is missing")
        with safe_open(self._file_of[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name).clone()
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise self.bad(f"{name} holds NaN or infinite values")
        return tensor

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where there is none of that name."""
        return self.read(name) if name in self._file_of else None

    def bad(self, problem: str) -> BadModel:
        """The error that says what is wrong with this folder."""
        return BadModel(f"{short(self.folder.name)}: {problem}; save or download the model again.")


class Schemes:
    """Bits and symmetry of each packed module, from a config's `quantization_config`."""

    def __init__(self, config: object, folder: Path) -> None:
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        groups = config.get("config_groups") if isinstance(config, dict) else None
        if not isinstance(groups, dict) or not isinstance(config, dict) or config.get("format") not in FORMATS:
            raise BadModel(f"{short(folder.name)}: its weights are packed, but config.json does not say how.")
        self._folder = folder
        self._by_target: dict[str, dict[str, JsonValue]] = {
            target: group["weights"] | {"inputs": group.get("input_activations")}
            for group in groups.values()
            for target in group["targets"]
        }

    def of(self, name: str) -> tuple[int, bool, str | None, Kind]:
        """(bits, symmetric, strategy of the inputs, kind of numbers) of a module.

        By its name, else by a `re:` pattern, else by its class.

        Raises:
            BadModel: no group covers it, or not with integers of 2 to 8 bits.
        """
        patterns = (t for t in self._by_target if t.startswith("re:") and re.match(t[3:], name))
        target = name if name in self._by_target else next(patterns, "Linear")
        weights = self._by_target.get(target, {})
        bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
        if not isinstance(bits, int) or bits not in range(2, 9) or weights.get("type", "int") not in ("int", "float"):
            raise BadModel(f"{short(self._folder.name)}: config.json gives {name} no integer scheme that we can read.")
        inputs = weights.get("inputs")
        strategy = str(inputs.get("strategy")) if isinstance(inputs, dict) else None
        if strategy not in (None, "token", "tensor") or (isinstance(inputs, dict) and inputs.get("num_bits") != 8):
            raise BadModel(f"{short(self._folder.name)}: config.json quantizes the inputs of {name} as we cannot read.")
        return bits, bool(symmetric), strategy, "float" if weights.get("type") == "float" else "int"


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The network without data: every parameter and buffer on the meta device."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = config.dtype or torch.bfloat16
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=config.dtype, attn_implementation=models.attention(config), trust_remote_code=False
        )
    assert isinstance(network, PreTrainedModel)
    return network


def _fill_packed(network: PreTrainedModel, name: str, files: TensorFiles, schemes: Schemes, device: str) -> str:
    """Replace the linear `name` by one that computes on its packed weight; the name of its kernel."""
    linear = _submodule(network, name, files)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise files.bad(f"{name} is packed, but the network has no linear there")
    columns, rows = linear.weight.shape if isinstance(linear, Conv1D) else linear.weight.shape[::-1]
    weight = read_quantized(files, name, rows, columns, schemes)
    bias = files.get(f"{name}.bias")
    if (bias is None) != (linear.bias is None) or (bias is not None and bias.shape != (rows,)):
        raise files.bad(f"{name}.bias does not fit the config")
    dtype = linear.weight.dtype
    if weight.inputs is not None and dtype == torch.bfloat16 and Int8Linear.knows(weight, device):
        integers = Int8Linear(weight, bias, device)
        network.set_submodule(name, integers)
        return integers.kernel
    packed = packed_linear(weight, bias, device, dtype)
    if packed is not None:
        network.set_submodule(name, packed)
        if weight.inputs is None:
            return packed.kernel
        models.quantize_inputs(packed, weight.inputs)
        return f"{packed.kernel}, {ROUNDED}"
    dense = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.dequantize().to(device, dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    network.set_submodule(name, dense)
    if weight.inputs is not None:
        models.quantize_inputs(dense, weight.inputs)
    return SIMULATED.format(dtype=str(dtype).removeprefix("torch."))


def read_quantized(files: TensorFiles, name: str, rows: int, columns: int, schemes: Schemes) -> QuantizedWeight:
    """The codes, scales and zero points of a packed module, as they were found.

    Raises:
        BadModel: a part is missing or misshapen.
    """
    bits, symmetric, strategy, kind = schemes.of(name)
    inputs = None
    if strategy is not None:
        inputs = InputGrid(None if strategy == "token" else float(files.read(f"{name}.input_scale")), kind)
    scale = files.read(f"{name}.weight_scale")
    if f"{name}.weight_packed" not in files.names:
        return _read_plain(files, name, (rows, columns), scale, kind, inputs)
    packed, shape = (files.read(f"{name}.{part}") for part in ("weight_packed", "weight_shape"))
    words = -(-columns * bits // 32)
    if packed.dtype != torch.int32 or packed.shape != (rows, words) or shape.tolist() != [rows, columns]:
        raise files.bad(f"{name}: {bits}-bit codes of shape {tuple(packed.shape)} do not fit {rows} x {columns}")
    if files.get(f"{name}.weight_g_idx") is not None:
        raise files.bad(f"{name} has groups in activation order, which have no kernel here")
    scale = scale.view(1, 1) if scale.numel() == 1 else scale
    if scale.dim() != 2 or scale.shape[0] not in (1, rows) or columns % scale.shape[1]:
        raise files.bad(f"{name}: scales of shape {tuple(scale.shape)} do not fit {rows} x {columns}")
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        points = files.read(f"{name}.weight_zero_point")
        points = points.view(1, 1) if points.numel() == 1 else points
        # Packed along dim 0, so transposed rows of codes. Stock transformers wants it padded with rows of zeros.
        needed = -(-scale.shape[0] * bits // 32)
        if points.dim() != 2 or points.shape[0] < needed or points.shape[1] != scale.shape[1]:
            raise files.bad(f"{name}: zero points of shape {tuple(points.shape)} do not fit")
        zero = unpack(points[:needed].T.contiguous(), bits, scale.shape[0]).T.contiguous()
    # A few rows at a time: unpacking takes a byte for every bit.
    codes = torch.cat([unpack(part, bits, columns) for part in torch.split(packed, 256)])
    return QuantizedWeight(codes, scale, zero, bits, symmetric, inputs)


def _read_plain(
    files: TensorFiles, name: str, shape: tuple[int, int], scale: Tensor, kind: Kind, inputs: InputGrid | None
) -> QuantizedWeight:
    """A weight that stands in the file as int8 or float8 (N, K), with one scale a row."""
    weight = files.read(f"{name}.weight")
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    if weight.dtype != dtype or weight.shape != shape or scale.shape != (shape[0], 1):
        raise files.bad(f"{name}: 8-bit weights of shape {tuple(weight.shape)} do not fit {shape[0]} x {shape[1]}")
    codes = weight.view(torch.uint8) if kind == "float" else (weight.to(torch.int16) + 128).to(torch.uint8)
    return QuantizedWeight(codes, scale, torch.full_like(scale, 128, dtype=torch.uint8), 8, True, inputs, kind)


def _fill_dense(network: PreTrainedModel, name: str, files: TensorFiles, device: str) -> None:
    """Put the tensor `name` into the network."""
    module, _, leaf = name.rpartition(".")
    owner = _submodule(network, module, files)
    tensor = files.read(name)
    expected: Tensor | None = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if expected is None or expected.shape != tensor.shape:
        raise files.bad(f"{name} of shape {tuple(tensor.shape)} does not fit the config")
    tensor = tensor.to(device, expected.dtype)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _submodule(network: PreTrainedModel, name: str, files: TensorFiles) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise files.bad(f"{name} is not part of a {type(network).__name__}") from None


def _finish(network: PreTrainedModel, folder: Path, device: str) -> None:
    """Tie what is tied, compute the buffers that no file holds, and refuse what is still without data.

    Raises:
        BadModel: a tensor that the network needs was not in the files.
    """
    network.tie_weights()
    # Non-persistent buffers (rotary frequencies, embedding scales) follow from the config. The family's own
    # initialisation computes them; everything else is marked as already initialised.
    for parameter in network.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in network.modules():
        module._is_hf_initialized = not module._non_persistent_buffers_set  # type: ignore[assignment]
        for leaf in module._non_persistent_buffers_set:
            if (buffer := module._buffers[leaf]) is not None and buffer.is_meta:
                empty = torch.zeros_like(buffer, device="cpu")
                module._buffers[leaf] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
    with torch.no_grad():
        network.initialize_weights()  # type: ignore[no-untyped-call]
    derived = {name for name, _ in network.named_non_persistent_buffers()}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_meta or (name in derived and not torch.isfinite(tensor).all()):
            raise BadModel(f"{short(folder.name)}: {name} is missing; save or download the model again.")
    nn.Module.to(network, device)
    if (folder / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
