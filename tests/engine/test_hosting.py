"""Modes, limits, users and quotas: who may listen where, who gets in, and how much each may take."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import cli, hardware, quotas
from engine.errors import BadModel, InputError, StoreError, TooBig, TooMany, UnknownName
from engine.modes import GIB, LIMITS, Limits, Mode, check_address, is_loopback, limits_of, mode_of
from engine.quotas import Quotas, folder_size
from engine.rates import RateLimits
from engine.records import Recipe, Run, Status
from engine.runners.local import LocalRunner
from engine.scheduler import Scheduler
from engine.store import MIGRATIONS, Store
from engine.users import UserFile

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
PUBLIC = LIMITS[Mode.PUBLIC]
PASSWORD = "correct horse battery"
MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, Mode.LOCAL), ({"SPACE_ID": "a/b"}, Mode.PUBLIC), ({"MAQUETTE_MODE": "team"}, Mode.TEAM),
        ({"SPACE_ID": "a/b", "MAQUETTE_MODE": " Team "}, Mode.TEAM),
    ],
)  # fmt: skip
def test_the_environment_says_the_mode(environment: dict[str, str], mode: Mode) -> None:
    assert mode_of(environment) is mode


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="must be one of local, team, public"):
        mode_of({"MAQUETTE_MODE": "private"})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "LOCALHOST", "127.8.0.1", "a.localhost"])
def test_local_mode_listens_on_this_machine(host: str) -> None:
    check_address(Mode.LOCAL, host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.2", "example.org", "", "localhost.evil.org", "127.0.0.1.x"]
)
def test_listening_beyond_it_needs_another_mode(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match="MAQUETTE_MODE=team"):
        check_address(Mode.LOCAL, host)
    check_address(Mode.TEAM, host)
    check_address(Mode.PUBLIC, host)


def test_each_limit_can_be_set() -> None:
    limits = limits_of(
        Mode.PUBLIC,
        {"MAQUETTE_RUN_MINUTES": "5", "MAQUETTE_DISK_GIB": "0.5", "MAQUETTE_ORGANISATIONS": "me, you", "PORT": "1"},
    )
    assert (limits.seconds, limits.disk, limits.organisations) == (300, GIB // 2, ("me", "you"))
    assert limits_of(Mode.PUBLIC, {"MAQUETTE_ORGANISATIONS": "*"}).organisations is None
    for bad in ("0", "-1", "nan", "inf", "two"):
        with pytest.raises(InputError, match="MAQUETTE_KEEP_HOURS"):
            limits_of(Mode.PUBLIC, {"MAQUETTE_KEEP_HOURS": bad})


def test_users_get_in_by_their_password_alone(tmp_path: Path) -> None:
    users = UserFile(tmp_path)
    assert users.check("anna", PASSWORD) is None
    users.add("anna", PASSWORD)
    mark = users.check("anna", PASSWORD)
    assert mark == users.mark("anna") is not None
    for name, password in (("anna", PASSWORD + " "), ("anna", ""), ("ben", PASSWORD), ("anna", "x" * 5000)):
        assert users.check(name, password) is None
    text = (tmp_path / "users.json").read_text()
    assert PASSWORD not in text
    assert (tmp_path / "users.json").stat().st_mode & 0o777 == 0o600
    users.add("anna", PASSWORD)  # the same password: another salt, another mark
    assert users.mark("anna") != mark
    users.remove("anna")
    assert users.check("anna", PASSWORD) is users.mark("anna") is None
    with pytest.raises(UnknownName):
        users.remove("anna")


@pytest.mark.parametrize("name", ["", "A", "../x", "a b", "x" * 33, "-a", "a:b", "a\n"])
def test_a_name_that_cannot_be_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no user name"):
        UserFile(tmp_path).add(name, PASSWORD)


def test_a_broken_users_file_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        UserFile(tmp_path).check("anna", PASSWORD)


def test_users_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def call(*words: str, typed: str = "") -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return cli.main(["user", *words, "--home", str(tmp_path)], Scheduler)

    assert call("add", "anna", typed=f"{PASSWORD}\n") == 0
    assert call("add", "ben", typed="short\n") == 2
    assert "8 to 1024" in capsys.readouterr().err
    assert call("add") == 2
    assert call("list") == 0
    assert capsys.readouterr().out.split() == ["anna"]
    assert UserFile(tmp_path).check("anna", PASSWORD)
    assert call("remove", "anna") == 0
    assert UserFile(tmp_path).names() == []


def test_buckets_fill_again() -> None:
    rates = RateLimits()
    assert [rates.take("start", "a", 2, now=0) > 0 for _ in range(3)] == [False, False, True]
    assert rates.take("start", "b", 2, now=0) == 0
    assert rates.take("stream", "a", 2, now=0) == 0
    assert rates.take("start", "a", 2, now=29) > 0
    assert rates.take("start", "a", 2, now=31) == 0
    assert rates.take("start", "a", None) == 0
    rates.require("x", "a", 1)
    with pytest.raises(TooMany, match="in 60 seconds"):
        rates.require("x", "a", 1)


def recipe(body: object) -> Recipe:
    return Recipe.model_validate(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"model": "/etc"}, "cannot be used on a shared server"),
        ({"model": "~/models/x"}, "cannot be used on a shared server"),
        ({"model": "../x"}, "cannot be used on a shared server"),
        ({"model": "assets/demo/model"}, "more than one slash"),
        ({"model": "gpt2"}, "Models of 'gpt2' are not offered here"),
        ({"model": "evil-corp/llama"}, "Models of 'evil-corp' are not offered here"),
        ({"calibration": "/etc/passwd"}, "the bundled text is used"),
        ({"steps": [{"distill/logits": {"text": "/etc/passwd"}}]}, "the bundled text is used"),
        ({"steps": [{"distill/logits": {"teachers": "demo /etc"}}]}, "'/etc'.* cannot be used on a shared server"),
        ({"steps": [{"distill/logits": {"teachers": "'/etc"}}]}, "cannot be the name of a model"),
        ({"steps": [{"distill/logits": {"folder": "../x"}}]}, "cannot be used on a shared server"),
        ({"steps": [{"distill/repair": {"teachers": "qwen/x evil-corp/llama"}}]}, "Models of 'evil-corp' are not"),
    ],
)
def test_what_a_visitor_may_not_name(body: object, words: str) -> None:
    with pytest.raises(BadModel, match=words):
        quotas.check_sources(recipe(body), PUBLIC)
    quotas.check_sources(recipe(body), LIMITS[Mode.LOCAL])


def test_what_a_visitor_may_name() -> None:
    for source in ("demo", "Qwen/Qwen3-0.6B", "qwen/x"):
        quotas.check_sources(recipe({"model": source}), PUBLIC)
    beside = {"teachers": "demo Qwen/x@v1", "student": "folder", "folder": "qwen/x"}
    quotas.check_sources(recipe({"steps": [{"distill/logits": beside}]}), PUBLIC)
    patterns = {"targets": "*.mlp.*", "ignore": "*.0.*", "overrides": "*.down_proj=8"}
    quotas.check_sources(recipe({"steps": [{"quantize/gptq": patterns}]}), PUBLIC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "maquette.db") as made:
        yield made


@pytest.mark.parametrize(
    ("limits", "free", "words"),
    [
        (Limits(parameters=1000), GIB, "billion parameters; this server takes up to 0.00"),
        (Limits(model_bytes=1000), GIB, r"The files of demo hold \d\.\d MiB; this server takes up to 0.0 MiB"),
        (Limits(disk=8 << 20), GIB, r"Your runs hold 4.0 MiB of the 8.0 MiB that .* Delete a run"),
        (Limits(floor=GIB), GIB, r"1.00 GiB left; the run needs up to \d\.\d MiB, and 1.00 GiB stay free"),
    ],
)
def test_too_much_is_refused_before_work(
    limits: Limits, free: int, words: str, store: Store, tiny_folder: Callable[..., Path]
) -> None:  # fmt: skip
    run = store.add_run(Recipe(), "ada")
    (store.home / "runs" / run.id).mkdir(parents=True, exist_ok=True)
    (store.home / "runs" / run.id / "weights").write_bytes(bytes(4 << 20))
    with pytest.raises(TooBig, match=words):
        Quotas(store.home, store, limits, lambda: free).check(Recipe(), "ada")
    large = tiny_folder(num_hidden_layers=90)
    beside = recipe({"steps": [{"distill/logits": {"teachers": str(large)}}]})
    most = quotas.model_size(Recipe())[0]
    with pytest.raises(TooBig, match=f"^{large.name} has .* billion"):
        Quotas(store.home, store, Limits(parameters=most), lambda: GIB).check(beside, "ada")
    Quotas(store.home, store, Limits(parameters=most), lambda: GIB).check(Recipe(), "ada")
    enough = Limits(parameters=10**9, model_bytes=GIB, disk=GIB, floor=GIB)
    Quotas(store.home, store, enough, lambda: 2 * GIB).check(Recipe(), "ada")


def _group(bits: int, *targets: str) -> dict[str, object]:
    return {"targets": list(targets), "weights": {"num_bits": bits}}


@pytest.mark.parametrize(
    ("leaf", "dtype", "bits", "scheme"),
    [
        ("qweight", torch.int32, (4, 4), {"quant_method": "gptq", "bits": 4}),
        ("qweight", torch.int32, (4, 4), {"quant_method": "gptq", "bits": 8, "dynamic": {"+:.*": {"bits": 4}}}),
        ("weight", torch.uint8, (4, 4), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("weight", torch.int8, (8, 8), {"quant_method": "compressed-tensors", "config_groups": 3}),
        (
            "weight_packed", torch.int32, (2, 8),
            {"config_groups": {"a": _group(2, f"{MLP}.up_proj"), "b": _group(8, f"{MLP}.down_proj")}},
        ),
    ],
)  # fmt: skip
def test_a_packed_model_is_as_large_as_what_it_was_made_of(
    tiny_folder: Callable[..., Path], leaf: str, dtype: torch.dtype, bits: tuple[int, int], scheme: dict
) -> None:
    folder = tiny_folder()
    size = quotas.model_size(recipe({"model": str(folder)}))
    tensors = load_file(folder / "model.safetensors")
    for name, each in zip(("up_proj", "down_proj"), bits, strict=True):
        module = f"{MLP}.{name}"
        count = tensors.pop(f"{module}.weight").numel() * each // (8 * dtype.itemsize)
        tensors[f"{module}.{leaf}"] = torch.zeros(count, 1, dtype=dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    assert quotas.model_size(recipe({"model": str(folder)})) == size


def test_the_disk_of_a_visitor_is_that_of_own_runs(store: Store) -> None:
    quota = Quotas(store.home, store, Limits(disk=8 << 20), lambda: GIB)
    for owner in ("ada", "ben"):
        run = store.add_run(Recipe(), owner)
        (store.home / "runs" / run.id / "deep").mkdir(parents=True, exist_ok=True)
        (store.home / "runs" / run.id / "deep" / "weights").write_bytes(bytes(1 << 20))
    assert 1 << 20 <= quota.used("ada") < 2 << 20
    assert quota.used("cleo") == 0
    assert folder_size(store.home / "none") == 0


def test_while_it_works_the_disk_ends_only_who_fills_it(store: Store) -> None:
    runs = [store.begin_attempt(store.add_run(Recipe(), owner).id) for owner in ("ada", "ben")]
    for run, size in zip(runs, (2 << 20, 1 << 10), strict=True):
        (store.home / "runs" / run.id).mkdir(parents=True, exist_ok=True)
        (store.home / "runs" / run.id / "weights").write_bytes(bytes(size))
    visitor = Quotas(store.home, store, Limits(disk=1 << 20), lambda: GIB).look(runs)
    assert [(breach.run, breach.discard) for breach in visitor] == [(runs[0].id, True)]
    assert "a visitor has 1.0 MiB" in visitor[0].reason
    everybody = Quotas(store.home, store, Limits(floor=2 * GIB), lambda: GIB - 1).look(runs)
    assert [breach.run for breach in everybody] == [runs[0].id]
    assert Quotas(store.home, store, Limits(floor=2 * GIB), lambda: GIB).look(runs) == []


def test_a_clock_that_jumps_ends_no_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.begin_attempt(store.add_run(Recipe(), "ada").id)
    quota = Quotas(store.home, store, Limits(seconds=60))
    assert quota.look([run], now=1000.0) == []
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert quota.look([run], now=1059.0) == []
    assert "longer than the 1 minutes" in quota.look([run], now=1062.0)[0].reason


def test_an_older_store_learns_to_share_and_to_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.store.MIGRATIONS", MIGRATIONS[:1])
    with Store(tmp_path / "maquette.db") as old, old._write() as db:
        db.execute(
            "INSERT INTO runs (id, owner, recipe, status, created) VALUES ('aaaa0000', 'ada', ?, 'succeeded', 1)",
            (Recipe().model_dump_json(),),
        )
    monkeypatch.undo()
    with Store(tmp_path / "maquette.db") as store:
        assert store.runs("ben", shared=True) == []
        assert store.share("aaaa0000", True).shared
        assert [run.id for run in store.runs("ben", shared=True)] == ["aaaa0000"]
        assert store.runs("ben") == []
    assert list(tmp_path.glob("*.backup"))


# With a scheduler and worker processes


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scheduler]]:
    monkeypatch.setattr("engine.preflight.check", lambda *asked: None)
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    monkeypatch.setattr(quotas, "LOOK_EVERY", 0.1)
    started: list[Scheduler] = []

    def start(limits: Limits) -> Scheduler:
        started.append(Scheduler(tmp_path, runner=LocalRunner(FAKE), limits=limits))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ended(scheduler: Scheduler, run: Run) -> Run:
    until(lambda: scheduler.store.run(run.id).status.final and not scheduler._watches)
    return scheduler.store.run(run.id)


def does(what: str) -> Recipe:
    return Recipe(calibration=what)


def test_a_run_that_takes_too_long_ends_alone_and_says_so(make: Callable[..., Scheduler]) -> None:
    scheduler = make(Limits(seconds=1.5))
    late, next_one = scheduler.submit(does("deaf"), "ada"), scheduler.submit(does("quick"), "ben")
    late = ended(scheduler, late)
    assert late.status is Status.FAILED
    assert "minutes that a run has here" in late.reason
    assert ended(scheduler, next_one).status is Status.SUCCEEDED


def test_a_run_that_fills_the_visitors_disk_ends_with_its_files(make: Callable[..., Scheduler]) -> None:
    scheduler = make(replace(Limits(), disk=GIB))
    run = scheduler.submit(does("polite"), "ada")
    folder = scheduler.home / "runs" / run.id / "attempt-1"
    until(lambda: scheduler.store.events(run.id, kinds=("log",)))
    scheduler._quotas._limits = Limits(disk=1 << 20)
    (folder / "big").write_bytes(bytes(2 << 20))
    run = ended(scheduler, run)
    assert run.status is Status.FAILED
    assert "its files are deleted" in run.reason
    assert not folder.exists()


def test_files_go_when_their_time_is_over_and_results_stay(make: Callable[..., Scheduler]) -> None:
    scheduler = make(Limits(keep=3600))
    run = ended(scheduler, scheduler.submit(does("quick"), "ada"))
    assert run.artifact
    assert run.expired is None
    scheduler._quotas._limits = Limits(keep=0.01)
    scheduler._quotas._next_expiry = 0
    until(lambda: scheduler.store.run(run.id).expired)
    run = scheduler.store.run(run.id)
    assert (run.status, run.artifact) == (Status.SUCCEEDED, None)
    assert not (scheduler.home / "runs" / run.id).exists()
    assert scheduler.store.measurements(run.id)
    assert scheduler._quotas.used("ada") == 0


def test_starting_too_often_hurts_only_the_sender(make: Callable[..., Scheduler]) -> None:
    scheduler = make(Limits(starts=2, queued=9))
    for _ in range(2):
        scheduler.submit(does("quick"), "ada")
    with pytest.raises(TooMany, match="Try again in"):
        scheduler.submit(does("quick"), "ada")
    assert scheduler.submit(does("quick"), "ben").status is Status.QUEUED


def test_only_the_owner_shares(make: Callable[..., Scheduler]) -> None:
    scheduler = make(Limits())
    run = scheduler.submit(does("quick"), "ada")
    with pytest.raises(UnknownName):
        scheduler.share(run.id, True, "ben")
    assert scheduler.share(run.id, True, "ada").shared
    for act in (scheduler.cancel, scheduler.resume, scheduler.delete):
        with pytest.raises(UnknownName):  # shared is to look at
            act(run.id, "ben")
