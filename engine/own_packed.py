"""Packed weights of linears that compressed-tensors does not know: GPT-2's `Conv1D`, Falcon's own, and a few families'.

    <name>.weight_packed       int32 (N, ceil(K * bits / 32)), the codes dense along K; of 8-bit floats float8 (N, K)
    <name>.weight_scale        (N, G), or (1,) where all share one
    <name>.weight_zero_point   where the grid has them; packed along N, as `engine.shards` says
    <name>.weight_shape        int64 (2): N and K
    <name>.input_scale         (1,), where inputs are rounded with one scale for all
    <name>.weight              a tensor without numbers, shape (0,): who does not know the format refuses the folder

N outputs and K inputs, whichever way round the network holds its weight. config.json says under `PACKED_KEY` what it
says of other families under `quantization_config`, each module by its name. Where one linear needs this format, all
that is packed in the folder has it, the head and the embeddings too.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

PACKED_KEY = "maquette_packed"  # of config.json
CONV1D = ("gpt2",)  # families whose linears are `Conv1D`: their weights are (K, N)
# Families that begin with numbers of their own for some linears, by their weight, which packed ones have not.
BEGUN = ("gpt_bigcode", "modernbert-decoder", "nanochat", "recurrent_gemma")
FAMILIES = (*CONV1D, "falcon", *BEGUN)  # that are known to need the format; of others the network says


def rounds_inputs(config: Mapping[str, JsonValue]) -> bool:
    """Whether a config.json says that inputs of packed linears are rounded."""
    stored = config.get(PACKED_KEY)
    groups = stored.get("config_groups") if isinstance(stored, dict) else None
    found = groups.values() if isinstance(groups, dict) else ()
    return any(isinstance(group, dict) and group.get("input_activations") is not None for group in found)
