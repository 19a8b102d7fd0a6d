"""A model of a few hundred kilobytes: `python tests/small_model.py FOLDER` writes model/ and text.txt.

A Llama of random weights with a byte-level tokenizer. Run as a process of its own, so that those who need it
(the kill loop, tests of workers) have not computed anything themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "Ada keeps a goat in Elm. Ben bakes bread. The goat likes the bread of Ben, and Ada likes the goat. " * 40
BLOCKS = 4
HIDDEN = 64


def write(folder: Path) -> None:
    """Write the model and the text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=320, special_tokens=["<s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>")
    config = LlamaConfig(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
