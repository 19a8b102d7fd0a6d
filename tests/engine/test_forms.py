"""Every family's blocks in our own kernels against the lean decoder, and what the kernels refuse."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    Olmo2Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from engine.generate import _read_prompt, decode
from engine.kv_cache import read_on
from engine.models import linears
from engine.packing import CacheGrid
from engine.runtime.classic import NormedAfter, Ordered
from engine.runtime.lean import LeanDecoder, frame_of
from engine.runtime.mlp import PlainMlp, Side
from engine.runtime.native import library
from engine.runtime.native.decoder import NativeDecoder
from engine.runtime.native.forms import ACTS, Form, Formless
from engine.runtime.native.library import Matrix, Norm
from engine.runtime.native.linear import multiply
from engine.runtime.parts import EachHead, Frame, InTurn, LayerNorm, Rounding, Then
from tests.conftest import tiny_config
from tests.engine.conftest import KINDS, needs_kernels
from tests.engine.test_classic import CLASSIC, REFUSED, SMALL
from tests.engine.test_generate import LEAN, MIXTURES, OTHERS, PLAIN, PROMPT
from tests.engine.test_native import network

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_kernels]
# test_native.py has those of PLAIN, with all kinds of weights, and test_mixtures.py mixtures.
FAMILIES = {name: each for name, each in (LEAN | CLASSIC).items() if name not in PLAIN | MIXTURES}
WAYS = [
    (kind, weights)
    for kind in KINDS
    for weights in (("dense", "4 bit", "8 bit", "W8A8") if kind == KINDS[0] else ("mixed",))
]


def telling(config: PretrainedConfig, weights: str) -> PreTrainedModel:
    """As `network`, with embeddings and positions so small that what blocks add decides."""
    subject = network(config, weights)
    with torch.no_grad():
        for name, parameter in subject.named_parameters():
            if any(part in name for part in ("wte", "wpe", "embed", "embedding")) and parameter.dim() == 2:
                parameter.mul_(0.05)
    return subject


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize(("kind", "weights"), WAYS, indirect=["kind"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_native_step_of_every_family_is_the_lean_decoders(family: str, weights: str, kind: str) -> None:
    subject = telling(FAMILIES[family], weights)
    exact = copy.deepcopy(subject).float() if weights == "dense" else None
    assert library.available() == kind
    for batch in (1, 3):
        assert NativeDecoder.supports(subject, batch, 40)
        text = torch.randint(5, 1280, (batch, 27), generator=torch.Generator().manual_seed(batch))  # beyond windows
        caches = [_read_prompt(model, text[:, :7], None)[1] for model in (subject, exact) if model is not None]
        native, lean = NativeDecoder(subject, caches[0], 27), LeanDecoder(subject, caches[0], 27)
        truth = None if exact is None else LeanDecoder(exact, caches[1], 27)
        for place in range(6, 27):
            step = text[:, place : place + 1]
            ours, theirs = native.step(step), lean.step(step)
            assert distance(ours, theirs) < (0.15 if weights == "W8A8" else 0.04)  # rounded inputs amplify
            if truth is not None:
                right = truth.step(step)
                assert distance(ours, right) < 2 * distance(theirs, right) + 0.005


SIZED = SMALL | {"hidden_size": 128}  # heads of 32, which the kernels' vectors fit
CACHED: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=1280, n_embd=128, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(**SIZED, ffn_dim=96, word_embed_proj_dim=128, max_position_embeddings=64),
    "neox": GPTNeoXConfig(**SIZED, intermediate_size=96),
    "falcon": FalconConfig(**SIZED, new_decoder_architecture=True, num_kv_heads=2),
    "falcon with alibi": FalconConfig(**SIZED, alibi=True),
    "bloom": BloomConfig(**SIZED),
    "gemma2": LEAN["gemma2"],
    "gemma3": LEAN["gemma3"],
    "olmo2": Olmo2Config(**SIZED, intermediate_size=96, num_key_value_heads=2, pad_token_id=0),
}


@pytest.mark.parametrize("grid", [CacheGrid(8, 32, 0), CacheGrid(4, 16, 5)])
@pytest.mark.parametrize("family", CACHED)
@torch.inference_mode()
def test_packed_keys_and_values_are_read_as_in_transformers(family: str, grid: CacheGrid) -> None:
    subject = telling(CACHED[family], "4 bit")
    text = torch.randint(5, 1280, (3, 60), generator=torch.Generator().manual_seed(1))
    assert NativeDecoder.supports(subject, 3, 60, grid)
    _, cache = _read_prompt(subject, text[:, :20], grid)
    native = NativeDecoder(subject, _read_prompt(subject, text[:, :20], grid)[1], 60)
    for place in range(20, 60):
        expected = read_on(subject, text[:, place : place + 1], cache)[0][:, -1]
        # A key between two codes goes to either, as its last bit says.
        assert distance(native.step(text[:, place : place + 1]), expected) < 0.06


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox", "falcon", "bloom", "phi3", "gemma2", "olmo2", "stablelm"])
def test_decoding_takes_our_kernels_and_agrees_with_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    step = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    subject = network((LEAN | CLASSIC)[name], "4 bit")
    assert len(list(decode(subject, PROMPT, 58))) == 58  # all learned positions, where there are no more
    assert len(used) == 58  # one that is checked, which the lean decoder would take over from


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (64, 96), (100, 33), (130, 200), (2304, 768)])
def test_turned_weights_give_the_exact_product(rows: int, columns: int, threads: int) -> None:
    torch.set_num_threads(threads)
    dice = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(columns, rows, generator=dice).bfloat16(), torch.randn(rows, generator=dice).bfloat16()
    for at in (None, bias.data_ptr()):
        matrix = Matrix(Matrix.TURNED, rows, columns, columns, weight.data_ptr(), None, None, None, at, 0.0)
        for m in (1, 2, 3, 4, 5, 9, 16):
            x = torch.randn(m, columns, generator=dice).bfloat16()
            exact = x.double() @ weight.double() + (0 if at is None else bias.double())
            torch.testing.assert_close(multiply(matrix, x).double(), exact, rtol=2**-8, atol=2e-5)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("act", ACTS)
def test_activations_are_rounded_once(act: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all there are
    x = x[x.isfinite() & (x.abs() < 1e30)]
    found = torch.empty_like(x)
    library.library().maquette_activate(ACTS.index(act), x.data_ptr(), len(x), found.data_ptr())  # type: ignore[union-attr]
    # float32 has no digits for what is left of numbers below -5; erf is off by 1.5e-7 at most.
    torch.testing.assert_close(found.double(), act(x.double()), rtol=2**-8 + 1e-5, atol=2e-7)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("size", [5, 16, 100, 768])
def test_norms_are_those_of_transformers(size: int) -> None:
    dice = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(n, size, generator=dice).bfloat16() for n in (3, 1, 1))
    x = x * 3 + 20  # a mean that would drown the rest, were it not subtracted first
    wide, epsilon = x.double(), 1e-2
    quotient = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
    expected = {
        (Norm.NONE, 0.0): wide,
        (Norm.ROUNDED, 0.0): quotient.bfloat16().double() * weight.double(),
        (Norm.RMS, 0.0): quotient * weight.double(),
        (Norm.RMS, 1.0): quotient * (1 + weight.double()),
        (Norm.LAYER, 0.0): F.layer_norm(wide, (size,), weight[0].double(), bias[0].double(), epsilon),
    }
    for (kind, base), right in expected.items():
        norm = Norm(kind, epsilon, base, weight.data_ptr(), bias.data_ptr() if kind == Norm.LAYER else None)
        for found, source in ((torch.empty_like(x), x), (same := x.clone(), same)):  # also in place
            library.library().maquette_normalize(ctypes.byref(norm), source.data_ptr(), 3, size, found.data_ptr())  # type: ignore[union-attr]
            torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=1e-5)


def frame(name: str) -> Frame:
    return frame_of(network((LEAN | CLASSIC)[name], "dense"), 16, 40, torch.float32)


def changed(name: str, **parts: Any) -> Frame:
    """The frame of a family with other parts in its last block."""
    found = frame(name)
    return replace(found, blocks=[*found.blocks[:-1], replace(found.blocks[-1], **parts)])


def test_a_part_that_kernels_do_not_know_leaves_all_to_torch() -> None:
    Form.of(frame("gpt2"), 16)
    block = frame("gpt2").blocks[-1]
    mlp, norm = block.finish.mlp, block.finish.before_mlp  # type: ignore[attr-defined]
    short = LayerNorm((32,), torch.ones(32).bfloat16(), None, 1e-5)
    wide = replace(norm, weight=norm.weight.float())
    sized = PlainMlp(mlp.down, mlp.activate, mlp.down)  # of which the first gives too little for the second
    rotated = torch.arange(12).roll(1)
    for parts in (
        {"before_attention": torch.relu}, {"before_attention": short}, {"before_attention": wide},
        {"o": mlp.up}, {"o": torch.relu}, {"q_k_v": block.o}, {"q_k_v": Side((block.o,))},
        {"q_k_v": Side((block.o,) * 3)}, {"q_k_v": Side((block.o,) * 4)},
        {"q_k_v": Then(block.q_k_v, Ordered(rotated + 1, 16))}, {"q_k_v": Then(block.q_k_v, Ordered(rotated - 1, 16))},
        {"q_k_v": Then(block.q_k_v, Ordered(rotated[:5], 16))}, {"head_norms": EachHead(norm, norm)},
        {"finish": lambda x, _: x}, {"finish": InTurn(norm, torch.relu)}, {"finish": InTurn(norm, sized)},
        {"finish": InTurn(short, mlp)}, {"finish": InTurn(norm, replace(mlp, activate=torch.tanh))},
        {"finish": InTurn(norm, Then(mlp, torch.relu))}, {"finish": NormedAfter(norm, mlp, short)},
    ):  # fmt: skip
        with pytest.raises(Formless):
            Form.of(changed("gpt2", **parts), 16)
    Form.of(changed("gpt2", q_k_v=Then(block.q_k_v, Ordered(rotated, 16))), 16)
    for other in (
        replace(frame("gpt2"), bend=torch.tanh), replace(frame("bloom"), bend=Rounding(torch.float16)),
        replace(frame("gpt2"), heads=(4, 3)), replace(frame("neox"), heads=(5, 5)),
    ):  # fmt: skip
        with pytest.raises(Formless):
            Form.of(other, 16)
    with pytest.raises(Formless):
        Form.of(frame("gpt2"), 32)


@pytest.mark.parametrize("name", [*OTHERS, *REFUSED])
def test_what_the_lean_decoder_or_the_kernels_do_not_know_is_refused(name: str) -> None:
    assert not NativeDecoder.supports(network((OTHERS | REFUSED)[name], "dense"), 1, 40)


def test_linears_that_others_change_are_refused() -> None:
    for name in ("gpt2", "falcon in turn", "opt"):
        subject = network(CLASSIC[name], "dense")
        path = list(linears(subject))[3][0]
        assert NativeDecoder.supports(subject, 1, 40)
        linear = subject.get_submodule(path)
        hook = linear.register_forward_hook(lambda *_: None)
        assert not NativeDecoder.supports(subject, 1, 40)
        hook.remove()
        assert NativeDecoder.supports(subject, 1, 40)
        linear.bias = torch.nn.Parameter(linear.bias.detach().float())
        assert not NativeDecoder.supports(subject, 1, 40)


def test_packed_keys_within_a_window_alone() -> None:
    subject = network(LEAN["gemma3"], "dense")  # a window of 64
    grid = CacheGrid(4, 16, 0)
    assert NativeDecoder.supports(subject, 1, 63, grid)
    assert not NativeDecoder.supports(subject, 1, 64, grid)
    assert NativeDecoder.supports(subject, 1, 64)


@torch.inference_mode()
def test_other_sequences_than_before_are_an_error_and_no_crash() -> None:
    subject = network(tiny_config(), "4 bit")
    decoder = NativeDecoder(subject, _read_prompt(subject, torch.tensor([PROMPT]), None)[1], 40)
    for ids in (torch.tensor([[7], [7]]), torch.tensor([[7, 7]])):
        with pytest.raises(ValueError, match="continue"):
            decoder.step(ids)
