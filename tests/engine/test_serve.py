"""The warm model: what it writes, how it sees another's text, and what it says to input that cannot work."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.serve import serve
from tests import small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    small_model.write(folder)
    return str(folder / "model")


def talk(model: str, *commands: dict) -> list[dict]:
    replies = io.StringIO()
    serve(model, "cpu", io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def generate(**changes: object) -> dict:
    command = {"do": "generate", "prompt": "Ada", "max_tokens": 6, "temperature": 0.0, "seed": 0, "write": None}
    return {**command, **changes}


def score(prompt: str, ids: list[int], file: Path) -> dict:
    return {"do": "score", "prompt": prompt, "token_ids": ids, "read": str(file)}


class OneByOne(io.StringIO):
    """Commands of which the next comes only when the last is answered."""

    def __init__(self, commands: list[dict], replies: io.StringIO) -> None:
        super().__init__()
        self._commands, self._replies = commands, replies

    def __iter__(self) -> Iterator[str]:
        for sent, command in enumerate(self._commands):
            self._wait(sent)
            yield json.dumps(command) + "\n"
        self._wait(len(self._commands))

    def _wait(self, answers: int) -> None:
        while sum(f'"event": "{last}"' in line for line in self._lines() for last in ("done", "error")) < answers:
            time.sleep(0.01)

    def _lines(self) -> list[str]:
        return self._replies.getvalue().splitlines()


def answers(model: str, *commands: dict) -> list[dict]:
    replies = io.StringIO()
    serve(model, "cpu", OneByOne(list(commands), replies), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_it_writes_tokens_with_their_odds(model: str) -> None:
    ready, *tokens, done = answers(model, generate())
    assert ready["event"] == "ready"
    assert [token["event"] for token in tokens] == ["token"] * 6
    for token in tokens:
        assert 0 < token["probability"] <= 1
        assert token["top"][0][1] == pytest.approx(token["probability"])  # greedy: the likeliest
        assert token["kl"] is None
    assert done["tokens"] == 6
    assert done["ttft"] > 0
    assert done["tpot"] > 0


def test_the_same_seed_the_same_text(model: str) -> None:
    hot = generate(temperature=1.0, seed=3)
    found = [r["id"] for r in answers(model, hot, hot, {**hot, "seed": 4}) if r["event"] == "token"]
    assert found[:6] == found[6:12] != found[12:]


def test_a_stop_text_ends_writing_with_the_token_that_completes_it(model: str) -> None:
    (_, *tokens, done), (_, *cut, ended) = answers(model, generate()), answers(model, generate(stop_strings=["\0"]))
    assert cut == tokens
    assert done["stop_string"] is ended["stop_string"] is None
    written = [token["text"] for token in tokens]
    over = written[2] + written[3][:1]  # part of two tokens
    _, *cut, ended = answers(model, generate(stop_strings=["\0", over]))
    place = next(n for n in range(1, 7) if over in "".join(written[:n]))
    assert [token["text"] for token in cut] == written[:place]
    assert (ended["tokens"], ended["stop_string"]) == (place, over)


def test_its_own_text_does_not_diverge(model: str, tmp_path: Path) -> None:
    file = tmp_path / "logprobs.safetensors"
    written = [r for r in answers(model, generate(write=str(file))) if r["event"] == "token"]
    ids = [token["id"] for token in written]
    tokens = [r for r in answers(model, score("Ada", ids, file)) if r["event"] == "token"]
    assert [token["id"] for token in tokens] == ids
    for mine, seen in zip(written, tokens, strict=True):
        assert seen["kl"] == pytest.approx(0, abs=2e-3)
        assert seen["probability"] == pytest.approx(mine["probability"], rel=0.05)
    other = [r for r in answers(model, score("The goat of Ben", ids, file)) if r["event"] == "token"]
    assert sum(token["kl"] for token in other) > 10 * sum(token["kl"] for token in tokens)


def test_a_stop_ends_the_command_and_not_the_next(model: str) -> None:
    long = generate(max_tokens=200)
    replies = talk(model, long, {"do": "stop"}, generate(max_tokens=3))
    first = next(r for r in replies if r["event"] == "done")
    assert first["tokens"] < 200


def test_a_prompt_above_the_context_is_one_line_and_the_model_lives_on(model: str) -> None:
    replies = answers(model, generate(prompt="Ada " * 300), generate(max_tokens=2))
    assert "255" in next(r for r in replies if r["event"] == "error")["text"]
    assert replies[-1]["tokens"] == 2


def test_text_is_cut_at_the_context(model: str) -> None:
    prompt = "Ada keeps a goat in Elm. " * 20
    done = answers(model, generate(prompt=prompt, max_tokens=2048))[-1]
    assert 0 < done["tokens"] < 256


def test_more_probabilities_than_are_kept_are_not_asked_for(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.serve.KEPT", 4 * 320 * 5)
    file = str(tmp_path / "logprobs.safetensors")
    long, short = (answers(model, generate(write=file, max_tokens=tokens))[-1] for tokens in (6, 5))
    assert long["event"] == "error"
    assert "all 320 tokens" in str(long["text"])
    assert "Ask for 5 at most." in str(long["text"])
    assert short["tokens"] == 5
    assert answers(model, generate(max_tokens=6))[-1]["tokens"] == 6  # nothing is kept


def test_another_vocabulary_is_refused(model: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"logprobs": torch.zeros(2, 77)}, str(file))
    replies = answers(model, score("Ada", [1, 2], file))
    assert "77 and 320" in replies[-1]["text"]


def test_a_reader_who_left_takes_no_model_along(model: str, tmp_path: Path) -> None:
    replies = answers(model, score("Ada", [1, 2], tmp_path / "gone.safetensors"), generate(max_tokens=2))
    assert replies[1] == {"event": "error", "text": "The first model's predictions are gone. Try again."}
    assert replies[-1]["event"] == "done"


def test_a_chat_is_written_in_the_models_own_template(model: str, tmp_path: Path) -> None:
    spoken = generate(chat=True, system="Be brief.", max_tokens=2)
    assert "no chat template" in answers(model, spoken)[-1]["text"]
    folder = tmp_path / "chat"
    shutil.copytree(model, folder)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    plain = generate(prompt="Be brief. Ada ", max_tokens=5)
    _, *said = answers(str(folder), plain, generate(chat=True, system="Be brief.", max_tokens=5))
    ids = [reply["id"] for reply in said if reply["event"] == "token"]
    assert ids[:5] == ids[5:]
    assert len(ids) == 10
