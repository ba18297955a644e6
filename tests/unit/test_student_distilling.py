"""The student's recipe weighs by hand-worked alphas, and only what it should."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from distill.cache import SoftTargets
from distill.config.errors import ConfigError
from distill.config.schema import (
    DisagreementFactor,
    EntropyFactor,
    LagFactor,
    ModelConfig,
    Schedule,
    StudentConfig,
    TrainConfig,
    WeightingConfig,
)  # fmt: skip
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.model import Transformer
from losses.weighting import Setting
from student.distilling import StudentRecipe
from student.weigher import Weigher, signals_of

V, S = 32, 4
ALONE = Dist(0, 1, torch.device("cpu"))
MODEL = ModelConfig(
    vocab_size=V, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, expert_hidden=16, dense_hidden=16,
    experts=2, chunk_size=8,
)  # fmt: skip
torch.manual_seed(0)
NET = Transformer(MODEL)


def batch(levels, entropy=2.0, end=2.0):
    """One sample per level of its teacher (nan: no targets); the last position of each carries no loss."""
    g = torch.Generator().manual_seed(0)
    size = len(levels)
    loss_B = torch.tensor(levels)
    covered_T = (~loss_B.isnan()).repeat_interleave(S)
    ids = torch.randint(V, (size * S, 2), generator=g)
    probs = torch.tensor([0.7, 0.2]).expand(size * S, 2) * covered_T[:, None]
    full = torch.full((size * S,), float(entropy))
    valid = torch.ones(size, S, dtype=torch.bool)
    valid[:, -1] = False
    return Batch(
        ids_BS=torch.randint(V, (size, S), generator=g),
        labels_BS=torch.randint(V, (size, S), generator=g),
        valid_BS=valid,
        documents_BS=torch.zeros(size, S, dtype=torch.int32),
        sample_ids_B=np.arange(size),
        corpus_B=np.zeros(size, np.int64),
        digests_B=np.zeros(size, np.uint64),
        targets=SoftTargets(ids, probs, covered_T, -full, full),
        shard_loss_B=loss_B,
        step_B=torch.zeros(size, dtype=torch.int64),
        level_B=loss_B,
        end_B=torch.where(loss_B.isnan(), torch.nan, end),
        par_B=torch.where(loss_B.isnan(), torch.nan, torch.inf),
    )


def recipe(corpora=1, **weighting):
    config = StudentConfig(MODEL, weighting=WeightingConfig(**weighting))
    setting = Setting(V, V, corpora, 1000, math.inf, torch.device("cpu"))
    return StudentRecipe(config, ALONE, setting, 10, ["main", "code"][:corpora])


def run(student, b, step=0, net=None):
    """A forward pass of a whole step, and its end."""
    plan = student.begin(b, step)
    out = student.forward(net or NET, b, plan)
    student.end(plan, [out.result])
    return out


def alphas(student, b, step=0):
    """Of the first token of each sample, without moving the student's state."""
    plan, before = student.begin(b, step), student.weighting_state
    valid = torch.ones(b.valid_BS.numel(), dtype=torch.bool)
    weigher = Weigher(
        student.weighting, plan.state, step, signals_of(b, torch.device("cpu"), 1.0), valid, torch.zeros(len(valid))
    )
    weigher(slice(None), torch.zeros(len(valid)), torch.zeros(len(valid)))
    assert student.weighting_state is before
    return weigher.whole.soft_T.view(-1, S)[:, 0].tolist()


def at(*losses):
    """The state of the lag factor of a student that is at these losses on its corpora's curves."""
    return {"lag": {"place": torch.tensor([[loss, 1.0] for loss in losses], dtype=torch.float64)}}


def test_a_row_function_that_gives_no_soft_loss_is_refused():
    valid, student = torch.ones(S, dtype=torch.bool), recipe(alpha=0.6)
    signals = signals_of(batch([3.0]), torch.device("cpu"), 1.0)
    weigher = Weigher(student.weighting, student.weighting.init(), 0, signals, valid, torch.zeros(S))
    with pytest.raises(ConfigError, match=r"student\.loss gives weigh no soft loss"):
        weigher(slice(None), torch.zeros(S), None)


def test_uncovered_samples_fall_to_the_hard_loss():
    assert alphas(recipe(alpha=0.6), batch([3.0, math.nan])) == pytest.approx([0.6, 0.0])


def test_lag_scales_by_the_level_of_the_teacher():
    student = recipe(alpha=0.8, lag=LagFactor(enabled=True, power=1.0))
    best = math.log(V) - 1.0
    assert alphas(student, batch([best, best + 0.5, 9.0], end=best)) == pytest.approx([0.8, 0.4, 0.0], rel=1e-5)


def test_entropy_factor_scales_alpha():
    student = recipe(alpha=1.0, entropy=EntropyFactor(enabled=True, scale=True))
    assert alphas(student, batch([3.0], entropy=math.log(V) / 4)) == pytest.approx([0.25])


def test_alpha_follows_its_schedule():
    student = recipe(alpha=0.8, schedule=Schedule.linear, final_alpha=0.3)
    assert [alphas(student, batch([3.0]), step)[0] for step in (0, 5)] == pytest.approx([0.8, 0.55])


def test_the_loss_is_the_weighted_sum_over_valid_tokens_and_state_survives_exactly():
    student, b = recipe(alpha=0.5, lag=LagFactor(enabled=True, memory=0.01)), batch([2.0, math.nan])
    out = run(student, b, step=9)
    logp = torch.log_softmax(NET.logits(b.ids_BS).double(), -1).flatten(0, 1)
    hard = -logp[torch.arange(2 * S), b.labels_BS.flatten()]
    soft = -(b.targets.probs_TK * logp.gather(-1, b.targets.ids_TK)).sum(-1)
    alpha = torch.tensor([0.5] * S + [0.0] * S)
    valid = b.valid_BS.flatten()
    want = ((alpha * soft + (1 - alpha) * hard) * valid).sum()
    assert out.loss_sum.item() == pytest.approx(want.item(), rel=1e-5)
    assert out.routing.counts_LE.sum() == 2 * S
    means = {name: float(mean.sum / mean.weight) for name, mean in out.means.items()}
    first = valid & b.targets.covered_T
    assert means["hard_loss"] == pytest.approx((hard * valid).sum().item() / 6, rel=1e-5)
    assert means["coverage"] == 0.5 and means["mass"] == pytest.approx(0.9) and means["lag_factor"] == 1.0
    assert means["teacher_loss"] == 2.0 and means["lag"] == 0.0
    assert means["teacher_lead"] == pytest.approx(hard[first].mean().item() - 2.0, rel=1e-5)
    assert means["disagreement"] == pytest.approx(soft[first].mean().item() - 2.0, rel=1e-5)
    assert out.histograms["alpha"].sum() == 6 and out.histograms["lag_factor"][-1] == 3

    assert student.weighting_state["lag"]["place"].tolist() == [
        [pytest.approx((hard[first] - 2.0 + 2.0).sum().item(), rel=1e-5), 3.0]
    ]
    assert student.coverage == 0.5
    other = recipe(alpha=0.5, lag=LagFactor(enabled=True))
    other.load_state(json.loads(json.dumps(student.state())))
    assert other.weighting_state["lag"]["place"].equal(student.weighting_state["lag"]["place"])
    assert other.coverage == student.coverage


def test_norms_are_those_of_the_two_terms_gradients():
    """At steps that are logged, against autograd on the logits, one term at a time."""
    student, b = recipe(alpha=0.25), batch([2.0, 2.0])
    assert "soft_grad_norm" not in run(student, b, step=3).means  # log_every is 10
    means = {name: float(mean.sum / mean.weight) for name, mean in run(student, b, step=9).means.items()}
    logits = NET.logits(b.ids_BS).double().flatten(0, 1).detach().requires_grad_()
    logp = logits.log_softmax(-1)
    hard = -logp[torch.arange(2 * S), b.labels_BS.flatten()]
    dense = torch.zeros_like(logp).scatter_add(-1, b.targets.ids_TK, b.targets.probs_TK.double())
    valid = b.valid_BS.flatten()
    norms = [
        torch.autograd.grad(term.sum(), logits, retain_graph=True)[0].norm(dim=-1)[valid]
        for term in (hard, -(dense * logp).sum(-1))
    ]
    assert means["hard_grad_norm"] == pytest.approx(norms[0].mean().item(), rel=1e-5)
    # Where a token's atoms are one id, the closed form takes them as two.
    distinct = (b.targets.ids_TK[:, 0] != b.targets.ids_TK[:, 1]).all()
    assert distinct and means["soft_grad_norm"] == pytest.approx(norms[1].mean().item(), rel=1e-5)
    soft, hard = 0.25 * norms[1].sum(), 0.75 * norms[0].sum()
    assert means["effective_weight"] == pytest.approx((soft / (soft + hard)).item(), rel=1e-5)


def test_weights_do_not_depend_on_how_a_step_is_cut():
    """Micro-batches and chunks of the head: the same loss, metrics and state."""
    keys = dict(alpha=0.9, lag=LagFactor(enabled=True), disagreement=DisagreementFactor(enabled=True))
    b = batch([2.5, 3.0, math.nan, 2.2])
    found = []
    for size, chunk in ((4, 4096), (4, 3), (1, 5)):
        student = recipe(**keys)
        student.weighting_state |= at(3.1)
        student.config = dataclasses.replace(student.config, train=TrainConfig(head_chunk=chunk))
        plan = student.begin(b, 0)
        outs = [student.forward(NET, b.rows(i, i + size), plan) for i in range(0, 4, size)]
        student.end(plan, [out.result for out in outs])
        parts = {name: [out.means[name] for out in outs] for name in outs[0].means}
        means = {n: sum(float(m.sum) for m in p) / sum(float(m.weight) for m in p) for n, p in parts.items()}
        found.append(
            [
                sum(o.loss_sum.item() for o in outs),
                *means.values(),
                *student.weighting_state["lag"]["place"][0].tolist(),
            ]
        )
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


def test_each_corpus_of_a_mixture_has_its_own_place_alpha_and_loss():
    lag = {"alpha": 1.0, "lag": LagFactor(enabled=True, power=1.0)}
    student = recipe(2, **lag)
    b = dataclasses.replace(batch([3.0, 0.5, 2.0, 0.25, math.nan]), corpus_B=np.array([0, 1, 0, 1, 1]))
    b = dataclasses.replace(b, end_B=torch.tensor([2.0, 0.25, 2.0, 0.25, math.nan]))
    student.weighting_state = at(4.0, 1.0)
    assert alphas(student, b) == pytest.approx([0.5, 2 / 3, 1.0, 1.0, 0.0])  # (4-3)/(4-2), (1-0.5)/(1-0.25)
    out = run(student, b)
    means = {name: float(mean.sum / mean.weight) for name, mean in out.means.items()}
    assert means["alpha/main"] == pytest.approx(0.75) and means["alpha/code"] == pytest.approx((2 / 3 + 1) / 3)
    for corpus, samples in enumerate(([0, 2], [1, 3, 4])):
        alone = recipe(**lag)
        alone.weighting_state = at([4.0, 1.0][corpus])
        single = run(alone, dataclasses.replace(pick(b, samples), corpus_B=np.zeros(len(samples), np.int64)))
        mine, theirs = (r.weighting_state["lag"]["place"] for r in (student, alone))
        assert (mine[corpus, 0] / mine[corpus, 1]).item() == pytest.approx(
            (theirs[0, 0] / theirs[0, 1]).item(), rel=0.02
        )
        hard = single.means["hard_loss"]
        assert means[f"hard_loss/{['main', 'code'][corpus]}"] == pytest.approx(float(hard.sum / hard.weight), rel=1e-5)
    other = recipe(2, **lag)
    other.load_state(json.loads(json.dumps(student.state())))
    assert other.weighting_state["lag"]["place"].equal(student.weighting_state["lag"]["place"])


def pick(b: Batch, samples: list[int]) -> Batch:
    """Some samples of a batch, as a batch."""
    parts = [b.rows(i, i + 1) for i in samples]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Batch)}
    targets = SoftTargets(*(torch.cat(column) for column in zip(*columns.pop("targets"))))
    del columns["images"], columns["tile_tokens"], columns["teacher_TE"]
    joined = {n: torch.cat(c) if isinstance(c[0], torch.Tensor) else np.concatenate(c) for n, c in columns.items()}
    return Batch(**joined, targets=targets)
