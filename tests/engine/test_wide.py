"""Products in float32 where bfloat16 has no instructions: the same numbers, whatever the processor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from engine import processor, wide
from engine.checkpoint import attention, shell
from engine.wide import (
    Everywhere,
    OneRow,
    WideConv1D,
    WideFalcon,
    WideLinear,
    bare,
    is_plain,
    mixed_precision,
    product,
    widen,
)
from tests.conftest import tiny_config
from tests.families import FAMILIES

SHAPES = [(1, 32, 16), (8, 64, 48), (9, 64, 48), (600, 40, 24), (3, 1, 1), (20, 1 << 15, 100)]  # M, K, N


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without products of bfloat16, whatever this one is."""
    monkeypatch.setattr(wide, "multiplies_bfloat16", lambda kind: kind != "cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3).to(torch.bfloat16)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_product_is_the_exact_one_rounded_once(m: int, k: int, n: int) -> None:
    x, weight, bias = numbers(m, k), numbers(n, k, seed=1), numbers(n, seed=2)
    exact = x.double() @ weight.double().t() + bias.double()
    y = product(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-3 * float(exact.abs().max()))
    torch.testing.assert_close(product(x[None], weight)[0], product(x, weight), rtol=0, atol=0)


@pytest.mark.parametrize("m", [0, 1, 3, 9])
def test_a_weight_may_lie_the_other_way_round(m: int) -> None:
    x, weight, bias = numbers(m, 40), numbers(40, 24, seed=1), numbers(24, seed=2)
    exact = x.double() @ weight.double() + bias.double()
    torch.testing.assert_close(product(x, weight.t(), bias).double(), exact, rtol=2**-7, atol=2**-6)
    assert product(x, weight.t()).shape == (m, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_those_of_the_product(dtype: torch.dtype) -> None:
    x, weight, bias = numbers(20, 12).to(dtype), numbers(7, 12, seed=1).to(dtype), numbers(7, seed=2).to(dtype)
    ours = [each.clone().requires_grad_() for each in (x, weight, bias)]
    exact = [each.double().requires_grad_() for each in (x, weight, bias)]
    slope = numbers(20, 7, seed=3)
    product(*ours).backward(slope)
    nn.functional.linear(*exact).backward(slope.double())
    for mine, right in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=2**-7, atol=1e-4)


def test_autocast_gets_its_bfloat16_from_weights_that_are_not_rounded() -> None:
    linear = WideLinear(64, 48).requires_grad_(False)
    x = torch.randn(30, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x)
    torch.testing.assert_close(found, nn.functional.linear(x, linear.weight, linear.bias).to(torch.bfloat16))
    assert linear(x).dtype == torch.float32


def test_frozen_bfloat16_weights_pass_gradients_on() -> None:
    linear = WideLinear(16, 8, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(10, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[3], linear.weight.float().sum(0), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_widened_network_computes_what_it_did(family: str) -> None:
    config = copy.deepcopy(FAMILIES[family])
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention(config)).eval()
    widened = copy.deepcopy(plain)
    widen(widened)
    kinds = {type(module) for module in widened.modules()}
    assert any(issubclass(kind, WideLinear | WideConv1D | WideFalcon) for kind in kinds)
    assert not kinds & {nn.Linear, Conv1D}
    ids = torch.arange(40).view(2, 20)
    expected, found = (each(input_ids=ids).logits.float() for each in (plain, widened))
    assert (found - expected).norm() / expected.norm() < 0.01
    with Everywhere():
        torch.testing.assert_close(plain(input_ids=ids).logits.float(), found, rtol=0, atol=0)


def test_only_plain_linears_are_widened() -> None:
    class Own(nn.Linear):
        pass

    parts = nn.ModuleList([nn.Linear(2, 2), Own(2, 2), Conv1D(2, 2), nn.Embedding(2, 2)])
    widen(parts)
    assert [type(part) for part in parts] == [WideLinear, Own, WideConv1D, nn.Embedding]
    assert [is_plain(part) for part in parts] == [True, False, False, False]
    assert is_plain(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_bare_linears_compute_what_they_compute_dressed(dtype: torch.dtype) -> None:
    parts = nn.ModuleList([nn.Linear(40, 24), nn.Linear(40, 24, bias=False), Conv1D(24, 40), FalconLinear(40, 24),
                           FalconLinear(40, 24, bias=False)]).to(dtype)  # fmt: skip
    nn.init.normal_(parts[2].bias)
    for _ in range(2):
        for part in parts:
            for m in (1, 3, 20):
                x = numbers(m, 40, seed=m).to(dtype)
                torch.testing.assert_close(bare(part)(x), part(x))
        widen(parts)
    for part in parts:
        assert isinstance(bare(part), OneRow)
        part.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
        assert bare(part) is part  # what rounds the inputs would not be asked


def test_training_is_mixed_only_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(network: nn.Module) -> bool:
        with mixed_precision(network):
            return torch.is_autocast_enabled("cpu")

    part = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)])
    assert not mixed(nn.Linear(2, 2))
    assert mixed(part)  # numbers of both kinds meet: autocast makes them one
    monkeypatch.setattr(wide, "multiplies_bfloat16", lambda kind: True)
    assert mixed(nn.Linear(2, 2))


def test_linux_and_torch_agree_on_the_processor() -> None:
    if processor.instructions():
        assert bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) == processor.multiplies_bfloat16()


def test_the_fallback_for_unknown_processors_is_belief(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, expected in [
        (set(), True), ({"avx2", "fma"}, False), ({"avx512vl", "avx512bw", "avx512dq"}, True), ({"bf16"}, True),
    ]:  # fmt: skip
        monkeypatch.setattr(processor, "instructions", lambda known=known: frozenset(known))
        assert processor.multiplies_bfloat16() is expected


def test_shells_are_widened() -> None:
    network = shell(tiny_config(), torch.bfloat16)
    assert {type(module) for module in network.modules() if isinstance(module, nn.Linear)} == {WideLinear}
