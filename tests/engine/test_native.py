"""Our own kernels against the slow, obvious product, and a decoder that uses them against the one that does not."""

from __future__ import annotations

import copy
import ctypes
import fcntl
import gc
import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.generate import _read_prompt, decode
from engine.models import blocks, linears, quantize_inputs
from engine.packing import InputGrid, QuantizedWeight
from engine.runtime import pages
from engine.runtime.lean import LeanDecoder
from engine.runtime.linear import INT8, Int8Linear, PackedLinear, packed_linear
from engine.runtime.native import library
from engine.runtime.native.columns import solve_columns
from engine.runtime.native.decoder import MOST_ROWS, NativeDecoder
from engine.runtime.native.library import Matrix
from engine.runtime.native.linear import NativeLinear, native_kernel
from engine.runtime.native.moments import add_second_moments
from engine.runtime.pages import give_back, use_large_pages
from tests.conftest import in_memory, tiny_config
from tests.engine.conftest import KINDS, needs_kernels
from tests.engine.test_generate import PLAIN, PROMPT
from tests.engine.test_runtime import exact_product, make, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
# rows, columns, groups
SHAPES = [
    (128, 256, 4),
    (100, 256, 1),
    (16, 64, 8),
    (7, 72, 3),
    (130, 200, 25),
    (65, 8, 1),
    (20, 1000, 1),
    (24, 2304, 3),
    (530, 2304, 9),
]
BITS = [(kind, bits) for kind in KINDS for bits in (range(2, 9) if kind == KINDS[0] else (4, 8))]


def inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a mean, so that wrong zero points and swapped columns show."""
    dice = torch.Generator().manual_seed(seed)
    steps = torch.randn(rows, columns, generator=dice) * 0.3 + 0.1
    return (steps.cumsum(1) / torch.arange(1, columns + 1).sqrt() + 0.5).to(torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("kind", "bits"), BITS, indirect=["kind"])
def test_a_native_linear_computes_the_grids_product(
    bits: int, symmetric: bool, shape: tuple[int, int, int], kind: str
) -> None:
    rows, columns, groups = shape
    weight = make(bits, groups, symmetric=symmetric, rows=rows, columns=columns)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    linear = NativeLinear(weight, bias)
    assert linear.kernel.endswith(f"-{kind}")
    for m in [*range(1, 18), linear.many_rows - 1, linear.many_rows, 100]:  # every tile of rows, and both ways
        x = inputs(m, columns, m)
        y = linear(x)
        assert y.dtype == torch.bfloat16
        # Many rows meet weights that are rounded to bfloat16 themselves, as dense ones are.
        limit = 0.0035 if m < linear.many_rows else 0.005
        assert relative_error(y, exact_product(x, weight) + bias.double()) < limit, m


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_more_rows_than_are_taken_at_once_are_taken(bits: int, kind: str) -> None:
    weight = make(bits, 2, rows=33, columns=64)
    x = inputs(2100, 64)
    assert relative_error(NativeLinear(weight)(x), exact_product(x, weight)) < 0.005


@needs_kernels
@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(
    ("tokens", "size"), [(0, 5), (1, 1), (2, 16), (7, 65), (64, 64), (33, 100), (100, 384), (9, 2048), (10, 2200)]
)
def test_second_moments_are_the_exact_ones(tokens: int, size: int) -> None:
    x = inputs(tokens, size)
    before = torch.rand(size, size, generator=torch.Generator().manual_seed(1)).triu()
    total, exact = before.clone(), 0.5 * before.double() + 0.25 * x.double().t() @ x.double()
    assert add_second_moments(total, x, None, keep=0.5, weight=0.25)
    torch.testing.assert_close(total.triu().double(), exact.triu(), rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert not total.tril(-64).any()
    torch.set_num_threads(3)
    again = before.clone()
    add_second_moments(again, x, None, keep=0.5, weight=0.25)
    torch.testing.assert_close(again, total, rtol=0, atol=0)
    lengths = torch.linspace(0.01, 30, tokens)
    scaled = (x.float() / lengths[:, None]).bfloat16()
    apart, at_once = before.clone(), before.clone()
    add_second_moments(apart, scaled, None, keep=0.5, weight=0.25)
    add_second_moments(at_once, x, lengths, keep=0.5, weight=0.25)
    torch.testing.assert_close(at_once, apart, rtol=0, atol=0)


def test_second_moments_of_other_numbers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros(4, 4)
    assert not add_second_moments(total, torch.ones(2, 4), None, keep=0.0, weight=1.0)
    monkeypatch.setenv(library.SWITCH, "0")
    assert not add_second_moments(total, torch.ones(2, 4, dtype=torch.bfloat16), None, keep=0.0, weight=1.0)
    assert not total.any()


@needs_kernels
@pytest.mark.parametrize(("columns", "rows", "groups"), [(1, 1, 1), (7, 65, 2), (128, 64, 3), (30, 200, 30)])
def test_columns_are_solved_as_one_by_one(columns: int, rows: int, groups: int) -> None:
    dice = torch.Generator().manual_seed(0)
    wanted = torch.randn(columns, rows, generator=dice)
    part = wanted + 0.1 * torch.randn(columns, rows, generator=dice)
    factor = 0.1 * torch.randn(columns, columns, generator=dice).triu(1)
    scale, zero = torch.rand(groups, rows, generator=dice) * 0.2 + 0.05, torch.full((groups, rows), 7.0)
    group = torch.randint(0, groups, (columns,), generator=dice)
    found = solve_columns(wanted, part, factor, scale, zero, group, 15)
    assert found is not None
    codes, missed = found
    for j in range(columns):
        counts = part[j].double() + factor[:j, j].double() @ missed[:j].double()
        s, z = scale[group[j]].double(), zero[group[j]].double()
        nearest = ((counts / s).round() + z).clamp(0, 15)
        tie = ((counts / s) % 1 - 0.5).abs() < 1e-4  # where either level is as near
        assert ((codes[j] == nearest) | tie).all()
        torch.testing.assert_close(
            missed[j].double(), wanted[j].double() - (codes[j].double() - z) * s, atol=1e-6, rtol=0
        )


@needs_kernels
@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_threads_share_the_work_and_change_nothing(rows: int, threads: int) -> None:
    linear = NativeLinear(make(4, 4, rows=1000, columns=1024))
    x = inputs(rows, 1024)
    alone = linear(x)
    torch.set_num_threads(threads)
    torch.testing.assert_close(linear(x), alone, rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_few_rows_are_exact_up_to_the_order_of_sums(bits: int, symmetric: bool) -> None:
    """Nothing but the last rounding to bfloat16 may show: inputs that are powers of two, sums that float32 holds."""
    weight = make(bits, 4, symmetric=symmetric)
    linear = NativeLinear(weight)
    eye = torch.eye(256)[:17].to(torch.bfloat16)
    torch.testing.assert_close(linear(eye), exact_product(eye, weight).to(torch.bfloat16), rtol=0, atol=0)
    x = torch.randint(-2, 3, (3, 256)).to(torch.bfloat16)
    torch.testing.assert_close(linear(x), exact_product(x, weight).to(torch.bfloat16), rtol=2**-8, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_costs_its_neighbours_nothing(bits: int, rows: int) -> None:
    """Where inputs are multiplied as whole numbers, one that dwarfs the others leaves them their digits."""
    weight = make(bits, 4)
    weight.codes[:, 100] = 2 ** (bits - 1)  # times zero: what its neighbours give is all that is seen
    linear = NativeLinear(weight)
    for size in (1.0, 1e2, 1e4, 1e6, 1e30):
        x = inputs(rows, 256)
        x[-1, 100] = -size
        assert relative_error(linear(x), exact_product(x, weight)) < 0.0035, size


@needs_kernels
def test_what_is_no_number_stays_none() -> None:
    linear = NativeLinear(make(4, 4))
    for wrong in (float("nan"), float("inf")):
        x = inputs(3, 256)
        x[1, 7] = wrong
        y = linear(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@needs_kernels
def test_a_native_linear_is_as_small_as_its_codes() -> None:
    for bits, symmetric, extra in [(4, True, 2), (4, False, 3), (3, False, 2), (8, True, 2), (8, False, 3)]:
        linear = NativeLinear(make(bits, 4, symmetric=symmetric, rows=256, columns=1024))
        stored = sum(buffer.nbytes for buffer in linear.buffers())
        assert stored == 256 * 1024 * (4 if bits <= 4 else 8) // 8 + 256 * 4 * extra


@needs_kernels
def test_shapes_are_kept_and_wrong_ones_refused() -> None:
    linear = NativeLinear(make(4, 4))
    assert linear(inputs(6, 256).view(2, 3, 256)).shape == (2, 3, 128)
    assert linear(inputs(6, 256)[:0]).shape == (0, 128)
    transposed = inputs(256, 5).T
    torch.testing.assert_close(linear(transposed), linear(transposed.contiguous()), rtol=0, atol=0)
    for rows in (3, linear.many_rows):
        shifted = inputs(1, rows * 256 + 1)[0, 1:].view(rows, 256)  # begins between two words
        torch.testing.assert_close(linear(shifted), linear(shifted.clone()), rtol=0, atol=0)
    for wrong in (inputs(2, 128), inputs(2, 256).float()):
        with pytest.raises(ValueError, match="do not fit"):
            linear(wrong)


@needs_kernels
@pytest.mark.parametrize(
    ("bits", "groups", "columns", "kernel"),
    [(4, 16, 256, "int4"), (4, 64, 256, None), (8, 64, 256, "int8"), (4, 1, 100, None), (8, 1, 100, "int8"),
     (8, 1, 102, None)],
)  # fmt: skip
def test_odd_shapes_fall_back(bits: int, groups: int, columns: int, kernel: str | None) -> None:
    weight = make(bits, groups, columns=columns)
    found = native_kernel(weight, "cpu", torch.bfloat16)
    assert found == (kernel and f"{kernel}-{library.available()}")
    assert native_kernel(weight, "cpu", torch.float32) is None
    assert native_kernel(weight, "cuda", torch.bfloat16) is None
    if kernel is None:
        assert not isinstance(packed_linear(weight, None, "cpu", torch.bfloat16), NativeLinear)
        with pytest.raises(ValueError, match="no kernel"):
            NativeLinear(weight)


@needs_kernels
def test_the_switch_gives_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make(4, 4)
    assert isinstance(packed_linear(weight, None, "cpu", torch.bfloat16), NativeLinear)
    monkeypatch.setenv(library.SWITCH, "0")
    assert isinstance(packed_linear(weight, None, "cpu", torch.bfloat16), PackedLinear)


@needs_kernels
@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (33, 100), (65, 102), (200, 4), (20, 4200)])
def test_integer_products_are_those_of_the_input_grid(
    rows: int, columns: int, scale: float | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(8, 1, rows=rows, columns=columns)
    weight = QuantizedWeight(made.codes, made.scale, made.zero, 8, True, InputGrid(scale))
    native = Int8Linear(weight)
    assert native.kernel == f"{INT8}-{kind}"
    monkeypatch.setenv(library.SWITCH, "0")
    plain = Int8Linear(weight)
    monkeypatch.delenv(library.SWITCH)
    for m in (*range(1, 18), 40, 50):
        x = inputs(m, columns, m)
        x[0, :3] = torch.tensor([9.0, -9.0, 0.0])  # beyond a fixed grid
        torch.testing.assert_close(native(x), plain(x), rtol=0, atol=0)
    zeros = torch.zeros(2, columns, dtype=torch.bfloat16)
    torch.testing.assert_close(native(zeros), plain(zeros), rtol=0, atol=0)


@needs_kernels
@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize("scale", [None, 0.03])
def test_integer_products_of_what_lies_beyond_every_grid(
    scale: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(8, 1, rows=33, columns=100)
    weight = QuantizedWeight(made.codes, made.scale, made.zero, 8, True, InputGrid(scale))
    native = Int8Linear(weight)
    monkeypatch.setenv(library.SWITCH, "0")
    plain = Int8Linear(weight)
    monkeypatch.delenv(library.SWITCH)
    x = inputs(rows, 100)
    for size in (1e9, -1e9, 1e30, -1e30, float("inf"), float("nan")):
        x[0, 7] = size
        ours, theirs = native(x), plain(x)
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=0, atol=0)
        if size != size or (scale is None and abs(size) == float("inf")):
            assert not ours[0].isfinite().any(), size
        else:
            torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("size", [1.0, 80.0, 1e3, 1e8, 1e16, 1e30])
def test_scores_of_any_size_are_weights(size: float) -> None:
    dice = torch.Generator().manual_seed(0)
    keys, values = torch.zeros(3, 32).bfloat16(), torch.randn(3, 32, generator=dice).bfloat16()
    keys[0, 0], keys[1, 0] = size, -size
    q_k_v = torch.stack((torch.eye(32)[0].bfloat16(), keys[2], values[2]))  # the new token is the third
    found = torch.empty(32, dtype=torch.bfloat16)
    heads = library.Heads(1, 1, 32, scale=1.0)
    library.library().maquette_attend(  # type: ignore[union-attr]
        ctypes.byref(heads), *(states.data_ptr() for states in (q_k_v, keys, values)), 1, 3, 0, 2, found.data_ptr(), 1
    )
    expected = (keys.double() @ q_k_v[0].double()).softmax(0) @ values.double()
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("size", [1.0, 80.0, 1e3, 1e8, 1e16, 1e30])
def test_gates_of_any_size_are_opened(size: float) -> None:
    eye, ones = torch.eye(32).bfloat16(), torch.ones(32).bfloat16()
    gates = eye * torch.tensor([size, -size]).bfloat16().repeat(16)
    same, gate = (Matrix(Matrix.DENSE, 32, 32, 32, w.data_ptr(), None, None, None, None, 0.0) for w in (eye, gates))
    norm = library.Norm(library.Norm.ROUNDED, 1e-6, 0.0, ones.data_ptr(), None)
    mlp = library.Mlp(inner=32, rising=2, gated=True, up=(gate, same), down=same)
    block = library.Block(before_mlp=norm, hidden=32, o=same, mlp=mlp)
    x, attended = ones.clone(), torch.zeros(32).bfloat16()
    library.library().maquette_finish(  # type: ignore[union-attr]
        ctypes.byref(block), attended.data_ptr(), x.data_ptr(), 1, 1
    )
    expected = 1 + nn.functional.silu(gates.diagonal().double())
    torch.testing.assert_close(x.double(), expected, rtol=2**-6, atol=1e-6)


FAMILIES = PLAIN | {
    "wide heads": tiny_config(head_dim=80),
    "odd heads": tiny_config(head_dim=24),
}
WEIGHTS = ("dense", "4 bit", "8 bit", "mixed", "W8A8")


def network(config: PretrainedConfig, weights: str) -> PreTrainedModel:
    """A model whose next token depends on the text, the linears of its blocks on grids of the given kind."""
    subject = in_memory(config).network
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in subject.parameters():
            _ = parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
    for number, (name, linear) in enumerate(list(linears(subject))):
        if not name.startswith(blocks(subject)[0]) or weights == "dense":
            continue
        turned = linear.weight.t().contiguous() if isinstance(linear, Conv1D) else linear.weight
        bits = {"4 bit": 4, "8 bit": 8, "mixed": (3, 4, 8)[number % 3], "W8A8": 8}[weights]
        grid = rounded(turned, bits, 1 if weights == "W8A8" else 2)
        bias = linear.bias
        if weights == "W8A8":
            subject.set_submodule(name, Int8Linear(replace(grid, inputs=InputGrid()), bias))
        else:
            subject.set_submodule(name, packed_linear(grid, bias, "cpu", torch.bfloat16) or pytest.fail("no kernel"))
    return subject


def rounded(weight: Tensor, bits: int, groups: int) -> QuantizedWeight:
    """Round to nearest on a symmetric grid."""
    split = weight.detach().float().view(weight.shape[0], groups, -1)
    half = 2 ** (bits - 1)
    scale = (split.abs().amax(-1) / half).to(torch.bfloat16)
    codes = (split / scale.float().unsqueeze(-1)).round().add_(half).clamp_(0, 2 * half - 1).view_as(weight)
    return QuantizedWeight(codes.to(torch.uint8), scale, torch.full_like(scale, half, dtype=torch.uint8), bits, True)


@needs_kernels
@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_native_step_computes_what_the_lean_decoder_computes(family: str, weights: str) -> None:
    subject = network(FAMILIES[family], weights)
    exact = copy.deepcopy(subject).float() if weights == "dense" else None
    for batch in (1, 3, 16):
        assert NativeDecoder.supports(subject, batch, 40)
        ids = torch.randint(5, 1280, (batch, 9), generator=torch.Generator().manual_seed(batch))
        caches = [_read_prompt(model, ids, None)[1] for model in (subject, exact) if model is not None]
        native, lean = NativeDecoder(subject, caches[0], 40), LeanDecoder(subject, caches[0], 40)
        truth = None if exact is None else LeanDecoder(exact, caches[1], 40)
        step = ids[:, -1:]
        for _ in range(30):
            ours, theirs = native.step(step).float(), lean.step(step).float()
            # Rounded inputs amplify: a number near the middle of two steps falls on either side.
            assert (ours - theirs).norm() / theirs.norm() < (0.15 if weights == "W8A8" else 0.04)
            if truth is not None:
                right = truth.step(step)
                assert (ours - right).norm() < 2 * (theirs - right).norm() + 0.005 * right.norm()
            step = theirs.argmax(-1, keepdim=True)


@needs_kernels
@pytest.mark.parametrize("weights", WEIGHTS[:4])
def test_decoding_gives_the_same_tokens_with_and_without(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tie_word_embeddings=False)
    used = []
    step = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, ids: used.append(1) or step(self, ids))
    ours = list(decode(network(config, weights), PROMPT, 20))
    assert len(used) == 20  # one that is checked, nineteen that count
    monkeypatch.setenv(library.SWITCH, "0")
    theirs = list(decode(network(config, weights), PROMPT, 20))
    assert len(used) == 20
    same = 0
    while same < 20 and ours[same].tokens == theirs[same].tokens:
        same += 1
    if same < 20:  # only where both tokens were as likely: sums in another order choose either then
        odds = theirs[same].logprobs[0]
        assert odds[theirs[same].tokens] - odds[ours[same].tokens] < 0.05 * odds.std()
    assert same > 10
    assert len({int(found.tokens) for found in ours}) > 2  # a text that varies, so that agreement says something


@needs_kernels
def test_what_the_kernels_do_not_compute_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = network(tiny_config(), "4 bit")
    assert NativeDecoder.supports(subject, 16, 40)
    assert not NativeDecoder.supports(subject, 17, 40)
    assert not NativeDecoder.supports(copy.deepcopy(network(tiny_config(), "dense")).float(), 1, 40)
    monkeypatch.setenv(library.SWITCH, "0")
    assert not NativeDecoder.supports(subject, 1, 40)
    monkeypatch.delenv(library.SWITCH)
    quantize_inputs(subject.get_submodule("model.layers.1.mlp.down_proj"), InputGrid())  # nothing would round them
    assert not NativeDecoder.supports(subject, 1, 40)


@needs_kernels
@torch.inference_mode()
def test_a_full_cache_is_an_error_and_not_a_crash() -> None:
    subject = network(tiny_config(), "4 bit")
    ids = torch.tensor([PROMPT])
    decoder = NativeDecoder(subject, _read_prompt(subject, ids, None)[1], len(PROMPT) + 1)
    decoder.step(ids[:, -1:])
    decoder.step(ids[:, -1:])
    with pytest.raises(ValueError, match="room"):
        decoder.step(ids[:, -1:])


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make `g++` run a script."""
    folder.mkdir()
    compiler = folder / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_builds_at_the_same_time_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    script = (
        f'[ "$1" = --version ] && exit 0; for last; do :; done; echo $last >> {calls}; sleep 0.1; echo whole > $last'
    )
    fake_compiler(tmp_path / "bin", monkeypatch, script)
    folder = tmp_path / "kernels"
    with ThreadPoolExecutor(4) as pool:  # the lock is a file's, so threads stand for processes
        found = set(pool.map(library.build, [folder] * 4, [library.PROCESSORS[0]] * 4))
    wanted = [f"{path.stem}.o" for path in library.PROCESSORS[0].sources if path.suffix == ".cpp"]
    assert sorted(Path(line).name for line in calls.read_text().splitlines()) == sorted([*wanted, "library.so"])
    assert [file.read_text() for file in found] == ["whole\n"]
    assert sorted(file.name for file in folder.iterdir()) == sorted(["lock", *(file.name for file in found)])


def test_a_library_that_is_there_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path / "bin", monkeypatch, '[ "$1" = --version ] || { for last; do :; done; : > "$last"; }')
    folder, kind = tmp_path / "kernels", library.PROCESSORS[0]
    built = library.build(folder, kind)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = pool.submit(library.build, folder, kind)
        try:
            assert found.result(20) == built
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86-64")
@pytest.mark.parametrize("kind", [kind for kind in library.PROCESSORS if kind.name not in KINDS], ids=lambda k: k.name)
def test_the_kernels_of_other_processors_compile(kind: library.Processor, tmp_path: Path) -> None:
    """Of those that this one cannot run: what it can has been compiled and computes above. They are not loaded, for
    that runs some.
    """
    built = library.build(tmp_path / "kernels", kind).read_bytes()
    assert all(name.encode() in built for name in library._POINTERS)


def test_a_failed_build_leaves_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(tmp_path / "bin", monkeypatch, '[ "$1" = --version ] && exit 0; echo "no such thing" >&2; exit 1')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "instructions", lambda: frozenset(library.PROCESSORS[0].instructions))
    library._load.cache_clear()
    try:
        assert not library.available()
        assert not library.available()
    finally:
        library._load.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such thing" in caplog.text
    assert [file.name for file in (tmp_path / "home" / "maquette" / "kernels").iterdir()] == ["lock"]


@pytest.mark.skipif("amx" not in KINDS, reason="this processor has no tiles, or they are not given")
def test_a_compiler_that_knows_no_tiles_builds_for_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = shutil.which("g++")
    fake_compiler(
        tmp_path / "bin", monkeypatch, f'case "$*" in *amx*) echo "what is amx?" >&2; exit 1;; esac\nexec {real} "$@"'
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    library._load.cache_clear()
    try:
        assert library.available() == "avx512"
    finally:
        library._load.cache_clear()
    assert "kernels for avx512; better ones could not be built: what is amx?" in caplog.text


def test_tiles_that_the_system_does_not_give_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "instructions", lambda: frozenset(library.AMX.instructions))
    monkeypatch.setattr(library, "may_use_tiles", lambda: False)
    assert [kind.name for kind in library.PROCESSORS if kind.here()] == ["avx512"]


def test_another_processor_is_never_asked_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "instructions", lambda: frozenset(["avx2"]))
    library._load.cache_clear()
    try:
        assert not library.available()
    finally:
        library._load.cache_clear()
    assert not (tmp_path / "home").exists()


def test_the_librarys_name_follows_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'if [ "$1" = --version ]; then echo VERSION; else for last; do :; done; : > "$last"; fi'
    names = []
    for version in ("1", "2", "2"):
        number = len(names)
        fake_compiler(tmp_path / f"bin{number}", monkeypatch, script.replace("VERSION", version))
        names.append(library.build(tmp_path / "kernels", library.PROCESSORS[0]).name)
    assert names[0] != names[1] == names[2]


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(PermissionError, match="others"):
        library.build(tmp_path / "kernels", library.PROCESSORS[0])


@needs_kernels
def test_weights_that_a_decoder_reads_in_place_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text's decoder joins linears meanwhile, and gives the memory of their parts back."""
    monkeypatch.setattr(pages, "SMALL", 0)
    subject = network(tiny_config(), "W8A8")
    use_large_pages(subject)
    alone = [step.tokens.item() for step in decode(subject, PROMPT, 12)]
    steps = decode(subject, PROMPT, 12)
    found = [next(steps).tokens.item() for _ in range(4)]
    part = subject.model.layers[0].mlp.up_proj.weight
    list(decode(subject, PROMPT, 2, batch=MOST_ROWS + 1))
    assert subject.model.layers[0].mlp.up_proj.weight is not part
    assert found + [step.tokens.item() for step in steps] == alone
    assert part.any()
    steps.close()
    del steps
    gc.collect()
    give_back(part)
    assert float((part == 0).float().mean()) > 0.4


def test_large_pages_change_where_tensors_lie_and_nothing_else() -> None:
    subject = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048), nn.Embedding(300, 2048)).to(torch.bfloat16)
    subject.register_buffer("codes", torch.randint(0, 255, (30_000_001,), dtype=torch.uint8))
    subject[1].weight = subject[0].weight  # tied
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    weight = subject[0].weight
    places = {tensor.data_ptr() for tensor in subject.state_dict().values()}
    use_large_pages(subject)
    for name, tensor in subject.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert subject[0].weight is weight is subject[1].weight
    give_back(subject[2].weight)  # of its memory only what lies in whole pages, and nothing of its neighbours'
    give_back(subject[2].weight)
    for name, tensor in subject.state_dict().items():
        if name != "2.weight":
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert float((subject[2].weight == 0).float().mean()) > 0.99
    assert places.isdisjoint(tensor.data_ptr() for tensor in subject.state_dict().values())
    small = nn.Linear(64, 64)
    place = small.weight.data_ptr()
    use_large_pages(small)
    assert small.weight.data_ptr() == place
