"""Quantize with GPTQModel; runs in its environment. Settings that are not named are its defaults."""

from __future__ import annotations

from runner import mark, request, token_rows

BATCH = 8


def main() -> None:
    asked = request()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    bits = {"gptq-4": 4, "gptq-3": 3}[asked["task"]]
    mark("loading")
    settings = QuantizeConfig(bits=bits, group_size=128, sym=True)
    model = GPTQModel.load(asked["model"], settings, device="cpu", dtype=getattr(torch, asked["dtype"]))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in token_rows(asked["rows"])]
    model.quantize(rows, batch_size=BATCH)
    model.save(asked["out"])
    mark("saved")


if __name__ == "__main__":
    main()
