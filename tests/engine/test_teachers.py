"""Teachers: cached answers against live ones, ensembles, fingerprints, a cache that is gone on with, tokenizers."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import teachers
from engine.body import Body, eager
from engine.errors import BadModel, BadText
from engine.losses import Full, Objective, TopK
from engine.methods import Context
from engine.models import load_tokenizer
from engine.origin import FolderOrigin
from engine.places import DEMO
from engine.rows import Rows, packed_rows
from engine.teachers import Cached, Live, Question, cached, fingerprint, load_live
from engine.tokens import check_same_files, check_same_tokenizer
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import FAMILIES

DTYPE = "bfloat16"
QUESTION = Question(DTYPE, 5, 1280)


def rows_of(count: int = 6, length: int = 16) -> Rows:
    return packed_rows(load_tokenizer(DEMO / "model"), DEMO / "text.txt", length, count)


def test_rows_are_packed_without_padding_and_positions_begin_with_each_document() -> None:
    tokenizer = load_tokenizer(DEMO / "model")
    rows = rows_of(40, 50)
    whole = [tokenizer(text).input_ids for text in (DEMO / "text.txt").read_text().splitlines()[:200]]
    flat = [token for document in whole for token in document]
    assert rows.ids.flatten().tolist() == flat[:2000]
    starts = (rows.positions == 0).flatten()
    assert bool(starts[::50].all())
    assert bool((rows.ids.flatten()[starts & (torch.arange(2000) % 50 != 0)] == 0).all())  # where a document begins
    steps = rows.positions[:, 1:] - rows.positions[:, :-1]
    assert bool(((steps == 1) | (rows.positions[:, 1:] == 0)).all())


def test_held_out_rows_are_the_same_however_many_rows_follow() -> None:
    few, many = rows_of(30, 8), rows_of(45, 8)
    assert few.split()[1].ids.tolist() == many.split()[1].ids[: len(few.split()[1])].tolist()
    assert [len(each) for each in rows_of(1, 8).split()] == [1, 0]
    assert [len(each) for each in rows_of(5, 8).split()] == [4, 1]


def test_an_empty_and_a_short_text_are_one_line_each(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DEMO / "model")
    for text, words in (("", "empty"), ("Ann.", r"tokens, one sequence needs 64")):
        (tmp_path / "text.txt").write_text(text)
        with pytest.raises(BadText, match=words):
            packed_rows(tokenizer, tmp_path / "text.txt", 64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon", "bloom"])
def test_documents_of_a_row_do_not_see_one_another(family: str) -> None:
    network = in_memory(FAMILIES[family], torch.float32).network
    body = Body.of(network)
    others = {"opt": ("mask",), "falcon": ("mask", "positions"), "bloom": ("none",)}  # Falcon since transformers 5.24
    assert body.isolation in others.get(family, ("positions",))
    ids = torch.randint(5, 1200, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        torch.testing.assert_close(body.logits(body.hidden(ids)[0]), network(input_ids=ids).logits[0])
        if family != "bloom":
            alone = body.hidden(ids[:, 8:])
            torch.testing.assert_close(body.hidden(ids, positions)[:, 8:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_rounding_is_not_taken_for_what_another_document_does(family: str, seed: int) -> None:
    """A student that begins at random, in 16 bits, which round a row of another length otherwise."""
    body = Body.of(in_memory(FAMILIES[family], torch.bfloat16, seed).network)
    assert body.isolation == {"opt": "mask", "bloom": "none"}.get(family, "positions")


def test_documents_stay_apart_where_attention_adds_its_mask() -> None:
    network = in_memory(FAMILIES["opt"], torch.float32).network
    body = Body.of(network)
    ids = torch.randint(5, 1200, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad(), eager(network):
        alone = body.hidden(ids[:, 8:])
        torch.testing.assert_close(body.hidden(ids, positions)[:, 8:], alone, rtol=1e-4, atol=1e-5)
        later = ids.clone()
        later[0, -1] = 7
        torch.testing.assert_close(body.hidden(later, positions)[:, :-1], body.hidden(ids, positions)[:, :-1])


def test_an_unknown_head_falls_back_to_whole_logits() -> None:
    network = in_memory(tiny_config(), torch.float32).network
    network.lm_head.register_forward_hook(lambda module, args, output: output * (2 if output.dim() == 3 else 1))
    body = Body.of(network)
    assert body.scale is None
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(body.logits(body.hidden(ids)), network(input_ids=ids).logits)


def test_a_cache_says_what_the_teachers_say_and_later_runs_need_none(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    folders = [tiny_folder(), tiny_folder(num_hidden_layers=2)]
    rows = rows_of()
    live = load_live(folders, 1280, context, "bfloat16")
    kept = cached(folders, rows, Question(DTYPE, 7, 1280), context, lambda: live)
    numbers = torch.tensor([4, 1])
    exact, found = live.answers(rows, numbers)(slice(0, 30)), kept.answers(rows, numbers)(slice(0, 30))
    assert isinstance(exact, Full)
    assert isinstance(found, TopK)
    ids, positions = rows.of(numbers, live.device)
    with torch.no_grad():
        each = [body.network(ids, position_ids=positions).logits[:, :-1].float().softmax(-1) for body in live.bodies]
    torch.testing.assert_close(exact.logp.exp(), ((each[0] + each[1]) / 2).flatten(0, 1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.logp, exact.logp.gather(1, found.ids), rtol=1e-3, atol=1e-3)
    whole = found.logp.exp().sum(-1) + found.tail.exp()
    torch.testing.assert_close(whole, torch.ones(30), rtol=2e-3, atol=0)

    def never() -> Live:
        raise AssertionError("the teacher is not needed")

    question = Question(DTYPE, 7, 1280)
    again = cached(folders[::-1], rows, question, context, never).answers(rows, numbers)(slice(0, 30))
    assert isinstance(again, TopK)
    assert again.ids.equal(found.ids)
    assert any("not loaded" in line for line in recorder.logs())
    student = torch.randn(30, 1280, generator=torch.Generator().manual_seed(0))
    assert float(Objective()(student, None, found)) <= float(Objective()(student, None, exact)) * 1.01


def test_what_the_first_teacher_has_computed_is_not_computed_again(
    tiny_folder: Callable[..., Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = load_live([tiny_folder(), tiny_folder()], 1280, context, DTYPE)
    ids, positions = rows_of().of(torch.tensor([0, 3]), torch.device("cpu"))
    expected = live.of(ids, positions)(slice(0, 30))
    first, hidden, asked = live.bodies[0].hidden(ids, positions), Body.hidden, []
    monkeypatch.setattr(Body, "hidden", lambda body, *given: asked.append(body) or hidden(body, *given))
    found = live.of(ids, positions, first=first)(slice(0, 30))
    assert asked == live.bodies[1:]
    assert isinstance(found, Full)
    assert isinstance(expected, Full)
    assert found.logp.equal(expected.logp)


def test_a_cache_is_softened_before_the_rest_is_merged(tiny_folder: Callable[..., Path], context: Context) -> None:
    folder, rows, numbers = tiny_folder(), rows_of(), torch.tensor([4, 1])
    live = load_live([folder], 1280, context, DTYPE)
    kept = cached([folder], rows, replace(QUESTION, temperature=4.0), context, lambda: live)
    exact, found = live.answers(rows, numbers)(slice(0, 30)), kept.answers(rows, numbers)(slice(0, 30))
    assert isinstance(exact, Full)
    assert isinstance(found, TopK)
    soft = (exact.logp / 4).softmax(-1)
    torch.testing.assert_close(found.logp.exp(), soft.gather(1, found.ids), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(found.tail.exp(), 1 - soft.gather(1, found.ids).sum(-1), rtol=1e-2, atol=1e-6)
    assert float(Objective(temperature=4.0)(exact.logp, None, found)) < 1e-2  # a sum over 30 tokens, kept in few digits
    with pytest.raises(AssertionError):
        Objective(temperature=2.0)(exact.logp, None, found)


def test_a_cache_is_gone_on_with_and_grows_with_the_text(
    tiny_folder: Callable[..., Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "FILE_TOKENS", 32)  # two rows a file
    folder = tiny_folder()
    live = load_live([folder], 1280, context, "bfloat16")
    asked: list[tuple[int, int]] = []
    write = teachers.write_answers

    def watched(live: Live, rows: Rows, span: tuple[int, int], *rest: object) -> None:
        if len(asked) == 2:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(span)
        write(live, rows, span, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(teachers, "write_answers", watched)
    with pytest.raises(KeyboardInterrupt):
        cached([folder], rows_of(6), QUESTION, context, lambda: live)
    cached([folder], rows_of(6), QUESTION, context, lambda: live)
    assert asked == [(4, 6)]
    asked.clear()
    cached([folder], rows_of(8), QUESTION, context, lambda: live)
    assert asked == [(6, 8)]


def test_answers_make_room_and_who_uses_them_keeps_them(
    tiny_folder: Callable[..., Path], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, room = tiny_folder(), context.cache / "teachers"
    live = load_live([folder], 1280, context, DTYPE)

    def ask(run: int, k: int) -> Cached:
        own = replace(context, folder=context.folder / f"run-{run}")
        return cached([folder], rows_of(), Question(DTYPE, k, 1280), own, lambda: live)

    first = ask(1, 5)
    (kept,) = room.glob("*/*")
    os.utime(kept, (1, 1))
    size = kept.stat().st_size
    free = int(size * 1.5 / teachers.SHARE) - size  # room for one and a half
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    ask(2, 5)  # is a use
    assert kept.stat().st_mtime > 1
    ask(3, 6)
    assert [len(list(each.glob("*"))) for each in room.iterdir()] == [1]
    assert not kept.exists()
    assert len(first.answers(rows_of(), torch.tensor([0, 5]))(slice(0, 30)).logp) == 30
    ask(4, 20)  # more than there is room for: with the run alone
    assert len(list(room.glob("*/*"))) <= 1


def test_a_cache_of_another_teacher_is_refused(tiny_folder: Callable[..., Path], context: Context) -> None:
    first, second = tiny_folder(), tiny_folder(num_hidden_layers=2)
    others = (replace(QUESTION, dtype="float32"), replace(QUESTION, k=6), replace(QUESTION, temperature=2.0))
    asked = [fingerprint([first], question) for question in (QUESTION, *others)]
    assert len({*asked, fingerprint([second], QUESTION)}) == 5
    live = load_live([first], 1280, context, "bfloat16")
    cached([first], rows_of(), QUESTION, context, lambda: live)
    home = context.cache / "teachers"
    (home / fingerprint([first], QUESTION)[:32]).rename(home / fingerprint([second], QUESTION)[:32])
    with pytest.raises(BadModel, match=r"another teacher or tokenizer\. Delete the folder [0-9a-f]+ below"):
        cached([second], rows_of(), QUESTION, context, lambda: live)


def test_damaged_answers_are_asked_for_again_also_where_runs_share_them(
    tiny_folder: Callable[..., Path], context: Context, recorder: Recorder
) -> None:
    folder = tiny_folder()
    live = load_live([folder], 1280, context, DTYPE)
    cached([folder], rows_of(), QUESTION, context, lambda: live)
    (own,), (shared,) = (context.folder / "answers").glob("*/*"), (context.cache / "teachers").glob("*/*")
    whole = own.read_bytes()
    own.write_bytes(whole[:-100])  # and the other, which is a link
    later = replace(context, folder=context.folder / "later")
    cached([folder], rows_of(), QUESTION, later, lambda: live)
    assert recorder.logs()[-1].endswith("; 0 of 1 files reused")
    assert shared.read_bytes() == whole
    cached([folder], rows_of(), QUESTION, context, lambda: live)
    assert recorder.logs()[-1].startswith("reused the teacher's answers")
    assert own.read_bytes() == whole


def test_other_tokenizers_are_refused_with_the_reason_and_padding_is_not(tiny_folder: Callable[..., Path]) -> None:
    ours, padded, other = tiny_folder(), tiny_folder(vocab_size=1344), tiny_folder()
    check_same_files(FolderOrigin(ours), FolderOrigin(padded))
    check_same_tokenizer(load_tokenizer(ours), padded)
    body = json.loads((other / "tokenizer.json").read_text())
    vocabulary = body["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(body))
    origins = FolderOrigin(ours), FolderOrigin(other)
    for check in (lambda: check_same_files(*origins), lambda: check_same_tokenizer(load_tokenizer(ours), other)):
        with pytest.raises(BadModel, match=r"another tokenizer: token '.*' has the id \d+ there and \d+ here"):
            check()
