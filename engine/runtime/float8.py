"""Linears with 8-bit floating-point weights and inputs (e4m3), on GPUs whose tensor cores multiply them.

One scale a row of the weight and one a token of the inputs: `torch._scaled_mm` takes both, sums in float32 and scales
the sums. GPUs have such products from compute capability 8.9 on, with a scale a row from 9.0 on. torch computes them on
a CPU, too, without instructions for it: right, which the tests use, and of no advantage, so nothing else does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.packing import QuantizedWeight

KERNEL = "fp8-fp8-cuda"
NEEDED = (9, 0)  # compute capability
MULTIPLE = 16  # of both sides of the weight


class Float8Linear(nn.Module):
    """y = x W^T + bias, both in 8-bit floats; x (..., K) and y (..., N) in bfloat16.

    weight: float8 (N, K); scales: float32 (1, N).
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    kernel = KERNEL

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device | str) -> None:
        super().__init__()
        assert weight.inputs is not None
        self.inputs = weight.inputs
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("weight", weight.codes.view(torch.float8_e4m3fn).to(device))
        self.register_buffer("scales", weight.scale.float().reshape(1, -1).contiguous().to(device))
        self.register_buffer("bias", None if bias is None else bias.detach().to(device, torch.bfloat16))

    @staticmethod
    def knows(weight: QuantizedWeight, device: torch.device | str) -> bool:
        """Whether the device multiplies such weights and inputs itself."""
        rows, columns = weight.codes.shape
        plain = weight.kind == "float" and weight.inputs is not None and weight.scale.shape == (rows, 1)
        able = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= NEEDED
        return plain and able and rows % MULTIPLE == 0 and columns % MULTIPLE == 0

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        values, scale = self.inputs.encode(x.reshape(-1, self.in_features))  # 8-bit floats in x's dtype, (tokens, 1)
        y: Tensor = torch._scaled_mm(
            values.to(torch.float8_e4m3fn), self.weight.t(), scale_a=scale.float(), scale_b=self.scales,
            out_dtype=torch.bfloat16,
        )  # fmt: skip
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel}"
