"""Load a saved model so that it computes on its packed weights.

The network is built on the meta device and filled tensor by tensor, so that no dense copy of the whole
ever exists and the memory of loading stays near the size of the files. Artifacts are
compressed-tensors `pack-quantized`, or in a format of ours (`engine.own_packed`); a folder without packed weights is
loaded dense by `engine.models`, and where two of four weights are zero CUDA's kernels for that compute
(`engine.runtime.semi_structured`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine import models, patterns
from engine.checkpoint import read_config, shell
from engine.errors import BadModel, BadParams, short
from engine.models import LoadedModel, put_tensor, read_generation_config
from engine.orientation import rows_and_columns
from engine.own_packed import PACKED_KEY
from engine.packing import Kind
from engine.runtime.embedding import KERNEL, Int8Embedding
from engine.runtime.float8 import Float8Linear
from engine.runtime.linear import SIMULATED, Int8Linear, packed_linear
from engine.runtime.norms_and_gates import take_over
from engine.runtime.pages import use_large_pages
from engine.runtime.semi_structured import use_semi_structured
from engine.shards import PARTS, Scheme, TensorFiles, dense_of, read_quantized
from engine.wide import WideLinear

ROUNDED = "inputs rounded to 8 bits"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "mixed-precision")


def load(folder: Path, device: str = "cpu") -> LoadedModel:
    """The model in `folder` in its own dtype and in evaluation mode, with linears that compute on packed weights.

    `kernels` names, for each quantized linear, the kernel that computes it, or says that it is simulated.

    Raises:
        BadModel: tensors are missing, unexpected, misshapen or not finite, or packed in a way we do not read.
    """
    config = read_config(folder)
    files = TensorFiles.of_folder(folder)
    packed = _packed(files)
    if not packed:
        model = models.load(folder, str(config.dtype or torch.bfloat16).removeprefix("torch."), device)
        model.kernels.update(library_kernels(model.network))
        model.kernels.update(use_semi_structured(model.network, device))
        use_large_pages(model.network)
        return model
    schemes = Schemes.of_folder(config, folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    network = shell(config, dtype, device)
    kernels = {name: _fill_packed(network, name, files, schemes, device) for name in packed}
    for name in files.names:
        module, _, part = name.rpartition(".")
        if not (module in kernels and part in (*PARTS, "weight", "bias")):
            _fill_dense(network, name, files, device)
    _finish(network, folder)
    kernels |= use_semi_structured(network, device)
    use_large_pages(network)
    if not any(kernel.startswith("simulated") for kernel in kernels.values()):  # else it computes as strangers do
        take_over(network)
    kv_cache = models.cache_grid(config, folder)
    return LoadedModel(network, models.load_tokenizer(folder), folder, kernels=kernels, kv_cache=kv_cache)


def load_dense(folder: Path, dtype: str = "bfloat16", device: str = "cpu") -> LoadedModel:
    """As `models.load`; weights that are packed in our own format (`engine.own_packed`) beside their codes.

    Raises:
        BadModel: as `load`, or as `models.load`.
    """
    config = read_config(folder)
    if getattr(config, PACKED_KEY, None) is None:
        return models.load(folder, dtype, device)
    files, schemes = TensorFiles.of_folder(folder), Schemes.of_folder(config, folder)
    network = shell(config, getattr(torch, dtype), device)
    model = LoadedModel(network, models.load_tokenizer(folder), folder, kv_cache=models.cache_grid(config, folder))
    for name in _packed(files):
        module = _submodule(network, name, files)
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            raise files.bad(f"{name} is packed, but the network has no linear there")
        weight = read_quantized(files, name, *rows_and_columns(module), schemes.of(name)).to(device)
        model.quantized[name] = weight
        module._parameters["weight"] = nn.Parameter(dense_of(module, weight).to(network.dtype), requires_grad=False)
        if weight.inputs is not None:
            models.quantize_inputs(module, weight.inputs)
    for name in files.names:
        module_name, _, part = name.rpartition(".")
        if not (module_name in model.quantized and part in PARTS):
            _fill_dense(network, name, files, device)
    model.pruned, model.sparse = set(files.sparse), set(files.sparse)
    _finish(network, folder)
    return model


def _packed(files: TensorFiles) -> list[str]:
    """The names of the modules whose weights are packed."""
    marks = (".weight_packed", ".weight_scale")
    return sorted({name.rpartition(".")[0] for name in files.names if name.endswith(marks)})


def library_kernels(network: PreTrainedModel) -> dict[str, str]:
    """The modules that bitsandbytes computes, by name."""
    found = {}
    for name, module in network.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            scheme = getattr(module.weight, "quant_type", "int8")
            found[name] = f"bitsandbytes {scheme}"
    return found


class Schemes:
    """Bits and symmetry of each packed module, from a config's `quantization_config` or our own key of it."""

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
        self._patterns = {target: self._read(target) for target in self._by_target if target.startswith(patterns.MARK)}

    @classmethod
    def of_folder(cls, config: PretrainedConfig, folder: Path) -> Schemes:
        """Those of the model folder with this config."""
        return cls(getattr(config, PACKED_KEY, None) or getattr(config, "quantization_config", None), folder)

    def of(self, name: str) -> Scheme:
        """That of a module: by its name, else by a `re:` pattern, else by its class.

        Raises:
            BadModel: no group covers it, or not with integers of 2 to 8 bits; or a pattern takes too long.
        """
        fitting = (target for target in self._patterns if self._fits(target, name))
        target = name if name in self._by_target else next(fitting, "Linear")
        weights = self._by_target.get(target, {})
        bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
        if not isinstance(bits, int) or bits not in range(2, 9) or weights.get("type", "int") not in ("int", "float"):
            raise BadModel(f"{short(self._folder.name)}: config.json gives {name} no integer scheme that we can read.")
        inputs = weights.get("inputs")
        strategy = str(inputs.get("strategy")) if isinstance(inputs, dict) else None
        if strategy not in (None, "token", "tensor") or (isinstance(inputs, dict) and inputs.get("num_bits") != 8):
            raise self._unreadable_inputs(name)
        kind: Kind = "float" if weights.get("type") == "float" else "int"
        if isinstance(inputs, dict) and not (inputs.get("symmetric", True) and inputs.get("type", "int") == kind):
            raise self._unreadable_inputs(name)
        return Scheme(bits, bool(symmetric), strategy, kind)

    def _unreadable_inputs(self, name: str) -> BadModel:
        return BadModel(f"{short(self._folder.name)}: config.json quantizes the inputs of {name} as we cannot read.")

    def _read(self, target: str) -> patterns.Expression:
        try:
            return patterns.Expression(target.removeprefix(patterns.MARK))
        except ValueError:
            raise self._bad(target) from None

    def _fits(self, target: str, name: str) -> bool:
        try:
            return self._patterns[target].matches(name)
        except BadParams:
            raise self._bad(target) from None

    def _bad(self, target: str) -> BadModel:
        return BadModel(
            f"{short(self._folder.name)}: config.json chooses modules by {short(target)}, which is no pattern or takes "
            "too long to match. Choose another model."
        )


def _fill_packed(network: PreTrainedModel, name: str, files: TensorFiles, schemes: Schemes, device: str) -> str:
    """Replace the linear or the embeddings `name` by one that computes on its packed weight; the name of its kernel."""
    linear = _submodule(network, name, files)
    if type(linear) is nn.Embedding:
        weight = read_quantized(files, name, *rows_and_columns(linear), schemes.of(name))
        network.set_submodule(name, Int8Embedding(weight, device))
        return KERNEL
    if not isinstance(linear, nn.Linear | Conv1D):
        raise files.bad(f"{name} is packed, but the network has no linear there")
    rows, columns = rows_and_columns(linear)
    weight = read_quantized(files, name, rows, columns, schemes.of(name))
    bias = files.get(f"{name}.bias")
    if (bias is None) != (linear.bias is None) or (bias is not None and bias.shape != (rows,)):
        raise files.bad(f"{name}.bias does not fit the config")
    dtype = linear.weight.dtype
    if weight.inputs is not None and dtype == torch.bfloat16 and Int8Linear.knows(weight, device):
        integers = Int8Linear(weight, bias, device)
        network.set_submodule(name, integers)
        return integers.kernel
    if weight.inputs is not None and dtype == torch.bfloat16 and Float8Linear.knows(weight, device):
        floats = Float8Linear(weight, bias, device)
        network.set_submodule(name, floats)
        return floats.kernel
    packed = packed_linear(weight, bias, device, dtype)
    if packed is not None:
        network.set_submodule(name, packed)
        if weight.inputs is None:
            return packed.kernel
        models.quantize_inputs(packed, weight.inputs)
        return f"{packed.kernel}, {ROUNDED}"
    dense = WideLinear(columns, rows, bias=bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.dequantize().to(device, dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    network.set_submodule(name, dense)
    if weight.inputs is not None:
        models.quantize_inputs(dense, weight.inputs)
    return SIMULATED.format(dtype=str(dtype).removeprefix("torch."))


def _fill_dense(network: PreTrainedModel, name: str, files: TensorFiles, device: str) -> None:
    """Put the tensor `name` into the network."""
    module, _, leaf = name.rpartition(".")
    owner = _submodule(network, module, files)
    tensor = files.read(name)
    expected: Tensor | None = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if expected is None or expected.shape != tensor.shape:
        raise files.bad(f"{name} of shape {tuple(tensor.shape)} does not fit the config")
    put_tensor(owner, leaf, tensor.to(device, expected.dtype))


def _submodule(network: PreTrainedModel, name: str, files: TensorFiles) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise files.bad(f"{name} is not part of a {type(network).__name__}") from None


def _finish(network: PreTrainedModel, folder: Path) -> None:
    """Tie what is tied, and refuse what is still without data.

    Raises:
        BadModel: a tensor that the network needs was not in the files.
    """
    network.tie_weights()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_meta:
            raise BadModel(f"{short(folder.name)}: {name} is missing; save or download the model again.")
    if (generation := read_generation_config(folder)) is not None:
        network.generation_config = generation
