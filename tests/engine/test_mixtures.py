"""Mixtures of experts in our own kernels against the lean decoder, transformers, and what torch's topk takes.

Where a router sees two experts as equals, a last bit decides between them, and what follows is another text. So
sequences are compared while no router was in doubt.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from engine.generate import _read_prompt, decode
from engine.kv_cache import read_on
from engine.runtime.lean import LeanDecoder, frame_of
from engine.runtime.mlp import Mixture, Router
from engine.runtime.native import library
from engine.runtime.native.decoder import NativeDecoder, head_size
from engine.runtime.native.forms import Form, Formless
from engine.runtime.parts import Block, InTurn
from tests.conftest import in_memory
from tests.engine.conftest import needs_kernels
from tests.engine.test_forms import WAYS, distance, telling
from tests.engine.test_generate import FOUR, MIXTURES, PROMPT, SHARED, fused
from tests.engine.test_native import network

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_kernels]
NARROW = FOUR | {"moe_intermediate_size": 48}


def margin(router: Router, logits: Tensor) -> Tensor:
    """How far (B,) the last expert that is taken is before the next one, beside the spread of all."""
    best = logits.float().topk(router.chosen + 1).values
    return (best[:, -2] - best[:, -1]) / logits.float().std()


@contextlib.contextmanager
def margins(network: nn.Module) -> Iterator[list[Tensor]]:
    """Those of each router that is called meanwhile."""
    found: list[Tensor] = []

    def note(own: Router) -> Callable[..., None]:
        return lambda _, __, output: found.append(margin(own, output[0]))

    routers = [(module, Router.of(module)) for module in network.modules()]
    hooks = [module.register_forward_hook(note(own)) for module, own in routers if own is not None]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("kind", "weights"), [way for way in WAYS if way[1] != "W8A8"], indirect=["kind"])
@pytest.mark.parametrize("family", [*MIXTURES, "fused"])
@torch.inference_mode()
def test_steps_are_those_of_the_lean_decoder_and_of_transformers(family: str, weights: str, kind: str) -> None:
    if family == "fused":
        model = in_memory(Qwen3MoeConfig(**NARROW, head_dim=32))
        subject = fused(dataclasses.replace(model, network=telling(model.network.config, "dense"))).network
    else:
        subject = telling(MIXTURES[family], weights)
    assert library.available() == kind
    compared = 0
    for number in range(8):
        batch = (1, 4)[number % 2]
        text = torch.randint(5, 1280, (batch, 12), generator=torch.Generator().manual_seed(number))
        cache = _read_prompt(subject, text[:, :7], None)[1]
        assert NativeDecoder.supports(subject, batch, 12)
        native, lean = NativeDecoder(subject, cache, 12), LeanDecoder(subject, cache, 12)
        sure = torch.ones(batch, dtype=torch.bool)
        for place in range(6, 12):
            step = text[:, place : place + 1]
            ours = native.step(step)
            with margins(subject) as found:
                expected = [lean.step(step)]
                expected += [read_on(subject, step, cache)[0][:, -1]] if place > 6 else []
            sure &= torch.stack(found).amin(0) > 0.1
            for row in torch.arange(batch)[sure]:
                assert max(distance(ours[row], each[row]) for each in expected) < 0.05
                compared += 1
    assert compared > 20


@pytest.mark.parametrize(("kind", "weights"), WAYS, indirect=["kind"])
@pytest.mark.parametrize("name", MIXTURES)
@torch.inference_mode()
def test_a_mixture_of_the_same_inputs_is_torchs(name: str, weights: str, kind: str) -> None:
    subject = network(MIXTURES[name], weights)
    block, form = parts(subject)
    assert isinstance(block.finish, InTurn)
    assert isinstance(block.finish.mlp, Mixture)
    exact = copy.deepcopy(block.finish.mlp.router).double()
    own = Router.of(exact)
    assert own is not None
    for batch in (1, 2, 3, 4, 7, 16):
        x, attended = inputs(subject, batch)
        ours, theirs = finish(form, x, attended), block.finish(x, block.o(attended))
        sure = margin(own, exact(block.finish.before_mlp(x + block.o(attended)).double())[0]) > 0.03
        assert sure.float().mean() > 0.5 or batch < 7
        if sure.any():
            assert distance(ours[sure] - x[sure], theirs[sure] - x[sure]) < (0.03 if weights == "W8A8" else 0.012)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(("experts", "chosen"), [(4, 4), (8, 2), (33, 1), (64, 1), (64, 8), (128, 2), (200, 3)])
@torch.inference_mode()
def test_of_equal_experts_those_are_taken_that_torch_takes(experts: int, chosen: int) -> None:
    shape = NARROW | {"num_experts": experts, "num_experts_per_tok": chosen, "num_hidden_layers": 1}
    for normed in (False, True):
        subject = network(Qwen3MoeConfig(**shape, head_dim=32, norm_topk_prob=normed), "dense")
        router = subject.get_submodule("model.layers.0.mlp.gate").get_parameter("weight")
        router[:, 1:] = 0  # sums of one number have one order
        router[:, 0] = torch.arange(experts) % 3
        block, form = parts(subject)
        x, attended = inputs(subject, 16)
        assert distance(finish(form, x, attended) - x, block.finish(x, block.o(attended)) - x) < 0.012


@pytest.mark.parametrize("name", MIXTURES)
def test_decoding_takes_our_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    step = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    assert len(list(decode(network(MIXTURES[name], "4 bit"), PROMPT, 12))) == 12
    assert len(used) == 12  # one that is checked, which transformers would take over from


def test_what_kernels_do_not_know_of_a_mixture_leaves_all_to_torch() -> None:
    subject = network(Qwen2MoeConfig(**SHARED), "dense")
    size = head_size(subject)
    frame = frame_of(subject, size, 12, torch.float32)
    block = frame.blocks[0]
    assert isinstance(block.finish, InTurn)
    mixture = block.finish.mlp
    assert isinstance(mixture, Mixture)

    def form(**changed: object) -> Form:
        finish = dataclasses.replace(block.finish, mlp=dataclasses.replace(mixture, **changed))  # type: ignore[type-var]
        return Form.of(dataclasses.replace(frame, blocks=[dataclasses.replace(block, finish=finish)]), size)

    form(shared=None)
    form(shared_gate=None)
    other, many, wide = (copy.deepcopy(mixture.router) for _ in range(3))
    other.__class__ = type("AnotherTopKRouter", (type(other),), {})
    vars(many)["top_k"] = 5
    wide.float()
    first, *others = mixture.experts
    for changed in (
        {"router": other}, {"router": many}, {"router": wide}, {"experts": others}, {"shared_gate": first.down},
        {"experts": [dataclasses.replace(first, activate=torch.tanh), *others]},
        {"experts": [dataclasses.replace(first, down=torch.relu), *others]},
        {"experts": [dataclasses.replace(first, gate_up=first.down), *others]},
        {"shared": dataclasses.replace(first, down=first.gate_up)},
    ):  # fmt: skip
        with pytest.raises(Formless):
            form(**changed)
    hook = mixture.router.register_forward_hook(lambda *_: None)
    assert not NativeDecoder.supports(subject, 1, 12)
    hook.remove()
    assert NativeDecoder.supports(subject, 1, 12)


def parts(subject: PreTrainedModel) -> tuple[Block, Form]:
    """The lean decoder's first block, and what the kernels read."""
    size = head_size(subject)
    frame = frame_of(subject, size, 12, torch.float32)
    form = Form.of(frame, size)
    form.kept += [tensor.detach() for tensor in (*subject.parameters(), *subject.buffers())]  # torch joins some
    return frame.blocks[0], form


def inputs(subject: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """Of a block (batch, hidden), and what attention gives there (batch, heads size)."""
    dice, wide = torch.Generator().manual_seed(batch), subject.get_submodule("model.layers.0.self_attn.o_proj")
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, size, generator=dice).bfloat16() for size in (wide.out_features, wide.in_features)
    )


def finish(form: Form, x: Tensor, attended: Tensor) -> Tensor:
    """What our kernels make of the first block's inputs behind attention."""
    y = x.clone()
    block = ctypes.addressof(form.blocks[0])
    library.library().maquette_finish(block, attended.data_ptr(), y.data_ptr(), len(x), 2)  # type: ignore[union-attr]
    return y
