"""Side-by-side text: panes at once, one text for all, stopping, sharing and losing warm workers."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import artifacts, hardware, methods, models, runtime, streams
from engine.errors import InputError, RunError
from engine.methods import Context
from engine.records import Recipe
from engine.sizes import loaded_bytes
from engine.streams import Reply, Streams

A, B = Path("/models/a"), Path("/models/b")


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Streams]:
    monkeypatch.setattr(streams, "COMMAND", (sys.executable, str(Path(__file__).with_name("fake_serve.py"))))
    made = Streams(tmp_path / "scratch")
    yield made
    made.close()


def write(
    warm: Streams, models: list[Path], *, same_text: bool = False, max_tokens: int = 5,
    stop: threading.Event | None = None,
) -> Iterator[Reply]:  # fmt: skip
    return warm.write(models, "Hi", max_tokens=max_tokens, temperature=0.0, seed=0, same_text=same_text, stop=stop)


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def idle(warm: Streams) -> bool:
    return not any(each.busy for each in warm._warm.values())


def of(replies: list[Reply], pane: int) -> list[str]:
    return [event for number, event, _ in replies if number == pane]


def test_what_is_put_aside_is_made_when_it_is_needed_and_goes_with_the_streams(warm: Streams, tmp_path: Path) -> None:
    assert not (tmp_path / "scratch").exists()
    list(write(warm, [A]))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["warm-1"]
    warm.close()
    assert not (tmp_path / "scratch").exists()


def test_panes_write_at_the_same_time(warm: Streams) -> None:
    list(write(warm, [A, B]))  # loads them
    replies = list(write(warm, [A, B], max_tokens=20))
    assert of(replies, 0) == of(replies, 1) == ["token"] * 20 + ["done"]
    panes = [pane for pane, _, _ in replies]
    assert panes.index(1) < len(panes) - 1 - panes[::-1].index(0)
    assert panes.index(0) < len(panes) - 1 - panes[::-1].index(1)


def test_loading_is_said_once_and_the_worker_stays(warm: Streams) -> None:
    assert of(list(write(warm, [A])), 0)[0] == "loading"
    pids = warm.pids()
    assert "loading" not in of(list(write(warm, [A])), 0)
    assert warm.pids() == pids


def test_the_same_text_in_all_panes(warm: Streams) -> None:
    replies = [reply for reply in write(warm, [A, B, A], same_text=True) if reply[1] == "token"]
    for pane, name, kl in ((0, "a", None), (1, "b", 0.5), (2, "a", 0.5)):
        mine = [data for number, _, data in replies if number == pane]
        assert [data["id"] for data in mine] == [0, 1, 2, 3, 4]
        assert {data["text"] for data in mine} == {name}
        assert {data.get("kl") for data in mine} == {kl}


def test_closing_stops_the_models(warm: Streams) -> None:
    stream = write(warm, [A, B], max_tokens=2000)
    while next(stream)[1] != "token":
        pass
    stream.close()
    until(lambda: idle(warm))
    assert len(list(write(warm, [A], max_tokens=3))) == 4  # nothing is left of the text before


def test_a_stop_ends_the_texts_and_says_so(warm: Streams) -> None:
    stop = threading.Event()
    stream = write(warm, [A, B], max_tokens=2000, stop=stop)
    while next(stream)[1] != "token":
        pass
    stop.set()
    ends = [(event, data.get("stopped", data.get("text"))) for _, event, data in stream if event in ("done", "error")]
    assert len(ends) == 2
    assert set(ends) <= {("done", True), ("error", "Stopped.")}  # the second model may not have been loaded yet
    until(lambda: idle(warm))


def test_a_stream_that_ends_by_itself_leaves_the_readers_event_for_the_next(warm: Streams) -> None:
    stop = threading.Event()
    for _ in range(2):
        assert of(list(write(warm, [A], max_tokens=2, stop=stop)), 0)[-2:] == ["token", "done"]
    assert not stop.is_set()


def test_a_worker_that_heeds_no_stop_is_ended(warm: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE", 0.2)
    monkeypatch.setattr(streams.Warm, "_listen", _few_replies)
    stream = write(warm, [Path("/models/deaf")], max_tokens=2000)
    while next(stream)[1] != "token":
        pass
    (deaf,) = warm._warm.values()
    stream.close()
    until(lambda: not deaf.alive())
    until(lambda: idle(warm))


def _few_replies(self: streams.Warm) -> None:
    """As a model that is deep in its prompt: a word, then silence."""
    assert self._process.stdout is not None
    with self._process.stdout as lines:
        for number, line in enumerate(lines):
            if 1 <= number <= 2:
                self._replies.put(streams.json.loads(line))
    self._replies.put(None)


def test_a_model_that_cannot_be_loaded_is_one_line(warm: Streams) -> None:
    replies = list(write(warm, [A, Path("/models/broken")]))
    assert of(replies, 0)[-1] == "done"
    assert [data for pane, event, data in replies if event == "error"] == [{"text": "weights are missing"}]


def test_a_model_that_dies_is_one_line_and_can_be_tried_again(warm: Streams) -> None:
    for _ in range(2):
        replies = list(write(warm, [Path("/models/dies")]))
        assert replies[-1][1] == "error"
        assert "memory" in str(replies[-1][2]["text"])


def test_without_a_first_text_the_others_say_so(warm: Streams) -> None:
    replies = list(write(warm, [Path("/models/broken"), A], same_text=True))
    assert of(replies, 0)[-1] == of(replies, 1)[-1] == "error"


def test_readers_share_a_worker_one_after_the_other(warm: Streams) -> None:
    found: list[list[Reply]] = []
    read = lambda: found.append(list(write(warm, [A, B], same_text=True)))  # noqa: E731
    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert len(found) == 4
    for replies in found:
        assert [data["id"] for pane, event, data in replies if event == "token" and pane == 0] == [0, 1, 2, 3, 4]
        assert of(replies, 1)[-1] == "done"
    assert len(warm.pids()) == 2


def test_no_more_than_four_are_warm(warm: Streams) -> None:
    for number in range(6):
        list(write(warm, [Path(f"/models/{number}")], max_tokens=1))
    assert [path.name for path in warm._warm] == ["2", "3", "4", "5"]


def test_a_model_waits_while_the_memory_it_needs_is_still_being_taken(
    warm: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two panes begin together; there is room for both only once it is known what the first has left."""
    monkeypatch.setattr(hardware, "free_memory", lambda: streams.RUNTIME * 3 // 2)
    monkeypatch.setattr(streams.Warm, "_listen", _no_replies)
    first = warm._try_borrow(A)
    assert first is not None
    assert warm._try_borrow(B) is None
    assert len(warm.pids()) == 1
    first.loaded = True
    assert warm._try_borrow(B) is not None
    assert len(warm.pids()) == 2


def _no_replies(self: streams.Warm) -> None:
    """As a model that is being loaded."""
    assert self._process.stdout is not None
    with self._process.stdout as lines:
        for _ in lines:
            pass


def test_what_idle_workers_hold_is_spare(warm: Streams) -> None:
    list(write(warm, [A], max_tokens=1))
    until(lambda: idle(warm))
    (held,) = warm._warm.values()
    assert 1 << 20 < warm.spare(held.device) < hardware.group_memory(held.pid)
    assert warm.spare("elsewhere") == 0
    held.busy = True
    assert warm.spare(held.device) == 0


def test_idle_workers_end(warm: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    list(write(warm, [A], max_tokens=1))
    warm.end_idle()
    assert len(warm.pids()) == 1
    monkeypatch.setattr(streams, "IDLE", -1.0)
    warm.end_idle()
    assert warm.pids() == []


def test_close_ends_everything(warm: Streams) -> None:
    stream = write(warm, [A, B], max_tokens=2000)
    while next(stream)[1] != "token":
        pass
    processes = [each._process for each in warm._warm.values()]
    warm.close()
    assert all(process.poll() is not None for process in processes)
    assert [event for _, event, _ in stream][-1] == "error"
    assert not os.path.exists(warm._folder)  # noqa: PTH110
    with pytest.raises(RunError):
        write(warm, [A])


@pytest.mark.parametrize(
    "change",
    [
        {"models": []}, {"models": [A] * 5}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": "x" * 20_001},
        {"prompt": "a\0b"}, {"max_tokens": 0}, {"max_tokens": 10**9}, {"temperature": float("nan")},
        {"temperature": -1.0}, {"temperature": float("inf")}, {"seed": -1}, {"top_p": 0.0}, {"top_p": float("nan")},
        {"top_k": -1}, {"top_k": 1001}, {"system": "a\0b"}, {"system": "x" * 20_001},
        {"stop_strings": [""]}, {"stop_strings": ["x" * 81]}, {"stop_strings": ["x"] * 9},
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once(warm: Streams, change: dict) -> None:
    good = {"models": [A], "prompt": "Hi", "max_tokens": 5, "temperature": 0.0, "seed": 0, "same_text": False}
    with pytest.raises(InputError):
        warm.write(**(good | change))
    assert warm.pids() == []


def test_a_model_that_does_not_fit_is_one_line_and_makes_those_go_that_nobody_uses(
    warm: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(write(warm, [A], max_tokens=1))
    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 20)
    replies = list(write(warm, [B], max_tokens=1))
    assert [event for _, event, _ in replies][-1] == "error"
    assert "GiB are free" in str(replies[-1][2]["text"])
    assert warm.pids() == []


@pytest.mark.parametrize(
    ("step", "dtype"),
    [
        ({"quantize/rtn": {"bits": 2, "group_size": 32}}, "bfloat16"), ({"quantize/fp8": {}}, "bfloat16"),
        ({"quantize/rtn": {"bits": 4, "group_size": 32}}, "float32"), ({"quantize/smoothquant": {}}, "bfloat16"),
        ({"prune/magnitude": {"sparsity": 0.9, "storage": "bitmask"}}, "bfloat16"), ({}, "bfloat16"),
    ],
)  # fmt: skip
def test_a_model_is_counted_as_it_will_stand_in_memory(
    step: dict[str, object], dtype: str, tiny_folder: Callable[..., Path], context: Context, tmp_path: Path
) -> None:
    model = models.stream(tiny_folder(), dtype)
    for name, settings in step.items():
        method = methods.get(name)
        model = method.apply(model, method.check(settings), context)
    artifacts.write(model, Recipe(), tmp_path / "artifact")
    loaded = runtime.load(tmp_path / "artifact").network
    held = {id(t): t.nbytes for t in (*loaded.parameters(), *loaded.buffers())}
    assert loaded_bytes(tmp_path / "artifact") == pytest.approx(sum(held.values()), rel=0.05)
    assert streams.memory_of(tmp_path / "artifact") > streams.RUNTIME + loaded_bytes(tmp_path / "artifact")
