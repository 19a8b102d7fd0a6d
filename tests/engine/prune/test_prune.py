"""Masks and scores: exact counts, a slow loop for Wanda, correlated inputs."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import JsonValue
from torch import Tensor

from engine.calibration import token_rows
from engine.errors import BadParams
from engine.methods import Context
from engine.models import LoadedModel
from engine.prune import magnitude, wanda
from engine.prune._masks import SparsityParams, keep_largest
from engine.sparsity import by_magnitude
from tests.conftest import Recorder, in_memory, tiny_config
from tests.families import MIXTURES


def scores(rows: int = 6, columns: int = 40) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.97])
def test_rows_lose_exactly_their_share(sparsity: float) -> None:
    mask = keep_largest(scores(), SparsityParams(sparsity=sparsity), "w")
    assert (~mask).sum(1).tolist() == [round(sparsity * 40)] * 6


def test_a_matrix_loses_exactly_its_share_and_only_the_smallest() -> None:
    values = scores()
    mask = by_magnitude(values, 0.3)
    assert int((~mask).sum()) == 72
    assert values[~mask].max() < values[mask].min()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_by_magnitude_is_a_sort_of_all_with_the_first_of_equal_ones_gone(
    sparsity: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows at a time; coarse numbers, so that many are equal, zeros among them."""
    monkeypatch.setattr("engine.sparsity.COUNTED", 100)
    values = (torch.randn(50, 40, generator=torch.Generator().manual_seed(2)) * 3).round().div(3).to(dtype)
    order = values.float().abs().flatten().argsort(stable=True)
    wanted = torch.ones(2000, dtype=torch.bool).index_fill_(0, order[: round(sparsity * 2000)], False)
    assert torch.equal(by_magnitude(values, sparsity), wanted.view(50, 40))


@pytest.mark.parametrize(("pattern", "zeros", "span"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_zero_exactly_n_of_m(pattern: str, zeros: int, span: int) -> None:
    values = scores()
    params = SparsityParams.model_validate({"pattern": pattern})
    mask = keep_largest(values, params, "w")
    assert bool(((~mask).view(-1, span).sum(1) == zeros).all())
    assert torch.equal(by_magnitude(-values, 0.5, params.pattern), mask)
    for kept, score in zip(mask.view(-1, span), values.view(-1, span), strict=True):
        assert score[~kept].max() < score[kept].min()


def test_ties_still_give_exact_counts() -> None:
    mask = keep_largest(torch.ones(3, 8), SparsityParams(pattern="2:4"), "w")
    assert bool(((~mask).view(-1, 4).sum(1) == 2).all())


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadParams, match="the 10 inputs of up_proj"):
        keep_largest(scores(4, 10), SparsityParams(pattern="2:4"), "up_proj")


def test_wanda_equals_a_loop_over_single_weights() -> None:
    dice = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 12, generator=dice) @ torch.randn(12, 12, generator=dice)
    weight = torch.randn(5, 12, generator=dice)
    expected = torch.ones(5, 12, dtype=torch.bool)
    for n in range(5):
        importance = [abs(float(weight[n, k])) * sum(float(x) ** 2 for x in inputs[:, k]) ** 0.5 for k in range(12)]
        for k in sorted(range(12), key=importance.__getitem__)[:6]:
            expected[n, k] = False
    found = keep_largest(wanda.score(weight, inputs.norm(dim=0)), SparsityParams(), "w")
    torch.testing.assert_close(found, expected)


def test_wanda_differs_from_magnitude_where_inputs_differ() -> None:
    weight, norm = torch.tensor([[1.0, 0.9]]), torch.tensor([0.1, 1.0])
    assert keep_largest(wanda.score(weight, norm), SparsityParams(), "w").tolist() == [[False, True]]
    assert keep_largest(weight.abs(), SparsityParams(), "w").tolist() == [[True, False]]


def test_methods_prune_every_linear_of_the_model(tiny: LoadedModel, context: Context) -> None:
    wanda.apply(tiny, wanda.Params(samples=4, sequence_length=16, sparsity=0.25), context)
    assert len(tiny.pruned) == 3 * 7
    for name in tiny.pruned:
        zeros = (tiny.network.get_submodule(name).weight == 0).sum(1)
        assert bool((zeros == zeros.new_tensor(round(0.25 * tiny.network.get_submodule(name).weight.shape[1]))).all())


def test_norms_of_the_original_are_those_of_a_plain_forward_pass_and_another_ratio_makes_none(
    context: Context, recorder: Recorder
) -> None:
    def passes(model: LoadedModel) -> list[str]:
        seen: list[str] = []
        for name, module in model.network.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
        return seen

    plain = in_memory(tiny_config(num_hidden_layers=2), torch.float32)
    rows = token_rows(plain.tokenizer, context.calibration, 16, 4)
    inputs: dict[str, Tensor] = {}
    for name, module in plain.network.named_modules():
        if "proj" in name:
            module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
            )
    plain.network(rows)
    for number, given in enumerate(({"sparsity": 0.5}, {"sparsity": 0.25}, {"pattern": "2:4", "targets": "*.mlp.*"})):
        params = wanda.Params.model_validate({"inputs": "original", "samples": 4, "sequence_length": 16, **given})
        model = in_memory(tiny_config(num_hidden_layers=2), torch.float32)
        seen = passes(model)
        wanda.apply(model, params, replace(context, folder=context.folder / str(number)))
        assert bool(seen) is (number == 0), given
        for name in model.pruned:
            old = plain.network.get_submodule(name).weight
            wanted = keep_largest(wanda.score(old, inputs[name].norm(dim=0)), params, name)
            assert float(((model.network.get_submodule(name).weight != 0) == wanted).float().mean()) > 0.999, name
    assert recorder.logs().count("norms of inputs: measured before, now reused") == 2
    other = in_memory(tiny_config(num_hidden_layers=2), torch.float32, seed=1)
    seen = passes(other)
    wanda.apply(other, params, replace(context, folder=context.folder / "other"))
    assert seen


def test_norms_of_experts_that_computed_every_token_are_kept_apart(context: Context) -> None:
    def norms(**given: JsonValue) -> list[list[float] | None]:
        params = wanda.Params.model_validate({"samples": 4, "sequence_length": 16, **given})
        found = wanda.original_norms(in_memory(MIXTURES["mixtral"]), params, context)
        return [found[f"model.layers.1.mlp.experts.{number}.w1"] for number in range(4)]

    first, *others = norms(experts="all")
    assert first is not None
    assert others == [first] * 3
    assert norms()[0] not in (first, norms()[1])


def test_magnitude_keeps_the_large_weights_unchanged(tiny: LoadedModel, context: Context) -> None:
    before = {name: module.weight.clone() for name, module in tiny.network.named_modules() if "proj" in name}
    magnitude.apply(tiny, magnitude.Params(sparsity=0.5), context)
    for name, old in before.items():
        new = tiny.network.get_submodule(name).weight
        kept = new != 0
        torch.testing.assert_close(new[kept], old[kept], rtol=0, atol=0)
        assert old[~kept].abs().max() <= old[kept].abs().min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_one_threshold_over_all_linears_is_exact(
    dtype: torch.dtype, sparsity: float, context: Context, recorder: Recorder
) -> None:
    model = in_memory(tiny_config(num_hidden_layers=2), dtype)
    before = {n: m.weight.clone() for n, m in model.network.named_modules() if "proj" in n}
    for number, weight in enumerate(before.values()):
        model.network.get_submodule(list(before)[number]).weight.data.mul_(1 + number % 3)
        weight.mul_(1 + number % 3)
    magnitude.apply(model, magnitude.Params(sparsity=sparsity, scope="global"), context)
    after = {name: model.network.get_submodule(name).weight for name in before}
    flat, now = (torch.cat([w.flatten() for w in some.values()]) for some in (before, after))
    assert int((now == 0).sum()) == round(sparsity * flat.numel())
    kept = now != 0
    assert sparsity == 0 or flat[~kept].abs().max() <= flat[kept].abs().min()
    torch.testing.assert_close(now[kept], flat[kept], rtol=0, atol=0)
    shares = {round(float((w == 0).float().mean()), 2) for w in after.values()}
    assert sparsity == 0 or len(shares) > 2


def test_ties_at_the_threshold_go_in_order(context: Context) -> None:
    model = in_memory(tiny_config(num_hidden_layers=2))
    names = [n for n, m in model.network.named_modules() if "proj" in n]
    for name in names:
        model.network.get_submodule(name).weight.data.fill_(0.5)
    magnitude.apply(model, magnitude.Params(sparsity=0.5, scope="global"), context)
    zeros = [float((model.network.get_submodule(name).weight == 0).float().mean()) for name in names]
    assert zeros[:7] == [1.0] * 7
    assert zeros[7:] == [0.0] * 7


@pytest.mark.parametrize(("params", "ranked"), [(wanda.Params, 256), (magnitude.Params, 128 * 256)])
def test_zeros_that_would_be_all_weights_are_refused_before_work(params: type[SparsityParams], ranked: int) -> None:
    linears = {"up": (128, 256)}
    with pytest.raises(BadParams, match=rf"leaves none of {ranked:,} weights of up .* Keep one at least: 0\.99\d* or"):
        params(sparsity=0.99999).check_model(linears, 1)
    most = math.floor(1e4 * (1 - 1 / ranked)) / 1e4
    params(sparsity=most).check_model(linears, 1)
    params(sparsity=0.99999, pattern="2:4").check_model(linears, 1)  # which is half
