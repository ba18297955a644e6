"""Targets of a live teacher against dense fp64 figures; how a batch is cut changes nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.cache import SoftTargets
from distill.config.errors import ConfigError
from distill.config.schema import ModelConfig, PrecisionConfig, StudentConfig, Targets, WeightingConfig
from distill.data.join import Batch, Joined
from distill.engine.dist import Dist
from distill.model import Transformer, hidden_projector
from distill.model.parts import PLAIN, Parts
from distill.model.precision import numerics_of
from losses import head_loss
from losses.bucketed import Bucketed
from losses.dense import Dense
from losses.matching import hidden_match
from losses.mixed import Mixed, fixed
from losses.weighting import Setting
from student.distilling import StudentRecipe
from student.live_teacher import LiveTeacher, labelled
from student.soft_loss import SoftLoss
from teacher.labelling import own_hidden

V, S, B = 32, 6, 4
ALONE = Dist(0, 1, torch.device("cpu"))
MODEL = ModelConfig(
    vocab_size=V, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, expert_hidden=16, dense_hidden=16,
    experts=2, chunk_size=8,
)  # fmt: skip
SETTING = Setting(V, V, 2, 1000, math.inf, torch.device("cpu"))
WIDE = dataclasses.replace(MODEL, hidden_size=24, layers=2)


def batch(seed=0, most=V):
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[:, -1] = False
    return Batch(
        ids_BS=torch.randint(most, (B, S), generator=g),
        labels_BS=torch.randint(most, (B, S), generator=g),
        valid_BS=valid,
        documents_BS=torch.zeros(B, S, dtype=torch.int32),
        sample_ids_B=np.arange(B),
        corpus_B=np.array([0, 1, 0, 1]),
        digests_B=np.zeros(B, np.uint64),
        **Joined.none(B)._asdict(),
    )


def teacher(config=WIDE, step=7, parts=PLAIN):
    torch.manual_seed(1)
    model = Transformer(config, parts)
    live = LiveTeacher(
        lambda b: own_hidden(model, b), lambda: model.head.weight.detach(), config.hidden_size, lambda: step, "digest"
    )
    return model, live


def test_signals_are_those_of_the_dense_distribution():
    model, live = teacher()
    b = batch()
    out = labelled(live, b, 1, 4096, ALONE)
    logp = model.logits(b.ids_BS, b.documents_BS).flatten(0, 1).detach().double().log_softmax(-1)
    labels = b.labels_BS.flatten()
    torch.testing.assert_close(out.targets.entropy_T, -(logp.exp() * logp).sum(-1).float(), rtol=1e-5, atol=1e-5)
    picked_T = logp[torch.arange(B * S), labels]
    torch.testing.assert_close(out.targets.label_logprob_T, picked_T.float(), rtol=1e-5, atol=1e-5)
    assert out.targets.covered_T.all() and out.step_B.tolist() == [7] * B
    assert out.level_B.tolist() == out.end_B.tolist() == [0.0] * B  # it lags behind nothing
    assert out.par_B.tolist() == [math.inf] * B
    assert out.teacher_TE.shape == (B * S, 24) and not out.teacher_TE.requires_grad


@pytest.mark.parametrize(("parts", "chunk"), [(2, 4096), (4, 5)])
def test_how_a_batch_is_cut_changes_no_target(parts, chunk):
    _, live = teacher()
    a, b = labelled(live, batch(), 1, 4096, ALONE), labelled(live, batch(), parts, chunk, ALONE)
    for x, y in zip((*a.targets, a.teacher_TE, a.level_B), (*b.targets, b.teacher_TE, b.level_B)):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    micro = b.rows(1, 3)
    assert torch.equal(micro.teacher_TE, b.teacher_TE[S : 3 * S]) and len(micro.targets.covered_T) == 2 * S


def test_a_sample_with_an_id_that_the_teacher_lacks_has_no_target():
    _, live = teacher(dataclasses.replace(WIDE, vocab_size=V - 2))
    b = batch(most=V - 2)
    b.ids_BS[1, 2] = V - 1
    b.labels_BS[2, 0] = V - 2
    b.labels_BS[3, -1] = V - 1  # carries no loss
    out = labelled(live, b, 2, 4096, ALONE)
    assert out.targets.covered_T.view(B, S)[:, 0].tolist() == [True, False, False, True]
    assert out.step_B.tolist() == [7, -1, -1, 7] and out.level_B.isnan().tolist() == [False, True, True, False]
    assert torch.equal(out.ids_BS, b.ids_BS)  # the student reads its own


def recipe(live, parts=PLAIN, **keys):
    weighting = WeightingConfig(alpha=keys.pop("alpha", 0.5))
    config = StudentConfig(MODEL, weighting=weighting, targets=Targets.live, **keys)
    torch.manual_seed(0)
    student = Transformer(MODEL, parts)
    projector = hidden_projector.attach(student, live.width, 0) if config.hidden_match else None
    return student, StudentRecipe(config, ALONE, SETTING, 10, ["a", "b"], SoftLoss(config, (), projector), live)


def step(student, made, b, parts=1):
    b = made.ready(b, parts)
    plan = made.begin(b, 0)
    outs = [made.forward(student, b.rows(i, i + B // parts), plan) for i in range(0, B, B // parts)]
    for out in outs:
        out.loss_sum.backward()
    return sum(out.loss_sum.item() for out in outs), outs[0]


def test_a_step_equals_a_dense_computation():
    model, live = teacher()
    student, made = recipe(live, loss="mixed", hidden_match=0.5)
    b = batch()
    loss, out = step(student, made, b)
    valid = b.valid_BS.flatten()
    p, q = (m.logits(b.ids_BS, b.documents_BS).flatten(0, 1).detach().log_softmax(-1) for m in (model, student))
    hard = torch.nn.functional.nll_loss(q, b.labels_BS.flatten(), reduction="none")
    soft = -(p.exp() * q).sum(-1)
    mine, theirs = (own_hidden(m, b) for m in (student, model))
    match = 1 - torch.cosine_similarity(mine @ student.hidden_projector.weight.T, theirs)
    assert loss == pytest.approx((valid * 0.5 * (hard + soft + 0.5 * match)).sum().item(), rel=1e-5)
    assert (out.means["hidden_match"].sum / out.means["hidden_match"].weight).item() == pytest.approx(
        match[valid].mean().item(), rel=1e-5
    )
    assert student.hidden_projector.weight.grad.any() and all(p.grad is None for p in model.parameters())


class Bf16Products(TorchDispatchMode):
    """Counts products of bf16 operands."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        is_product = any(part in op.__name__ for part in ("mm", "mv", "dot", "attention"))
        self.count += is_product and any(isinstance(x, torch.Tensor) and x.dtype is torch.bfloat16 for x in args)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("native", [False, True])
def test_on_a_cpu_a_step_in_bf16_multiplies_in_bf16_itself_only_where_that_is_asked_for(native):
    parts = Parts.of(numerics_of(PrecisionConfig("bf16", native=native), ALONE.device))
    model, live = teacher(parts=parts)
    student, made = recipe(live, parts, loss="jensen_shannon", hidden_match=0.5)
    model.bfloat16()
    student.bfloat16()
    with Bf16Products() as products:
        step(student, made, batch())
    assert student.hidden_projector.weight.grad.any() and bool(products.count) == native


def test_micro_batches_add_up_to_the_step():
    _, live = teacher()
    found = {}
    for parts in (1, 2, 4):
        student, made = recipe(live, loss="jensen_shannon", hidden_match=0.1)
        loss, _ = step(student, made, batch(), parts)
        found[parts] = loss, student.head.weight.grad
    for parts in (2, 4):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-5)
        torch.testing.assert_close(found[parts][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_the_loss_of_each_form():
    args = torch.zeros(2, dtype=torch.int64), fixed(torch.ones(2), torch.ones(2))
    _, live = teacher()
    found = labelled(live, batch(), 1, 4096, ALONE).targets
    dense = torch.zeros(2, 3), torch.zeros(V, 3)
    for loss, codecs, teacher_, kind in (
        ("mixed", ["topk"], None, Mixed),
        ("mixed", ["systematic"], None, Mixed),
        ("mixed", [], dense, Dense),
        ("forward_kl", ["systematic"], None, Mixed),
        ("forward_kl", ["topk", "systematic"], None, Mixed),
        ("forward_kl", ["topk"], None, Bucketed),
        ("reverse_kl", ["topk", "topk"], None, Bucketed),
        ("reverse_kl", [], dense, Dense),
    ):
        made = SoftLoss(StudentConfig(MODEL, loss=loss), codecs)
        assert type(made.rows(*args, found, teacher_)) is kind, (loss, codecs)
        assert type(made.rows(*args, None, None)) is Mixed


def test_the_least_that_a_soft_loss_can_be():
    """Of a student that predicts just what the targets say; so what is above it is a divergence, 0 at the least."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(6, V, generator=g, dtype=torch.float64)
    p = logits.softmax(-1)
    top, ids = p.topk(4, -1)
    some = SoftTargets(ids, top, torch.ones(6, dtype=torch.bool), -torch.ones(6), -(p * p.log()).sum(-1))
    nothing = some._replace(probs_TK=torch.zeros(6, 4, dtype=torch.float64))
    rows = torch.zeros(6, dtype=torch.int64), fixed(torch.zeros(6), torch.ones(6)), some
    sparse = torch.full_like(p, -1e4).scatter(-1, ids, top.log())
    dense = torch.eye(V, dtype=torch.float64)
    for loss, codecs, student, teacher_ in (
        ("mixed", ["topk"], sparse, None),
        ("mixed", [], logits, (logits, dense)),
        ("forward_kl", ["topk"], logits, None),
        ("forward_kl", [], logits, (logits, dense)),
        ("jensen_shannon", ["topk"], logits, None),
    ):
        made = SoftLoss(StudentConfig(MODEL, loss=loss), codecs)
        soft_T = head_loss(student, dense, made.rows(*rows, teacher_)).parts["soft"]
        torch.testing.assert_close(made.least(some), soft_T, rtol=1e-9, atol=1e-9)
        other_T = head_loss(student.flip(0), dense, made.rows(*rows, teacher_)).parts["soft"]
        assert (other_T > made.least(some)).all()
        assert made.least(nothing).isfinite().all()
    drawn = SoftLoss(StudentConfig(MODEL, loss="forward_kl"), ["systematic"])
    assert drawn.least(some) is some.entropy_T


def test_a_loss_that_is_not_linear_never_passes_as_the_mixed_one():
    _, live = teacher()
    found = labelled(live, batch(), 1, 4096, ALONE).targets
    made = SoftLoss(StudentConfig(MODEL, loss="reverse_kl"), ["topk", "systematic"])
    with pytest.raises(AssertionError, match="atoms that were drawn"):
        made.rows(torch.zeros(2, dtype=torch.int64), fixed(torch.ones(2), torch.ones(2)), found, None)


def test_a_run_that_goes_on_needs_the_same_frozen_teacher():
    _, live = teacher()
    _, made = recipe(live)
    made.load_state(made.state())
    _, other = recipe(dataclasses.replace(live, identity="another"))
    with pytest.raises(ConfigError, match=r"teacher\.from has weights another; the run was started with digest"):
        other.load_state(made.state())


def test_matching_against_fp64_and_finite_differences():
    g = torch.Generator().manual_seed(0)
    hidden, projector, theirs = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((5, 3), (4, 3), (5, 4)))
    a, b = hidden @ projector.T, theirs
    torch.testing.assert_close(hidden_match(a, theirs), 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
    torch.testing.assert_close(hidden_match(a * 3, a), torch.zeros(5).double())
    assert torch.autograd.gradcheck(lambda projected: hidden_match(projected, theirs), a.requires_grad_())
    assert hidden_match(a.bfloat16(), theirs.bfloat16()).dtype == torch.float32
