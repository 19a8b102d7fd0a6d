"""A frame of the lean decoder as the kernels read it: a C struct for each block, where each of its parts has a form.

So one description of the families serves both loops. A part without a form leaves the network to torch: routers of
other kinds, linears that torch multiplies or whose inputs something rounds, numbers that are not bfloat16. Shapes are
checked here, for kernels get nothing but addresses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine import wide
from engine.runtime import mlp, parts
from engine.runtime.classic import NormedAfter, Ordered, SideBySide
from engine.runtime.linear import Int8Linear
from engine.runtime.mlp import GELU_TANH, PlainMlp, Router, Side
from engine.runtime.native.library import Block, Heads, Matrix, Mixture, Mlp, Norm
from engine.runtime.native.linear import NativeLinear
from engine.runtime.parts import AllHeads, Cap, Frame, InTurn, LayerNorm, Rounding, Sight, Then, unchanged
from engine.wide import OneRow, WideConv1D, is_falcons, is_plain

ACTS = (F.silu, GELU_TANH, F.gelu, F.relu)  # as `Act` of decoder.cpp has them


class Formless(Exception):
    """A part of a frame is none that the kernels know."""


@dataclass
class Form:
    """What the kernels read of a network, a struct for each block; keeps what these point to beside the weights.

    sights: of each the cos and sin (room, turns / 2) by which heads turn, and the window. last: the norm behind the
    blocks, where kernels compute it.
    """

    blocks: list[Block] = field(default_factory=list)
    sights: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    last: Norm | None = None
    kept: list[object] = field(default_factory=list)

    @classmethod
    def of(cls, frame: Frame, size: int) -> Form:
        """Of a frame whose heads have `size` numbers.

        Raises:
            Formless: the kernels do not know one of its parts.
        """
        form, half = cls(), frame.sights.turns // 2
        for sight in frame.sights.of:
            cos, sin = sight.cos[:, :half], sight.sin[:, half : 2 * half]  # of the second half: with their own signs
            form.sights.append((cos.float().contiguous(), sin.float().contiguous(), sight.window))
        heads = [form._heads(frame, sight, size) for sight in frame.sights.of]
        form.blocks = [form._block(block, heads[block.sight]) for block in frame.blocks]
        hidden = form.blocks[0].hidden
        if any(block.hidden != hidden for block in form.blocks):
            raise Formless("blocks of different widths")
        try:
            form.last = form._norm(frame.norm, hidden)
        except Formless:  # torch computes it as well
            form.last = None
        return form

    def _heads(self, frame: Frame, sight: Sight, size: int) -> Heads:
        heads, shared = frame.heads
        bias, bend = None, frame.bend
        if sight.bias is not None:
            table = sight.bias.float().reshape(heads, len(sight.cos)).contiguous()
            self.kept.append(table)
            bias = table.data_ptr()
        if not isinstance(bend, Cap | Rounding | None) or (isinstance(bend, Rounding) and bend.dtype != torch.bfloat16):
            raise Formless("scores that are bent otherwise")
        if heads % shared or frame.sights.turns > size or frame.sights.turns % 2:
            raise Formless(f"{heads} heads of {size} that share {shared}, of which {frame.sights.turns} turn")
        cap = bend.limit if isinstance(bend, Cap) else 0.0
        coarse = isinstance(bend, Rounding)
        return Heads(heads, shared, size, frame.sights.turns, 0.0, cap, coarse, len(sight.cos), bias)

    def _block(self, block: parts.Block, heads: Heads) -> Block:
        query, keys = heads.heads * heads.size, heads.shared * heads.size
        product, behind_attention = _parted(block.o)
        side, order = _ordered(block.q_k_v)
        asking, o = [matrix_of(each) for each in side.parts], matrix_of(product)
        form = Block(heads=heads, hidden=o.rows, asking=len(asking), asked=query // heads.size + 2 * heads.shared)
        form.heads.scale = block.scale
        if not block.rotates:
            form.heads.turning = 0
        if order is not None:
            form.asked = sum(each.rows for each in asking) // heads.size
            inside = 0 <= int(order.min()) <= int(order.max()) < form.asked
            if order.numel() != heads.heads + 2 * heads.shared or not inside:
                raise Formless("an order of other heads")
            order = order.to(torch.int32).contiguous()
            self.kept.append(order)
            form.order = order.data_ptr()
        _fit(asking, form.hidden, form.asked * heads.size, most=3)
        _fit([o], query, form.hidden)
        form.q_k_v, form.o = (Matrix * 3)(*asking), o

        form.before_attention = self._norm(block.before_attention, form.hidden)
        form.behind_attention = self._norm(behind_attention, form.hidden)
        if block.head_norms is not None:
            form.whole = isinstance(block.head_norms, AllHeads)
            form.queries = self._norm(block.head_norms.q, query if form.whole else heads.size)
            form.keys = self._norm(block.head_norms.k, keys if form.whole else heads.size)
        self._finish(form, block.finish)
        return form

    def _finish(self, form: Block, finish: parts.Finish) -> None:
        """What follows attention."""
        if not isinstance(finish, InTurn | SideBySide | NormedAfter):
            raise Formless("a block that adds up otherwise")
        computed, behind_mlp = _parted(finish.mlp)
        form.behind_mlp = self._norm(behind_mlp, form.hidden)
        if isinstance(finish, NormedAfter):
            form.behind_sum = self._norm(finish.after_attention, form.hidden)
            form.behind_all = self._norm(finish.after_mlp, form.hidden)
        else:
            form.before_mlp = self._norm(finish.before_mlp, form.hidden)
            form.beside = isinstance(finish, SideBySide)
        if isinstance(computed, mlp.Mixture):
            mixture = self._mixture(computed, form.hidden)
            self.kept.append(mixture)
            form.mixture = ctypes.addressof(mixture)
        else:
            form.mlp = _feed_forward(computed, form.hidden)

    def _mixture(self, computed: mlp.Mixture, hidden: int) -> Mixture:
        router = Router.of(computed.router)
        if router is None:
            raise Formless("another router")
        shares = computed.shared is not None and computed.shared_gate is not None
        each = [_feed_forward(expert, hidden) for expert in (*computed.experts, computed.shared) if expert is not None]
        count, weight = len(computed.experts), router.weight
        if weight.shape != (count, hidden) or not 0 < router.chosen <= count:
            raise Formless(f"{router.chosen} of {count} experts, chosen by {tuple(weight.shape)}")
        experts = (Mlp * len(each))(*each)
        self.kept += [experts, weight.detach()]
        form = Mixture(count, router.chosen, router.normed, router.rounded, shares, _dense(weight))
        form.experts = ctypes.addressof(experts)
        if shares:
            form.gate = matrix_of(computed.shared_gate)
            _fit([form.gate], hidden, 1)
        return form

    def _norm(self, norm: object, size: int) -> Norm:
        if norm is unchanged:
            return Norm(Norm.NONE)
        if isinstance(norm, LayerNorm):
            weight, bias = (None if each is None else self._numbers(each, size) for each in (norm.weight, norm.bias))
            if norm.shape != (size,):
                raise Formless(f"a norm of {norm.shape}, not of {size}")
            return Norm(Norm.LAYER, norm.epsilon, 0.0, weight, bias)
        if not isinstance(norm, parts.Norm):
            raise Formless("another norm")
        kind = Norm.ROUNDED if norm.rounds else Norm.RMS
        if norm.distances is not None:
            return Norm(kind, norm.epsilon, 1.0, self._numbers(norm.distances, size), None)
        return Norm(kind, norm.epsilon, 0.0, self._numbers(norm.weight, size), None)

    def _numbers(self, tensor: Tensor, size: int) -> int:
        if tensor.shape != (size,) or tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
            raise Formless(f"numbers of {tensor.dtype}, {tuple(tensor.shape)}")
        self.kept.append(tensor.detach())  # the tensor's memory, also where the tensor is given another
        return tensor.data_ptr()


def matrix_of(product: object) -> Matrix:
    """A linear as the kernels read it, pointing into its weights.

    Raises:
        Formless: they do not know its kind, or something rounds its inputs.
    """
    linear = product.linear if isinstance(product, OneRow) else product
    if isinstance(linear, functools.partial) and linear.func is wide.linear and not linear.args:
        return _dense(**linear.keywords)
    if not isinstance(linear, nn.Module) or linear._forward_pre_hooks or linear._forward_hooks:
        raise Formless("a product that is none of a linear alone")
    if isinstance(linear, NativeLinear | Int8Linear):
        found = linear.matrix()
        if found is None:
            raise Formless("integers that torch multiplies")
        return found
    if not is_plain(linear) and not is_falcons(linear) and type(linear) not in (Conv1D, WideConv1D):
        raise Formless(f"a linear of the kind {type(linear).__name__}")
    weight, bias = linear.get_parameter("weight"), linear.bias
    return _dense(weight, bias if isinstance(bias, Tensor) else None, turned=isinstance(linear, Conv1D))


def _dense(weight: Tensor, bias: Tensor | None = None, turned: bool = False) -> Matrix:
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        raise Formless(f"weights of {weight.dtype}")
    rows, columns = reversed(weight.shape) if turned else weight.shape
    at = None
    if bias is not None:
        if bias.shape != (rows,) or bias.dtype != torch.bfloat16 or not bias.is_contiguous():
            raise Formless(f"a bias of {bias.dtype}, {tuple(bias.shape)}")
        at = bias.data_ptr()
    kind = Matrix.TURNED if turned else Matrix.DENSE  # Falcon's rounds before it adds a bias; the kernels do not
    return Matrix(kind, rows, columns, columns, weight.data_ptr(), None, None, None, at, 0.0)


def _feed_forward(computed: object, hidden: int) -> Mlp:
    if isinstance(computed, mlp.Mlp):
        rising = [matrix_of(each) for each in _sides(computed.gate_up)]
    elif isinstance(computed, PlainMlp):
        rising = [matrix_of(computed.up)]
    else:
        raise Formless("something else than an MLP")
    if computed.activate not in ACTS:
        raise Formless("another activation")
    down, gated = matrix_of(computed.down), isinstance(computed, mlp.Mlp)
    _fit(rising, hidden, down.columns * (2 if gated else 1), most=2)
    _fit([down], down.columns, hidden)
    up = (Matrix * 2)(*rising)
    return Mlp(down.columns, len(rising), gated, ACTS.index(computed.activate), up, down)


def _sides(product: Callable[..., Tensor]) -> Sequence[Callable[..., Tensor]]:
    """The linears side by side of which a product is made."""
    return product.parts if isinstance(product, Side) else (product,)


def _parted(function: Callable[..., Tensor]) -> tuple[object, object]:
    """What is computed, and the norm behind it."""
    return (function.first, function.second) if isinstance(function, Then) else (function, unchanged)


def _ordered(q_k_v: Callable[..., Tensor]) -> tuple[Side, Tensor | None]:
    """The linears that give heads, and where among these all heads are."""
    side, behind = _parted(q_k_v)
    if not isinstance(side, Side) or not (behind is unchanged or isinstance(behind, Ordered)):
        raise Formless("heads that come from something else than linears")
    return side, behind.order if isinstance(behind, Ordered) else None


def _fit(matrices: Sequence[Matrix], columns: int, rows: int, most: int = 1) -> None:
    """Check that matrices read `columns` numbers each, and give `rows` together."""
    if (
        len(matrices) > most
        or any(each.columns != columns for each in matrices)
        or sum(e.rows for e in matrices) != rows
    ):
        raise Formless(f"products of {[(each.rows, each.columns) for each in matrices]}, not {columns} to {rows}")
    if len(matrices) > 1 and any(each.kind == Matrix.TURNED for each in matrices):
        raise Formless("turned weights beside others")
