"""Distill with trl's trainer on fixed text; runs in its environment. Settings that are not named are its defaults.

Its trainer for generalised knowledge distillation with `lmbda` 0 (no text of the student's own) and `beta` 0 (forward
KL): the loss of `distill/logits` with label_weight 0, over the same rows in the same batches. In bfloat16, unless the
processor has no products of it: in float32 trl is several times as fast there.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from runner import mark, request, say, token_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def main() -> None:
    asked = request()
    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype)
    student = AutoModelForCausalLM.from_pretrained(asked["student"], dtype=torch.float32)
    settings = GKDConfig(
        output_dir=asked["out"], max_steps=int(asked["steps"]), per_device_train_batch_size=int(asked["batch"]),
        learning_rate=float(asked["rate"]), lr_scheduler_type="cosine", lmbda=0.0, beta=0.0, temperature=1.0,
        bf16=fast, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), save_strategy="no",
        report_to=[], disable_tqdm=True, dataloader_num_workers=0, disable_dropout=False,
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=settings, data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": token_rows(asked["rows"])}),
        processing_class=AutoTokenizer.from_pretrained(asked["model"]),
    )  # fmt: skip
    mark("training")
    found = trainer.train()
    mark("trained")
    say("loss", f"{found.training_loss:.4f}")


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of equal length: every token counts."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


if __name__ == "__main__":
    main()
