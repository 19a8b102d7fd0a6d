"""Decode steps of a network in our own kernels: three calls for a block, nothing between them in Python.

    project   norm, query, key and value in one pass over their weights, order and norms of heads, rotation
    attend    the new keys and values into the cache, attention to all of it, or to a window
    finish    output, sum, norms, MLP with a gate or without, sum; or the MLP beside attention, and one sum

What a network's blocks are made of is said once, by the lean decoder's frame (`engine.runtime.parts`);
`engine.runtime.native.forms` makes of it what the kernels read, and knows no names of families.
`engine.runtime.native.held` has the keys and values: as they are, or packed, where attention reads the codes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from engine.packing import CacheGrid
from engine.runtime.lean import LeanDecoder, frame_of
from engine.runtime.native import held
from engine.runtime.native.forms import Form, Formless, matrix_of
from engine.runtime.native.library import Block, library
from engine.runtime.native.linear import multiply
from engine.runtime.pages import read_in_place
from engine.runtime.parts import logit_cap

MOST_ROWS = 16  # sequences; products of more are bound by arithmetic, and torch's are as good


class NativeDecoder:
    """Decodes where `supports` and `LeanDecoder` does, too.

    Starts with the prompt's `cache` less its last token; `room` is the number of tokens that there will ever be. A
    packed cache is taken over whole, and is empty then.
    """

    @staticmethod
    def supports(network: PreTrainedModel, batch: int, room: int, grid: CacheGrid | None = None) -> bool:
        """Whether our kernels know every part of the blocks, and read the keys and values of `room` tokens, which are
        packed on a grid."""
        if network.device.type != "cpu" or network.dtype != torch.bfloat16 or batch > MOST_ROWS or library() is None:
            return False
        if not LeanDecoder.supports(network, 0):
            return False
        size = head_size(network)
        try:
            form = Form.of(frame_of(network, size, 1, torch.float32), size)
        except Formless:
            return False
        # Packed keys have no window: the groups before it are not dropped.
        return grid is None or (held.reads(grid, size) and all(room < window for *_, window in form.sights))

    @torch.inference_mode()
    def __init__(self, network: PreTrainedModel, cache: Cache, room: int) -> None:
        kernels = library()
        assert kernels is not None
        self._kernels = kernels
        # The blocks point into these; they stay even where the network's own tensors are moved meanwhile.
        tensors = [*network.parameters(), *network.buffers()]
        self._kept = [tensor.detach() for tensor in tensors]
        read_in_place(tensors, self)
        self._room = room
        self._length, self._held = held.of(cache, room)
        keys = self._held[0].keys
        frame = frame_of(network, keys.shape[-1], room, torch.float32)
        self._form = Form.of(frame, keys.shape[-1])
        blocks, self._batch = self._form.blocks, keys.shape[0]
        heads, shared, size, self._hidden = *frame.heads, keys.shape[-1], blocks[0].hidden
        assert all(each.keys.shape[:2] == (self._batch, shared) for each in self._held)
        assert len(blocks) == len(self._held)
        self._embed, self._positions, self._norm = frame.embed, frame.positions, frame.norm
        self._head, self._cap = network.get_submodule("lm_head"), logit_cap(network)
        self._q_k_v = torch.empty(self._batch, heads + 2 * shared, size, dtype=torch.bfloat16)
        self._attended = torch.empty(self._batch, heads, size, dtype=torch.bfloat16)
        self._addresses = [
            (ctypes.addressof(block), ctypes.addressof(block) + Block.heads.offset, part.sight)
            for block, part in zip(blocks, frame.blocks, strict=True)
        ]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held, room for later ones included."""
        return sum(states.nbytes for states in self._held)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B, 1).

        Raises:
            ValueError: the room for keys and values is full, or there are other sequences than before.
        """
        at, batch = self._length, self._batch
        if at >= self._room:
            raise ValueError(f"there is room for {self._room} tokens and no more")
        if ids.shape != (batch, 1):
            raise ValueError(f"tokens of {tuple(ids.shape)} do not continue {batch} sequences")
        x = self._embed(ids[:, 0])
        if self._positions is not None:
            x = x + self._positions[at]
        x = x.contiguous()  # (B, hidden)
        assert x.shape == (batch, self._hidden)
        assert x.dtype == torch.bfloat16
        self._length += 1
        threads, kernels = torch.get_num_threads(), self._kernels
        here, q_k_v, attended = x.data_ptr(), self._q_k_v.data_ptr(), self._attended.data_ptr()
        places = [
            (cos[at].data_ptr(), sin[at].data_ptr(), max(0, at + 1 - window)) for cos, sin, window in self._form.sights
        ]
        for (block, heads, sight), states in zip(self._addresses, self._held, strict=True):
            cos, sin, first = places[sight]
            kernels.maquette_project(block, here, batch, cos, sin, q_k_v, threads)
            states.attend(kernels, heads, q_k_v, first, at, attended, threads)
            kernels.maquette_finish(block, attended, here, batch, threads)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        """Of the last block's output (B, hidden)."""
        last = self._form.last
        if last is None:
            y = self._norm(x)
        else:
            y = torch.empty_like(x)
            self._kernels.maquette_normalize(ctypes.addressof(last), x.data_ptr(), len(x), x.shape[1], y.data_ptr())
        try:
            logits: Tensor = multiply(matrix_of(self._head), y)
        except Formless:
            logits = self._head(y)
        return logits if self._cap is None else self._cap(logits)

    def glance(self, ids: Tensor) -> Tensor:
        """`step` with a token that is forgotten again."""
        logits = self.step(ids)
        self._length -= 1  # the next one takes its place, and packing waits for that
        return logits


def head_size(network: PreTrainedModel) -> int:
    """Channels of each head of keys and values."""
    config = network.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
