"""Features, on-policy, sequences: each against its definition, and what must stay as it was."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import headers, methods, models
from engine.distill import features, logits, on_policy, sequence
from engine.distill._assistants import Size, between, cut_sizes, new_sizes
from engine.distill._student import spread
from engine.errors import InputError
from engine.losses import Objective
from engine.methods import Context
from engine.models import LoadedModel, blocks, load
from engine.places import DEMO
from engine.preflight import check
from engine.records import Recipe
from engine.surgery import Kept, keep_blocks, narrow
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import FAMILIES

SHORT = {"steps": 3, "batch": 2, "sequence_length": 16}


def apply(name: str, model: LoadedModel, context: Context, **params: object) -> LoadedModel:
    method = methods.get(name)
    with torch.no_grad():
        return method.apply(model, method.check(SHORT | params), context)  # type: ignore[arg-type]


def test_blocks_stand_for_blocks_evenly_and_the_last_for_the_last() -> None:
    assert spread(12, 4) == [2, 5, 8, 11]
    assert spread(5, 2) == [2, 4]
    assert spread(3, 3) == [0, 1, 2]
    assert between(32, 2, 1) == [8]
    assert between(1000, 1, 2) == [100, 10]


def test_the_loss_of_features_is_its_definition() -> None:
    dice = torch.Generator().manual_seed(0)
    theirs = tuple(torch.randn(2, 4, 6, generator=dice) for _ in range(5))  # embeddings and four blocks
    ours = tuple(torch.randn(2, 4, 3, generator=dice) for _ in range(3))
    maps = torch.nn.Linear(3, 6, bias=False)
    expected = torch.stack([
        (maps(a[row]) - b[row]).square().sum() / b[row].square().sum()
        for a, b in zip(ours, theirs[::2], strict=True) for row in range(2)
    ]).mean()  # fmt: skip
    torch.testing.assert_close(features.hidden_loss(ours, theirs, maps), expected)
    p, q = (tuple(torch.rand(2, 2, 4, 4, generator=dice).softmax(-1) for _ in range(n)) for n in (4, 2))
    expected = torch.stack([(p[i] * (p[i] / q[j]).log()).sum(-1).mean() for j, i in enumerate((1, 3))]).mean()
    torch.testing.assert_close(features.attention_loss(q, p), expected)
    assert float(features.attention_loss(p, p)) == pytest.approx(0, abs=1e-6)


def test_feature_training_brings_hidden_states_nearer(tiny_folder: Callable[..., Path], context: Context) -> None:
    source = tiny_folder(num_hidden_layers=4)
    teacher, ids = load(source), torch.arange(5, 69)[None]
    distances = []
    for weight in (0.0, 1.0):  # without it the labels alone are learned
        found = apply(
            "distill/features", load(source), dataclasses.replace(context, folder=context.folder / str(weight)),
            keep_every=2, steps=40, batch=4, label_weight=1.0, hidden_weight=weight, learning_rate=1e-3,
        )  # fmt: skip
        with torch.no_grad():
            ours, theirs = (
                tuple(state.float() for state in each.network(ids, output_hidden_states=True).hidden_states)
                for each in (found, teacher)
            )
        distances.append(float(features.hidden_loss(ours, theirs, torch.nn.Identity())))
    assert distances[1] < 0.8 * distances[0]


def test_feature_training_throws_its_projection_away_and_gives_attention_back(
    tiny_folder: Callable[..., Path], context: Context
) -> None:
    model = load(tiny_folder())
    found = apply(
        "distill/features", model, context, student="size", hidden_size=32, num_blocks=2, steps=10, label_weight=1.0,
        attention_weight=1.0, learning_rate=3e-3,
    )  # fmt: skip
    assert found.network.config._attn_implementation == "sdpa"
    assert found.network.config.hidden_size == 32
    assert not any("projection" in name for name, _ in found.network.named_parameters())


@pytest.mark.parametrize("family", ["gpt2", "phi3", "falcon", "gemma2", "mixtral", "bloom"])
def test_students_of_every_family_learn_features(family: str, context: Context) -> None:
    from tests.families import MIXTURES

    model = in_memory((FAMILIES | MIXTURES)[family])
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    found = apply("distill/features", model, context, student="current", steps=2)
    assert any(not torch.equal(value, before[name]) for name, value in found.network.state_dict().items())


def test_what_the_student_writes_follows_from_the_seed_and_its_prompt() -> None:
    model = in_memory(tiny_config())
    prompts = torch.arange(12).view(2, 6)
    first, second, other = (
        on_policy.write(model, prompts, 14, 1.0, [torch.Generator().manual_seed(seed + row) for row in range(2)])
        for seed in (1, 1, 3)
    )
    assert first.equal(second)
    assert not first.equal(other)
    assert first[:, :6].equal(prompts)
    assert first.shape == (2, 14)
    model.network.float()
    with torch.no_grad():
        model.network.get_input_embeddings().weight.mul_(20)  # so that one token stands out
        sure = model.network(prompts).logits[:, -1].argmax(-1)
    dice = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    assert on_policy.write(model, prompts, 7, 0.05, dice)[:, -1].equal(sure)


@pytest.mark.parametrize(("share", "written"), [(0.0, 0), (1.0, 4)])
def test_the_student_writes_its_share_of_the_batches(
    share: float, written: int, tiny_folder: Callable[..., Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    write = on_policy.write
    monkeypatch.setattr(on_policy, "write", lambda *asked: calls.append(asked) or write(*asked))
    settings = {"student_share": share, "steps": 4, "prompt_tokens": 8, "student": "current"}
    apply("distill/on_policy", load(tiny_folder()), context, **settings)
    assert len(calls) == written


@pytest.mark.parametrize("weight", ["hidden_weight", "attention_weight"])
def test_each_part_of_the_loss_of_features_teaches_something(
    weight: str, tiny_folder: Callable[..., Path], context: Context, tmp_path: Path
) -> None:
    folder, found = tiny_folder(), []
    for value in (0.0, 5.0):
        own = dataclasses.replace(context, folder=tmp_path / f"{weight}-{value}")
        settings = {"hidden_weight": 0.0, "attention_weight": 0.0, weight: value, "student": "size"}
        student = apply(
            "distill/features", load(folder), own, hidden_size=32, num_blocks=2, label_weight=1.0, **settings
        )
        found.append(student.network.model.layers[0].self_attn.q_proj.weight.clone())
    assert not torch.equal(*found)


def test_only_written_tokens_up_to_the_end_count(tiny_folder: Callable[..., Path], context: Context) -> None:
    from engine.lesson import Lesson, Text
    from engine.rows import Rows
    from engine.teachers import load_live

    live = load_live([tiny_folder()], 1280, context, "float32")
    student = in_memory(tiny_config(), torch.float32, seed=1)
    empty = Rows(torch.zeros(0, 9, dtype=torch.int32), torch.zeros(0, 9, dtype=torch.int32))
    lesson = Lesson(student, Text(empty, empty), Objective(), live, None)
    end = student.tokenizer.eos_token_id
    ids = torch.tensor([[5, 6, 7, 8, 9, end, 11, 12, 13], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    found = on_policy.own_loss(lesson, live, ids, 3, Objective(label_weight=0.7))
    with torch.no_grad():
        q, p = (each(ids).logits.log_softmax(-1) for each in (student.network, live.bodies[0].network))
    kl = (p.exp() * (p - q)).sum(-1)
    kept = torch.cat([kl[0, 2:5], kl[1, 2:8]])  # what predicts the tokens 3, 4, 5 and 3 to 8
    torch.testing.assert_close(found, kept.mean(), rtol=0.05, atol=0)


def test_an_interrupted_on_policy_training_ends_with_the_same_weights(context: Context) -> None:
    from engine.errors import Cancelled

    def once(context: Context) -> LoadedModel:
        return apply(
            "distill/on_policy", in_memory(tiny_config()), context, student="current", steps=52, prompt_tokens=14
        )

    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 52:
            raise Cancelled("stopped")

    whole = once(dataclasses.replace(context, folder=context.folder / "whole"))
    with pytest.raises(Cancelled):
        once(dataclasses.replace(context, check_cancelled=stop))
    resumed = once(context)
    assert "resumed at step 50 of 52" in context.emit.logs()  # type: ignore[attr-defined]
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)


def test_the_teacher_writes_once(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder())
    settings = {"prompt_tokens": 6, "sequences": 4, "student": "current"}
    with torch.no_grad():
        prompts = torch.arange(10, 22).view(2, 6)
        live = sequence.load_live([model.source], 1280, context, "bfloat16")
        found = sequence.continuations(live, prompts, 9, 0.0, torch.Generator())
        for place in range(6, 9):
            alone = live.bodies[0].network(found[:, :place].long()).logits[:, -1].argmax(-1)
            assert found[:, place].tolist() == alone.tolist()
    apply("distill/sequence", model, context, **settings)
    assert any("written now" in line for line in recorder.logs())
    assert any(data.get("series") == "kl_heldout" for _, data in recorder.said)
    monkeypatch.setattr(sequence, "load_live", None)
    again = dataclasses.replace(context, folder=context.folder / "again")
    apply("distill/sequence", load(model.source), again, **settings)
    assert any("reused" in line for line in recorder.logs())


def test_a_chain_of_assistants_is_taught_one_by_the_other(context: Context, recorder: Recorder) -> None:
    params = methods.get("distill/logits").params
    made = params.model_validate({"student": "size", "hidden_size": 16, "num_blocks": 1})
    assert new_sizes(64, 3, 16, made, 1) == [Size(2, 32)]  # type: ignore[arg-type]
    settings = {"student": "blocks", "keep_every": 3, "assistants": 1}
    first = apply("distill/logits", in_memory(tiny_config()), context, **settings)
    assert "assistant 1 of 1: 2 blocks of 64" in recorder.logs()
    assert first.network.config.num_hidden_layers == 1
    assert first.source == DEMO / "model"
    second = apply("distill/logits", in_memory(tiny_config()), context, **settings)
    assert "this assistant is finished" in recorder.logs()
    for name, value in first.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[name], value, rtol=0, atol=0)


def test_sizes_between_the_original_and_a_student_that_is_there() -> None:
    def config(family: str = "llama", **changes: object) -> dict[str, object]:
        return {**FAMILIES[family].to_dict(), **changes}

    whole = config(num_hidden_layers=8, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=4)
    student = {**whole, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
    student |= {"num_key_value_heads": 1, "head_dim": 8}
    whole |= {"head_dim": 8}
    assert cut_sizes(whole, student, 1) == [Size(4, 64, {"neurons": 512, "heads": 2})]  # type: ignore[arg-type]
    odd = {**whole, "intermediate_size": 2000}
    assert cut_sizes(whole, odd, 1) == [Size(8, 64, {"neurons": 2016})]  # type: ignore[arg-type]  # both are 16 times
    deeper = {**student, "num_hidden_layers": 12, "hidden_size": 128}
    assert [each.blocks for each in cut_sizes(whole, deeper, 2)] == [8, 8]  # type: ignore[arg-type]
    for nothing in (whole, deeper | {"intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}):
        assert cut_sizes(whole, nothing, 3) == []  # type: ignore[arg-type]
    gpt2 = config("gpt2", n_embd=64, n_head=8)
    found = cut_sizes(gpt2, gpt2 | {"n_embd": 16, "n_head": 2}, 1)  # type: ignore[arg-type]
    assert [(each.width, dict(each.units)) for each in found] == [(32, {"neurons": 128, "heads": 4, "channels": 32})]
    bloom = config("bloom", n_layer=4)  # whose widths are not known
    assert cut_sizes(bloom, bloom | {"n_layer": 1, "hidden_size": 8}, 1) == [Size(2, 64)]  # type: ignore[arg-type]


def pruned(folder: Path) -> LoadedModel:
    """One of four blocks, with a quarter of its neurons."""
    return narrow(keep_blocks(load(folder), [2]), Kept(neurons=[range(32)]))


def test_a_pruned_student_has_assistants_cut_from_its_original(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(num_hidden_layers=4)
    original, made = load(folder), []
    make = logits.make

    def kept(*asked: object) -> LoadedModel:
        made.append(make(*asked))  # type: ignore[arg-type]
        return copy.deepcopy(made[-1])

    monkeypatch.setattr(logits, "make", kept)
    learned = []
    for number in range(2):
        given = {"student": "current", "assistants": 1, "steps": 1}
        learned.append(apply("distill/logits", pruned(folder), context, **given))
        assert ("this assistant is finished" in recorder.logs()) == bool(number)
    assert "assistant 1 of 1: 2 blocks of 64" in recorder.logs()
    (assistant,) = made
    theirs = blocks(original.network)[1]
    for block, number in zip(blocks(assistant.network)[1], (1, 3), strict=True):
        rows = {tuple(row.tolist()) for row in theirs[number].mlp.up_proj.weight}
        assert block.mlp.up_proj.weight.shape == (64, 64)
        assert {tuple(row.tolist()) for row in block.mlp.up_proj.weight} < rows
    assert learned[0].network.config.intermediate_size == 32
    for name, value in learned[0].network.state_dict().items():
        torch.testing.assert_close(learned[1].network.state_dict()[name], value, rtol=0, atol=0)


def test_a_checkpoint_has_assistants_of_the_originals_kind(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    own = tiny_folder(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    model = load(tiny_folder(num_hidden_layers=4, intermediate_size=128))
    apply("distill/logits", model, context, student="folder", folder=str(own), assistants=1, steps=1)
    assert "assistant 1 of 1: 2 blocks of 32" in recorder.logs()
    assert load(context.folder / "assistant-1" / "model").network.config.num_key_value_heads == 1


def test_a_checkpoint_can_be_the_student_and_vocabularies_may_differ_by_padding(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    own = tiny_folder(vocab_size=1344, num_hidden_layers=1)
    model = load(tiny_folder())
    found = apply("distill/logits", model, context, student="folder", folder=str(own))
    assert found.network.config.vocab_size == 1344
    assert found.source == model.source
    large = tiny_folder(num_hidden_layers=4)
    other = dataclasses.replace(context, folder=context.folder / "other")
    apply("distill/logits", model, other, student="folder", folder=str(large), teacher_logits="live")
    assert any("larger than the model" in line for line in recorder.logs())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": 0}, "temperature"),
        ({"steps": 0}, "steps"),
        ({"keep_every": 9}, "keep_every 9 leaves no block of 4"),
        ({"student": "size", "hidden_size": 100}, "not a multiple of the head size 64"),
        ({"student": "folder"}, "folder: no checkpoint is named for the student"),
        ({"student": "folder", "folder": " "}, "folder: no checkpoint is named for the student"),
        ({"teachers": "/nowhere/at/all"}, "There is no model folder"),
        ({"teachers": "'/nowhere at/all"}, "a quote is not closed"),
        ({"text": "/nowhere.txt"}, "There is no training text"),
        ({"text": "EMPTY"}, "is empty"),
        ({"text": "SHORT"}, "one sequence needs 128"),
        ({"teachers": "OTHER"}, "another tokenizer"),
        ({"student": "folder", "folder": "OTHER"}, "another tokenizer"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    params: dict[str, object], words: str, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    other = tiny_folder()
    body = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(body.replace('"the"', '"teh"').replace('"Ġthe"', '"Ġteh"'))
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "SHORT").write_text("Ann.")
    places = {"OTHER": str(other), "EMPTY": str(tmp_path / "EMPTY"), "SHORT": str(tmp_path / "SHORT")}
    given = {key: places.get(str(value), value) for key, value in params.items()}
    recipe = Recipe.model_validate({"steps": [{"distill/logits": given}], "measure": ["size"]})
    with pytest.raises(InputError, match=words) as caught:
        check(recipe)
    assert "\n" not in str(caught.value)


def test_two_teachers_answer_with_their_mean_and_a_name_may_hold_a_space(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    source = tiny_folder()
    other = tiny_folder(num_hidden_layers=2)
    spaced = other.rename(other.with_name("my other teacher"))
    for teachers in ("", f"'{spaced}'"):
        own = dataclasses.replace(context, folder=context.folder / f"run-{len(teachers)}")
        settings = {"student": "current", "label_weight": 0.0, "teacher_logits": "live", "teachers": teachers}
        apply("distill/logits", load(source), own, steps=20, learning_rate=3e-3, **settings)
    looks = [float(str(data["value"])) for _, data in recorder.said if data.get("series") == "kl_heldout"]
    alone, both = looks[: len(looks) // 2], looks[len(looks) // 2 :]
    assert alone[0] < both[0] / 10, looks  # a student that is its only teacher
    assert both[-1] < both[0]


def test_a_student_that_is_the_teacher_or_larger_is_said(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    source, large = tiny_folder(), tiny_folder(num_hidden_layers=4)
    shape = headers.inspect(source)

    def notes(**given: object) -> str:
        return " ".join(methods.get("distill/logits").check(given).notes(shape, "cpu"))  # type: ignore[arg-type]

    for folder in (source, large):
        assert "as large as the teacher, or larger" in notes(student="folder", folder=str(folder))
    assert notes() == notes(student="current") == notes(keep_every=1) == ""
    for number, (teachers, said) in enumerate(((str(large), False), ("", True))):
        own = dataclasses.replace(context, folder=context.folder / str(number))
        apply("distill/logits", models.stream(source), own, student="current", teachers=teachers, steps=1)
        assert any("the student is the teacher itself" in line for line in recorder.logs()) is said


@pytest.mark.parametrize("learn_prompts", [True, False])
def test_what_the_teacher_wrote_counts_up_to_its_end_and_prompts_where_they_are_wanted(
    learn_prompts: bool, tiny_folder: Callable[..., Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder())
    end = model.tokenizer.eos_token_id
    ids = torch.arange(100, 132).view(2, 16).int()
    ids[0, 2] = ids[0, 9] = ids[0, 12] = end  # one in the prompt ends nothing; the first that was written does
    learned: list[int] = []
    token_loss = sequence.token_loss

    def watched(body: object, hidden: torch.Tensor, labels: torch.Tensor, *rest: object) -> torch.Tensor:
        learned.extend(labels.tolist())
        return token_loss(body, hidden, labels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sequence, "written", lambda *asked: ids)
    monkeypatch.setattr(sequence, "token_loss", watched)
    settings = {"prompt_tokens": 6, "sequences": 2, "student": "current", "learn_prompts": learn_prompts}
    apply("distill/sequence", model, context, steps=1, **settings)
    first = 1 if learn_prompts else 6
    assert sorted(learned) == sorted([*ids[0, first:10].tolist(), *ids[1, first:].tolist()])


def test_what_a_teacher_samples_follows_from_its_dice(tiny_folder: Callable[..., Path], context: Context) -> None:
    live = sequence.load_live([tiny_folder()], 1280, context, "bfloat16")
    prompts = torch.arange(10, 22).view(2, 6)
    first, second, other, greedy = (
        sequence.continuations(live, prompts, 12, heat, torch.Generator().manual_seed(seed))
        for seed, heat in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 0.0))
    )
    assert first.equal(second)
    assert not first.equal(other)
    assert not first.equal(greedy)
    assert first[:, :6].tolist() == prompts.tolist()
    live.bodies[0].network.get_input_embeddings().weight.data.mul_(20)  # so that one token stands out
    cold = sequence.continuations(live, prompts, 7, 0.05, torch.Generator().manual_seed(3))
    assert cold.equal(sequence.continuations(live, prompts, 7, 0.0, torch.Generator()))


def test_the_largest_seed_lets_a_student_write(context: Context) -> None:
    largest = dataclasses.replace(context, seed=2**31 - 1)
    apply("distill/on_policy", in_memory(tiny_config()), largest, student_share=1.0, prompt_tokens=4)


JS = {"divergence": "js", "label_weight": 0.0}  # at most ln 2


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("distill/logits", {"learning_rate": 1e9, "steps": 40}),
        ("distill/logits", {"learning_rate": 1e9, "steps": 1}),  # the only loss is the one before it
        ("distill/logits", {"learning_rate": 1e9, "steps": 40, **JS}),
        ("distill/logits", {"learning_rate": 1.0, "steps": 40, **JS}),
        ("distill/on_policy", {"learning_rate": 1e9, "steps": 40, "prompt_tokens": 14}),
        ("distill/on_policy", {"learning_rate": 1.0, "steps": 40, "prompt_tokens": 14}),
    ],
)
def test_a_learning_rate_far_too_high_stops_as_diverged(name: str, params: dict[str, object], context: Context) -> None:
    from engine.errors import Diverged

    with pytest.raises(Diverged, match=r"diverged at step \d+: .*Use a lower learning_rate"):
        apply(name, in_memory(tiny_config()), context, **params)
    assert not (context.folder / "training.safetensors").exists()


@pytest.mark.parametrize(
    ("family", "width", "count", "warned"),
    [("llama", 32, 2, False), ("llama", 256, 2, True), ("gpt2", 256, 2, True), ("gpt2", 16, 1, False)],
)
def test_a_student_that_is_no_smaller_is_told_before_the_run(
    family: str, width: int, count: int, warned: bool, tmp_path: Path
) -> None:
    in_memory(FAMILIES[family]).network.save_pretrained(tmp_path)
    params = methods.get("distill/logits").check({"student": "size", "hidden_size": width, "num_blocks": count})
    assert any("nothing gets smaller" in note for note in params.notes(headers.inspect(tmp_path), "cpu")) is warned
