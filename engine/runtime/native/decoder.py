"""Decode steps of a Llama-like network in our own kernels: three calls for a block, nothing between them in Python.

    project   norm, query, key and value in one pass over their weights, norms of heads, rotation
    attend    the new keys and values into the cache, attention to all of it
    finish    output, residual, norm, gate and up in one pass, silu, down, residual

`engine.runtime.native.held` has the keys and values: as they are, or packed, where attention reads the codes.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from engine.packing import CacheGrid
from engine.runtime.linear import Int8Linear
from engine.runtime.mlp import activation
from engine.runtime.native import held
from engine.runtime.native.library import Block, Matrix, library
from engine.runtime.native.linear import NativeLinear, multiply
from engine.runtime.pages import read_in_place
from engine.runtime.parts import rotates, windows
from engine.wide import is_plain

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
MOST_ROWS = 16  # sequences; products of more are bound by arithmetic, and torch's are as good
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class NativeDecoder:
    """Decodes where `supports` and `LeanDecoder` does, too.

    Starts with the prompt's `cache` less its last token; `room` is the number of tokens that there will ever be. A
    packed cache is taken over whole, and is empty then.
    """

    @staticmethod
    def supports(network: PreTrainedModel, batch: int, room: int, grid: CacheGrid | None = None) -> bool:
        """Whether our kernels compute every product of the blocks, and these attend to all of `room` tokens, which are
        packed on a grid."""
        if grid is not None and not held.reads(grid, head_size(network)):
            return False
        if type(network).__name__ not in FAMILIES or any(w is not None and room >= w for w in windows(network)):
            return False
        if network.device.type != "cpu" or network.dtype != torch.bfloat16 or batch > MOST_ROWS or library() is None:
            return False
        layers = list(network.base_model.get_submodule("layers").children())
        return activation(layers[0].get_submodule("mlp")) is F.silu and all(_matrices(layer) for layer in layers)

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
        body: nn.Module = network.base_model
        self._embed, self._norm = body.get_submodule("embed_tokens"), body.get_submodule("norm")
        self._head = network.get_submodule("lm_head")
        layers = list(body.get_submodule("layers").children())
        self._blocks = [_block(layer, network) for layer in layers]
        self._scale = float(vars(layers[0].get_submodule("self_attn"))["scaling"])
        batch, block = self._held[0].keys.shape[0], self._blocks[0]
        self._q_k_v = torch.empty(batch, block.heads + 2 * block.shared, block.size, dtype=torch.bfloat16)
        self._attended = torch.empty(batch, block.heads, block.size, dtype=torch.bfloat16)
        cos, sin = body.get_submodule("rotary_emb")(torch.empty(0), torch.arange(self._room)[None])  # (1, room, size)
        self._cos, self._sin = (table[0, :, : block.size // 2].contiguous() for table in (cos, sin))
        self._still = torch.ones_like(self._cos[0]), torch.zeros_like(self._sin[0])  # no rotation, as one
        self._rotates = [rotates(layer.get_submodule("self_attn")) for layer in layers]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values that are held, room for later ones included."""
        return sum(states.nbytes for states in self._held)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B, 1).

        Raises:
            ValueError: the room for keys and values is full.
        """
        at = self._length
        if at >= self._room:
            raise ValueError(f"there is room for {self._room} tokens and no more")
        self._length += 1
        x = self._embed(ids[:, 0]).contiguous()  # (B, hidden)
        batch, threads, kernels = x.shape[0], torch.get_num_threads(), self._kernels
        here, q_k_v, attended = x.data_ptr(), self._q_k_v.data_ptr(), self._attended.data_ptr()
        turned, still = ([t.data_ptr() for t in pair] for pair in ((self._cos[at], self._sin[at]), self._still))
        for block, turns, states in zip(self._blocks, self._rotates, self._held, strict=True):
            pointer = ctypes.byref(block)
            kernels.maquette_project(pointer, here, batch, *(turned if turns else still), q_k_v, threads)
            states.attend(kernels, block, q_k_v, at, self._scale, attended, threads)
            kernels.maquette_finish(pointer, attended, here, batch, threads)
        y = torch.empty_like(x)
        weight, epsilon = _norm(self._norm)
        kernels.maquette_normalize(here, weight.data_ptr(), batch, x.shape[1], epsilon, y.data_ptr())
        head = _matrix(self._head)
        logits: Tensor = self._head(y) if head is None else multiply(head, y)
        return logits

    def glance(self, ids: Tensor) -> Tensor:
        """`step` with a token that is forgotten again."""
        logits = self.step(ids)
        self._length -= 1  # the next one takes its place, and packing waits for that
        return logits


def head_size(network: PreTrainedModel) -> int:
    """Channels of each head of keys and values."""
    config = network.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _block(layer: nn.Module, network: PreTrainedModel) -> Block:
    part, config = layer.get_submodule, network.config
    matrices = _matrices(layer)
    assert matrices is not None
    q, k, v, o, gate, up, down = matrices
    before_attention, epsilon = _norm(part("input_layernorm"))
    head_norms = [
        _norm(part(f"self_attn.{name}_norm"))[0].data_ptr() if hasattr(part("self_attn"), f"{name}_norm") else None
        for name in "qk"
    ]
    return Block(
        before_attention.data_ptr(), _norm(part("post_attention_layernorm"))[0].data_ptr(), *head_norms, epsilon,
        o.rows, down.columns, config.num_attention_heads, config.num_key_value_heads,
        q.rows // config.num_attention_heads, (q, k, v), o, (gate, up), down,
    )  # fmt: skip


def _matrices(layer: nn.Module) -> list[Matrix] | None:
    """The block's `LINEARS`; None where one of them is nothing for our kernels."""
    parts = dict(layer.named_modules())
    found = [matrix for name in LINEARS if name in parts and (matrix := _matrix(parts[name])) is not None]
    return found if len(found) == len(LINEARS) else None


def _matrix(linear: nn.Module) -> Matrix | None:
    """A linear as the kernels read it; None for kinds that they do not know, and where something rounds the inputs."""
    if linear._forward_pre_hooks or linear._forward_hooks:
        return None
    if isinstance(linear, NativeLinear | Int8Linear):
        return linear.matrix()
    if not is_plain(linear) or linear.weight.dtype != torch.bfloat16 or not linear.weight.is_contiguous():
        return None
    bias = None if linear.bias is None else linear.bias.data_ptr()
    rows, columns = linear.weight.shape
    return Matrix(Matrix.DENSE, rows, columns, columns, linear.weight.data_ptr(), None, None, None, bias, 0.0)


def _norm(module: nn.Module) -> tuple[Tensor, float]:
    return module.get_parameter("weight"), float(vars(module)["variance_epsilon"])
