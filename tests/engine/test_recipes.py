"""Recipes as YAML: one helpful line for everything that is wrong, and a short form that reads back equal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError, UnknownName
from engine.recipes import choose_measures, dump_recipe, load_recipe
from engine.records import MEASURES, Model, Recipe, Step


def test_the_example_of_the_readme() -> None:
    recipe = load_recipe(
        "model: demo\nsteps:\n  - quantize/gptq: {bits: 4, group_size: 64}\n"
        "measure: [size, memory]\nseed: 0\ncalibration: demo\n"
    )
    assert recipe.steps == (Step(method="quantize/gptq", params={"bits": 4, "group_size": 64}),)
    assert recipe.measure == ("size", "memory")


def test_nothing_but_a_model_is_a_baseline() -> None:
    assert load_recipe("model: demo") == Recipe()
    assert load_recipe("model: demo\nsteps:") == Recipe()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "mapping"),
        ("- a", "mapping"),
        ("model: [", "YAML"),
        ("a: b: c", "line 1"),
        ("modle: demo", "Did you mean model?"),
        ("model: {sorce: demo}", "Did you mean source?"),
        ("measure: [sise]", "Did you mean size?"),
        ("steps: [quantize/gptqq]", "Did you mean quantize/gptq"),
        ("steps: [{quantize/gptq: {bitz: 4}}]", "Did you mean bits?"),
        ("steps: [{quantize/gptq: {bits: 9}}]", "bits"),
        ("steps: [{quantize/gptq: {bits: '4'}}]", "bits"),
        ("steps: [{quantize/gptq: {group_size: .nan}}]", "group_size"),
        ("steps: [{quantize/gptq: 4}]", "settings"),
        ("steps: {quantize/gptq: {}}", "list"),
        ("steps: [{quantize/gptq: {}, bits: 4}]", "one method"),
        ("steps: [{method: quantize/gptq, parms: {}}]", "Did you mean params?"),
        ("steps: [7]", "step"),
        ("steps: [{quantize/rtn: {}}, {prune/magnitude: {}}]", "Put quantization last"),
        ("seed: -1", "seed"),
        ("model: demo\nseed: 1\nmodel: other", "'model' twice"),
        ("seed: soon", "seed"),
        ("device: tpu", "device"),
        ("model: ''", "model"),
        ("seed: 2020-01-45", "YAML"),
        ("a: &a [1]\nb: [*a]", "aliases"),
        ("!!python/object/apply:os.system ['true']", "YAML"),
        ("model: " + "[" * 5000, "YAML"),
        ("#" * 200_000, "limit"),
        ("model: \0", "YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


recipes = st.builds(
    Recipe,
    model=st.builds(Model, source=st.text(min_size=1, max_size=20), dtype=st.sampled_from(["bfloat16", "float32"])),
    steps=st.lists(
        st.builds(
            Step,
            method=st.just("quantize/rtn"),
            params=st.fixed_dictionaries(
                {}, optional={"bits": st.sampled_from([2, 3, 4, 8]), "symmetric": st.booleans()}
            ),
        ),
        max_size=1,
    ).map(tuple),
    measure=st.lists(st.sampled_from(MEASURES), unique=True).map(tuple),
    seed=st.integers(0, 2**31 - 1),
    calibration=st.text(min_size=1, max_size=20),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
)


@settings(max_examples=200, deadline=None)
@given(recipes)
def test_what_is_written_reads_back_equal(recipe: Recipe) -> None:
    assert load_recipe(dump_recipe(recipe)) == recipe


def test_the_short_form_is_what_people_type() -> None:
    recipe = Recipe(steps=[{"quantize/gptq": {"bits": 4, "group_size": 64}}], measure=("size",))
    assert dump_recipe(recipe) == (
        "model: demo\nsteps:\n- quantize/gptq: {bits: 4, group_size: 64}\nmeasure: [size]\nseed: 0\ncalibration: demo\n"
    )


def test_measures_by_the_names_of_their_results() -> None:
    assert choose_measures(["memory.peak", "size", "kl", "flips"]) == ("memory", "size", "divergence")
    with pytest.raises(UnknownName, match="perplexity"):
        choose_measures(["perplxity"])
