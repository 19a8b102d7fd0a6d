"""The schemes of the bitsandbytes library: LLM.int8(), NF4 and FP4, in the files that everybody reads.

- `nf4`, `fp4` (Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314): 4 bits a
  weight in blocks of 64, on levels that suit normally distributed weights (NF4) or on those of a 4-bit float. With
  `double_quant` the blocks' scales are quantized too: 4.13 bits a weight instead of 4.5.
- `int8` (Dettmers et al., 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv
  2208.07339): 8-bit weights and inputs, but input channels with a magnitude above `threshold` are computed in 16 bits.
  How many channels that is, is measured on calibration text and shown for each linear.

Needs no calibration otherwise, takes seconds, and holds one block at a time. Weights become the library's own modules,
and are written before they compute for the first time: on some processors the first product repacks 4-bit weights, and
files written afterwards are wrong. 4 bits are refused where a linear's inputs are not a multiple of 64 or its outputs
of 32: there the library computes something else on a CPU without saying so.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from engine.bnb import Kind, hollow
from engine.calibration import walk_blocks
from engine.errors import BadParams
from engine.fields import With
from engine.methods import Calibrated, Context, Selection, StoredBits
from engine.models import LoadedModel, blocks, head, linears
from engine.observing import BlockLinear, stretches
from engine.quantize._place import describe

TITLE = "bitsandbytes"
CHANGES = ("disk", "memory")
BLOCK = 64  # weights that share a scale, of 4 bits


class Params(Selection, Calibrated):
    """Settings of bitsandbytes; the calibration only measures outliers, for `int8`."""

    scheme: Literal["nf4", "fp4", "int8"] = Field("nf4", description="4-bit NormalFloat, 4-bit float, or LLM.int8().")
    double_quant: Annotated[bool, With("scheme", "nf4", "fp4")] = Field(
        True, description="With 4 bits: quantize the scales of the blocks, too."
    )
    threshold: Annotated[float, With("scheme", "int8")] = Field(
        6.0, gt=0.0, le=1e4, description="With int8: inputs above it stay 16 bit."
    )
    head: bool = Field(
        False, description="The output head, too, where it is not the embeddings: the library knows no embeddings."
    )

    def beyond_blocks(self) -> tuple[bool, bool]:
        return self.head, False

    def calibration_length(self) -> int | None:
        return super().calibration_length() if self.scheme == "int8" else None

    def check_model(self, linears: Mapping[str, tuple[int, int]], parameters: int, width: int = 16) -> None:
        """Refuse the shapes that 4-bit products damage."""
        if self.scheme != "int8":
            for name, (outputs, inputs) in linears.items():
                if inputs % 64 or outputs % 32:
                    raise BadParams(
                        f"{self.scheme} needs inputs divisible by 64 and outputs by 32; {name} has {inputs} and "
                        f"{outputs}. Use int8, or leave it out with ignore."
                    )

    def check_config(self, config: Mapping[str, JsonValue]) -> None:
        """Refuse a family whose linears `transformers` does not take for the library's when it reads the files."""
        if config.get("model_type") == "falcon":
            raise BadParams("transformers cannot load Falcon's own linears in bitsandbytes' files. Use quantize/rtn.")

    def stored_bits(self, outputs: int, inputs: int) -> StoredBits:
        """A byte and a scale a row, or 4 bits and a scale for each block of 64, in 8 bit where quantized again."""
        if self.scheme == "int8":
            return StoredBits(8, 32 / inputs, dense=8 + 32 / inputs)  # the library computes on them in any dtype
        share = (8 if self.double_quant else 32) / 64
        return StoredBits(4, share, dense=4 + share)

    def unfit_for_experts(self) -> str:
        return "the library knows linears only, and fused experts are none."

    def leaves_codes(self) -> bool:
        """The weights are the library's."""
        return False


def apply(model: LoadedModel, params: Params, context: Context) -> LoadedModel:
    """Replace the selected linears of the blocks, and the head where it is chosen, by the library's modules."""
    shares: list[float | None] = []
    for block in walk_blocks(model, context, params, "norm", original=True):
        while block.linears:  # each is let go when it is done
            context.check_cancelled()
            linear = block.linears.pop(0)
            shares.append(outliers(linear, params.threshold))
            made = make(linear.weight, linear.module._parameters.get("bias"), params)
            context.emit("linear", audit(BlockLinear(linear.name, linear.module), made, params, shares[-1]))
            model.put(linear.name, made)
    prefix, modules = blocks(model.network)
    chosen = [f"{prefix}.{number}.{path}" for number, block in enumerate(modules) for path, _ in linears(block)]
    chosen = [name for name in chosen if params.selects(name)] + [head(model.network)[0]] * params.head
    found = [share for share in shares if share is not None]
    if found and len(shares) == len(chosen):  # else an attempt before this one has seen the others
        mean = sum(found) / len(found)
        context.log(f"{mean:.2%} of the input channels have outliers above {params.threshold:g} and stay 16 bit")
    model.kernels |= dict.fromkeys(chosen, f"bitsandbytes {params.scheme}")
    kept = [name for name, _ in linears(model.network) if name not in chosen]
    model.stored_as = config(params, kept, str(model.network.dtype).removeprefix("torch."))
    return model


@torch.no_grad()
def make(weight: Tensor, bias: Tensor | None, params: Params) -> nn.Module:
    """The library's module for a weight (N, K), quantized by the library as it does when a module goes to a device.

    Some rows, or blocks of 64, at a time: on a CPU the library takes 11 to 20 bytes for each weight of a call. Scales
    that are quantized again are so together, for they share their mean.
    """
    modules: Any = importlib.import_module("bitsandbytes.nn")  # here, for they are slow to import
    library: Any = importlib.import_module("bitsandbytes.functional")
    threshold = params.threshold if params.scheme == "int8" else 0.0
    rows, columns = weight.shape
    made: Any = hollow(rows, columns, Kind(params.scheme, threshold), weight.dtype, bias=bias is not None)
    if params.scheme == "int8":
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
        for some in stretches(weight):
            codes[some], scales[some], _ = library.int8_vectorwise_quant(weight[some].half().contiguous())
        made.weight = modules.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        parts = weight.reshape(-1, BLOCK)  # (N * K / 64, 64)
        codes = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(len(parts), dtype=torch.float32, device=weight.device)
        for some in stretches(parts):
            packed, state = library.quantize_4bit(parts[some].contiguous(), blocksize=BLOCK, quant_type=params.scheme)
            codes.view(len(parts), -1)[some], scales[some] = packed.view(-1, BLOCK // 2), state.absmax
        state.shape, state.absmax = weight.shape, scales
        if params.double_quant:
            state.offset = scales.mean()
            state.absmax, state.state2 = library.quantize_blockwise(scales - state.offset, blocksize=256)
            state.nested = True
        made.quant_state = state
        made.weight = modules.Params4bit(
            codes, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=params.double_quant,
            quant_type=params.scheme, bnb_quantized=True, module=made,
        )  # fmt: skip
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    module: nn.Module = made
    return module


@torch.no_grad()
def audit(linear: BlockLinear, made: nn.Module, params: Params, outliers: float | None) -> dict[str, JsonValue]:
    """What became of a linear: the error of its weight, every stored byte, its levels, its share of outliers."""
    library: Any = importlib.import_module("bitsandbytes.functional")
    weight: Any = made.weight
    columns = linear.weight.shape[1]
    grid: list[float] = []
    if params.scheme == "int8":
        bits, size = 8, columns

        def after(rows: slice) -> Tensor:
            found: Tensor = library.int8_vectorwise_dequant(weight.data[rows], weight.SCB[rows])
            return found
    else:
        state = weight.quant_state
        bits, size, scales = 4, state.blocksize, state.absmax
        if state.nested:
            scales = library.dequantize_blockwise(scales, state.state2) + state.offset
        grid = sorted((state.code * scales.median()).tolist())

        def after(rows: slice) -> Tensor:
            start, stop, _ = rows.indices(len(linear.weight))
            own = scales[start * columns // size : stop * columns // size]
            some = library.QuantState(
                own, torch.Size((stop - start, columns)), blocksize=size, quant_type=params.scheme, dtype=state.dtype
            )  # fmt: skip
            found: Tensor = library.dequantize_4bit(weight.data[start * columns // 2 : stop * columns // 2], some)
            return found

    stored = sum(t.numel() * t.element_size() for key, t in made.state_dict().items() if key != "bias")
    said = describe(linear, after, bits, size, 8 * stored / linear.weight.numel(), grid)
    return said if outliers is None else said | {"outliers": outliers}


def outliers(linear: BlockLinear, threshold: float) -> float | None:
    """The share of a linear's input channels that exceed the threshold somewhere; None where no text was read."""
    return None if linear.input_max is None else float((linear.input_max > threshold).float().mean())


def config(params: Params, kept: list[str], dtype: str) -> dict[str, JsonValue]:
    """The `quantization_config` of config.json, as transformers' BitsAndBytesConfig writes it; `dtype`: of products."""
    four = params.scheme != "int8"
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
        "bnb_4bit_quant_type": params.scheme if four else "fp4", "bnb_4bit_use_double_quant": params.double_quant,
        "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": params.threshold,
        "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": list[JsonValue](kept),
    }  # fmt: skip
