"""Keys and values that a `NativeDecoder` holds, a block's at a time: as they are, or packed and read as codes.

Packed ones are rounded by `engine.kv_cache`, and laid out as attention goes through them: the codes of keys with the
tokens of a group side by side, scales of values with all tokens of a group of channels side by side. Room for all
tokens there will be is made at once; a group is packed when the token comes that sees it packed.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from engine.kv_cache import PackedCache, PackedLayer, PackedStates
from engine.packing import CacheGrid
from engine.runtime.lean import with_room
from engine.runtime.native.library import Packed

LANES = 16  # numbers of a vector of the kernels


class Held(Protocol):
    """What a block holds of its tokens; keys: (B, shared, n, D), those that are bfloat16."""

    keys: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that are held, room for later tokens included."""

    def attend(self, kernels: ctypes.CDLL, heads: int, q_k_v: int, first: int, at: int, out: int, threads: int) -> None:
        """Keep the keys and values of token `at`, and attend to those from `first` up to it.

        heads, q_k_v, out: addresses. Packed keys see all: for them `first` is 0.
        """


def reads(grid: CacheGrid, size: int) -> bool:
    """Whether attention reads the codes of heads of `size` channels: its vectors must fit groups and half heads."""
    return size % (2 * LANES) == 0 and grid.group_size % LANES == 0 and size % grid.group_size == 0


def of(cache: Cache, room: int) -> tuple[int, list[Held]]:
    """How many tokens are taken over, and what each block holds of them.

    A packed cache is emptied block by block, so that it and what is made of it are never there at once.
    """
    if isinstance(cache, PackedCache):
        length = cache.get_seq_length()
        return length, [PackedKeys(layer, room) for layer in cache.blocks]
    length = cache.get_seq_length() - 1
    return length, [ExactKeys(layer, length, room) for layer in cache.layers if isinstance(layer, DynamicLayer)]


class ExactKeys:
    """Keys and values (B, shared, room, D), bfloat16, as `transformers` has them."""

    def __init__(self, layer: DynamicLayer, length: int, room: int) -> None:
        assert layer.keys is not None
        assert layer.values is not None
        self.keys, self.values = (with_room(s, length, room, torch.bfloat16) for s in (layer.keys, layer.values))

    @property
    def nbytes(self) -> int:
        """See `Held`."""
        return self.keys.nbytes + self.values.nbytes

    def attend(self, kernels: ctypes.CDLL, heads: int, q_k_v: int, first: int, at: int, out: int, threads: int) -> None:
        """See `Held`."""
        kernels.maquette_attend(
            heads, q_k_v, self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape[0], self.keys.shape[2], first,
            at, out, threads,
        )  # fmt: skip


class PackedKeys:
    """Codes of keys and values in whole groups, and the newest tokens, bfloat16 (B, shared, newest, D)."""

    def __init__(self, layer: PackedLayer, room: int) -> None:
        grid = self._grid = layer.grid
        (keys, recent_keys), (values, recent_values) = layer.hand_over()
        self._packed = keys.tokens if keys is not None else 0
        batch, shared, recent, size = recent_keys.shape
        newest = min(grid.window + grid.group_size, room - self._packed)
        self.keys, self.values = (with_room(s, recent, newest, torch.bfloat16) for s in (recent_keys, recent_values))
        groups = grid.packed_tokens(room - 1) // grid.group_size  # that the last token sees
        of_head = size * grid.bits // 8  # bytes
        first = (batch, shared)
        self._key_codes = torch.zeros(*first, groups, of_head, grid.group_size, dtype=torch.uint8)
        self._value_codes = torch.zeros(*first, groups * grid.group_size, of_head, dtype=torch.uint8)
        self._key_scale, self._key_low = (torch.zeros(*first, groups, size, dtype=torch.bfloat16) for _ in range(2))
        self._value_scale, self._value_low = (
            torch.zeros(*first, size // grid.group_size, groups * grid.group_size, dtype=torch.bfloat16)
            for _ in range(2)
        )
        if keys is not None and values is not None:
            self._put(0, keys, values)
        self._entry = Packed(
            *(states.data_ptr() for states in self._states), grid.bits, grid.group_size, groups, newest
        )  # fmt: skip
        self._address = ctypes.addressof(self._entry)

    @property
    def _states(self) -> list[Tensor]:
        """In the order of `Packed`."""
        return [
            self.keys, self.values, self._key_codes, self._value_codes, self._key_scale, self._key_low,
            self._value_scale, self._value_low,
        ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        """See `Held`."""
        return sum(states.nbytes for states in self._states)

    def attend(self, kernels: ctypes.CDLL, heads: int, q_k_v: int, first: int, at: int, out: int, threads: int) -> None:
        """See `Held`."""
        assert first == 0
        while self._packed < self._grid.packed_tokens(at):
            self._pack()
        kernels.maquette_attend_packed(
            heads, q_k_v, self._address, self.keys.shape[0], self._packed, at - self._packed, out, threads
        )  # fmt: skip

    def _pack(self) -> None:
        """Pack the eldest group of the newest tokens."""
        size, kept, bits = self._grid.group_size, self._grid.window, self._grid.bits
        keys, values = (states[:, :, :size].contiguous() for states in (self.keys, self.values))
        self._put(
            self._packed, PackedStates.of(keys, bits, "tokens", size), PackedStates.of(values, bits, "channels", size)
        )
        for states in (self.keys, self.values):
            states[:, :, :kept] = states[:, :, size : size + kept].clone()
        self._packed += size

    def _put(self, at: int, keys: PackedStates, values: PackedStates) -> None:
        """Put whole groups where the token `at` begins."""
        size, end = self._grid.group_size, at + keys.tokens
        groups = slice(at // size, end // size)
        batch, shared, tokens, of_head = keys.codes.shape
        by_group = keys.codes.view(batch, shared, tokens // size, size, of_head)
        self._key_codes[:, :, groups] = by_group.transpose(-1, -2)
        self._value_codes[:, :, at:end] = values.codes
        for target, source in ((self._key_scale, keys.scale), (self._key_low, keys.low)):
            target[:, :, groups] = source.squeeze(3)
        for target, source in ((self._value_scale, values.scale), (self._value_low, values.low)):
            target[..., at:end] = source.squeeze(-1).transpose(-1, -2)
