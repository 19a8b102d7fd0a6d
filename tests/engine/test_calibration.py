"""The walk over blocks: replayed blocks compute what the whole model computes, in every family."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from engine import flow as flow_module
from engine import observing, text
from engine.calibration import Moments, token_rows, walk_blocks
from engine.errors import BadText
from engine.flow import capture, run_block
from engine.methods import Calibrated, Context, Params, Selection
from engine.models import LoadedModel, blocks
from engine.observing import BlockLinear, accumulate_hessian, make_empty_hessian, mirror
from engine.text import read_documents
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import FAMILIES, MIXTURES


def block_outputs(model: LoadedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block gives when the whole model runs."""
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for module in blocks(model.network)[1]
    ]
    with torch.inference_mode():
        model.network(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("held", [flow_module.HELD, 0], ids=["memory", "file"])
@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_replayed_blocks_give_what_the_model_gives(
    family: str, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_module, "HELD", held)
    model = in_memory((FAMILIES | MIXTURES)[family], torch.float32)
    ids = torch.randint(3, 1280, (4, 24), generator=torch.Generator().manual_seed(1))
    expected = block_outputs(model, ids)
    flow = capture(model, ids.split(2), tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == (0 if held else 2)
    for number, module in enumerate(blocks(model.network)[1]):
        flow.through(number, module)
        torch.testing.assert_close(torch.cat([flow.states[0], flow.states[1]]), expected[number])
    flow.states.close()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_states_that_go_to_files_do_so_as_they_come(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_module, "HELD", 0)
    written: list[int] = []
    embeddings = tiny.network.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda *_: written.append(len(list(tmp_path.rglob("*.safetensors")))))
    flow = capture(tiny, torch.full((3, 8), 5).split(1), tmp_path)
    assert written == [0, 1, 2]
    assert not any(isinstance(each, torch.Tensor) for each in flow.states._held)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_later_blocks_see_what_was_done_to_earlier_ones(family: str, context: Context) -> None:
    model = in_memory(FAMILIES[family], torch.float32)
    params = Calibrated(samples=4, sequence_length=16)
    ids = token_rows(model.tokenizer, context.calibration, 16, 4)
    norms = {}
    for block in walk_blocks(model, context, params, collect="norm"):
        for linear in block.linears:
            norms[linear.name] = linear.input_norm
            linear.weight.mul_(0.5)
    # The same statistics, taken from the changed model as a whole.
    for name, norm in norms.items():
        if name.startswith(blocks(model.network)[0] + ".1."):
            seen: list[torch.Tensor] = []
            handle = model.network.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2))
            )
            halved = {n: p.clone() for n, p in model.network.named_parameters() if f".{1}." in n}
            with torch.no_grad():
                for parameter_name, parameter in model.network.named_parameters():
                    if parameter_name in halved and parameter.dim() == 2:
                        parameter.mul_(2)  # block 1 itself was observed before it was changed
                model.network(input_ids=ids, use_cache=False)
                for parameter_name, parameter in model.network.named_parameters():
                    if parameter_name in halved:
                        parameter.copy_(halved[parameter_name])
            handle.remove()
            torch.testing.assert_close(norm, torch.cat(seen).norm(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strip", [1000, 3])
def test_hessian_is_the_mean_over_all_tokens(
    strip: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(observing, "STRIP", strip)
    monkeypatch.setattr(observing, "add_second_moments", lambda *_, **__: False)
    inputs = torch.randn(70, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    hessian, seen = make_empty_hessian(6, torch.device("cpu")), 0
    for part in inputs.split([10, 40, 20]):
        accumulate_hessian(hessian, seen, part)
        seen += len(part)
    mirror(hessian)
    torch.testing.assert_close(hessian, 2 * inputs.float().t() @ inputs.float() / 70)
    lengths = inputs.float().norm(dim=1)
    accumulate_hessian(hessian, 0, inputs, lengths)
    assert float(hessian.trace()) == pytest.approx(2, rel=1e-3)  # of inputs of length 1


@pytest.mark.parametrize("experts", ["routed", "all"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@torch.no_grad()
def test_experts_are_calibrated_with_the_tokens_that_were_asked_for(
    kind: str, experts: Literal["routed", "all"], context: Context
) -> None:
    model = in_memory(MIXTURES[kind], torch.float32)
    params = Moments(samples=16, sequence_length=16, equal_tokens=False, experts=experts)  # two batches
    entered: list[torch.Tensor] = []
    for block in walk_blocks(model, context, params, params.collect):
        seen = torch.cat([states for states, _ in block.batches])
        entered.append(seen)
        if block.number != 1:
            continue
        mixture = block.module.get_submodule("mlp.experts")
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = mixture.register_forward_pre_hook(lambda _, args, found=found: found.append(args[:2]))
        for states, call in block.batches:
            run_block(block.module, states, call)
        handle.remove()
        inputs, chosen = (torch.cat(each) for each in zip(*found, strict=True))
        known = {linear.name.removeprefix(f"{block.name}.mlp.experts."): linear for linear in block.linears}
        for number, expert in enumerate(mixture):
            mine = inputs if experts == "all" else inputs[(chosen == number).any(1)]
            gate, up, _ = expert.linears
            for name, read in zip(expert._names, (mine, mine, expert.act_fn(gate(mine)) * up(mine)), strict=True):
                linear = known[f"{number}.{name}"]
                assert linear.tokens == len(mine)
                torch.testing.assert_close(linear.hessian.triu(), (2 * read.t() @ read / len(read)).triu())
        distinct = len({id(linear.hessian) for linear in block.linears})
        shared = {"mixtral": 0, "qwen2_moe": 2}[kind]  # its gate and up read what the experts do; its down
        assert distinct == 2 + 4 + ((1 if experts == "all" else 4 + bool(shared)) + shared // 2)
    now = block_outputs(model, token_rows(model.tokenizer, context.calibration, 16, 16))
    torch.testing.assert_close(entered[1:], now[:-1])  # what blocks give is what they gave


def test_linears_that_are_not_selected_are_left_out(tiny: LoadedModel, context: Context) -> None:
    params = Selection(targets="*.mlp.*", ignore="*.1.mlp.up_proj")
    found = [[linear.name.split(".")[-1] for linear in block.linears] for block in walk_blocks(tiny, context, params)]
    assert found == [["gate_proj", "up_proj", "down_proj"], ["gate_proj", "down_proj"], found[0]]


def test_finished_blocks_are_read_back_and_not_yielded_again(
    tiny: LoadedModel, context: Context, recorder: Recorder
) -> None:
    for block in walk_blocks(tiny, context, Params()):
        if block.number == 2:
            break  # killed in the third block
        for linear in block.linears:
            linear.weight.fill_(block.number + 1)
            tiny.pruned.add(linear.name)
    again = in_memory(tiny_config())
    visited = [block.number for block in walk_blocks(again, context, Params())]
    assert visited == [2]
    assert recorder.logs() == ["reused 1 finished blocks", "reused 2 finished blocks"]
    for number, module in enumerate(blocks(again.network)[1][:2]):
        assert bool((module.mlp.up_proj.weight == number + 1).all())
    assert {name.split(".")[2] for name in again.pruned} == {"0", "1"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\0\1\2" * 50, "binary"),
        ("a.txt", b"\xff\xfe\xfa" * 500, "not UTF-8"),
        ("a.jsonl", b'{"body": 1}\n', 'line 1: a JSON object with a "text"'),
        ("a.jsonl", b"nonsense\n", "line 1"),
    ],
)
def test_bad_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadText, match=words) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_lines_of_json_end_at_line_feeds_alone_and_a_large_file_ends_within_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\u2028two\x85three"}\n\n{"text": "four"}\r\n', encoding="utf-8", newline="")
    assert read_documents(file) == ["one\u2028two\x85three", "four"]
    monkeypatch.setattr(text, "LONGEST_TEXT", file.stat().st_size - 3)
    assert read_documents(file) == ["one\u2028two\x85three"]
    file.write_text('{"text": "one"}\n\nnonsense\n')
    with pytest.raises(BadText, match="line 3"):
        read_documents(file)


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path, tiny: LoadedModel) -> None:
    (tmp_path / "a.txt").write_text("Two words")
    with pytest.raises(BadText, match="one sequence needs 128"):
        token_rows(tiny.tokenizer, tmp_path / "a.txt", 128)


def test_one_long_line_gives_as_many_rows_as_asked(tmp_path: Path, tiny: LoadedModel) -> None:
    (tmp_path / "a.txt").write_text("the lamp is in the barn " * 2000)
    assert token_rows(tiny.tokenizer, tmp_path / "a.txt", 64, 5).shape == (5, 64)


def test_a_weight_is_put_aside_only_where_its_memory_is_its_own() -> None:
    linear, twin = nn.Linear(8, 4), nn.Linear(8, 4)
    before = linear.weight.detach().clone()
    held = BlockLinear("a", linear)
    assert held.put_aside()
    assert held.weight.numel() == 0
    held.bring_back(before)
    assert torch.equal(linear(torch.ones(2, 8)), torch.ones(2, 8) @ before.t() + linear.bias)
    both = torch.ones(8, 8)
    twin.weight.data = both[:4]
    assert not BlockLinear("b", twin).put_aside()
    assert twin.weight.shape == (4, 8)
