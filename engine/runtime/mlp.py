"""What a block computes for each token alone, in a decode step: an MLP, or those of a mixture that its router chose.

    MLP        down(act(gate x) * up x)
    plain MLP  down(act(up x))
    mixture    the sum of w_e MLP_e(x) over the k experts e of a token; the router, and so w, are the family's own
    Qwen2-MoE  and sigmoid(g x) times that of an expert which all tokens share

Experts are linears of their own, packed or dense, or slices of the two tensors in which `transformers` fuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from engine import wide
from engine.experts import Expert, Experts
from engine.wide import bare, is_plain

Function = Callable[[Tensor], Tensor]
GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Function] = {  # by the names of their classes; BLOOM has one of its own
    SiLUActivation.__name__: F.silu, nn.ReLU.__name__: F.relu, GELUActivation.__name__: F.gelu,
    GELUTanh.__name__: GELU_TANH, NewGELUActivation.__name__: GELU_TANH, "BloomGelu": GELU_TANH,
}  # fmt: skip


def activation(mlp: nn.Module) -> Function | None:
    """What an MLP, or each expert of a mixture, applies to its gate; None where it is none of ours."""
    found = dict(mlp.named_children())
    if "experts" in found:
        experts = found["experts"]
        found = dict((experts[0] if isinstance(experts, Experts) else experts).named_children())
    return ACTIVATIONS.get(type(found.get("act_fn") or found.get("activation_fn")).__name__)


def feed_forward(mlp: nn.Module) -> Mlp | Mixture:
    """What a block's MLP computes, with its parts looked up; of one whose `activation` is ours."""
    return Mixture.of(mlp) if hasattr(mlp, "experts") else Mlp.of(mlp)


@dataclass(frozen=True)
class Side:
    """Linears side by side that read the same input: one product where their weights are, or can be, joined."""

    parts: tuple[Function, ...]

    @classmethod
    def of(cls, parts: list[nn.Module]) -> Side:
        return cls(tuple(bare(part) for part in parts))

    @functools.cached_property
    def joined(self) -> Function | None:
        """One product with the outputs of all parts, which moves their weights; made when it is first asked for."""
        if len(self.parts) == 1:
            return self.parts[0]
        kinds = {type(part) for part in self.parts}
        join = getattr(kinds.pop(), "joined", None) if len(kinds) == 1 else None  # packed linears can
        found: Function | None = None if join is None else join(self.parts)
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (B, n) of all parts in a row."""
        if self.joined is None:
            return torch.cat([part(x) for part in self.parts], dim=-1)
        outputs: Tensor = self.joined(x)
        return outputs


@dataclass(frozen=True)
class Mlp:
    """down(act(gate x) * up x). dense: no product has packed weights."""

    gate_up: Function
    down: Function
    activate: Function
    dense: bool

    @classmethod
    def of(cls, mlp: nn.Module) -> Self:
        """Of a module with linears; Phi-3 has gate and up in one."""
        if isinstance(mlp, Expert):
            *rising, down = mlp.linears
        else:
            names = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]
            *rising, down = (mlp.get_submodule(name) for name in (*names, "down_proj"))
        activate = activation(mlp)
        assert activate is not None
        return cls(Side.of(rising), bare(down), activate, all(is_plain(linear) for linear in [*rising, down]))

    @classmethod
    def each_of(cls, experts: nn.Module) -> list[Self]:
        """Of each expert; fused ones are tensors (experts, 2 x width, hidden) and (experts, hidden, width)."""
        if isinstance(experts, Experts):
            return [cls.of(expert) for expert in experts.children()]
        rising, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
        activate = ACTIVATIONS[type(experts.get_submodule("act_fn")).__name__]
        linears = [[functools.partial(wide.linear, weight=each) for each in fused] for fused in (rising, down)]
        return [cls(first, last, activate, dense=True) for first, last in zip(*linears, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, hidden) of x (B, hidden)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activate(gate).mul_(up))


@dataclass(frozen=True)
class PlainMlp:
    """down(act(up x))."""

    up: Function
    activate: Function
    down: Function

    def __call__(self, x: Tensor) -> Tensor:
        """(B, hidden) of x (B, hidden)."""
        return self.down(self.activate(self.up(x)))


ROUTERS = ("MixtralTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


@dataclass(frozen=True)
class Router:
    """What a family's router computes: for each token the likeliest of a softmax over x W^T, and how likely they are.

    weight: (experts, hidden). chosen: how many a token goes to. normed: their odds are made to add up to one; rounded:
    they are as wide as x, not float32. The softmax is float32, the product as wide as x.
    """

    weight: Tensor
    chosen: int
    normed: bool
    rounded: bool

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Of one of the families'; None where it is no such one, or something hooks in."""
        if type(module).__name__ not in ROUTERS or module._forward_pre_hooks or module._forward_hooks:
            return None
        always = type(module).__name__ == "MixtralTopKRouter"
        chosen, normed = int(vars(module)["top_k"]), always or bool(vars(module)["norm_topk_prob"])
        return cls(module.get_parameter("weight"), chosen, normed, rounded=not always)


@dataclass(frozen=True)
class Mixture:
    """The experts that the router chooses for each token, weighed; and the shared one with its gate, where one is."""

    router: nn.Module
    experts: Sequence[Mlp]
    shared: Mlp | None
    shared_gate: nn.Module | None

    @classmethod
    def of(cls, mlp: nn.Module) -> Self:
        parts = dict(mlp.named_children())
        shared = parts.get("shared_expert")
        return cls(
            parts["gate"], Mlp.each_of(parts["experts"]), None if shared is None else Mlp.of(shared),
            parts.get("shared_expert_gate"),
        )  # fmt: skip

    @property
    def dense(self) -> bool:
        """Whether no product has packed weights."""
        return all(each.dense for each in (*self.experts, self.shared) if each is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, hidden) of x (B, hidden)."""
        _, weights, chosen = self.router(x)  # (B, k)
        outputs = self._chosen(x, chosen)  # (B, k, hidden)
        found: Tensor = (outputs * weights[..., None]).sum(1).to(x.dtype)
        if self.shared is not None and self.shared_gate is not None:
            found += torch.sigmoid(self.shared_gate(x)) * self.shared(x)
        return found

    def _chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What each of the chosen experts (B, k) gives for its token, (B, k, hidden); each computes once."""
        batch, count = chosen.shape
        if batch == 1:
            return torch.stack([self.experts[number](x) for number in chosen[0].tolist()], dim=1)
        outputs = x.new_empty(batch * count, x.shape[1])
        places: dict[int, list[int]] = {}
        for place, number in enumerate(chosen.flatten().tolist()):
            places.setdefault(number, []).append(place)
        for number, own in places.items():
            outputs[own] = self.experts[number](x[[place // count for place in own]])
        return outputs.view(batch, count, -1)
