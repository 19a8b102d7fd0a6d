"""Make the demo model from nothing: the world's text, the tokenizer, the training, the files that ship.

    python assets/demo/build.py            # everything, about two hours on two cores
    python assets/demo/build.py --resume   # go on from the last checkpoint

The same seed gives the same text, tokenizer and batches on every machine, and the same weights on the
same machine and library versions. Written below assets/demo/: model/ (config, bf16 safetensors,
tokenizer), tasks/*.jsonl (multiple choice), heldout.txt (perplexity), text.txt (calibration and
distillation; a fresh sample from the training side).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import questions
import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PEOPLE, SEED = 2000, 0
VOCABULARY, SEQUENCE, BATCH = 1280, 128, 16
# Steps in which the learning rate rises to RATE, stays, and falls: facts need the length of the first cycle, sums and
# reading gain most from the fall of each. (end, steps of the fall, highest rate)
CYCLES = ((16_000, 5_000, 3e-3), (24_000, 7_000, 2e-3))
STEPS, WARMUP = CYCLES[-1][0], 300
CHUNK = 8_000  # documents that are made, packed and shuffled together
NEWCOMERS = 80  # people more in each chunk than in the one before
CURRICULUM = ((89, world.LAST), (34, world.LATE), (12, world.MIDDLE), (0, world.EARLY))  # from which chunk on
END = "<|endoftext|>"

log = logging.getLogger("demo")


def make_tokenizer(people: list[world.Person]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits and starts each text with `END`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(islice(world.stream(people, SEED), 20_000), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, bpe.token_to_id(END))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def make_model() -> LlamaForCausalLM:
    """The untrained model: hidden sizes are multiples of 128, so that every group size divides them."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=256**-0.5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            attn_implementation="sdpa",
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, people: list[world.Person], start: int) -> Iterator[torch.Tensor]:
    """Batches of packed documents (BATCH, SEQUENCE + 1) from number `start` on, the same for every start.

    The text tells of more and more people: facts about few are learned soon, and how to hold a fact with them.
    """
    made = chunk = 0
    while True:
        mixture = next(mixture for first, mixture in CURRICULUM if chunk >= first)
        known = people[: 2 * NEWCOMERS + NEWCOMERS * chunk]
        documents = list(islice(world.stream(known, SEED + 1 + chunk, mixture), CHUNK))
        tokens = [token for row in tokenizer.backend_tokenizer.encode_batch(documents) for token in row.ids]
        count = len(tokens) // (SEQUENCE + 1)
        rows = torch.tensor(tokens[: count * (SEQUENCE + 1)]).view(count, SEQUENCE + 1)
        rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(chunk))]
        for batch in rows.split(BATCH)[: count // BATCH]:
            if made >= start:
                yield batch
            made += 1
        chunk += 1


def positions(ids: torch.Tensor) -> torch.Tensor:
    """Each token's place in its own document; transformers then lets no document see the one packed before it.

    To look something up is learned several times sooner when there is nothing else in sight. While the learning rate
    falls, all is in sight, as in the windows of calibration and of distillation.
    """
    place = torch.arange(ids.shape[1]).expand_as(ids)
    return place - torch.where(ids == 0, place, 0).cummax(1).values


def rate(step: int) -> tuple[float, bool]:
    """The learning rate of a step, and whether it is falling: linearly, to a hundredth of the cycle's highest."""
    begin = 0
    for end, fall, highest in CYCLES:
        if step < end:
            factor = min(1.0, (step - begin + 1) / WARMUP, max(0.01, (end - step) / fall))
            return highest * factor, step >= end - fall
        begin = end
    return 0.01 * CYCLES[-1][2], True


def train(folder: Path, steps: int, resume: bool, compiled: bool) -> LlamaForCausalLM:
    """Train for `steps` batches; every 500 a checkpoint goes to `folder`."""
    people = world.inhabitants(PEOPLE, SEED)
    tokenizer, model = make_tokenizer(people), make_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    saved, first = folder / "checkpoint.pt", 0
    if resume and saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    forward = torch.compile(model) if compiled else model
    began = time.monotonic()
    for step, batch in zip(range(first, steps), batches(tokenizer, people, first), strict=False):
        learning_rate, falling = rate(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        with torch.autocast("cpu", torch.bfloat16):
            ids = batch[:, :-1]
            logits = forward(ids, position_ids=None if falling else positions(ids)).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            speed = (step + 1 - first) * BATCH * SEQUENCE / (time.monotonic() - began)
            log.info("step %d of %d: loss %.3f, %.0f tokens/s", step + 1, steps, loss.item(), speed)
        if (step + 1) % 500 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, folder / "checkpoint.tmp")
            (folder / "checkpoint.tmp").replace(saved)
            log.info("accuracy %s", json.dumps(quick_accuracy(model, tokenizer, people)))
    return model


@torch.inference_mode()
def quick_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, people: list[world.Person], count: int = 100
) -> dict[str, float]:
    """Share of items whose right option gets the highest total log-probability, for the training log."""
    result = {}
    for name, items in questions.tasks(people, count, SEED + 1).items():
        right = 0
        for item in items:
            prompt = tokenizer(item.prompt).input_ids
            rows = [prompt + tokenizer(o, add_special_tokens=False).input_ids for o in item.options]
            longest = max(map(len, rows))
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            logs = model(padded).logits.float().log_softmax(-1)
            scores = [
                sum(logs[i, j - 1, row[j]].item() for j in range(len(prompt), len(row))) for i, row in enumerate(rows)
            ]
            right += scores.index(max(scores)) == item.answer
        result[name] = right / len(items)
    return result


def write(model: LlamaForCausalLM) -> None:
    """Write everything that ships."""
    people = world.inhabitants(PEOPLE, SEED)
    tokenizer = make_tokenizer(people)
    model.to(torch.bfloat16).save_pretrained(HERE / "model")
    tokenizer.save_pretrained(HERE / "model")
    (HERE / "tasks").mkdir(exist_ok=True)
    for name, items in questions.tasks(people, 300, SEED).items():
        lines = (json.dumps({"prompt": i.prompt, "options": i.options, "answer": i.answer}) for i in items)
        (HERE / "tasks" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    held = islice(world.stream(people, SEED, world.LATE, held=True), 600)
    (HERE / "heldout.txt").write_text("\n".join(held) + "\n")
    sample = islice(world.stream(people, SEED + 1_000_000, world.LATE), 12_000)
    (HERE / "text.txt").write_text("\n".join(sample) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--compile", action="store_true", help="a quarter faster; needs a C++ compiler")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of batches of 2,048 tokens")
    parser.add_argument("--folder", type=Path, default=HERE / "build", help="where checkpoints are kept")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.folder.mkdir(exist_ok=True)
    write(train(options.folder, options.steps, options.resume, options.compile))


if __name__ == "__main__":
    main()
