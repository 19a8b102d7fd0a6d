"""Distillation: the loss against its definition, students of every kind, a resumed training run."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from engine import anatomy, artifacts, headers, models
from engine.distill import logits, repair
from engine.distill._student import choose, every_kth, of_size
from engine.distill.logits import Params
from engine.errors import BadModel, BadParams, Cancelled, Diverged
from engine.losses import Full, Objective
from engine.methods import Context
from engine.models import LoadedModel, blocks, linears, load
from engine.places import DEMO
from engine.records import Recipe
from engine.training import Extras, Schedule, draw, recompute, train
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import FAMILIES


def cross_entropy(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        model.network(input_ids=ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    )


def test_a_student_of_every_block_is_the_teacher(tiny: LoadedModel) -> None:
    ids = torch.arange(20)[None]
    student = every_kth(tiny, 1)
    torch.testing.assert_close(student.network(ids).logits, tiny.network(ids).logits, rtol=0, atol=0)


def test_every_second_block_keeps_the_last_ones_weights() -> None:
    teacher = in_memory(tiny_config(num_hidden_layers=4))
    teacher.pruned = {"model.layers.3.mlp.up_proj", "model.layers.2.mlp.up_proj"}
    student = every_kth(teacher, 2)
    assert student.network.config.num_hidden_layers == 2
    for new, old in ((0, 1), (1, 3)):
        torch.testing.assert_close(
            blocks(student.network)[1][new].state_dict(), blocks(teacher.network)[1][old].state_dict()
        )
    assert student.pruned == {"model.layers.1.mlp.up_proj"}
    assert teacher.network.config.num_hidden_layers == 4


@pytest.mark.parametrize(("keep_every", "kept"), [(1, [0, 1, 2, 3, 4]), (2, [2, 4]), (3, [4]), (5, [4])])
def test_the_last_block_is_always_kept(keep_every: int, kept: list[int]) -> None:
    teacher = in_memory(tiny_config(num_hidden_layers=5))
    student = blocks(every_kth(teacher, keep_every).network)[1]
    assert len(student) == len(kept)
    for new, old in zip(student, kept, strict=True):
        torch.testing.assert_close(new.state_dict(), blocks(teacher.network)[1][old].state_dict(), rtol=0, atol=0)


def test_blocks_that_compute_by_their_number_make_no_student() -> None:
    config = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
    with pytest.raises(BadModel, match="decoder_sparse_step: what a block computes"):
        Params().check_config(config)
    for settings in ({"keep_every": 1}, {"student": "current"}):
        Params.model_validate(settings).check_config(config)


def test_keeping_no_block_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(BadParams, match="keep_every 4 leaves no block of 3"):
        every_kth(tiny, 4)


@pytest.mark.parametrize("opened", [False, True])  # as a step before leaves a model that is larger than memory
def test_the_log_counts_parameters_as_they_were_before_the_student_was_cut(
    opened: bool, tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    folder = tiny_folder()
    model, before = models.stream(folder), headers.inspect(folder).parameters
    for part in ("model.embed_tokens", "lm_head") if opened else ():
        with model.opened(part):
            pass
    student = choose(model, Params(keep_every=2), context)
    each = sum(value.numel() for value in blocks(student.network)[1][0].parameters())
    assert recorder.logs() == [f"{before - 2 * each:,} of {before:,} parameters"]
    model.untie("lm_head")
    assert model.parameters == before + 1280 * 64


def test_a_student_of_a_size_has_it_and_runs(tiny: LoadedModel) -> None:
    student = of_size(tiny, 32, 2, seed=1)
    assert student.network.config.hidden_size == 32
    assert len(blocks(student.network)[1]) == 2
    assert student.network(torch.arange(8)[None]).logits.shape == (1, 8, 1280)
    with pytest.raises(BadParams, match="not a multiple of the head size 16"):
        of_size(tiny, 40, 2, seed=1)


def test_training_brings_the_student_closer_and_keeps_zeros(tmp_path: Path, context: Context) -> None:
    teacher = in_memory(tiny_config(), seed=0)
    folder = tmp_path / "teacher"
    teacher.network.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    student = in_memory(tiny_config(), seed=1)
    student.source = folder
    linear = student.network.get_submodule("model.layers.0.mlp.up_proj")
    linear.weight.data[:, ::2] = 0
    student.pruned = {"model.layers.0.mlp.up_proj"}
    ids = torch.arange(40)[None]

    def gap() -> float:
        with torch.no_grad():
            ours, theirs = (each.network(ids).logits[0].float() for each in (student, teacher))
        return float(Objective()(ours, None, Full(theirs.log_softmax(-1)))) / 40

    before = gap()
    params = Params(
        student="current", steps=30, batch=4, sequence_length=32, label_weight=0.0, learning_rate=3e-3,
        teacher_logits="live",  # what a model at random expects lies in its tail
    )  # fmt: skip
    with torch.no_grad():
        logits.apply(student, params, context)
    assert gap() < 0.8 * before
    assert bool((linear.weight[:, ::2] == 0).all())
    assert bool((linear.weight[:, 1::2] != 0).any())
    assert student.network.dtype == torch.bfloat16


def test_a_trained_model_reloads_with_the_very_same_logits(tmp_path: Path, context: Context) -> None:
    model = load(DEMO / "model")
    student = logits.apply(model, Params(student="current", steps=2, batch=2), context)
    artifacts.write(student, Recipe(), tmp_path / "artifact")
    again = load(tmp_path / "artifact")
    ids = torch.arange(3, 200)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again.network(ids).logits, student.network(ids).logits, rtol=0, atol=0)


def test_an_interrupted_training_ends_with_the_same_weights(context: Context, recorder: Recorder) -> None:
    rows = torch.randint(1280, (40, 24), generator=torch.Generator().manual_seed(0))
    schedule = Schedule(steps=12, batch=4, rate=1e-3, checkpoint_every=5)

    def trained(context: Context, stop_after: int | None = None) -> LoadedModel:
        model, seen = in_memory(tiny_config(), seed=2), 0

        def loss_of(batch: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            seen += 1
            if seen == stop_after:
                raise Cancelled("stopped")
            return cross_entropy(model, batch)

        train(model, rows, loss_of, schedule, context)
        return model

    whole = trained(dataclasses.replace(context, folder=context.folder / "whole"))
    with pytest.raises(Cancelled):
        trained(context, stop_after=8)
    resumed = trained(context)
    assert "resumed at step 5 of 12" in recorder.logs()
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)


def test_parts_of_a_batch_and_blocks_computed_again_learn_the_same(context: Context) -> None:
    rows = torch.randint(1280, (40, 24), generator=torch.Generator().manual_seed(0))
    together = []

    def trained(name: str, **how: object) -> dict[str, torch.Tensor]:
        model = in_memory(tiny_config(), torch.float32, seed=2)

        def loss_of(batch: torch.Tensor) -> torch.Tensor:
            together.append(len(batch))
            return cross_entropy(model, batch)

        schedule = dataclasses.replace(Schedule(steps=6, batch=5, rate=1e-3), **how)  # type: ignore[arg-type]
        train(model, rows, loss_of, schedule, dataclasses.replace(context, folder=context.folder / name))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.network.modules())
        return dict(model.network.named_parameters())

    start = in_memory(tiny_config(), torch.float32, seed=2).network.state_dict()
    whole, again = trained("whole"), trained("again", recompute=True)
    assert set(together) == {5}
    parts = trained("parts", micro_batch=2)
    assert together[-6:] == [2, 2, 1] * 2  # the last step, and the last look
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
        assert float((parts[name] - value).norm()) < 0.02 * float((value - start[name]).norm())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_compute_its_blocks_again(family: str) -> None:
    network = in_memory(FAMILIES[family], torch.float32).network.train()
    passes = []
    _, linear = next(linears(blocks(network)[1][0]))
    linear.register_forward_pre_hook(lambda module, args: passes.append(module))
    recompute(network)
    ids = torch.arange(3, 20)[None]
    with torch.enable_grad():
        network.requires_grad_(True)
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(passes) == 2


def test_the_usual_learning_rate_falls_with_the_size() -> None:
    rates = {size: Params().schedule(size).rate for size in (10**6, 10**7, 10**9, 8 * 10**9)}
    assert rates == pytest.approx({10**6: 1e-3, 10**7: 1e-3, 10**9: 1e-4, 8 * 10**9: 3.54e-5}, rel=1e-2)
    assert Params(learning_rate=0.5).schedule(10**9).rate == 0.5
    repairs = {scope: repair.Params(scope=scope).schedule(8 * 10**9).rate for scope in get_args(repair.Scope)}
    assert repairs == pytest.approx({"all": 3.54e-5, "lora": 3.54e-4, "norms and scales": 3.54e-4}, rel=1e-2)


def test_divergence_stops_with_its_reason(context: Context) -> None:
    model = in_memory(tiny_config())
    rows = torch.randint(1280, (40, 24))
    params = copy.deepcopy(model.network)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model, batch)

    with pytest.raises(Diverged, match=r"diverged at step 2: .*Use a lower learning_rate"):
        train(model, rows, loss_of, Schedule(steps=50, batch=4, rate=1e9), context)
    assert params.dtype == torch.bfloat16


def test_what_the_last_step_did_is_judged_where_no_rows_are_held_out(context: Context) -> None:
    model = in_memory(tiny_config())
    rows = torch.randint(1280, (4, 24), generator=torch.Generator().manual_seed(0))
    with pytest.raises(Diverged, match=r"diverged at step 1: the loss is .*No checkpoint was written yet"):
        train(model, rows, lambda batch: cross_entropy(model, batch), Schedule(steps=1, batch=4, rate=10.0), context)
    assert not (context.folder / "training.safetensors").exists()


@pytest.mark.parametrize(
    ("kls", "said"),
    [
        ([0.1, 0.05, 1.2, 0.06, 1.2, 1.3, 0.0], "step 51: the held-out KL is 1.3, after 0.05"),
        ([0.1, 0.05, 1.2, 0.06, 1.2, 0.3, 1.1], "step 60: the held-out KL is 1.1, after 0.05"),
    ],
)
def test_a_kl_that_stays_above_its_best_is_divergence_where_it_should_fall(
    kls: list[float], said: str, context: Context
) -> None:
    model = in_memory(tiny_config())
    rows = torch.randint(1280, (4, 24), generator=torch.Generator().manual_seed(0))

    def trained(closer: bool) -> None:
        looks = iter(kls)
        extras = Extras(held_out=lambda: next(looks), closer=closer)
        schedule = Schedule(steps=60, batch=4, rate=1e-4, checkpoint_every=10)
        train(model, rows, lambda batch: cross_entropy(model, batch), schedule, context, extras=extras)

    with pytest.raises(Diverged, match=f"{said}.* The checkpoint of step [35]0 is kept"):
        trained(closer=True)
    (context.folder / "training.safetensors").unlink()
    trained(closer=False)  # whose weights go, or who learns another text, may leave its teacher


def test_an_epoch_draws_every_row_once() -> None:
    rows = torch.arange(12)[:, None]
    drawn = torch.cat([draw(rows, 4, step, seed=0) for step in range(3)]).flatten().tolist()
    assert sorted(drawn) == list(range(12))
    assert drawn != list(range(12))


def test_a_bad_state_never_replaces_the_last_good_checkpoint(context: Context) -> None:
    rows = torch.randint(1280, (40, 24), generator=torch.Generator().manual_seed(0))
    model = in_memory(tiny_config(), seed=2)
    saved = context.folder / "training.safetensors"

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        good = cross_entropy(model, batch)
        return good * math.nan if saved.exists() else good

    with pytest.raises(Diverged, match=r"step 6: the loss is nan\..* The checkpoint of step 4 is kept"):
        train(model, rows, loss_of, Schedule(steps=12, batch=4, rate=1e-3, checkpoint_every=4), context)
    tensors = load_file(saved)
    assert all(bool(each.isfinite().all()) for each in tensors.values())
    exploding = in_memory(tiny_config(), seed=2)

    def jump(step: int) -> None:
        for each in exploding.network.parameters():
            each.data.mul_(math.inf if step == 4 else 1)

    other = dataclasses.replace(context, folder=context.folder / "other")
    with pytest.raises(Diverged, match=r"step 5: .*No checkpoint was written yet"):
        train(exploding, rows, lambda batch: cross_entropy(exploding, batch), Schedule(12, 4, 1e-3, 4), other, jump)
    assert not (other.folder / "training.safetensors").exists()


def test_the_charts_get_rate_speed_time_left_and_the_held_out_kl(context: Context, recorder: Recorder) -> None:
    params = Params(steps=20, batch=2, sequence_length=16)
    with torch.no_grad():
        logits.apply(in_memory(tiny_config()), params, context)
    series: dict[str, list[float]] = {}
    for kind, data in recorder.said:
        if kind == "sample":
            series.setdefault(str(data["series"]), []).append(float(str(data["value"])))
    assert set(series) == {"loss", "learning_rate", "tokens_per_second", "eta", "kl_heldout"}
    assert series["eta"][-1] == 0
    assert len(series["kl_heldout"]) == 3
    assert all(value >= 0 for value in series["kl_heldout"])


@pytest.mark.parametrize("family", ["opt", "falcon", "smollm3", "gpt2", "gemma3"])
def test_a_student_of_another_size_computes_in_every_family(family: str) -> None:
    config = copy.deepcopy(FAMILIES[family])
    if family == "falcon":
        config.new_decoder_architecture, config.num_kv_heads = True, 2
    teacher = in_memory(config)
    text = teacher.network.config.get_text_config()
    width = text.hidden_size // 2
    student = of_size(teacher, width, text.num_hidden_layers + 2, seed=1)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert student.network(ids).logits.shape == teacher.network(ids).logits.shape
    shape = anatomy.of(student.network.config)
    assert (shape.channels, shape.neurons) == (width, anatomy.of(teacher.network.config).neurons // 2)


def test_the_rate_rises_and_falls_by_half_a_cosine() -> None:
    schedule = Schedule(steps=100, batch=1, rate=2.0)
    rates = [schedule.at(step) for step in range(100)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[top] == pytest.approx(2.0)
    middle = top + (100 - top) // 2
    assert rates[middle] == pytest.approx(1.1, rel=0.05)
    assert rates[-1] == pytest.approx(0.2, rel=0.05)  # a tenth of the highest
