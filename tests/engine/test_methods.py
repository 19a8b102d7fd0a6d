"""The contract of every method file, and the loud refusal of incomplete ones."""

import json
import time
import types
from typing import Annotated

import pytest
import torch
from pydantic import Field, JsonValue

from engine import methods, patterns
from engine.errors import BadParams, InputError, UnknownName
from engine.fields import With, bounds, field_kind
from engine.methods import Context, Params
from engine.models import LoadedModel
from engine.places import DEMO
from engine.records import Recipe
from tests.conftest import in_memory, tiny_config

SMALL: dict[str, dict[str, object]] = {
    "quantize/bitsandbytes": {"samples": 4, "sequence_length": 16},
    "quantize/rtn": {"group_size": 32},
    "quantize/zeroquant": {"group_size": 32, "samples": 4, "sequence_length": 16},
    "quantize/smoothquant": {"samples": 4, "sequence_length": 16},
    "quantize/mixed": {"samples": 4, "sequence_length": 16},
    "quantize/awq": {"group_size": 32, "samples": 4, "sequence_length": 16},
    "quantize/hqq": {"group_size": 32},
    "quantize/kv_cache": {"group_size": 16},
    "quantize/gptq": {"group_size": 32, "samples": 4, "sequence_length": 16},
    "prune/wanda": {"samples": 4, "sequence_length": 16},
    "prune/sparsegpt": {"samples": 4, "sequence_length": 16},
    "prune/depth": {"samples": 4, "sequence_length": 16},
    "prune/width": {"samples": 4, "sequence_length": 16},
    "prune/low_rank": {"samples": 4, "sequence_length": 16, "multiple": 8},
    "prune/vocabulary": {"text": str(DEMO / "prompts.txt")},
    "distill/logits": {"steps": 3, "batch": 2, "sequence_length": 16},
    "prune/gradual": {"steps": 3, "batch": 2, "sequence_length": 16},
    "prune/l1": {"steps": 3, "batch": 2, "sequence_length": 16},
    "distill/features": {"steps": 3, "batch": 2, "sequence_length": 16, "attention_weight": 1.0},
    "distill/on_policy": {"steps": 3, "batch": 2, "sequence_length": 16, "prompt_tokens": 8},
    "distill/sequence": {"steps": 3, "batch": 2, "sequence_length": 16, "prompt_tokens": 8, "sequences": 4},
    "distill/repair": {"steps": 3, "batch": 2, "sequence_length": 16},
}
# Whose result is a model of another shape.
RESHAPING = ("prune/depth", "prune/width", "prune/vocabulary", "prune/low_rank")


def test_the_families_are_there() -> None:
    assert {name.split("/")[0] for name in methods.methods()} == set(methods.FAMILIES)


@pytest.mark.parametrize("name", methods.methods())
def test_defaults_are_valid_and_survive_json(name: str) -> None:
    method = methods.get(name)
    defaults = method.params()
    assert method.check(json.loads(defaults.model_dump_json())) == defaults
    assert len(method.documentation.splitlines()) > 2
    assert method.summary.endswith(".")
    for key, info in method.params.model_fields.items():
        if field_kind(info) in ("int", "float"):
            assert None not in bounds(info), f"{key} has no bounds"


@pytest.mark.parametrize("name", methods.methods())
def test_same_seed_same_result_and_shapes_are_kept(name: str, context: Context, tmp_path: object) -> None:
    import dataclasses

    method = methods.get(name)
    params = method.check(SMALL.get(name, {}))  # type: ignore[arg-type]

    def once(part: str) -> LoadedModel:
        with torch.no_grad():
            return method.apply(
                in_memory(tiny_config()), params, dataclasses.replace(context, folder=context.folder / part)
            )

    first, second = once("a"), once("b")
    for key, value in first.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[key], value, rtol=0, atol=0)
    original = in_memory(tiny_config()).network.state_dict()
    shapes = {k: v.shape for k, v in first.network.state_dict().items()}
    if method.name in RESHAPING:
        assert first.network.num_parameters() < in_memory(tiny_config()).network.num_parameters()
    elif method.family != "distill" and first.stored_as is None:  # a library's modules have shapes of their own
        assert shapes == {k: v.shape for k, v in original.items()}
    changed = len(shapes) < len(original) or any(
        k not in original or not torch.equal(v, original[k]) for k, v in first.network.state_dict().items()
    )
    assert changed == (first.kv_cache is None)  # a step changes weights, or says how keys and values are held
    assert first.network(torch.arange(9)[None]).logits.isfinite().all()


def module(**parts: object) -> types.ModuleType:
    class Good(Params):
        level: int = Field(1, ge=0, le=2, description="How much.")

    made = types.ModuleType("made")
    made.__doc__ = "Do something."
    given = {"TITLE": "Made", "CHANGES": (), "Params": Good, "apply": lambda m, p, c: m} | parts
    for key, value in given.items():
        if value is not None:
            setattr(made, key, value)
    return made


def test_a_complete_file_is_read() -> None:
    assert methods.read(module(), "prune/made").title == "Made"


@pytest.mark.parametrize("part", ["TITLE", "CHANGES", "Params", "apply"])
def test_a_missing_part_is_named(part: str) -> None:
    with pytest.raises(TypeError, match=f"prune/made: {part} is missing"):
        methods.read(module(**{part: None}), "prune/made")


def test_other_faults_are_named() -> None:
    class NoDefault(Params):
        level: int = Field(description="How much.")

    class NoDescription(Params):
        level: int = 1

    class BadType(Params):
        level: list[int] = Field([], description="How much.")

    class NoSuchSetting(Params):
        level: Annotated[int, With("kind", "deep")] = Field(1, ge=0, le=9, description="How much.")

    for faulty, words in (
        (NoDefault, "default"), (NoDescription, "description"), (BadType, "unsupported type"),
        (NoSuchSetting, "counts with kind"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=words):
            methods.read(module(Params=faulty), "prune/made")
    with pytest.raises(TypeError, match="CHANGES"):
        methods.read(module(CHANGES=("speed",)), "prune/made")


def test_names_are_looked_up_with_a_hint() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean quantize/gptq.*Available: distill/features"):
        methods.get("quantize/gqtp")
    with pytest.raises(BadParams, match="bits"):
        methods.get("quantize/rtn").check({"bits": 9})


@pytest.mark.parametrize(
    ("targets", "ignore", "chosen"),
    [
        ("", "", ["0.attn.q", "0.mlp.up", "1.mlp.up"]),
        ("*.mlp.*", "", ["0.mlp.up", "1.mlp.up"]),
        ("", "0.*", ["1.mlp.up"]),
        (r"re:\d\.attn", "", ["0.attn.q"]),
        ("*.attn.* 1.*", "re:1", ["0.attn.q"]),
    ],
)
def test_targets_and_ignore_choose_linears(targets: str, ignore: str, chosen: list[str]) -> None:
    selection = methods.Selection(targets=targets, ignore=ignore)
    assert [name for name in ("0.attn.q", "0.mlp.up", "1.mlp.up") if selection.selects(name)] == chosen


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("transformer.h.*", "h.0.mlp.c_fc"), ("h.*", "transformer.h.0.mlp.c_fc"),
        ("*.block_sparse_moe.*", "model.layers.0.mlp.experts.0.w1"),
        ("*.mlp.*", "model.layers.0.block_sparse_moe.experts.0.w1"),
    ],
)  # fmt: skip
def test_names_are_those_of_files_and_of_networks(pattern: str, name: str) -> None:
    assert methods.Selection(targets=pattern).selects(name)
    assert not methods.Selection(targets="other.*").selects(name)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("re:([a-z0-9_.]|[a-z0-9_.])+[^a-z0-9_.]", "takes too long to match"),
        ("re:(?:(?:a{1000}){1000}){1000}", "counts of more than 100 repeats"),
        (f"re:{'a' * 201}", "at most 200 are read"),
        ("re:(", "is no regular expression"),
    ],
)
def test_a_pattern_is_refused_before_it_takes_time_or_memory(pattern: str, words: str) -> None:
    began = time.thread_time()
    with pytest.raises(BadParams, match=words):
        chosen({"targets": f"*.q {pattern}"})
    assert time.thread_time() - began < 1


def chosen(params: dict[str, JsonValue]) -> bool:
    found = methods.get("quantize/rtn").check(params)
    assert isinstance(found, methods.Selection)
    return found.selects("model.layers.0.mlp.down_proj")


def test_what_is_slow_on_each_name_is_refused_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SLOW", 0.0)  # every match counts
    monkeypatch.setattr(patterns, "PATIENCE_IN_ALL", 1e-9)
    expression = patterns.Expression("a+b")
    expression.matches("aaab")
    with pytest.raises(BadParams, match="takes too long"):
        expression.matches("aaab")


def test_a_walk_that_would_change_nothing_is_no_success(tiny: LoadedModel, context: Context) -> None:
    rtn = methods.get("quantize/rtn")
    with pytest.raises(BadParams, match=r"no linear is left .* as in model\.layers\.0"):
        rtn.apply(tiny, rtn.check({"targets": "nothing", "group_size": 32}), context)


def order(*steps: object) -> Recipe:
    return Recipe.model_validate({"steps": list(steps)})


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (("prune/vocabulary", "distill/repair"), "the original has other tokens"),
        (("prune/vocabulary", "prune/wanda", "distill/logits"), "the original has other tokens"),
        (("prune/low_rank", "prune/width"), "two linears for one"),
        (("prune/low_rank", "quantize/gptq"), "multiples of 32, which groups of 64 do not divide. Use multiple 64"),
    ],
)
def test_orders_that_cannot_work_are_refused(steps: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        methods.check(order(*({step: {}} for step in steps)))
    methods.check(order(*({step: {}} for step in reversed(steps) if not step.startswith("quantize/"))))


def test_groups_that_divide_ranks_may_follow() -> None:
    methods.check(order({"prune/low_rank": {}}, {"quantize/gptq": {"group_size": 32}}))
    methods.check(order({"prune/low_rank": {"multiple": 64}}, {"quantize/gptq": {}}))


def test_a_broken_pattern_is_one_line() -> None:
    with pytest.raises(BadParams, match=r"quantize/rtn: targets: .*no regular expression"):
        methods.get("quantize/rtn").check({"targets": "re:(["})
