"""Linears whose weights are zero in two of four places, computed by CUDA's semi-structured kernels.

From compute capability 8.0 on, GPUs multiply such matrices in half the steps. Of each four weights two are held, with
two bits each for their places: 9/16 of the memory in 16 bit. torch takes cuSPARSELt where it has it, else CUTLASS;
which shapes and devices these take differs between versions. So each linear is tried, and compared with its dense
product.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.wide import is_plain

log = logging.getLogger(__name__)

KERNEL = "2:4 {library}"
LEAST = (8, 0)  # compute capability
TRIED = 16  # tokens of the product that is compared
CLOSE = 0.02  # relative distance; bf16 products differ in their last bits


class SemiStructuredLinear(nn.Module):
    """y = x Wᵀ + b with a weight (N, K) of which two in four are zero, on a CUDA device.

    Raises:
        RuntimeError: the kernels do not take this shape or device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        library, compressed = _compress(linear.weight.detach())
        self.kernel = KERNEL.format(library=library)
        self.weight = nn.Parameter(compressed, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def _compress(weight: Tensor) -> tuple[str, Tensor]:
    """The library that will compute, and the weight as it holds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the interface a prototype
        if torch.backends.cusparselt.is_available():
            return "cuSPARSELt", torch.sparse.to_sparse_semi_structured(weight)
        compressed: Tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        return "CUTLASS", compressed


def is_semi_structured(weight: Tensor) -> bool:
    """Whether two of each four consecutive inputs of a weight (N, K) are zero, at least."""
    rows, columns = weight.shape
    return columns % 4 == 0 and bool(((weight != 0).view(rows, -1, 4).sum(-1, dtype=torch.uint8) <= 2).all())


def use_semi_structured(network: nn.Module, device: str) -> dict[str, str]:
    """Replace the dense linears of a network on a CUDA device that the kernels take; the kernel of each by name."""
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) < LEAST:
        return {}
    found = {}
    for name, linear in list(network.named_modules()):
        if not is_plain(linear) or linear.weight.dtype not in (torch.bfloat16, torch.float16):
            continue
        if linear._forward_pre_hooks or not linear.weight.is_contiguous() or not is_semi_structured(linear.weight):
            continue
        try:
            sparse = SemiStructuredLinear(linear)
            distance = _distance(sparse, linear)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            log.warning("%s: its 2:4 zeros stay dense, for the kernel refuses it (%s)", name, error)
            continue
        if distance > CLOSE:
            log.warning("%s: its 2:4 zeros stay dense, for the kernel is off by %.3f", name, distance)
            continue
        network.set_submodule(name, sparse)
        found[name] = sparse.kernel
    return found


@torch.inference_mode()
def _distance(sparse: nn.Module, linear: nn.Linear) -> float:
    """The relative distance of the product of some random inputs from the dense one, of one token and of several."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(TRIED, linear.in_features, generator=dice).to(linear.weight.device, linear.weight.dtype)
    worst = 0.0
    for some in (x, x[:1], x[None, :3]):
        expected = linear(some).float()
        worst = max(worst, float((sparse(some).float() - expected).norm() / expected.norm().clamp(min=1e-30)))
    return worst
