"""Losses against their definitions in double, gradients against finite differences, pieces against the whole."""

import math

import pytest
import torch
from torch import Tensor

from engine.forward_kl import ForwardKl
from engine.losses import Divergence, Full, Objective, Target, TopK, averaged, chunked, coarse, top_k
from tests.engine.conftest import needs_kernels

V, N, H = 11, 7, 5
KINDS: tuple[Divergence, ...] = ("forward", "reverse", "js")


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated logits of a student and a teacher (N, V) in double, and labels."""
    dice = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, V, generator=dice, dtype=torch.float64) * 2
    student = shared + torch.randn(N, V, generator=dice, dtype=torch.float64)
    return student, shared, torch.randint(V, (N,), generator=dice)


def probabilities(logits: list[float], temperature: float) -> list[float]:
    total = sum(math.exp(v / temperature) for v in logits)
    return [math.exp(v / temperature) / total for v in logits]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def divergence(kind: str, p: list[float], q: list[float], beta: float) -> float:
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def merged(p: list[float], ids: list[int]) -> list[float]:
    return [p[i] for i in ids] + [sum(v for i, v in enumerate(p) if i not in ids)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (1.0, 0.3), (2.5, 0.25), (0.5, 0.0), (2.0, 1.0)])
def test_each_loss_is_its_definition(kind: Divergence, temperature: float, weight: float) -> None:
    student, teacher, labels = made()
    objective = Objective(kind, temperature, weight, beta=0.3)
    full, short = 0.0, 0.0
    kept = top_k(teacher.log_softmax(-1), 4, temperature)
    for row in range(N):
        y, z = student[row].tolist(), teacher[row].tolist()
        label = -weight * math.log(probabilities(y, 1)[int(labels[row])])
        p, q = probabilities(z, temperature), probabilities(y, temperature)
        full += (1 - weight) * temperature**2 * divergence(kind, p, q, 0.3) + label
        ids = sorted(range(V), key=lambda i: -z[i])[:4]
        p, q = (merged(probabilities(v, temperature), ids) for v in (z, y))
        short += (1 - weight) * temperature**2 * divergence(kind, p, q, 0.3) + label
    assert float(objective(student, labels, Full(teacher.log_softmax(-1)))) == pytest.approx(full, rel=1e-12)
    assert float(objective(student, labels, kept)) == pytest.approx(short, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_those_of_finite_differences(kind: Divergence, temperature: float) -> None:
    student, teacher, labels = (each[:2] for each in made(1))
    student = student.clone()
    student.requires_grad_(True)
    objective = Objective(kind, temperature, 0.4, beta=0.7)
    logp = teacher.log_softmax(-1)
    for target in (Full(logp), top_k(logp, 3, temperature)):
        assert torch.autograd.gradcheck(
            lambda y, target=target: objective(y, labels, target), (student,), fast_mode=True
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_all_classes_but_one_are_the_whole_and_fewer_are_less(kind: Divergence, temperature: float) -> None:
    student, teacher, labels = made(2)
    logp = teacher.log_softmax(-1)
    objective = Objective(kind, temperature)
    whole = float(objective(student, labels, Full(logp)))
    distances = [float(objective(student, labels, top_k(logp, k, temperature))) for k in range(1, V)]
    assert distances[-1] == pytest.approx(whole, rel=1e-12)
    assert distances == sorted(distances)
    assert float(objective(teacher, labels, top_k(logp, 3, temperature))) == pytest.approx(0.0, abs=1e-12)


def test_the_tail_by_hand() -> None:
    kept = top_k(torch.tensor([[0.7, 0.2, 0.06, 0.04]]).log(), 2)
    torch.testing.assert_close(torch.cat([kept.logp, kept.tail[:, None]], -1).exp(), torch.tensor([[0.7, 0.2, 0.1]]))
    torch.testing.assert_close(
        coarse(torch.tensor([[0.7, 0.2, 0.06, 0.04]]).log(), kept.ids).exp(), torch.tensor([[0.7, 0.2, 0.1]])
    )


@pytest.mark.parametrize(
    ("objective", "closer"),
    [
        (Objective(), True), (Objective(label_weight=0.5), True), (Objective(temperature=4.0), True),
        (Objective("js"), True), (Objective("js", label_weight=0.1), False), (Objective(label_weight=0.6), False),
        (Objective(temperature=4.0, label_weight=0.5), False), (Objective("reverse"), False),
    ],
)  # fmt: skip
def test_whether_the_kl_must_fall(objective: Objective, closer: bool) -> None:
    """At the best that can be learned of a token that the text has and the teacher finds unlikely."""
    assert objective.closer == closer
    teacher = torch.full((1, 50), 0.98 / 49, dtype=torch.float64).index_fill(1, torch.tensor(0), 0.02).log()
    student = teacher.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([student], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = objective(student, torch.tensor([0]), Full(teacher))
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    if closer:
        assert float(Objective()(student.detach(), None, Full(teacher))) < 0.75


def test_jensen_shannon_is_symmetric_at_a_half_and_bounded() -> None:
    student, teacher, _ = made(3)
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    half = Objective("js", beta=0.5)
    torch.testing.assert_close(half.distance(ours, theirs), half.distance(theirs, ours))
    far = torch.full((1, V), -1e4).index_fill(1, torch.tensor(0), 0.0)
    other = torch.full((1, V), -1e4).index_fill(1, torch.tensor(1), 0.0)
    assert float(half.distance(far, other)) == pytest.approx(math.log(2), rel=1e-5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (1.0, 0.3), (2.5, 0.0), (2.0, 0.25)])
@pytest.mark.parametrize("named", [None, 4])
def test_our_kernel_computes_forward_kl(
    named: int | None, temperature: float, weight: float, dtype: torch.dtype, kind: str
) -> None:
    """Against the same in double, whose gradients are those of finite differences; logits are more by padding."""
    dice = torch.Generator().manual_seed(5)
    teacher = torch.randn(9, 77, generator=dice) * 3
    student = (torch.cat([teacher, torch.zeros(9, 6)], 1) + torch.randn(9, 83, generator=dice) * 2).to(dtype)
    student[0] *= 40  # all but sure
    labels = torch.randint(77, (9,), generator=dice)
    logp = teacher.log_softmax(-1)
    target = Full(logp) if named is None else top_k(logp, named, temperature)
    objective = Objective("forward", temperature, weight)
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    with torch.enable_grad():
        found, wanted = objective(ours, labels, target), objective(exact, labels, target)
    found.backward()
    wanted.backward()
    assert found.dtype == torch.float32
    assert ours.grad is not None
    assert exact.grad is not None
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    limit = 2e-6 if dtype == torch.float32 else 0.004
    assert float((ours.grad - exact.grad).norm()) <= limit * float(exact.grad.norm())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_kernel_tells_tokens_apart_that_a_sure_student_excludes(dtype: torch.dtype, kind: str) -> None:
    """All that the teacher does not name together has less than a float's digits beside what it does name."""
    student = torch.tensor([[300.0, 200.0, 3.0, 2.0, 1.0]], dtype=dtype, requires_grad=True)
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log())
    with torch.enable_grad():
        found = Objective()(student, None, target)
    found.backward()
    rest = torch.tensor([3.0, 2.0, 1.0]).softmax(0)
    assert found.item() == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * math.log(0.25) + 25 + 0.25 * (300 - 3.4076), rel=1e-4
    )
    assert student.grad is not None
    wanted = torch.cat([torch.tensor([0.5, -0.25]), -0.25 * rest])
    torch.testing.assert_close(student.grad[0].float(), wanted, rtol=0.01, atol=1e-6)


@needs_kernels
def test_a_token_that_there_is_none_of_is_refused_by_our_kernel(kind: str) -> None:
    """As a damaged cache of answers may name: what is written there would be somebody else's."""
    target = TopK(torch.tensor([[0, 40]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log())
    with pytest.raises(IndexError, match="40 tokens"):
        Objective()(torch.zeros(1, 40), None, target)
    with pytest.raises(IndexError, match="40 tokens"):
        Objective(label_weight=0.5)(torch.zeros(1, 40), torch.tensor([-1]), Full(torch.zeros(1, 40).log_softmax(-1)))


@needs_kernels
def test_answers_to_other_rows_and_tokens_are_refused_by_our_kernel(kind: str) -> None:
    """They would be read, and the gradient written, past the ends."""
    logp, ids, tail = torch.zeros(2, 3), torch.arange(3).repeat(2, 1), torch.zeros(2)
    wrong = [
        Full(torch.zeros(2, 41)), Full(torch.zeros(1, 40)), TopK(ids[:1], logp, tail), TopK(ids[:, :2], logp, tail),
        TopK(ids[:1], logp[:1], tail[:1]),
    ]  # fmt: skip
    for target in wrong:
        with pytest.raises(IndexError, match="does not fit logits"):
            Objective()(torch.zeros(2, 40), None, target)
    with pytest.raises(IndexError, match="does not fit logits"):
        Objective(label_weight=0.5)(torch.zeros(2, 40), torch.tensor([1]), Full(torch.zeros(2, 40)))
    with pytest.raises(IndexError, match="logits of 30 tokens"):  # whose odds are not computed
        ForwardKl.apply(torch.zeros(1, 40), torch.zeros(1, 30), None, 1.0, torch.tensor([35]), 0.5)


@needs_kernels
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_not_hidden_by_our_kernel(broken: float, kind: str) -> None:
    student = torch.zeros(2, 40)
    student[1, 20] = broken
    logp = torch.zeros(2, 40).log_softmax(-1)
    for target in (Full(logp), top_k(logp, 3)):
        assert not math.isfinite(float(Objective()(student, None, target)))


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    first, second, _ = made(4)
    mean = (first.softmax(-1) + second.softmax(-1)) / 2
    torch.testing.assert_close(averaged([first.log_softmax(-1), second.log_softmax(-1)]).exp(), mean)


def test_a_students_padding_counts_for_labels_alone() -> None:
    student, teacher, labels = made(5)
    padded = torch.cat([student, torch.ones(N, 3, dtype=torch.float64)], -1)
    logp = Full(teacher.log_softmax(-1))
    torch.testing.assert_close(Objective()(padded, None, logp), Objective()(student, None, logp))
    expected = -padded.log_softmax(-1).gather(1, labels[:, None]).sum()
    torch.testing.assert_close(Objective(label_weight=1.0)(padded, labels, None), expected)
    both = Objective(label_weight=0.5)(padded, labels, logp)
    torch.testing.assert_close(both, (Objective()(student, None, logp) + expected) / 2)


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("k", [None, 3])
def test_pieces_are_the_whole_with_their_gradients(size: int, k: int | None) -> None:
    dice = torch.Generator().manual_seed(6)
    hidden = torch.randn(N, H, generator=dice, dtype=torch.float64)
    head = torch.nn.Linear(H, V).double()
    _, teacher, labels = made(6)
    logp = teacher.log_softmax(-1)
    objective = Objective("js", 2.0, 0.3)

    def target(piece: slice) -> Target:
        return Full(logp[piece]) if k is None else top_k(logp[piece], k, objective.temperature)

    def loss_of(part: Tensor, piece: slice) -> Tensor:
        return objective(head(part), labels[piece], target(piece))

    found = []
    for whole in (True, False):
        given = hidden.clone().requires_grad_(True)
        parameters = list(head.parameters())
        loss = loss_of(given, slice(0, N)) if whole else chunked(given, loss_of, parameters, size)
        (3 * loss).backward()
        found.append((loss.detach(), given.grad, *(each.grad for each in parameters)))
        head.zero_grad()
    torch.testing.assert_close(found[1], found[0])
    with torch.no_grad():
        torch.testing.assert_close(chunked(hidden, loss_of, parameters, size), found[0][0])


def test_no_more_logits_than_a_piece_ever_exist() -> None:
    hidden = torch.randn(64, H, requires_grad=True)
    head = torch.nn.Linear(H, V)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() and result.shape[-1] == V:
                seen.append(result.numel() // V)
            return result

    labels = torch.zeros(64, dtype=torch.int64)

    def loss_of(part: Tensor, piece: slice) -> Tensor:
        return Objective(label_weight=1.0)(head(part), labels[piece], None)

    with Watch():
        chunked(hidden, loss_of, list(head.parameters()), 8).backward()
    assert seen
    assert max(seen) <= 8


def test_kept_classes_are_the_largest() -> None:
    _, teacher, _ = made(7)
    kept = top_k(teacher.log_softmax(-1), 100)
    assert isinstance(kept, TopK)
    assert kept.ids.shape == (N, V - 1)
    torch.testing.assert_close((kept.logp.exp().sum(-1) + kept.tail.exp()), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_student_that_is_sure_still_tells_the_tails_tokens_apart(weight: float) -> None:
    """In the first row their odds are 0 in float32; the teacher's pull on each is what it is among them."""
    student = torch.tensor([[200.0, 0.0, -1.0, -2.0, -3.0], [0.3, 0.2, 0.1, 0.0, -0.1]])
    ids, p, labels = (
        torch.tensor([[0, 1], [4, 0]]),
        torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]),
        torch.tensor([3, 0]),
    )
    ours, wide = student.clone().requires_grad_(True), student.double().requires_grad_(True)
    with torch.enable_grad():
        found = Objective(label_weight=weight)(ours, labels, TopK(ids, p[:, :2].log(), p[:, 2].log()))
        divergence = torch.nn.functional.kl_div(coarse(wide, ids).log_softmax(-1), p.double(), reduction="sum")
        true = torch.nn.functional.cross_entropy(wide, labels, reduction="sum")
        expected = (1 - weight) * divergence + weight * true
        found.backward()
        expected.backward()
    torch.testing.assert_close(found, expected.float())
    assert ours.grad is not None
    assert wide.grad is not None
    assert ours.grad[0, 2:].count_nonzero() == 3
    torch.testing.assert_close(ours.grad, wide.grad.float(), rtol=1e-5, atol=1e-6)
