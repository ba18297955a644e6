"""The student's recipe weighs by hand-worked alphas, and only what it should."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from distill.cache import SoftTargets
from distill.config.schema import EntropyFactor, LagFactor, ModelConfig, Schedule, StudentConfig, WeightingConfig
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.model import Transformer
from student.distilling import StudentRecipe

V, S = 32, 4
ALONE = Dist(0, 1, torch.device("cpu"))
MODEL = ModelConfig(
    vocab_size=V, hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, expert_hidden=16, dense_hidden=16,
    experts=2, chunk_size=8,
)  # fmt: skip


def batch(shard_loss, entropy=2.0):
    """One sample per shard loss (nan: no targets); the last position of each carries no loss."""
    g = torch.Generator().manual_seed(0)
    size = len(shard_loss)
    loss_B = torch.tensor(shard_loss)
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
    )


def recipe(corpora=1, **weighting):
    return StudentRecipe(StudentConfig(MODEL, weighting=WeightingConfig(**weighting)), ALONE, 10, corpora)


def alphas(student, b, step=0):
    plan = student.begin(b, step)
    student.weighting_state = plan.state
    return student.weigh(b, plan).alpha_T.view(-1, S)[:, 0].tolist()


def lag_of(student):
    return student.weighting_state["lag"]


def test_uncovered_samples_fall_to_the_hard_loss():
    assert alphas(recipe(alpha=0.6), batch([3.0, math.nan])) == pytest.approx([0.6, 0.0])


def test_lag_scales_by_the_best_shard_so_far():
    student = recipe(alpha=0.8, lag=LagFactor(enabled=True, power=1.0))
    best = math.log(V) - 1.0
    assert alphas(student, batch([best, best + 0.5, 9.0])) == pytest.approx([0.8, 0.4, 0.0], rel=1e-5)
    # It counts from now on also where a batch has only worse ones.
    assert alphas(student, batch([best + 0.5])) == pytest.approx([0.4], rel=1e-5)


def test_entropy_factor_scales_alpha():
    student = recipe(alpha=1.0, entropy=EntropyFactor(enabled=True, scale=True))
    assert alphas(student, batch([3.0], entropy=math.log(V) / 4)) == pytest.approx([0.25])


def test_alpha_follows_its_schedule():
    student = recipe(alpha=0.8, schedule=Schedule.linear, final_alpha=0.3)
    assert [alphas(student, batch([3.0]), step)[0] for step in (0, 5)] == pytest.approx([0.8, 0.55])


def test_the_loss_is_the_weighted_sum_over_valid_tokens_and_state_survives_exactly():
    torch.manual_seed(0)
    net = Transformer(MODEL)
    student, b = recipe(alpha=0.5, lag=LagFactor(enabled=True, smoothing=0.9)), batch([3.0, math.nan])
    plan = student.begin(b, 0)
    out = student.forward(net, b, plan)
    logp = torch.log_softmax(net.logits(b.ids_BS).double(), -1).flatten(0, 1)
    hard = -logp[torch.arange(2 * S), b.labels_BS.flatten()]
    soft = -(b.targets.probs_TK * logp.gather(-1, b.targets.ids_TK)).sum(-1)
    alpha = torch.tensor([0.5] * S + [0.0] * S)
    want = ((alpha * soft + (1 - alpha) * hard) * b.valid_BS.flatten()).sum()
    assert out.loss_sum.item() == pytest.approx(want.item(), rel=1e-5)
    assert out.routing.counts_LE.sum() == 2 * S
    means = {name: float(mean.sum / mean.weight) for name, mean in out.means.items()}
    assert means["hard_loss"] == pytest.approx((hard * b.valid_BS.flatten()).sum().item() / 6, rel=1e-5)
    assert means["coverage"] == 0.5 and means["mass"] == pytest.approx(0.9) and means["lag_factor"] == 1.0
    assert out.histograms["alpha"].sum() == 6

    student.end(plan, [out.result])
    mean = (hard * b.valid_BS.flatten()).sum().item() / 6
    assert lag_of(student)["student_loss"].item() == pytest.approx(0.9 * math.log(V) + 0.1 * mean, rel=1e-6)
    assert student.coverage == 0.5
    other = recipe(alpha=0.5, lag=LagFactor(enabled=True))
    other.load_state(json.loads(json.dumps(student.state())))
    assert other.weighting_state == student.weighting_state and other.coverage == student.coverage


def test_each_corpus_of_a_mixture_has_its_own_lag():
    torch.manual_seed(0)
    net = Transformer(MODEL)
    lag = {"alpha": 1.0, "lag": LagFactor(enabled=True, power=1.0)}
    student = recipe(2, **lag)
    b = dataclasses.replace(batch([3.0, 0.5, 2.0, 0.25, math.nan]), corpus_B=np.array([0, 1, 0, 1, 1]))
    student.weighting_state = own([4.0, 1.0])
    assert alphas(student, b) == pytest.approx([0.5, 2 / 3, 1.0, 1.0, 0.0])  # (4-3)/(4-2), (1-0.5)/(1-0.25)
    assert lag_of(student)["best_teacher_loss"].tolist() == [2.0, 0.25]
    train(student, net, b)
    for corpus, samples in enumerate(([0, 2], [1, 3, 4])):
        alone = recipe(**lag)
        alone.weighting_state = own([[4.0], [1.0]][corpus])
        train(alone, net, dataclasses.replace(pick(b, samples), corpus_B=np.zeros(len(samples), np.int64)))
        for name in ("student_loss", "best_teacher_loss"):
            assert lag_of(student)[name][corpus].item() == pytest.approx(lag_of(alone)[name].item(), rel=1e-6)
    # A batch without one of the corpora leaves its part of the state alone.
    before = lag_of(student)["student_loss"]
    train(student, net, pick(b, [0, 2]))
    after = lag_of(student)["student_loss"]
    assert after[1] == before[1] and after[0] != before[0]
    other = recipe(2, **lag)
    other.load_state(json.loads(json.dumps(student.state())))
    assert all(torch.equal(lag_of(other)[name], part) for name, part in lag_of(student).items())


def own(losses):
    best = torch.full((len(losses),), math.inf).double()
    return {"lag": {"student_loss": torch.tensor(losses).double(), "best_teacher_loss": best}}


def train(student, net, b):
    plan = student.begin(b, 0)
    student.end(plan, [student.forward(net, b, plan).result])


def pick(b: Batch, samples: list[int]) -> Batch:
    """Some samples of a batch, as a batch."""
    parts = [b.rows(i, i + 1) for i in samples]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Batch)}
    targets = SoftTargets(*(torch.cat(column) for column in zip(*columns.pop("targets"))))
    del columns["images"], columns["tile_tokens"], columns["teacher_TE"]
    joined = {n: torch.cat(c) if isinstance(c[0], torch.Tensor) else np.concatenate(c) for n, c in columns.items()}
    return Batch(**joined, targets=targets)
