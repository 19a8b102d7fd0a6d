"""A network as its body, which makes hidden states, and its head, which makes logits of some of them.

So that the logits of all tokens need not exist at once, and packed documents do not see one another.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Isolation = Literal["positions", "mask", "none"]
PROBE = 12  # tokens
CLOSE = 0.005  # relative distance of what should be the same


@dataclass(frozen=True)
class Body:
    """A network taken apart.

    isolation: what keeps documents of a row apart: positions alone, a mask beside them, or nothing in this family.
    scale: from the head's outputs to logits. None: the head is not known, and hidden states are the logits already.
    """

    network: PreTrainedModel
    isolation: Isolation
    scale: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, network: PreTrainedModel) -> Body:
        """Take a network apart, and look that the parts compute what it computes."""
        training = network.training
        network.eval()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            scale = _scale(network)
            found = cls(network, "none", scale)
            ids = torch.arange(3, 3 + PROBE, device=network.device)[None] % network.config.get_text_config().vocab_size
            if not _close(found.logits(found.hidden(ids)[0]), network(input_ids=ids, use_cache=False).logits[0]):
                found = cls(network, "none", None)
            kinds: tuple[Isolation, ...] = ("positions", "mask")
            working = [kind for kind in kinds if _isolates(cls(network, kind, found.scale), ids)]
        network.train(training)
        return cls(network, working[0] if working else "none", found.scale)

    @property
    def vocabulary(self) -> int:
        """Logits of a token, padding included."""
        size: int = self.network.config.get_text_config().vocab_size
        return size

    @property
    def head(self) -> nn.Module:
        """The output head."""
        head: nn.Module = self.network.get_output_embeddings()  # type: ignore[no-untyped-call]
        return head

    @property
    def parameters(self) -> list[Tensor]:
        """What logits depend on beside the hidden states."""
        return [] if self.scale is None else list(self.head.parameters())

    def arguments(self, positions: Tensor | None) -> dict[str, Tensor]:
        """What a network must be given beside token ids, so that documents do not see one another."""
        if positions is None or self.isolation == "none":
            return {}
        found = {"position_ids": positions} if _knows_positions(self.network) else {}
        if self.isolation == "mask":
            mask = _mask(positions)
            if self.network.config._attn_implementation == "eager":  # which adds its mask to the scores
                smallest = torch.finfo(self.network.dtype).min
                mask = torch.zeros(mask.shape, dtype=self.network.dtype, device=mask.device).masked_fill(
                    ~mask, smallest
                )
            found["attention_mask"] = mask
        return found

    def hidden(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the head reads (B, T, H), of token ids and positions (B, T)."""
        if self.scale is None:
            logits: Tensor = self.network(input_ids=ids, use_cache=False, **self.arguments(positions)).logits
            return logits
        states: Tensor = self.network.base_model(input_ids=ids, use_cache=False, **self.arguments(positions))[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (n, V) of hidden states (n, H)."""
        return hidden if self.scale is None else self.scale(self.head(hidden))


def _scale(network: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What a family does to its head's outputs, by its config."""
    config = network.config.get_text_config()
    cap, factor = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if cap:
        return lambda outputs: torch.tanh(outputs / cap) * cap
    if factor or divisor:
        return lambda outputs: outputs * ((factor or 1) / (divisor or 1))
    return lambda outputs: outputs


def _knows_positions(network: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(network.forward).parameters


def _mask(positions: Tensor) -> Tensor:
    """Which tokens each may see (B, 1, T, T): those before it in its own document."""
    document = (positions == 0).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    return torch.tril(same)[:, None]


def _isolates(body: Body, ids: Tensor) -> bool:
    """Whether the second of two documents in a row is computed as it would be alone.

    In 16 bits a row of another length is rounded otherwise: by how much, a row shows that begins with that document.
    """
    half = PROBE // 2
    positions = torch.arange(half, device=ids.device).repeat(2)[None]
    first, second = ids[:, :half], ids[:, half:]
    try:
        packed = [body.hidden(torch.cat([each, second], 1), positions)[:, half:] for each in (first, first.flip(1))]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # the family does not take such a mask
    alone = body.hidden(second)
    rounding = distance(body.hidden(torch.cat([second, first], 1))[:, :half], alone)
    return _close(packed[0], packed[1]) and distance(packed[0], alone) <= max(CLOSE, 3 * rounding)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and distance(a, b) <= CLOSE


def distance(a: Tensor, b: Tensor) -> float:
    """How far one tensor is from another, relative to the second's length."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@contextlib.contextmanager
def eager(network: PreTrainedModel) -> Iterator[None]:
    """Let a network compute attention plainly meanwhile: its maps can be seen, and short rows are fast on a CPU."""
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(before)
