"""Closed forms against what autograd makes of the plain formulas, alone and in the networks of every family."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, Phi3Config, PreTrainedModel

from engine.body import Body, eager
from engine.closed_forms import ATTENTION, ROTATION, Attention, Rotation, closed_forms, short_attention
from engine.runtime.norms_and_gates import ACTS, Gate, RmsNorm, take_over
from engine.wide import multiplies_bfloat16
from tests.conftest import in_memory, tiny_config
from tests.engine.conftest import needs_kernels
from tests.families import FAMILIES, GROUPED, MIXTURES

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_kernels]
WIDTHS = [torch.float32, torch.bfloat16]
IDS = torch.randint(3, 1280, (3, 24), generator=torch.Generator().manual_seed(7))
POSITIONS = torch.cat([torch.arange(9), torch.arange(11), torch.arange(4)]).expand(3, 24)
# Norms and attention of the families are computed in closed form, but where they are of another kind.
OTHER_NORMS = {"gpt2", "gpt_neox", "opt", "bloom", "falcon", "stablelm"}
OTHER_ATTENTION = {"gemma2", "falcon", "bloom", "opt"}
ALL = FAMILIES | MIXTURES | {"phi3, in part": Phi3Config(**GROUPED, partial_rotary_factor=0.75)}


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *given: Tensor) -> None:
    """Results and gradients of all that is given agree: to float32's digits, or to two roundings of bfloat16."""
    wide = [each.double().requires_grad_() for each in given]
    own = [each.clone().requires_grad_() for each in given]
    with torch.enable_grad():
        wanted, found = plain(*wide), ours(*own)
    gradient = made(*wanted.shape, seed=9).to(found.dtype)
    wanted.backward(gradient.double())
    found.backward(gradient)
    limit = 2e-6 if found.dtype == torch.float32 else 0.01
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(own, wide, strict=True))]
    for mine, theirs in pairs:
        assert mine is not None
        assert theirs is not None
        assert float((mine.detach().double() - theirs.detach()).norm()) <= limit * float(theirs.detach().norm())


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 7, 16, 40, 256])
def test_a_norm(size: int, offset: float, dtype: torch.dtype, kind: str) -> None:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return (weight + offset) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)

    x = made(5, 9, size, dtype=dtype)
    same(lambda x, weight: RmsNorm.apply(x, weight, offset, 1e-2, dtype), plain, x, made(size, seed=1))


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("size", [1, 33, 700])
def test_a_gate(size: int, act: str, dtype: torch.dtype, kind: str) -> None:
    gate, up = made(4, size, dtype=dtype) * 4, made(4, size, seed=1, dtype=dtype)
    same(lambda gate, up: Gate.apply(act, gate, up), lambda gate, up: ACTS[act](gate) * up, gate, up)


def test_a_gate_far_from_zero_is_open_or_shut(kind: str) -> None:
    for act in ACTS:
        x = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4], requires_grad=True)
        with torch.enable_grad():
            found = Gate.apply(act, x, torch.ones(7))
        found.sum().backward()
        torch.testing.assert_close(found.detach(), x.detach().clamp_min(0), rtol=0, atol=1e-10)
        torch.testing.assert_close(x.grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(("batch", "size", "turning"), [(1, 8, 8), (2, 32, 32), (2, 80, 80), (1, 16, 4), (2, 80, 60)])
def test_a_rotation(batch: int, size: int, turning: int, dtype: torch.dtype, kind: str) -> None:
    cos, sin = made(batch, 5, turning, seed=1), made(batch, 5, turning, seed=2)

    def plain(x: Tensor) -> Tensor:
        x, still = x[..., :turning], x[..., turning:]
        first, second = x.chunk(2, -1)
        turned = x * cos[:, None].double() + torch.cat([-second, first], -1) * sin[:, None].double()
        return torch.cat([turned, still], -1)

    x = made(2, 5, 3, size, dtype=dtype).transpose(1, 2)  # as linears make them
    same(lambda x: Rotation.apply(x, cos, sin, dtype), plain, x)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(("heads", "shared", "tokens", "size"), [(1, 1, 1, 8), (4, 2, 19, 16), (6, 2, 40, 24)])
def test_attention(heads: int, shared: int, tokens: int, size: int, dtype: torch.dtype, kind: str) -> None:
    dice = torch.Generator().manual_seed(3)
    end = torch.arange(1, tokens + 1).expand(2, tokens)
    first = (end * torch.rand(2, tokens, generator=dice)).int()
    places = torch.arange(tokens)
    mask = (places >= first[..., None]) & (places < end[..., None])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(heads // shared, 1) for each in (k, v))
        scores = (q @ k.transpose(2, 3) * 0.7).masked_fill(~mask[:, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    q = made(2, tokens, heads, size, dtype=dtype).transpose(1, 2)
    k, v = (made(2, tokens, shared, size, seed=seed, dtype=dtype).transpose(1, 2) for seed in (1, 2))
    same(lambda q, k, v: Attention.apply(q, k, v, first.int(), end.int().contiguous(), 0.7), plain, q, k, v)


def test_weights_of_sharp_attention_are_whole_numbers_or_none(kind: str) -> None:
    """What lies below all digits of the sum would make gradients without digits, which are slow to multiply."""
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)
    q[..., 0], k[..., 0] = 100, torch.tensor([1.0, 0.5, 0.0])
    v = made(1, 1, 3, 8).requires_grad_()
    with torch.enable_grad():
        found = Attention.apply(q, k, v, torch.zeros(1, 3).int(), torch.full((1, 3), 3).int(), 1.0)
    torch.testing.assert_close(found, v[:, :, :1].transpose(1, 2).expand(1, 3, 1, 8))
    found.backward(torch.full_like(found, 1e-20))
    assert torch.equal(v.grad[0, 0, 1:], torch.zeros(2, 8))


def learned(network: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """What a network's head reads of two documents and a half, and all gradients of it."""
    body = Body(network, "positions", lambda outputs: outputs)
    with torch.enable_grad():
        hidden = body.hidden(IDS, POSITIONS)
        (hidden * made(*hidden.shape, seed=3)).sum().backward()
    found = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    network.zero_grad()
    return hidden.detach(), found


@pytest.mark.parametrize("family", ALL)
def test_a_family_learns_the_same(family: str) -> None:
    model = in_memory(ALL[family], torch.float32)
    network = model.network
    network.config.use_cache = False
    network.train().requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    body, before = Body.of(network), network.config._attn_implementation
    with eager(network):
        plain = learned(network)
    with closed_forms(model), short_attention(body, 24):
        assert (network.config._attn_implementation == ATTENTION) == (family not in OTHER_ATTENTION)
        taken = {type(module).__name__ for module in network.modules() if "forward" in vars(module)}
        assert any("Norm" in name for name in taken) == (family not in OTHER_NORMS)
        ours = learned(network)
    assert network.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in network.modules())
    for mine, theirs in [(ours[0], plain[0]), *((ours[1][name], plain[1][name]) for name in plain[1])]:
        assert float((mine - theirs).norm()) <= 2e-5 * float(theirs.norm()) + 1e-6


@pytest.mark.skipif(not multiplies_bfloat16("cpu"), reason="products of bfloat16 are float32 here")
def test_under_autocast_it_is_as_near_to_the_truth() -> None:
    model = in_memory(tiny_config(), torch.float32)
    exact = model.network.train()
    exact.requires_grad_(True)
    body = Body.of(exact)
    with eager(exact):
        truth = learned(exact)[1]
        with torch.autocast("cpu", torch.bfloat16):
            plain = learned(exact)[1]
    with closed_forms(model), short_attention(body, 24), torch.autocast("cpu", torch.bfloat16):
        ours = learned(exact)[1]

    def far(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)

    assert far(ours) <= 1.1 * far(plain)


@pytest.mark.parametrize(("length", "dropout", "found"), [
    (512, 0.0, ATTENTION), (513, 0.0, "sdpa"), (256, 0.5, "eager"), (257, 0.5, "sdpa"),
])  # fmt: skip
def test_how_it_attends_depends_on_the_rows_length(length: int, dropout: float, found: str) -> None:
    network = in_memory(tiny_config(attention_dropout=dropout)).network
    with short_attention(Body.of(network), length):
        assert network.config._attn_implementation == found
    assert network.config._attn_implementation == "sdpa"


def test_numbers_that_our_kernels_do_not_know_are_left_to_others() -> None:
    network = in_memory(tiny_config(), torch.float16).network
    with short_attention(Body.of(network), 24):
        assert network.config._attn_implementation == "eager"


def test_tokens_that_see_what_follows_are_left_to_others() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    network = BertLMHeadModel(BertConfig(vocab_size=64, **sizes, is_decoder=False)).eval()
    with short_attention(Body(network, "none", None), 24):
        assert network.config._attn_implementation == "eager"


def test_one_whose_maps_are_looked_at_stays_as_it_is() -> None:
    network = in_memory(tiny_config()).network
    body = Body.of(network)
    with eager(network), short_attention(body, 24):
        assert network.config._attn_implementation == "eager"


def test_what_computes_otherwise_is_not_taken_over() -> None:
    network = in_memory(tiny_config()).network
    first = network.model.layers[0]
    kind = type(first.input_layernorm)

    class Other(kind):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01  # type: ignore[no-any-return]

    first.input_layernorm.__class__ = Other
    first.mlp.act_fn = nn.ReLU()
    take_over(network)
    assert "forward" not in vars(first.input_layernorm)
    assert "forward" in vars(first.post_attention_layernorm)
    assert "forward" not in vars(first.mlp)
    assert "forward" in vars(network.model.layers[1].mlp)


class Norm(nn.Module):
    """As Gemma 4's, of which some have no weight, and as those of Mamba's blocks, which may be given a gate."""

    def __init__(self, size: int, with_scale: bool) -> None:
        super().__init__()
        self.eps = 1e-6
        if with_scale:
            self.weight = nn.Parameter(made(size))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * self.weight if hasattr(self, "weight") else x


def test_norms_of_a_kind_may_differ() -> None:
    network = in_memory(tiny_config()).network
    norms = network.model.norms = nn.ModuleList([Norm(8, True), Norm(8, False)])
    x, gate = made(3, 8), made(3, 8, seed=1)
    plain = [norm(x) for norm in norms], norms[0](x, gate), norms[0](x, gate=gate)
    take_over(network)
    assert "forward" in vars(norms[0])
    torch.testing.assert_close(([norm(x) for norm in norms], norms[0](x, gate), norms[0](x, gate=gate)), plain)


def test_a_familys_rotation_comes_back_after_a_failure() -> None:
    model = in_memory(tiny_config())
    file = sys.modules[type(model.network).__module__]
    theirs = getattr(file, ROTATION)
    with contextlib.suppress(ZeroDivisionError), closed_forms(model):
        assert getattr(file, ROTATION) is not theirs
        raise ZeroDivisionError
    assert getattr(file, ROTATION) is theirs


def test_without_kernels_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAQUETTE_NATIVE", "0")
    model = in_memory(tiny_config())
    with closed_forms(model), short_attention(Body.of(model.network), 24):
        assert model.network.config._attn_implementation == "eager"
        assert not any("forward" in vars(module) for module in model.network.modules())


def test_a_copy_that_takes_the_networks_place_computes_with_its_own_weights_and_is_let_go() -> None:
    model = in_memory(tiny_config(), torch.float32)
    with torch.no_grad(), closed_forms(model):
        before = model.network(input_ids=IDS).logits
        model.network = copy.deepcopy(model.network)
        model.network.model.norm.weight.mul_(2)
        torch.testing.assert_close(model.network(input_ids=IDS).logits, 2 * before)
    assert not any("forward" in vars(module) for module in model.network.modules())


def test_angles_of_other_tokens_are_refused() -> None:
    x = made(1, 2, 3, 8)
    for angles in (made(1, 4, 8), made(1, 3, 10), made(2, 3, 8)):
        with pytest.raises(IndexError, match="angles of"):
            Rotation.apply(x, angles, angles, x.dtype)
