"""Preflight: bad models, settings and texts are refused in one line, before any work."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import hardware, methods, models, places, preflight, sizes, sources
from engine.errors import BadModel, BadParams, InputError, TooBig
from engine.kv_cache import read_on
from engine.records import Recipe
from tests.conftest import in_memory, saved
from tests.families import FAMILIES, MIXTURES

Maker = Callable[..., Path]


def recipe(folder: Path | str, *steps: object, **more: object) -> Recipe:
    return Recipe.model_validate({"model": str(folder), "steps": list(steps), **more})


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refuse(wanted: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        preflight.check(wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("source", [" ", "a\0b", "../../etc", "/", "no/such/folder", "x" * 4000, "<b>bold</b>"])
def test_sources_that_are_no_model_folder(source: str) -> None:
    refuse(recipe(source))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "nonsense"}, "unknown"),
        ({"model_type": None}, "unknown"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "not a causal language model"),
        ({"model_type": "bert"}, "a bert model is not a causal language model"),
        ({"model_type": "gemma3"}, "is a gemma3 model, which wraps a language model together with other media"),
        ({"model_type": "openai-gpt"}, "keeps no keys and values of openai-gpt models"),
        ({"model_type": "llama4"}, "text-only checkpoint"),
        ({"vision_config": {"hidden_size": 8}}, "is a llama model, which wraps"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 7, "head_dim": None}, ""),
    ],
)
def test_absurd_configs(tiny_folder: Maker, change: dict[str, object], words: str) -> None:
    folder = tiny_folder()
    if change.pop("head_dim", 1) is None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("head_dim", None)
        (folder / "config.json").write_text(json.dumps(config))
        words = "do not divide"
    edit(folder, **change)
    assert words in refuse(recipe(folder))


def test_a_truncated_file(tiny_folder: Maker) -> None:
    folder = tiny_folder()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refuse(recipe(folder))
    file.write_bytes(b"\xff" * 100)
    assert "truncated or not" in refuse(recipe(folder))


def test_pickled_weights_only(tiny_folder: Maker) -> None:
    folder = tiny_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "can run code" in refuse(recipe(folder))


def test_an_index_that_points_outside(tiny_folder: Maker) -> None:
    folder = tiny_folder()
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a file of this folder" in refuse(recipe(folder))


def test_an_adapter_without_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in refuse(recipe(tmp_path))


def test_an_already_quantized_model(tiny_folder: Maker) -> None:
    folder = tiny_folder()
    edit(folder, quantization_config={"quant_method": "gptq"})
    assert "already quantized" in refuse(recipe(folder, "quantize/rtn"))


@pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
def test_damaged_weights_are_refused_when_loading(tiny_folder: Maker, damage: str) -> None:
    folder = tiny_folder()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "nan":
        tensors[name][0, 0] = float("nan")
    elif damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(7, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel):
        models.load(folder)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"quantize/gptq": {"bits": 0}}, "bits"),
        ({"quantize/gptq": {"bits": 3.5}}, "bits"),
        ({"quantize/gptq": {"bits": "4"}}, "bits"),
        ({"quantize/gptq": {"bits": float("nan")}}, "bits"),
        ({"quantize/gptq": {"group_size": 0}}, "group_size"),
        ({"quantize/gptq": {"group_size": 48}}, "does not divide the 128 inputs of model.layers.0.mlp.down_proj"),
        ({"quantize/gptq": {"targets": "*.nothing"}}, "no linear is left by targets '*.nothing'"),
        ({"quantize/gptq": {"targets": "*.q_proj *.donw_proj", "group_size": 32}}, "'*.donw_proj' of targets fits no"),
        ({"quantize/gptq": {"overrides": "*.donw_proj=8", "group_size": 32}}, "'*.donw_proj' of overrides fits no"),
        ({"quantize/gptq": {"overrides": "*.k_proj=8", "ignore": "*.k_proj", "group_size": 32}}, "of overrides fits"),
        ({"quantize/gptq": {"overrides": "lm_head=8", "group_size": 32}}, "'lm_head' of overrides fits no"),
        ({"quantize/gptq": {"group_size": 48}}, "Sizes that do: 8, 16, 32, 64, 128"),
        ({"quantize/gptq": {"bitz": 4}}, "Did you mean bits"),
        ({"quantize/kv_cache": {"bits": 3}}, "bits"),
        ({"quantize/kv_cache": {"group_size": 32}}, "does not divide the 16 channels of a head. Sizes that do: 8, 16"),
        ({"quantize/kv_cache": {"window": -1}}, "window"),
        ({"quantize/gtpq": {}}, "Did you mean quantize/gptq"),
        ({"prune/wanda": {"sparsity": 1.0}}, "sparsity"),
        ({"prune/wanda": {"sparsity": -0.1}}, "sparsity"),
        ({"prune/wanda": {"sparsity": float("nan")}}, "sparsity"),
        ({"prune/wanda": {"pattern": "3:4"}}, "pattern"),
        ({"distill/logits": {"temperature": 0}}, "temperature"),
    ],
)
def test_bad_settings_are_refused_by_name(tiny_folder: Maker, step: dict[str, object], words: str) -> None:
    assert words in refuse(Recipe.model_construct(**{**recipe(tiny_folder()).__dict__, "steps": _steps(step)}))


def _steps(step: dict[str, object]) -> tuple[object, ...]:
    from engine.records import Step

    ((method, params),) = step.items()
    return (Step.model_construct(method=method, params=params),)


@pytest.mark.parametrize("method", ["quantize/gptq", "prune/wanda", "distill/logits", "distill/on_policy"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sequences_are_no_longer_than_the_model_reads(tmp_path: Path, family: str, method: str) -> None:
    saved(FAMILIES[family], tmp_path)
    said = refuse(recipe(tmp_path, {method: {"sequence_length": 257}}))
    assert said == f"{method}: sequence_length 257 is more than the 256 tokens that the model reads. Use 256 or less."


def test_a_model_that_reads_too_little_is_not_asked_to_write(tiny_folder: Maker) -> None:
    folder = tiny_folder(max_position_embeddings=64)
    assert "measuring takes up to 128" in refuse(recipe(folder, measure=["size", "latency"]))
    preflight.check(recipe(folder, measure=["size"]))


def test_a_pattern_that_does_not_divide_the_width(tiny_folder: Maker) -> None:
    folder = tiny_folder(intermediate_size=130)
    assert "does not divide the 130 inputs" in refuse(recipe(folder, {"prune/wanda": {"pattern": "2:4"}}))


def test_nothing_may_follow_quantization(tiny_folder: Maker) -> None:
    assert "Put quantization last" in refuse(recipe(tiny_folder(), "quantize/rtn", "prune/magnitude"))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"prune/low_rank": {"multiple": 64}}, "hold no linears of two"),
        *(
            ({f"prune/{name}": {"storage": "bitmask"}}, "no bitmasks")
            for name in ("wanda", "gradual", "l1", "sparsegpt")
        ),
    ],
)
def test_formats_of_our_own_are_none_of_a_librarys(tiny_folder: Maker, step: dict[str, object], words: str) -> None:
    assert words in refuse(recipe(tiny_folder(), step, "quantize/bitsandbytes"))


def test_a_teacher_counts_once(tiny_folder: Maker) -> None:
    other = tiny_folder()
    for teachers in ("demo", f"'{other}' '{other}'"):
        step = {"distill/logits": {"teachers": teachers}}
        assert "teaches already: the original does" in refuse(recipe("demo", step))


def test_the_kv_cache_comes_last_once(tiny_folder: Maker) -> None:
    step, folder = {"quantize/kv_cache": {"group_size": 16}}, tiny_folder()
    preflight.check(recipe(folder, {"quantize/rtn": {"group_size": 32}}, step))
    for others in ((step, "quantize/rtn"), (step, step)):
        assert "Put quantize/kv_cache last, once" in refuse(recipe(folder, *others))


@pytest.mark.parametrize(
    "change", [{"model_type": "mamba2"}, {"layer_types": ["full_attention", "linear_attention", "full_attention"]}]
)
def test_families_without_keys_and_values_are_refused_by_name(tiny_folder: Maker, change: dict[str, object]) -> None:
    folder = tiny_folder()
    edit(folder, **change)
    said = refuse(recipe(folder, {"quantize/kv_cache": {"group_size": 16}}))
    assert "keys and values cannot be quantized" in said
    assert str(change.get("model_type", "layers of linear_attention")) in said


@pytest.mark.parametrize(
    "entry", [{"bits": 4}, {"bits": 3, "group_size": 16, "window": 0}, {"bits": 4, "group_size": "16", "window": 0}, 4]
)
def test_a_kv_cache_that_nobody_wrote_is_refused(tiny_folder: Maker, entry: object) -> None:
    folder = tiny_folder()
    edit(folder, maquette_kv_cache=entry)
    assert "no such KV cache is known" in refuse(recipe(folder))
    with pytest.raises(BadModel, match="no such KV cache"):
        models.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_of_attention_are_those_of_the_family(family: str) -> None:
    network = in_memory(FAMILIES[family]).network
    with torch.no_grad():
        _, cache = read_on(network, torch.arange(5)[None], None)
    _, heads, _, size = cache.layers[0].values.shape
    config = json.loads(network.config.to_json_string())
    assert sizes.attention_sizes(config) == (len(cache.layers), heads, size)


def test_calibration_that_is_not_there(tiny_folder: Maker) -> None:
    assert "calibration file" in refuse(recipe(tiny_folder(), "quantize/gptq", calibration="nowhere.txt"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"Two words", "one sequence needs 128. Give a longer text or a smaller sequence_length"),
        ("a.txt", b"\x7fELF\0\1" * 100_000, "binary file"),
        ("a.txt", b"\xff\xfe\xfa" * 500, "not UTF-8"),
        ("a.jsonl", b'{"body": "no text"}\n', 'line 1: a JSON object with a "text"'),
    ],
)
def test_a_text_that_cannot_calibrate(
    tiny_folder: Maker, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    text = tmp_path / name
    text.write_bytes(content)
    wanted = {"quantize/gptq": {"group_size": 32}}
    assert words in refuse(recipe(tiny_folder(), wanted, calibration=str(text)))
    # What reads no text is not held up by one.
    preflight.check(recipe(tiny_folder(), {"quantize/rtn": {"group_size": 32}}, calibration=str(text)))


@pytest.mark.parametrize(
    ("steps", "measure"),
    [
        ([{"quantize/bitsandbytes": {"scheme": "int8"}}], []),
        ([{"prune/wanda": {}}], []),
        ([{"prune/vocabulary": {}}], []),
        ([], ["sensitivity"]),
        ([{"prune/magnitude": {}}], ["sensitivity"]),
    ],
)
def test_whatever_reads_the_calibration_text_has_it_looked_through(
    tiny_folder: Maker, tmp_path: Path, steps: list[object], measure: list[str]
) -> None:
    text, folder = tmp_path / "a.txt", tiny_folder()
    text.write_bytes(b"The lamp is in the barn.\n" * 8000)
    preflight.check(recipe(folder, *steps, measure=measure, calibration=str(text)))
    text.write_bytes(b"The lamp is in the barn.\n" * 8000 + b"\0")
    assert "NUL in line 8001" in refuse(recipe(folder, *steps, measure=measure, calibration=str(text)))


@pytest.mark.parametrize(
    ("steps", "measure"),
    [
        ([{"quantize/bitsandbytes": {"scheme": "nf4"}}], []),
        ([{"quantize/bitsandbytes": {"scheme": "fp4", "sequence_length": 300}}], []),  # the model reads 256 tokens
        ([{"quantize/hqq": {"group_size": 32}}], ["sensitivity"]),  # which packed weights are not asked for
        ([{"prune/magnitude": {}}], ["size"]),
    ],
)
def test_what_reads_no_calibration_text_is_not_held_up_by_one(
    tiny_folder: Maker, tmp_path: Path, steps: list[object], measure: list[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\0")
    preflight.check(recipe(tiny_folder(), *steps, measure=measure, calibration=str(tmp_path / "a.txt")))


def test_a_run_keeps_whole_paths_however_its_files_were_named(
    tiny_folder: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tiny_folder(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("One sentence. " * 200)
    monkeypatch.chdir(tmp_path)
    named = f"./{folder.relative_to(tmp_path)}"
    asked = recipe(named, {"distill/logits": {"text": "text.txt"}}, {"quantize/gptq": {}}, calibration="text.txt")
    told = places.settle(asked)
    assert (told.model.source, told.calibration) == (str(folder), str(text))
    assert told.steps[0].params == {"text": str(text)}
    assert told.steps[1].params == {}
    monkeypatch.setattr(sources, "_base", [])
    sources.stay_in(tmp_path)  # as the page's server, which goes elsewhere itself
    monkeypatch.chdir(elsewhere)
    assert places.settle(asked) == told
    for absent in ("~nobody-has-this-name/x", "not there.txt", "a" * 300):
        assert places.settle(recipe("demo", calibration=absent)).calibration == absent


def test_a_short_text_is_enough_for_short_sequences(tiny_folder: Maker, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the lamp is in the barn and the cat is on the roof")
    step = {"quantize/gptq": {"group_size": 32, "sequence_length": 8}}
    preflight.check(recipe(tiny_folder(), step, calibration=str(tmp_path / "a.txt")))


def test_tokens_that_a_tokenizer_would_cut_off_are_counted(tiny_folder: Maker, tmp_path: Path) -> None:
    folder = tiny_folder()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": cut}))
    (tmp_path / "a.txt").write_text("the lamp is in the barn and the cat is on the roof " * 40)  # one line
    preflight.check_text(tmp_path / "a.txt", folder, 128)


def test_a_model_that_does_not_fit(tiny_folder: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder()
    monkeypatch.setattr(preflight.hardware, "free_memory", lambda: 1 << 20)
    with pytest.raises(
        TooBig, match=r"needs 0\.[89] GiB, 0\.0 are free. Close other programs|measuring `size` alone needs"
    ):
        preflight.check(recipe(folder))


def test_a_good_recipe_passes_and_is_estimated(tiny_folder: Maker) -> None:
    found = preflight.check(recipe(tiny_folder(), {"quantize/gptq": {"group_size": 32}}))
    assert found.fits
    assert found.total == max(sum(need.parts.values()) for need in found.needs)
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("student", "refused"),
    [
        ({"keep_every": 3}, "a model of one block can lose none"),
        ({"keep_every": 1}, ""),
        ({"student": "size", "hidden_size": 32, "num_blocks": 1}, "a model of one block can lose none"),
        ({"student": "size", "hidden_size": 32, "num_blocks": 2}, ""),
    ],
)
def test_a_step_is_checked_on_the_student_that_the_step_before_leaves(
    student: dict[str, object], refused: str, tiny_folder: Maker
) -> None:
    chain = recipe(tiny_folder(), {"distill/logits": student}, {"prune/depth": {"count": 1}})
    if refused:
        assert refused in refuse(chain)
    else:
        preflight.check(chain)


@pytest.mark.parametrize(
    ("later", "words"),
    [({"quantize/gptq": {"group_size": 128}}, "does not divide the 32 inputs"), ({"quantize/bitsandbytes": {}}, "64")],
)
def test_a_new_students_shapes_are_known_before_it_is_trained(
    later: dict[str, object], words: str, tiny_folder: Maker
) -> None:
    student = {"student": "size", "hidden_size": 32, "num_blocks": 1}
    assert words in refuse(recipe(tiny_folder(), {"distill/logits": student}, later))


@pytest.mark.parametrize("shorter", [{"distill/logits": {"keep_every": 3}}, {"prune/depth": {"count": 2}}], ids=str)
@pytest.mark.parametrize("kind", ["gemma3", "qwen3", "smollm3"])
def test_what_configs_say_of_each_block_goes_with_the_blocks(
    tmp_path: Path, kind: str, shorter: dict[str, object]
) -> None:
    saved(FAMILIES[kind], tmp_path)
    preflight.check(recipe(tmp_path, shorter, {"prune/width": {"neurons": 0.25, "multiple": 32}}))


def test_a_group_that_fits_the_original_alone_is_refused_behind_width_pruning(tiny_folder: Maker) -> None:
    narrower = {"prune/width": {"neurons": 0.25, "multiple": 32}}  # 96 of 128
    words = refuse(recipe(tiny_folder(), narrower, {"quantize/gptq": {"group_size": 64}}))
    assert "does not divide the 96 inputs of model.layers.0.mlp.down_proj" in words


@pytest.mark.parametrize(
    ("step", "gpu", "words"),
    [
        ({"prune/wanda": {}}, False, "Wanda: No smaller and no faster here: the zeros stay dense."),
        ({"prune/magnitude": {"storage": "bitmask"}}, False, "The file becomes smaller; memory and speed do not."),
        ({"prune/sparsegpt": {"pattern": "2:4"}}, False, "No smaller and no faster here"),
        ({"prune/sparsegpt": {"pattern": "2:4"}}, True, "no smaller; where CUDA's 2:4 kernel takes a linear"),
        ({"quantize/gptq": {"sparsity": 0.5, "group_size": 32}}, False, "zeros take as many bits"),
        ({"prune/low_rank": {"multiple": 8}}, False, ""),
        ({"prune/low_rank": {"multiple": 8, "experts": "all"}}, False, "Low rank: The model has no experts"),
    ],
)
def test_what_zeros_bring_is_said_before_the_run(
    step: dict[str, object], gpu: bool, words: str, tiny_folder: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hardware.Gpu("A GPU", 0, 1 << 40) if gpu else None
    monkeypatch.setattr(hardware, "gpu", lambda: found)
    notes = preflight.estimate(recipe(tiny_folder(), step)).notes
    assert words in " ".join(notes)
    assert bool(words) == bool(notes)


@pytest.mark.parametrize(
    ("family", "step", "words"),
    [
        ("gpt2", {"quantize/rtn": {"group_size": 32}}, "`export --format dense` writes a folder that it loads"),
        ("falcon", {"quantize/mixed": {"unit": "mib", "budget": 0.4}}, "Packed linears of falcon are in a format of"),
        ("gpt2", {"quantize/smoothquant": {}}, "No export holds rounded inputs"),
        ("gpt2", {"quantize/bitsandbytes": {}}, ""),
        ("gpt2", {"quantize/kv_cache": {"group_size": 16}}, ""),
        ("llama", {"quantize/rtn": {"group_size": 32}}, ""),
    ],
    ids=str,
)
def test_that_only_maquette_reads_what_is_packed_is_said_before_the_run(
    family: str, step: dict[str, object], words: str, tmp_path: Path
) -> None:
    notes = preflight.check(recipe(saved(FAMILIES[family], tmp_path / family), step)).notes
    own = [note for note in notes if "format of Maquette's own" in note]
    assert words in "".join(own)
    assert bool(words) == bool(own)


def test_the_head_may_have_bits_of_its_own(tiny_folder: Maker) -> None:
    folder = tiny_folder(tie_word_embeddings=False)
    four, eight = (
        preflight.check(recipe(folder, {"quantize/gptq": {"head": True, "group_size": 32, "overrides": each}}))
        for each in ("", "lm_head=8")
    )
    assert eight.serving.parts["weights"] - four.serving.parts["weights"] == 1280 * 64 // 2


def test_that_there_is_nothing_to_heal_is_said_before_the_run(tiny_folder: Maker) -> None:
    folder, other = tiny_folder(), tiny_folder(num_hidden_layers=1)
    begins, is_it = "begins as the teacher itself", "The student is the teacher itself"
    for name, given, words in (
        ("distill/repair", {}, begins), ("distill/logits", {"student": "current"}, begins),
        ("distill/logits", {"keep_every": 1}, begins), ("distill/features", {"keep_every": 1}, begins),
        ("distill/sequence", {"student": "folder", "folder": str(folder)}, is_it),
    ):  # fmt: skip
        pruned, taught = {"prune/depth": {"count": 1}}, {name: {**given, "teachers": str(other)}}
        for steps, said in (([{name: given}], True), ([pruned, {name: given}], False), ([taught], False)):
            notes = preflight.estimate(recipe(folder, *steps)).notes
            assert any(words in note for note in notes) == said, (steps, notes)


def test_that_others_round_inputs_otherwise_is_said_before_the_run(tmp_path: Path) -> None:
    for family in ("opt", "llama"):
        folder = saved(FAMILIES[family], tmp_path / family)
        notes = preflight.check(recipe(folder, {"quantize/smoothquant": {"samples": 4}})).notes
        assert any("rounds the inputs of OPT's MLP number by number" in note for note in notes) == (family == "opt")


def test_that_another_model_learns_from_the_demos_text_is_said_before_the_run(
    tiny_folder: Maker, tmp_path: Path
) -> None:
    folder, own = tiny_folder(), tmp_path / "own.txt"
    own.write_text("Somebody else's words. " * 500)
    words = (
        "It reads the demo's text alone, which tells of a small made-up world. Give a text of your own; a shared "
        "server takes none: run Maquette on your own machine."
    )
    heal = {"distill/logits": {"student": "current"}}
    for source, step, said in (
        (folder, heal, f"Logit distillation: {words}"),
        (folder, {"prune/gradual": {}}, f"Gradual magnitude pruning: {words}"),
        (folder, {"prune/vocabulary": {}}, f"Vocabulary pruning: {words}"),
        (folder, {"distill/logits": {"student": "current", "text": str(own)}}, ""),
        (folder, {"quantize/gptq": {"group_size": 32}}, ""),
        ("demo", heal, ""),
    ):
        notes = preflight.estimate(recipe(source, step)).notes
        assert said in notes if said else not any(words in note for note in notes), (step, notes)


def test_what_is_ignored_for_nothing_is_said_before_the_run(tiny_folder: Maker) -> None:
    ignore = "*.q_proj *.donw_proj"
    found = preflight.check(recipe(tiny_folder(), {"quantize/gptq": {"group_size": 32, "ignore": ignore}}))
    assert found.notes == ("GPTQ: `*.donw_proj` of ignore fits no linear of the blocks, so it leaves none alone.",)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda"])
@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_no_method_takes_an_impossible_sparsity(method: str, sparsity: float) -> None:
    with pytest.raises(BadParams, match="sparsity"):
        methods.get(f"prune/{method}").check({"sparsity": sparsity})


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"prune/sparsegpt": {"pattern": "2:4"}}, "does not divide the 130 inputs"),
        ({"quantize/gptq": {"pattern": "2:4", "granularity": "channel"}}, "does not divide the 130 inputs"),
        ({"prune/magnitude": {"scope": "global", "pattern": "4:8"}}, "does not divide the 130 inputs"),
        ({"prune/magnitude": {"storage": "zip"}}, "storage"),
        ({"prune/low_rank": {"ratio": 1.0}}, "ratio"),
        ({"prune/low_rank": {"ratio": 0.05}}, "Use a ratio from"),
        ({"prune/low_rank": {"multiple": 512}}, "Use a smaller multiple"),
    ],
)
def test_pruning_that_cannot_work_is_refused(step: dict[str, object], words: str, tiny_folder: Maker) -> None:
    assert words in refuse(recipe(tiny_folder(intermediate_size=130), step))


@pytest.mark.parametrize(("tied", "name"), [(False, "lm_head"), (True, "model.embed_tokens")])
def test_the_head_is_checked_before_any_work(tiny_folder: Maker, tied: bool, name: str) -> None:
    folder = tiny_folder(tie_word_embeddings=tied)  # its inputs are 64, those of down_proj 128
    step = {"targets": "*.down_proj", "group_size": 128, "head": True, "embeddings": tied}
    said = refuse(recipe(folder, {"quantize/rtn": step}))
    assert f"group_size 128 does not divide the 64 inputs of {name}. Sizes that do: 8, 16, 32, 64" in said
    preflight.check(recipe(folder, {"quantize/rtn": step | {"head": False, "embeddings": False}}))


def test_routers_are_no_linears(tmp_path: Path) -> None:
    folder = saved(MIXTURES["mixtral"], tmp_path / "mixtral")
    wanted = {"quantize/bitsandbytes": {"scheme": "nf4", "ignore": "*.experts.*"}}
    preflight.check(recipe(folder, wanted))  # the router has 4 outputs, which the library could not take


def test_whoever_may_say_so_trusts_no_code_of_a_repo() -> None:
    said = []
    for file in Path(models.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                said.append(ast.unparse(node.value))
    assert len(said) >= 4  # configs, networks, tokenizers
    assert set(said) == {"False"}
