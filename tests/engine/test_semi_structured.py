"""2:4 on CUDA: what is recognised anywhere, and the kernels' products where there is a GPU."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine import artifacts, runtime
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune import magnitude
from engine.records import Recipe
from engine.runtime.semi_structured import SemiStructuredLinear, is_semi_structured, use_semi_structured
from tests.conftest import in_memory, tiny_config

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("row", "whether"),
    [
        ([0, 1, 0, 2, 3, 4, 0, 0], True),
        ([0, 0, 0, 2, 0, 0, 0, 0], True),
        ([0, 1, 2, 2, 3, 4, 0, 0], False),
        ([1, 0, 0, 1, 1, 1], False),
    ],
)
def test_two_of_four_zeros_are_recognised(row: list[float], whether: bool) -> None:
    assert is_semi_structured(torch.tensor([[0.0] * len(row), row])) == whether


def test_a_cpu_computes_the_zeros_densely(tiny: LoadedModel, context: Context, tmp_path: Path) -> None:
    magnitude.apply(tiny, magnitude.Params(pattern="2:4"), context)
    assert use_semi_structured(tiny.network, "cpu") == {}
    artifacts.write(tiny, Recipe(), tmp_path / "artifact")
    assert runtime.load(tmp_path / "artifact").kernels == {}


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_computes_the_dense_product(bias: bool) -> None:
    linear = nn.Linear(256, 128, bias=bias, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    linear.weight.view(-1, 4)[:, 1:3] = 0
    sparse = SemiStructuredLinear(linear)
    for shape in ((1, 256), (3, 256), (2, 5, 256), (64, 256)):
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        torch.testing.assert_close(sparse(x), linear(x), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("storage", ["dense", "bitmask"])
def test_a_pruned_model_computes_with_the_kernel(storage: str, context: Context, tmp_path: Path) -> None:
    model = in_memory(tiny_config(hidden_size=256, intermediate_size=512))
    magnitude.apply(model, magnitude.Params.model_validate({"pattern": "2:4", "storage": storage}), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    read = runtime.load(tmp_path / "artifact", "cuda")
    assert set(read.kernels) == model.pruned
    assert all(kernel.startswith("2:4 ") for kernel in read.kernels.values())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found, expected = read.network(ids.cuda()).logits.float().cpu(), model.network(ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.03
