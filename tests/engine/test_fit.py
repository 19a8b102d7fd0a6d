"""Memory as a sum of named parts: sums that anyone can check by hand, and what must change when a setting does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import JsonValue

from engine import fit, losses, methods, pace, sizes, ways
from engine.fit import Estimate, Machine, Need
from engine.headers import Shape
from engine.pace import Rates
from engine.packing import CacheGrid
from engine.quantize import hqq, mixed, zeroquant
from engine.records import Recipe
from engine.sizes import Holding

GB, TB, GiB = 10**9, 10**12, 1 << 30


def llama(
    blocks: int = 4, hidden: int = 64, wide: int = 128, heads: int = 4, shared: int = 2, words: int = 1000,
    tied: bool = True, **more: JsonValue,
) -> Shape:  # fmt: skip
    """The shape of a Llama, from nothing but numbers."""
    size = hidden // heads
    config: dict[str, JsonValue] = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": words,
        "max_position_embeddings": 2048, **more,
    }  # fmt: skip
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (words, hidden)
    for block in range(blocks):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (shared * size, hidden),
            "self_attn.v_proj": (shared * size, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            tensors[f"model.layers.{block}.{name}.weight"] = shape
    return Shape(Path("llama"), config, tensors, 0)


LARGE = llama(32, 4096, 14336, 32, 8, 128256, tied=False)  # 8 B


def estimate(shape: Shape, *steps: object, machine: Machine | None = None, **more: object) -> Estimate:
    recipe = Recipe.model_validate({"model": "demo", "steps": list(steps), **more})
    return fit.estimate(recipe, shape, methods.check(recipe), machine or Machine(24 * GiB))


def step(found: Estimate) -> Need:
    return max((need for need in found.needs if need.situation == "compress"), key=lambda need: need.total)


def situation(found: Estimate, name: str) -> Need:
    return next(need for need in found.needs if need.situation == name)


def test_the_kv_cache_of_a_540_b_model_is_three_times_its_weights() -> None:
    cache = sizes.kv_bytes(blocks=118, heads=48, size=128, batch=512, tokens=2048, width=2)
    assert cache == 2 * 118 * 48 * 128 * 512 * 2048 * 2
    assert round(cache / TB, 2) == 3.04
    assert 2.8 < cache / (2 * 540 * GB) < 3.0  # "three times"
    config: dict[str, JsonValue] = {"num_hidden_layers": 118, "num_attention_heads": 48, "head_dim": 128}
    assert sizes.cache_bytes(config, None, 2, batch=512, tokens=2048) == cache


def test_a_sliding_window_keeps_its_own_tokens() -> None:
    config: dict[str, JsonValue] = {
        "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8, "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    one = 2 * 2 * 8 * 2  # of a token in a block, in 16 bit
    assert sizes.cache_bytes(config, None, 2, batch=1, tokens=100) == one * (3 * 16 + 100)
    assert sizes.cache_bytes(config, None, 2, batch=1, tokens=10) == one * 4 * 10


def test_a_packed_cache_holds_codes_scales_and_one_block_unpacked() -> None:
    numbers = 16 * 64 * 2 * 4 * 2 * 16  # sequences, tokens, keys and values, blocks, heads, channels
    held = sizes.cache_bytes(llama().config, CacheGrid(4, 16, 0), 2, 16, 64)
    assert held == numbers // 2 + 4 * numbers // 16 + 2 * numbers // 4
    exact = estimate(llama(), measure=["latency"])
    packed = estimate(llama(), {"quantize/kv_cache": {"bits": 4, "group_size": 16}}, measure=["latency"])
    # What read the prompt and what decodes both have exact keys and values; a packed cache stands once.
    assert situation(exact, "measure").parts["kv_cache"] == 2 * 2 * numbers
    assert situation(packed, "measure").parts["kv_cache"] == held
    assert packed.serving.parts["kv_cache"] < exact.serving.parts["kv_cache"] / 3


@pytest.mark.parametrize(
    ("name", "params", "stored", "held"),
    [
        ("quantize/rtn", {"bits": 4, "group_size": 64}, 4 + 16 / 64, 4 + 16 / 64),
        ("quantize/gptq", {"bits": 3, "group_size": 32}, 3 + 16 / 32, 4 + 16 / 32),
        ("quantize/rtn", {"bits": 4, "group_size": 64, "symmetric": False}, 4 + 20 / 64, 4 + 20 / 64),
        ("quantize/awq", {"bits": 8, "granularity": "channel"}, 8 + 16 / 256, 8 + 16 / 256),
        ("quantize/hqq", {"bits": 6, "granularity": "tensor"}, 6 + 16 / (512 * 256), 8 + 16 / (512 * 256)),
        ("quantize/smoothquant", {}, 8 + 16 / 256, 8 + 16 / 256),
        ("quantize/fp8", {}, 8 + 16 / 256, 16),
        ("quantize/bitsandbytes", {}, 4 + 8 / 64, 4 + 8 / 64),
        ("quantize/mixed", {"budget": 3.25}, 3.25, 4),
    ],
)
def test_bits_of_a_weight_scales_included(name: str, params: dict[str, JsonValue], stored: float, held: float) -> None:
    found = methods.get(name).check(params).stored_bits(512, 256)
    assert found is not None
    assert (found.stored, found.held) == (pytest.approx(stored), pytest.approx(held))


def test_methods_that_store_no_codes_say_so() -> None:
    kept = [m.name for m in methods.methods().values() if m.params().stored_bits(512, 256) is None]
    assert {name for name in kept if name.startswith("quantize/")} == {"quantize/kv_cache"}


def test_embeddings_and_head_are_counted_apart_from_the_blocks() -> None:
    held = Holding(LARGE, 2).after(methods.get("quantize/gptq").check({"bits": 4, "group_size": 128}))
    inside = sum(a * b for a, b in LARGE.linears.values())
    beside = LARGE.parameters - inside
    assert held.file_bytes() == pytest.approx(inside * 4.125 / 8 + beside * 2, rel=1e-6)
    both = methods.get("quantize/gptq").check({"bits": 4, "group_size": 128, "head": True, "embeddings": True})
    table = 128256 * 4096
    whole = Holding(LARGE, 2).after(both)
    saved = held.file_bytes() - whole.file_bytes()
    assert saved == pytest.approx(table * (2 - 4.125 / 8) + table * (2 - 1 - 2 / 4096), rel=1e-6)


def test_later_steps_are_counted_on_what_earlier_ones_leave() -> None:
    depth, gptq = {"prune/depth": {"share": 0.5}}, {"quantize/gptq": {"group_size": 32}}
    whole, half = (estimate(llama(8, 256, 512), *steps) for steps in ((gptq,), (depth, gptq)))
    assert half.serving.parts["weights"] < 0.6 * whole.serving.parts["weights"]
    assert half.serving.parts["kv_cache"] == whole.serving.parts["kv_cache"] / 2


def test_one_block_at_a_time_and_the_whole() -> None:
    rtn = {"quantize/rtn": {"group_size": 128}}
    block = max(size for name, size in LARGE.parts.items() if name.endswith(".0"))
    found = step(estimate(LARGE, rtn, measure=["size"]))
    assert found.parts["weights"] == 2 * block
    beside = 2 * max(size for name, size in LARGE.parts.items() if not name.endswith(".0"))
    assert step(estimate(LARGE, {"prune/depth": {}}, measure=["size"])).parts["weights"] == max(2 * block, beside)
    assert step(estimate(LARGE, {"prune/l1": {}}, measure=["size"])).parts["weights"] == 4 * LARGE.parameters
    tight = estimate(LARGE, rtn, measure=["size"], machine=Machine(4 * GiB))
    assert situation(tight, "verify").total < 4 * GiB  # read back part by part
    assert "Larger than memory: one block at a time." in tight.notes
    assert situation(estimate(LARGE, rtn, machine=Machine(80 * GiB)), "verify").parts["weights"] == 2 * LARGE.parameters


def test_a_hessian_for_each_input_that_is_read() -> None:
    found = step(estimate(LARGE, {"quantize/gptq": {"group_size": 128, "samples": 32, "sequence_length": 512}}))
    states = 32 * 512 * 4096 * 2
    assert found.parts["calibration"] == states + 4 * (14336**2 + 3 * 4096**2)  # as they are gathered, all of a block
    embedded = step(estimate(LARGE, {"prune/wanda": {"samples": 32, "sequence_length": 512}}))
    assert (embedded.parts["weights"], embedded.parts["calibration"]) == (
        2 * 128256 * 4096,
        states,
    )  # more than a block
    few = llama(32, 4096, 14336, 32, 8, 8000)
    norms = step(estimate(few, {"prune/wanda": {"samples": 32, "sequence_length": 512}}))
    assert norms.parts["calibration"] == states + 8 * (14336 + 3 * 4096)
    many = step(estimate(few, {"prune/wanda": {"samples": 4096, "sequence_length": 512}}))
    assert many.parts["calibration"] == (1 << 30) + 8 * (14336 + 3 * 4096)  # more stand in a file


def test_a_model_that_is_whole_in_memory_keeps_the_codes_of_all_its_blocks() -> None:
    linears, block = sum(a * b for a, b in LARGE.linears.values()), LARGE.parts["model.layers.0"]
    learned = {"distill/logits": {"student": "current", "steps": 1, "batch": 1}}
    for *earlier, last in (["prune/l1", "quantize/gptq"], [learned, "quantize/gptq"]):
        need = [n for n in estimate(LARGE, *earlier, last).needs if n.situation == "compress"][-1]
        together = need.parts["weights"] + need.parts["codes"]
        # While the last block is observed all weights and the codes before it; of its last linear what was put aside.
        assert 2 * (LARGE.parameters - block) + linears < together < 2 * LARGE.parameters + linears + block
    streamed = step(estimate(LARGE, "quantize/gptq")).parts
    assert streamed.get("weights", 0) + streamed.get("codes", 0) < 4 * block


@pytest.mark.parametrize("unit", ["mib", "memory"])
def test_a_budget_of_the_whole_model_is_what_it_will_take(unit: str) -> None:
    shape = llama(8, 256, 512, words=4000)
    linears = sum(a * b for a, b in shape.linears.values())
    budget = (5.5 * linears / 8 + 2 * (shape.parameters - linears)) / fit.MiB
    params = methods.get("quantize/mixed").check({"budget": budget, "unit": unit})
    after = Holding(shape, 2).after(params)
    headers = sum(mixed.HEADER + mixed.NAMED * len(name) for name in shape.linears) if unit == "mib" else 0
    assert after.file_bytes() + headers == pytest.approx(budget * fit.MiB)
    held = after.packed() if unit == "memory" else after.packed() - linears * (8 - 5.5) / 8  # kernels hold 5 bits in 8
    assert held == pytest.approx(budget * fit.MiB, rel=0.02)
    found = estimate(shape, {"quantize/mixed": {"budget": budget, "unit": unit}})
    assert found.serving.parts["weights"] == after.packed()
    large = methods.get("quantize/mixed").check({"budget": 1e6, "unit": unit})
    assert Holding(shape, 2).after(large).file_bytes() < 8.6 * linears / 8 + 2 * (shape.parameters - linears)


def test_what_is_measured_first_takes_its_time_and_memory() -> None:
    shape = llama(2, 256, 512, words=50_000)
    params = methods.get("quantize/mixed").check({"samples": 16, "sequence_length": 128, "targets": "*.o_proj"})
    survey = params.survey(shape, 2)
    assert survey is not None
    head = 50_000 * 256
    calibration, block = 6 * 16 * 128 * shape.parameters, (shape.parameters - head) / 2
    # The text as it is passes two blocks, with each of two linears changed one or both; the head predicts thrice.
    read = 2 * 8 * 128 * (5 * block + 3 * head)
    options = 6 * 3 * 256**3  # of a linear: the error of 6 widths with 3 group sizes, by half of a product
    assert survey.operations == calibration + read + 2 * options
    again = methods.get("quantize/gptq").check({"samples": 16, "sequence_length": 128, "targets": "*.o_proj"})
    seconds = [pace.step_seconds(Holding(shape, 2), each, Rates()) for each in (params, again)]
    assert seconds[0] - seconds[1] == pytest.approx(survey.operations / Rates().arithmetic)
    need = step(estimate(shape, {"quantize/mixed": {"samples": 1, "sequence_length": 128}}))
    states, linears = 2 * 8 * 128 * 256, len(shape.linears)  # what enters the blocks, and what each change makes of it
    rounding = mixed.WEIGHED * 512 * 256
    assert need.parts["activations"] == 22 * (1 << 24) + (linears + 3) * states + rounding  # with some rows' logits


def test_four_bits_of_bitsandbytes_read_no_text_and_neither_time_nor_memory_says_so() -> None:
    def seen(scheme: str, samples: int) -> tuple[float, int, bool]:
        body: dict[str, JsonValue] = {"scheme": scheme, "samples": samples, "sequence_length": 2048}
        found = estimate(LARGE, {"quantize/bitsandbytes": body}, machine=Machine(64 * GiB))
        need = step(found)
        return found.working, need.total, "calibration" in need.parts

    for scheme in ("nf4", "fp4"):
        assert seen(scheme, 1) == seen(scheme, 4096)
        assert not seen(scheme, 4096)[2]
    assert seen("int8", 4096)[0] - seen("int8", 1)[0] == pytest.approx(
        6 * 4095 * 2048 * LARGE.parameters / Rates().arithmetic
    )
    assert seen("int8", 4096)[2]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_bitsandbytes_holds_a_block_and_its_library(scheme: str) -> None:
    few, many = (step(estimate(llama(count), {"quantize/bitsandbytes": {"scheme": scheme}})) for count in (2, 9))
    assert few.total == many.total
    rounded = step(estimate(llama(9), {"quantize/rtn": {"group_size": 128}}))
    assert many.parts["weights"] == rounded.parts["weights"]
    assert many.parts["runtime"] - rounded.parts["runtime"] == fit.LIBRARY
    assert many.parts["codes"] < rounded.parts["codes"]  # found as they are written, once


@pytest.mark.parametrize(("scheme", "bytes_"), [("nf4", fit.REPACKED), ("int8", 0)])
def test_a_head_in_4_bits_is_repacked_when_it_computes(scheme: str, bytes_: int) -> None:
    found = estimate(LARGE, {"quantize/bitsandbytes": {"scheme": scheme, "head": True}})
    assert situation(found, "save").parts.get("activations", 0) == bytes_ * 128256 * 4096


def working(name: str, **params: JsonValue) -> float:
    """Operations that the time of a method's steps counts beside all others'."""
    return estimate(LARGE, {name: params}).working * Rates().arithmetic


def test_the_turns_of_hqq_take_time_on_the_weights_that_it_changes() -> None:
    weights = sum(outputs * inputs for outputs, inputs in LARGE.linears.values())
    more = working("quantize/hqq", turns=30) - working("quantize/hqq", turns=20)
    assert more == pytest.approx(10 * hqq.TURN * weights)
    assert working("quantize/hqq") - working("quantize/rtn") == pytest.approx(21 * hqq.TURN * weights)
    few = working("quantize/hqq", targets="*.o_proj") - working("quantize/rtn")
    assert few == pytest.approx(21 * hqq.TURN * 32 * 4096**2)
    head = working("quantize/hqq", head=True) - working("quantize/hqq")
    assert head == pytest.approx(21 * hqq.TURN * 128256 * 4096)


def test_blocks_that_losses_judge_take_the_time_of_what_is_behind_them() -> None:
    text = {"samples": 10, "sequence_length": 100}
    block, head = sum(outputs * inputs for outputs, inputs in LARGE.linears.values()) / 32, 128256 * 4096
    quick = working("prune/depth", by="influence", **text)
    one = working("prune/depth", by="perplexity", count=8, **text) - quick
    assert one == pytest.approx(2 * 1000 * (sum(range(32)) * block + 32 * head))
    runs = working("prune/depth", by="perplexity", count=8, contiguous=True, **text) - quick
    assert runs == pytest.approx(2 * 1000 * (sum(range(25)) * block + 25 * head))
    two = working("prune/depth", by="greedy", count=2, **text) - quick
    assert two == pytest.approx(one + 2 * 1000 * (sum(range(31)) * block + 31 * head))


def test_blocks_that_learn_take_the_time_of_their_steps() -> None:
    weights = sum(outputs * inputs for outputs, inputs in LARGE.linears.values())

    def taken(steps: int, samples: int = 64, **more: JsonValue) -> float:
        return working("quantize/zeroquant", distill_steps=steps, samples=samples, sequence_length=128, **more)

    assert taken(30) - taken(20) == pytest.approx(10 * (6 * 8 * 128 + zeroquant.LEARNED) * weights)
    assert taken(30, samples=2) - taken(20, samples=2) == pytest.approx(
        10 * (6 * 2 * 128 + zeroquant.LEARNED) * weights
    )
    judging = 6 * 64 * 128 + 2 * 8 * zeroquant.ROUNDED  # three passes over all text, two of them with rounding
    learning = 10 * (6 * 8 * 128 + zeroquant.LEARNED)
    assert taken(10) - taken(0) == pytest.approx((learning + judging) * weights)
    assert taken(10, head=True) - taken(0, head=True) == pytest.approx(taken(10) - taken(0))  # the head does not learn


def test_a_block_that_learns_stands_in_float32_beside_itself_with_what_it_gave() -> None:
    body = {"distill_steps": 5, "samples": 512, "sequence_length": 2048}
    found = step(estimate(LARGE, {"quantize/zeroquant": body})).parts
    block = max(size for name, size in LARGE.parts.items() if name.endswith(".0"))
    assert found["weights"] == 2 * block + 4 * block + 2 * block  # as it is, as it learns, as it is rounded
    assert (found["gradients"], found["optimizer"]) == (4 * block, 8 * block)
    assert found["calibration"] == 2 * fit.HELD  # what enters the block, and what it gave; more stands in files
    few = step(estimate(LARGE, {"quantize/zeroquant": body | {"samples": 1}})).parts
    assert few["calibration"] == 2 * 2048 * 4096 * 2


def test_as_many_logits_are_counted_as_a_piece_of_the_loss_has() -> None:
    assert (fit.LOGITS_CPU, fit.LOGITS_CUDA, fit.FEWEST) == (losses.CHUNK, losses.CHUNK_CUDA, losses.FEWEST)


def test_training_holds_weights_gradients_and_two_moments_in_float32() -> None:
    shape = llama(8, 256, 512)
    body = {"student": "current", "steps": 5, "batch": 2}
    found = step(estimate(shape, {"distill/logits": body}))
    assert found.parts["weights"] == found.parts["gradients"] == 4 * shape.parameters
    assert found.parts["optimizer"] == 8 * shape.parameters
    assert "teacher" not in found.parts
    live = step(estimate(shape, {"distill/logits": {**body, "teacher_logits": "live"}}))
    assert live.parts["teacher"] == 2 * shape.parameters
    lora = step(estimate(shape, {"distill/repair": {"scope": "lora", "rank": 4}}))
    assert lora.parts["optimizer"] < found.parts["optimizer"] / 20
    larger = step(estimate(shape, {"distill/logits": {**body, "batch": 8}}))
    assert larger.parts["activations"] > 2 * found.parts["activations"]
    small = step(estimate(shape, {"distill/logits": {**body, "student": "blocks", "keep_every": 4}}))
    assert small.total < found.total


def test_of_assistants_the_largest_is_held_and_all_take_time() -> None:
    shape, body = llama(8, 256, 512), {"student": "blocks", "keep_every": 4, "steps": 5, "batch": 2}
    alone, chain = (estimate(shape, {"distill/logits": {**body, "assistants": n}}) for n in (0, 2))
    block = shape.parts["model.layers.0"]
    # Between 8 blocks and 2, in equal ratios: 5 and 3.
    assert step(alone).parts["optimizer"] == 8 * (shape.parameters - 6 * block)
    assert step(chain).parts["optimizer"] == 8 * (shape.parameters - 3 * block)
    sizes_of = [shape.parameters - gone * block for gone in (0, 3, 5, 6)]
    more = 6 * sum(sizes_of[1:3]) + 2 * sum(sizes_of[1:3])  # trained, and asked by the next
    assert chain.working - alone.working == pytest.approx(5 * 2 * 128 * more / Rates().arithmetic)
    wide = {"student": "size", "hidden_size": 64, "num_blocks": 2, "steps": 5, "assistants": 1}
    found = step(estimate(shape, {"distill/logits": wide}))  # of width 128 with 4 blocks
    of_a_block = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128
    assert found.parts["optimizer"] == 8 * (2 * 1000 * 128 + 128 + 4 * of_a_block)


def test_a_training_that_ends_early_takes_the_time_of_its_steps() -> None:
    shape, body = llama(8, 256, 512), {"student": "blocks", "keep_every": 4, "batch": 2, "assistants": 1}
    times = [
        estimate(shape, {"distill/logits": {**body, "steps": steps, "learning_rate_factors": factors}}).working
        for steps, factors in ((40, ""), (10, ""), (40, "0.1 after 5, 0 after 10"))
    ]
    alone = [
        estimate(shape, {"distill/logits": {**body, "assistants": 0, "steps": steps}}).working for steps in (40, 10)
    ]
    # The assistant's training goes to its end: the factors are the student's. It is asked by the student.
    asked = 2 * (shape.parameters - 4 * shape.parts["model.layers.0"]) - 2 * shape.parameters
    student = (alone[0] - alone[1]) + 30 * 2 * 128 * asked / Rates().arithmetic
    assert times[0] - times[2] == pytest.approx(student)
    assert times[1] < times[2] < times[0]


@pytest.mark.parametrize("by", ["activation", "taylor"])
def test_a_pruned_student_waits_for_its_assistants_where_it_was_taken_into_memory(by: str) -> None:
    shape, prune = llama(8, 256, 512), [{"prune/depth": {"share": 0.75}}, {"prune/width": {"neurons": 0.75, "by": by}}]
    body = {"student": "current", "steps": 5, "batch": 2}
    alone, helped = (estimate(shape, *prune, {"distill/logits": {**body, "assistants": n}}) for n in (0, 1))
    # Between 8 blocks of 512 neurons and 2 of 128: 4 of 256.
    attention, norms = 256 * (256 + 256 + 2 * 128), 2 * 256

    def size(blocks: int, neurons: int) -> int:
        return 1000 * 256 + 256 + blocks * (attention + norms + 3 * 256 * neurons)

    learning = [max(found.needs, key=lambda need: need.parts.get("optimizer", 0)) for found in (alone, helped)]
    assert [need.parts["optimizer"] for need in learning] == [8 * size(2, 128), 8 * size(4, 256)]
    assert learning[1].parts["weights"] == 4 * size(4, 256) + (2 * size(2, 128) if by == "taylor" else 0)
    assert learning[0].parts["weights"] == 4 * size(2, 128)
    more = 6 * size(4, 256) + 2 * size(4, 256)  # trained by the original, as the student is alone; asked by the student
    assert helped.working - alone.working == pytest.approx(5 * 2 * 128 * more / Rates().arithmetic)


def test_taylor_holds_all_weights_in_float32_with_gradients_and_what_leads_back() -> None:
    shape = llama(8, 256, 512)
    found = step(estimate(shape, {"prune/width": {"by": "taylor", "samples": 4, "sequence_length": 64}}))
    assert found.parts["weights"] == found.parts["gradients"] == 4 * shape.parameters
    assert found.parts["activations"] == 4 * 64 * (8 * (60 * 256 + 16 * 512) + 12 * 1000)
    norms = step(estimate(shape, {"prune/width": {"samples": 4, "sequence_length": 64}}))
    assert "gradients" not in norms.parts


def test_measuring_counts_logits_and_the_original_beside_it() -> None:
    shape, rtn = llama(8, 256, 512, words=50_000), {"quantize/rtn": {"group_size": 64}}
    alone = situation(estimate(shape, rtn, measure=["perplexity"]), "measure").parts
    both = situation(estimate(shape, rtn, measure=["perplexity", "divergence"]), "measure").parts
    assert "original" not in alone
    assert both["original"] == 2 * shape.parameters
    assert alone["activations"] == 4096 * (10 * 50_000 + 2 * (3 * 512 + 4 * 256))
    assert both["activations"] - alone["activations"] == 4096 * 10 * 50_000
    looked_at = situation(estimate(shape, rtn, measure=["memory"]), "measure").parts["activations"]
    assert looked_at == fit.MOVED * 50_000 * 256


def test_long_work_is_probed_beside_the_waiting_run() -> None:
    gptq = {"quantize/gptq": {"group_size": 128}}
    found = estimate(LARGE, gptq, measure=["size"])
    assert situation(found, "probe").total == step(found).total + fit.RUNTIME
    assert found.after == situation(found, "verify").total  # what a probe measured replaces its own estimate alone
    assert found.probed
    few = llama(2, 4096, 14336, 32, 8)  # one of two is half of the work
    for short in (estimate(llama(), "quantize/rtn", measure=["size"]), estimate(few, gptq, measure=["size"])):
        assert [need.situation for need in short.needs] == ["compress", "save", "verify"]
        assert not short.probed


def test_serving_grows_with_batch_and_context() -> None:
    held = Holding(LARGE, 2)
    one, more = fit.serving(held, 1, 1024).parts, fit.serving(held, 8, 2048).parts
    assert more["kv_cache"] == 16 * one["kv_cache"]
    assert more["weights"] == one["weights"] == 2 * LARGE.parameters


def test_a_gpu_has_a_context_where_a_cpu_has_processes() -> None:
    found = estimate(llama(), measure=["memory"], machine=Machine(8 * GiB, "cuda"))
    assert situation(found, "measure").parts["runtime"] == 2 * fit.CONTEXT
    assert found.device == "cuda"


def test_the_largest_situation_counts_and_every_sum_is_that_of_its_parts() -> None:
    found = estimate(LARGE, {"quantize/gptq": {"group_size": 128}}, machine=Machine(16 * GiB))
    assert found.total == max(sum(need.parts.values()) for need in found.needs)
    assert not found.fits
    for need in (*found.needs, found.serving):
        assert set(need.parts) <= set(fit.PARTS)
        assert all(type(amount) is int and amount > 0 for amount in need.parts.values())


@pytest.mark.parametrize("name", sorted(methods.methods()))
def test_every_method_has_an_estimate(name: str) -> None:
    found = estimate(llama(8, 256, 512, heads=4, shared=2), name)
    assert step(found).total > fit.RUNTIME
    assert found.seconds > found.working > 0


def test_seconds_are_a_sum_too_and_heed_what_a_probe_has_found() -> None:
    gptq = {"quantize/gptq": {"group_size": 128}}
    usual = estimate(LARGE, gptq)
    assert set(usual.times) == {"load", "steps", "save", "verify", "measure"}
    assert usual.seconds == sum(usual.times.values())
    slow = estimate(LARGE, gptq, machine=Machine(24 * GiB, rates=Rates(steps={"quantize/gptq": 3.0})))
    assert slow.working == pytest.approx(3 * usual.working)
    recipe = Recipe.model_validate({"model": "demo"})
    fetched = fit.estimate(recipe, LARGE, [], Machine(24 * GiB), download=16 * GB)
    assert fetched.times["download"] == pytest.approx(16 * GB / Rates().download)


@pytest.mark.parametrize(
    ("steps", "measure", "free", "name", "fits"),
    [
        ([], ["perplexity"], 16, "four_bits", True),
        ([{"quantize/rtn": {"group_size": 128}}], ["perplexity", "divergence"], 18, "no_original", True),
        ([{"quantize/rtn": {"group_size": 128}}], ["perplexity"], 4, "size_alone", True),
        ([{"distill/logits": {"student": "current", "batch": 64}}], ["size"], 20, "streamed", True),
        ([{"quantize/rtn": {"group_size": 128}}], ["perplexity"], 1, "size_alone", False),
        (
            [{"distill/logits": {"student": "size", "hidden_size": 8192, "num_blocks": 64}}],
            ["size"],
            200,
            "every_second",
            True,
        ),
    ],
)
def test_a_way_out_is_named_with_what_it_needs(
    steps: list[object], measure: list[str], free: int, name: str, fits: bool
) -> None:
    machine = Machine(free * GiB)
    recipe = Recipe.model_validate({"model": "demo", "steps": steps, "measure": measure})
    now = fit.estimate(recipe, LARGE, methods.check(recipe), machine)
    assert not now.fits
    way = ways.out(recipe, LARGE, machine, now)
    assert way is not None
    assert (way.name, way.fits) == (name, fits)
    again = fit.estimate(way.recipe, LARGE, methods.check(way.recipe), machine)
    assert way.total == again.total < now.total
    assert way.phrase.endswith(f" {again.total / GiB:.1f}")


def test_every_way_has_words() -> None:
    from ui.words import ENGLISH

    assert {f"way.{name}" for name in ways.PHRASES} <= set(ENGLISH)


def test_serving_grows_by_the_cache_of_each_sequence() -> None:
    found = estimate(LARGE, {"quantize/rtn": {"group_size": 128}})
    lengths = sorted({tokens for _, tokens in found.loads})
    assert lengths == [1024, 2048]  # no more than the model reads
    assert {batch for batch, _ in found.loads} == {1, 4, 16, 64}
    cache = sizes.cache_bytes(LARGE.config, None, 2, 1, 1024)
    assert found.loads[64, 2048] - found.loads[64, 1024] == 64 * cache * sizes.cache_copies(LARGE.config, None)
    assert found.loads[1, 2048] == found.serving.total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_packed_weights_are_held_packed_in_bfloat16_alone(dtype: str) -> None:
    shape = llama(2, 256, 512)
    model = {"source": "x", "dtype": dtype}
    body = {"model": model, "steps": [{"quantize/rtn": {"group_size": 32}}], "measure": ["memory"]}
    recipe = Recipe.model_validate(body)
    found = fit.estimate(recipe, shape, methods.check(recipe), Machine(64 * GiB))
    bits = sum(math.prod(s) for n, s in shape.tensors.items() if n.removesuffix(".weight") in shape.linears)
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[dtype]
    packed = width * (shape.parameters - bits) + bits * (4 + 8 * width / 32) / 8
    assert found.serving.parts["weights"] == (round(packed) if dtype == "bfloat16" else width * shape.parameters)
    assert (fit.IN_BFLOAT16 in found.notes) is (dtype != "bfloat16")
