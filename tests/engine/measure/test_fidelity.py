"""Perplexity, divergence, accuracy and outputs against slow loops over single tokens and items."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import artifacts, fit, headers, methods
from engine.errors import InputError
from engine.generate import generate
from engine.measure import _text, accuracy, divergence, outputs, perplexity, suite
from engine.measure._text import Document, Item
from engine.methods import Context
from engine.models import LoadedModel, load
from engine.places import DEMO
from engine.records import Recipe
from tests.conftest import Recorder, in_memory, tiny_config


def row(model: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of one row by itself, without batching or padding."""
    with torch.inference_mode():
        return model.network(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.fixture
def documents(tiny: LoadedModel) -> list[Document]:
    texts = ["The lamp is in the barn.", "12 + 7 = 19.", "Ada has the key. Who has the key? Ada.", "One day"]
    return [Document(tuple(_text.encode(tiny.tokenizer, text)), len(text)) for text in texts]


def test_perplexity_equals_a_loop_over_tokens(tiny: LoadedModel, documents: list[Document]) -> None:
    losses = []
    for document in documents:
        logs = row(tiny, list(document.ids))
        losses.append(-sum(float(logs[i - 1, document.ids[i]]) for i in range(1, len(document.ids))))
    tokens = sum(len(document.ids) - 1 for document in documents)
    found = {m.name: m for m in perplexity.measure(tiny, documents)}
    assert found["perplexity"].value == pytest.approx(math.exp(sum(losses) / tokens), rel=0.01)
    total = sum(document.bytes for document in documents)
    assert found["bits_per_byte"].value == pytest.approx(sum(losses) / math.log(2) / total, rel=0.01)
    assert found["perplexity"].details["tokens"] == tokens
    assert (found["perplexity"].error or 0) > 0


def test_the_standard_error_shrinks_with_more_documents() -> None:
    sums, counts = [10.0, 14.0, 9.0, 15.0], [5, 5, 5, 5]
    value, error = perplexity.ratio(sums, counts)
    assert value == 2.4
    # The mean of four cluster means 2, 2.8, 1.8, 3: its textbook standard error.
    spread = [2.0, 2.8, 1.8, 3.0]
    mean = sum(spread) / 4
    assert error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in spread) / 3 / 4))
    assert perplexity.ratio(sums * 9, counts * 9)[1] < error / 2.5


def test_divergence_equals_a_loop_and_is_zero_for_the_same_model(tiny: LoadedModel, documents: list[Document]) -> None:
    other = in_memory(tiny_config(), seed=1)
    total = agreed = tokens = 0.0
    for document in documents:
        p, q = row(tiny, list(document.ids)), row(other, list(document.ids))
        for place in range(len(document.ids) - 1):
            total += sum(math.exp(float(a)) * (float(a) - float(b)) for a, b in zip(p[place], q[place], strict=True))
            agreed += float(p[place].argmax() == q[place].argmax())
            tokens += 1
    found = {m.name: m.value for m in divergence.measure(other, tiny, documents)}
    assert found["kl"] == pytest.approx(total / tokens, rel=0.02)
    assert found["top1_agreement"] == pytest.approx(agreed / tokens, abs=1 / tokens)
    same = {m.name: m.value for m in divergence.measure(tiny, tiny, documents)}
    assert same == {"kl": 0.0, "top1_agreement": 1.0}


def test_models_with_other_vocabularies_are_not_compared(tiny: LoadedModel, documents: list[Document]) -> None:
    with pytest.raises(InputError, match="1280 tokens, the baseline 1200"):  # fewer than the tokenizer has: no padding
        divergence.measure(tiny, in_memory(tiny_config(vocab_size=1200)), documents)


def test_choices_equal_scoring_every_option_by_itself(tiny: LoadedModel) -> None:
    items = [item for item in _text.items(tiny, 1) if item.task in ("sums", "facts")][::25]
    assert {len(option) for item in items for option in item.options} > {1}
    for item, chosen in zip(items, accuracy.choices(tiny, items), strict=True):
        scores = []
        for option in item.options:
            logs = row(tiny, [*item.prompt, *option])
            start = len(item.prompt)
            scores.append(sum(float(logs[start - 1 + i, token]) for i, token in enumerate(option)))
        assert scores[chosen] == pytest.approx(max(scores), abs=0.05)  # bf16: batches round differently


def test_accuracy_and_flips_count_what_they_say() -> None:
    items = [Item(task, (1,), ((2,), (3,)), answer) for task, answer in (("a", 0), ("a", 1), ("b", 0), ("b", 0))]
    found = {m.name: m for m in accuracy.measure(items, [0, 0, 1, 0])}
    assert {name: m.value for name, m in found.items()} == {"accuracy": 0.5, "accuracy.a": 0.5, "accuracy.b": 0.5}
    assert found["accuracy.a"].error == pytest.approx(math.sqrt(0.25 / 2))
    assert found["accuracy.b"].details["right"] == "01"
    flips = accuracy.flips(items, [0, 0, 1, 0], [1, 0, 0, 0])
    assert flips.value == 0.5
    assert (flips.details["right_to_wrong"], flips.details["wrong_to_right"]) == (1, 1)


def test_outputs_show_each_token_as_the_model_saw_it(tiny: LoadedModel) -> None:
    baseline = in_memory(tiny_config(), seed=1)
    (found,) = outputs.measure(tiny, baseline, ["The lamp is in"])
    prompt = _text.encode(tiny.tokenizer, "The lamp is in")
    theirs = [step.token_id for step in generate(baseline, prompt, max_new_tokens=outputs.LENGTH)]
    assert "".join(token.text for token in found.forced) == tiny.tokenizer.decode(theirs)
    for token in found.tokens:
        assert len(token.top) == 5
        assert token.probability == pytest.approx(token.top[0][1], abs=1e-6)  # greedy took the likeliest
    p, q = row(baseline, prompt + theirs), row(tiny, prompt + theirs)
    place = len(prompt) - 1
    expected = float((p[place].exp() * (p[place] - q[place])).sum())
    assert found.forced[0].kl == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_the_items_that_ship_are_real_questions() -> None:
    for task in ("facts", "reading", "sums", "grammar"):
        items = [json.loads(line) for line in (DEMO / "tasks" / f"{task}.jsonl").read_text().splitlines()]
        assert len(items) >= 250
        assert all(len(set(item["options"])) == 4 and 0 <= item["answer"] < 4 for item in items)
        counts = [sum(item["answer"] == place for item in items) for place in range(4)]
        assert min(counts) > len(items) / 8  # no position gives the answer away


def test_nothing_that_is_asked_stands_in_the_text_that_ships() -> None:
    text = (DEMO / "text.txt").read_text()
    lines = text.splitlines()
    for task in ("reading", "grammar", "facts"):
        for line in (DEMO / "tasks" / f"{task}.jsonl").read_text().splitlines():
            item = json.loads(line)
            if task == "reading":  # as a passage of its own; longer ones may say the same sentence
                passage = item["prompt"].partition(". ")[0]
                asked = tuple(f"{passage}. {word} " for word in ("Who", "What", "Where"))
                assert not any(known.startswith(asked) for known in lines)
            else:  # a question of grammar may be the beginning of a longer word: "mason" of "masons"
                assert item["prompt"] + (item["options"][item["answer"]] if task == "facts" else " ") not in text
    held = (DEMO / "heldout.txt").read_text().splitlines()
    trained = set(text.splitlines())
    assert not trained & set(held)


def test_large_models_read_fewer_documents() -> None:
    assert fit.share(2_000_000, 300) == 300
    assert fit.share(500_000_000, 300) == 32
    assert fit.share(100_000_000, 300) == 150
    assert fit.share(8_000_000_000, 20) == 20


def test_a_packed_model_reads_what_its_original_does(
    tiny_folder: Callable[..., Path], tmp_path: Path, context: Context, recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, asked = tiny_folder(), set[int]()

    def some(parameters: int, count: int) -> int:
        asked.add(parameters)
        return 2

    monkeypatch.setattr(_text, "share", some)
    rtn = methods.get("quantize/rtn")
    model = rtn.apply(load(source), rtn.check({"group_size": 32}), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    for folder, baseline in ((source, None), (tmp_path / "artifact", source)):
        suite.measure(folder, ("perplexity", "accuracy"), baseline, "cpu", recorder)
    assert asked == {headers.inspect(source).parameters}


def test_padding_that_the_baseline_has_not_is_no_prediction(tiny: LoadedModel) -> None:
    text = [5, 6, 7]
    reference = outputs.score(tiny, [3, 4, *text], 2)[:, :1200].log_softmax(-1)
    assert [token.kl for token in outputs.force(tiny, [3, 4], text, reference)] == pytest.approx([0.0] * 3, abs=1e-6)


def test_a_document_that_is_too_long_is_cut(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text("the lamp is in the barn " * 400)
    for positions, length in ((2048, _text.LONGEST), (256, 256)):
        tiny.network.config.max_position_embeddings = positions
        (document,) = _text.documents(tiny, 1, tmp_path)
        assert len(document.ids) == length
        assert document.bytes < 400 * 24
