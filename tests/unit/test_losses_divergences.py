"""Losses of top-k targets and of a live teacher against definitions in fp64 autograd, and finite differences."""

import math
from functools import partial

import pytest
import torch
from scipy.special import rel_entr
from scipy.special import softmax as scipy_softmax

from losses import divergences, fixed, head_loss
from losses.bucketed import LEAST_REST, Bucketed
from losses.dense import Dense


def kl(p, q):
    """Over the last dimension, with 0 log 0 = 0."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def ab(p, q, a, b):
    return -((p**a * q**b) - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


DEFINITIONS = {
    "cross_entropy": ({}, lambda p, q: -torch.special.xlogy(p, q).sum(-1)),
    "forward_kl": ({}, kl),
    "reverse_kl": ({}, lambda p, q: kl(q, p)),
    "jensen_shannon": ({"beta": 0.5}, lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)),
    "jensen_shannon 0.1": ({"beta": 0.1}, lambda p, q: 0.1 * kl(p, p / 10 + 0.9 * q) + 0.9 * kl(q, p / 10 + 0.9 * q)),
    "skew_kl": ({"skew": 0.1}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_reverse_kl": ({"skew": 0.2}, lambda p, q: kl(q, 0.8 * p + 0.2 * q)),
    "alpha_beta": ({"alpha": 0.2, "beta": 0.7}, lambda p, q: ab(p, q, 0.2, 0.7)),
    "alpha_beta 2 0.5": ({"alpha": 2.0, "beta": 0.5}, lambda p, q: ab(p, q, 2.0, 0.5)),
    "alpha_beta 1 0": ({"alpha": 1.0, "beta": 0.0}, kl),
    "alpha_beta 0 1": ({"alpha": 0.0, "beta": 1.0}, lambda p, q: kl(q, p)),
    "alpha_beta 0 0.5": ({"alpha": 0.0, "beta": 0.5}, lambda p, q: ab(p, q, 1e-6, 0.5)),
    "alpha_beta 0.5 0": ({"alpha": 0.5, "beta": 0.0}, lambda p, q: ab(p, q, 0.5, 1e-6)),
}
LOSSES = list(DEFINITIONS)
FINITE_AT_ZERO = [name for name in LOSSES if name not in ("reverse_kl", "alpha_beta 0 1", "alpha_beta 0 0.5")]


def bucketed(labels, w_hard, ids, probs, w_soft, *others):
    return Bucketed(labels, fixed(w_hard, w_soft), ids, probs, *others)


def dense(labels, w_hard, hidden, weight, w_soft, *others):
    return Dense(labels, fixed(w_hard, w_soft), hidden, weight, *others)


def divergence(name):
    return partial(getattr(divergences, name.split()[0]), **DEFINITIONS[name][0])


def problem(tokens=11, width=5, vocab=23, atoms=4, seed=0, dtype=torch.float64, teacher_width=7):
    """Student's hidden states and weight, the teacher's, labels, weights; and top-k rows of the teacher."""
    g = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, generator=g, dtype=torch.float64)
    student, teacher = (
        (make(tokens, width), make(vocab, width)),
        (make(tokens, teacher_width), make(vocab, teacher_width)),
    )
    labels = torch.randint(vocab, (tokens,), generator=g)
    w_hard, w_soft = torch.rand(2, tokens, generator=g, dtype=torch.float64)
    w_hard[1:2] = w_soft[1:2] = 0  # an invalid token
    probs, ids = torch.softmax(teacher[0] @ teacher[1].T, -1).topk(atoms, -1)
    if atoms > 2:
        probs[2, 2:], ids[2, 2:] = 0, 0  # fewer atoms, padded with id 0, which may be one of them
    if tokens > 3:
        probs[3] = 0  # a token without targets
        w_soft[3] = 0
    cast = [
        x.to(dtype) if x.is_floating_point() else x for x in (*student, *teacher, labels, w_hard, w_soft, ids, probs)
    ]
    return cast[:2], cast[2:4], cast[4:7], cast[7:]


def tempered(p, temperature):
    power = p ** (1 / temperature)
    return power / power.sum()


def oracle_bucketed(name, student, labels, w_hard, w_soft, ids, probs, temperature):
    """Token by token: the atoms' probabilities, and 1 minus their sum."""
    total = student[0].new_zeros(())
    for t, logits in enumerate(student[0] @ student[1].T):
        q = torch.softmax(logits, -1)
        total = total - w_hard[t] * q[labels[t]].log()
        atoms = {int(i): float(p) for i, p in zip(ids[t], probs[t]) if p > 0}
        rest = [i for i in range(len(q)) if i not in atoms]
        teacher = torch.tensor([*atoms.values()], dtype=q.dtype)
        mine = q[torch.tensor([*atoms], dtype=torch.int64)]
        if rest:
            teacher = torch.cat([teacher, (1 - teacher.sum()).clamp(min=LEAST_REST)[None]])
            mine = torch.cat([mine, q[torch.tensor(rest)].sum()[None]])
        teacher, mine = tempered(teacher, temperature), tempered(mine, temperature)
        total = total + w_soft[t] * temperature**2 * DEFINITIONS[name][1](teacher, mine)
    return total


def oracle_dense(name, student, teacher, labels, w_hard, w_soft, temperature):
    logits, theirs = student[0] @ student[1].T, teacher[0] @ teacher[1].T
    p = torch.zeros_like(logits)
    p[:, : theirs.shape[1]] = torch.softmax(theirs / temperature, -1)
    soft = temperature**2 * DEFINITIONS[name][1](p, torch.softmax(logits / temperature, -1))
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (w_hard * hard + w_soft * soft).sum()


def leaves(student):
    return [x.clone().requires_grad_() for x in student]


def assert_same(a, b, rows, want, rtol):
    """Value and gradients of a row function, in chunks of any size, and of an oracle."""
    gradients = torch.autograd.grad(3 * want, b)
    for chunk in (1, 4, 64):
        loss = head_loss(*a, rows, chunk=chunk).loss_sum
        torch.testing.assert_close(loss, want, rtol=rtol, atol=rtol)
        for mine, other in zip(torch.autograd.grad(3 * loss, a), gradients):
            torch.testing.assert_close(mine, other, rtol=10 * rtol, atol=rtol)


def tolerance(name):
    return 1e-4 if name in ("alpha_beta 0 0.5", "alpha_beta 0.5 0") else 1e-9  # those definitions only near the limit


SHAPES = [dict(), dict(tokens=1, width=1, vocab=2, atoms=1), dict(tokens=6, width=3, vocab=9, atoms=9, teacher_width=2),
          dict(tokens=8, width=8, vocab=64, atoms=12)]  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_bucketed_equals_its_definition(name, temperature):
    for shape in SHAPES:
        student, _, weights, targets = problem(**shape)
        a, b = leaves(student), leaves(student)
        want = oracle_bucketed(name, b, *weights, *targets, temperature)
        rows = bucketed(weights[0], weights[1], *targets, weights[2], divergence(name), temperature)
        assert_same(a, b, rows, want, tolerance(name))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_dense_equals_its_definition(name, temperature):
    for shape in SHAPES:
        student, teacher, weights, _ = problem(**shape)
        a, b = leaves(student), leaves(student)
        want = oracle_dense(name, b, teacher, *weights, temperature)
        rows = dense(*weights[:2], *teacher, weights[2], divergence(name), temperature)
        assert_same(a, b, rows, want, tolerance(name))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("form", ["bucketed", "dense"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name, form, temperature):
    student, teacher, (labels, w_hard, w_soft), targets = problem(tokens=4, width=2, vocab=6, atoms=3, seed=1)
    rows = bucketed(labels, w_hard, *targets, w_soft, divergence(name), temperature)
    if form == "dense":
        rows = dense(labels, w_hard, *teacher, w_soft, divergence(name), temperature)
    assert torch.autograd.gradcheck(lambda *x: head_loss(*x, rows, chunk=4).loss_sum, leaves(student))


@pytest.mark.parametrize("name", FINITE_AT_ZERO)
def test_a_smaller_teacher_gives_added_ids_nothing(name):
    student, (hidden, weight), weights, _ = problem()
    teacher = hidden, weight[:-3]
    a, b = leaves(student), leaves(student)
    loss = head_loss(*a, dense(*weights[:2], *teacher, weights[2], divergence(name)), chunk=4).loss_sum
    want = oracle_dense(name, b, teacher, *weights, 1.0)
    torch.testing.assert_close(loss, want, rtol=tolerance(name), atol=tolerance(name))
    for mine, other in zip(torch.autograd.grad(loss, a), torch.autograd.grad(want, b)):
        if tolerance(name) == 1e-9 and not other.isnan().any():  # a power of 0 has no derivative in autograd
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)
        assert mine.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_soft_loss_and_no_soft_gradient(name, temperature):
    (hidden, weight), _, (labels, _, _), _ = problem(seed=5)
    ones, none = torch.ones(len(labels), dtype=torch.float64), torch.zeros(len(labels), dtype=torch.float64)
    probs, ids = torch.softmax(hidden @ weight.T, -1).topk(4, -1)
    hidden.requires_grad_()
    for rows in (
        bucketed(labels, none, ids, probs, ones, divergence(name), temperature),
        dense(labels, none, hidden.detach(), weight, ones, divergence(name), temperature),
    ):
        out = head_loss(hidden, weight, rows, chunk=4)
        (gradient,) = torch.autograd.grad(out.loss_sum, hidden)
        assert gradient.abs().max() < 1e-12
        assert name == "cross_entropy" or out.parts["soft"].abs().max() < 1e-12
        assert out.parts["agreement"].all()


@pytest.mark.parametrize("form", ["bucketed", "dense"])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite_and_right_in_fp32(name, form):
    student, teacher, weights, (ids, probs) = problem(dtype=torch.float32, seed=2)
    loud = [student[0] * 1e4, student[1]]
    spiked = probs.clone()
    spiked[4], spiked[4, 0] = 0, 1  # all mass on one atom, the others of probability 0
    labels, w_hard, w_soft = weights
    for temperature in (1.0, 2.0):
        rows = bucketed(labels, w_hard, ids, spiked, w_soft, divergence(name), temperature)
        if form == "dense":
            rows = dense(labels, w_hard, teacher[0] * 1e4, teacher[1], w_soft, divergence(name), temperature)
        a = leaves(loud)
        out = head_loss(*a, rows, chunk=4)
        gradients = torch.autograd.grad(out.loss_sum, a)
        assert out.loss_sum.isfinite() and all(part.float().isfinite().all() for part in out.parts.values())
        assert all(gradient.isfinite().all() for gradient in gradients)
        double = [x.double() for x in loud]
        again = bucketed(labels, w_hard.double(), ids, spiked.double(), w_soft.double(), divergence(name), temperature)
        if form == "dense":
            loud_teacher = (teacher[0] * 1e4).double(), teacher[1].double()
            again = dense(labels, w_hard.double(), *loud_teacher, w_soft.double(), divergence(name), temperature)
        # Products of 1e4 are off by 1e-3 in fp32, so a loss is right to that, of some 1e4 nats.
        torch.testing.assert_close(out.loss_sum.double(), head_loss(*double, again).loss_sum, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_an_oracle_of_another_library(name):
    student, teacher, weights, _ = problem(seed=7)
    p, q = (scipy_softmax((x @ y.T).numpy(), -1) for x, y in (teacher, student))
    want = rel_entr(p, q).sum(-1) if name == "forward_kl" else rel_entr(q, p).sum(-1)
    out = head_loss(*student, dense(*weights[:2], *teacher, weights[2], divergence(name)))
    torch.testing.assert_close(out.parts["soft"], torch.from_numpy(want))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_zero_and_parts_are_unweighted(name):
    student, teacher, (labels, w_hard, w_soft), targets = problem(seed=3)
    none = torch.zeros_like(w_hard)
    for make in (
        lambda h, s: bucketed(labels, h, *targets, s, divergence(name), 2.0),
        lambda h, s: dense(labels, h, *teacher, s, divergence(name), 2.0),
    ):
        a = leaves(student)
        silent = head_loss(*a, make(none, none), chunk=4)
        assert silent.loss_sum == 0 and not any(g.any() for g in torch.autograd.grad(silent.loss_sum, a))
        out = head_loss(*student, make(w_hard, w_soft))  # nothing asks for a gradient
        for key in ("hard", "soft", "mass", "agreement"):
            torch.testing.assert_close(silent.parts[key], out.parts[key])
        logp = torch.log_softmax(student[0] @ student[1].T, -1)
        torch.testing.assert_close(out.parts["hard"], -logp.gather(-1, labels[:, None]).squeeze(-1))
        total = (w_hard * out.parts["hard"] + w_soft * out.parts["soft"]).sum()
        torch.testing.assert_close(out.loss_sum, total)
    torch.testing.assert_close(
        head_loss(*student, bucketed(labels, w_hard, *targets, w_soft, divergence(name))).parts["mass"],
        targets[1].sum(-1),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", LOSSES)
def test_norms_are_those_of_the_two_terms_gradients(name, temperature):
    """Of each token, against autograd on the logits, one term at a time and unweighted; they change nothing else."""
    student, teacher, (labels, w_hard, w_soft), targets = problem(seed=4)
    valid_T = (w_soft > 0) & (w_hard > 0)
    eye = torch.eye(len(student[1]), dtype=torch.float64)
    logits = (student[0] @ student[1].T).requires_grad_()
    ones, zeros = torch.ones_like(w_hard), torch.zeros_like(w_hard)
    for rows, soft in (
        (
            bucketed(labels, w_hard, *targets, w_soft, divergence(name), temperature),
            oracle_bucketed(name, (logits, eye), labels, zeros, valid_T.double(), *targets, temperature),
        ),
        (
            dense(labels, w_hard, *teacher, w_soft, divergence(name), temperature),
            oracle_dense(name, (logits, eye), teacher, labels, zeros, ones, temperature),
        ),
    ):
        plain, out = (head_loss(*leaves(student), each, chunk=4) for each in (rows, rows._replace(norms=True)))
        assert out.loss_sum == plain.loss_sum and not plain.parts.keys() & {"hard_norm", "soft_norm"}
        hard = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        for key, term in (("hard_norm", hard), ("soft_norm", soft)):
            want_T = torch.autograd.grad(term, logits)[0].norm(dim=-1)
            rtol = 10 * tolerance(name)
            torch.testing.assert_close(out.parts[key][valid_T], want_T[valid_T], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("form", ["bucketed", "dense"])
def test_bf16_hidden_states_give_losses_in_fp32(form):
    student, teacher, (labels, w_hard, w_soft), targets = problem(dtype=torch.bfloat16)
    rows = bucketed(labels, w_hard, *targets, w_soft, divergences.reverse_kl)
    if form == "dense":
        rows = dense(labels, w_hard, *teacher, w_soft, divergences.reverse_kl)
    a = leaves(student)
    loss = head_loss(*a, rows).loss_sum
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, a)[0].dtype == torch.bfloat16


def test_the_bucket_is_not_one_minus_a_sum():
    """A student that is sure of the atoms: what is left is below fp32's resolution of 1, its logarithm is not."""
    hidden, weight = torch.eye(3)[:1], torch.tensor([[40.0, 0, 0], [0.0, 0, 0], [-3.0, 0, 0]])
    ids, probs = torch.tensor([[0]]), torch.tensor([[0.75]])
    out = head_loss(
        hidden, weight, bucketed(torch.tensor([0]), torch.zeros(1), ids, probs, torch.ones(1), divergences.forward_kl)
    )
    rest = 0.25 * (math.log(0.25) + 40 - math.log(1 + math.exp(-3)))
    assert out.parts["soft"].item() == pytest.approx(0.75 * math.log(0.75) + rest, rel=1e-6)
