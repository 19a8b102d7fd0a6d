"""Quantize with llm-compressor; runs in its environment. Settings that are not named are its defaults.

Its AWQ pins the memory of cached activations, which torch refuses without a GPU: the method that pins, which only
makes copies to a GPU faster, is replaced by nothing. AWQ itself is as it ships.
"""

from __future__ import annotations

from runner import mark, request, token_rows

BATCH = 8


def main() -> None:
    asked = request()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    mark("loading")
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    rows = token_rows(asked["rows"])
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=recipe(asked["task"]), batch_size=BATCH,
        num_calibration_samples=len(rows), max_seq_length=len(rows[0]), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(asked["out"], save_compressed=True)
    tokenizer.save_pretrained(asked["out"])
    mark("saved")


def recipe(task: str) -> list[object]:
    """The modifiers of a task."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    def groups(bits: int, symmetric: bool = True) -> dict[str, object]:
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 128}
        return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}

    return {
        "gptq-4": lambda: [GPTQModifier(**groups(4))],
        "gptq-3": lambda: [GPTQModifier(**groups(3))],
        "awq-4": lambda: [AWQModifier(), QuantizationModifier(**groups(4))],
        "awq-4-asymmetric": lambda: [AWQModifier(), QuantizationModifier(**groups(4, symmetric=False))],
        "w8a8": lambda: [
            SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(scheme="W8A8", ignore=["lm_head"]),
        ],
    }[task]()  # fmt: skip


if __name__ == "__main__":
    main()
