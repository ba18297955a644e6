"""The student's step weighs by hand-worked alphas, and only what it should."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from distill.cache import SoftTargets
from distill.config.schema import EntropyFactor, LagFactor, ModelConfig, WeightingConfig
from distill.data.join import Batch
from distill.engine.dist import Dist
from distill.model import Transformer
from distill.tracking.meters import Meters
from losses.weighting import LagState
from student.distilling import StudentStep

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
        covered_B=~loss_B.isnan(),
    )


def step(**weighting):
    return StudentStep(Meters("cpu"), 64, WeightingConfig(**weighting), V, steps=10)


def alphas(program, b, at=0):
    program.begin(b, at, ALONE)
    return program.weigh(b)[0].view(-1, S)[:, 0].tolist()


def test_uncovered_samples_fall_to_the_hard_loss():
    assert alphas(step(alpha=0.6), batch([3.0, math.nan])) == pytest.approx([0.6, 0.0])


def test_lag_scales_by_the_best_shard_met_so_far():
    program = step(alpha=0.8, lag=LagFactor(enabled=True, power=1.0))
    best = math.log(V) - 1.0
    assert alphas(program, batch([best, best + 0.5, 9.0])) == pytest.approx([0.8, 0.4, 0.0], rel=1e-5)
    # Met, so it counts from now on also where a batch has only worse ones.
    assert alphas(program, batch([best + 0.5])) == pytest.approx([0.4], rel=1e-5)


def test_entropy_factor_scales_alpha():
    program = step(alpha=1.0, entropy=EntropyFactor(enabled=True, scale=True))
    assert alphas(program, batch([3.0], entropy=math.log(V) / 4)) == pytest.approx([0.25])


def test_the_loss_is_the_weighted_sum_over_valid_tokens_and_state_survives_exactly():
    torch.manual_seed(0)
    net = Transformer(MODEL)
    program, b = step(alpha=0.5, lag=LagFactor(enabled=True, smoothing=0.9)), batch([3.0, math.nan])
    program.begin(b, 0, ALONE)
    loss, routing = program.loss(net, b)
    logp = torch.log_softmax(net.logits(b.ids_BS).double(), -1).flatten(0, 1)
    hard = -logp[torch.arange(2 * S), b.labels_BS.flatten()]
    soft = -(b.targets.probs_TK * logp.gather(-1, b.targets.ids_TK)).sum(-1)
    alpha = torch.tensor([0.5] * S + [0.0] * S)
    want = ((alpha * soft + (1 - alpha) * hard) * b.valid_BS.flatten()).sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert routing.counts_LE.sum() == 2 * S

    program.end(ALONE)
    mean = (hard * b.valid_BS.flatten()).sum().item() / 6
    assert program.lag.student_loss.item() == pytest.approx(0.9 * math.log(V) + 0.1 * mean, rel=1e-6)
    assert program.coverage == 0.5
    other = step(alpha=0.5, lag=LagFactor(enabled=True))
    other.load_state(program.state())
    assert other.lag == program.lag and other.coverage == program.coverage


def test_each_corpus_of_a_mixture_has_its_own_lag():
    torch.manual_seed(0)
    net = Transformer(MODEL)
    weighting = WeightingConfig(alpha=1.0, lag=LagFactor(enabled=True, power=1.0))
    program = StudentStep(Meters("cpu"), 64, weighting, V, 10, corpora=2)
    b = dataclasses.replace(batch([3.0, 0.5, 2.0, 0.25, math.nan]), corpus_B=np.array([0, 1, 0, 1, 1]))
    program.lag = own([4.0, 1.0])
    assert alphas(program, b) == pytest.approx([0.5, 2 / 3, 1.0, 1.0, 0.0])  # (4-3)/(4-2), (1-0.5)/(1-0.25)
    assert program.lag.best_teacher_loss.tolist() == [2.0, 0.25]
    train(program, net, b)
    for corpus, samples in enumerate(([0, 2], [1, 3, 4])):
        alone = step(alpha=1.0, lag=LagFactor(enabled=True, power=1.0))
        alone.lag = own([[4.0], [1.0]][corpus])
        train(alone, net, dataclasses.replace(pick(b, samples), corpus_B=np.zeros(len(samples), np.int64)))
        assert program.lag.student_loss[corpus].item() == pytest.approx(alone.lag.student_loss.item(), rel=1e-6)
        assert program.lag.best_teacher_loss[corpus] == alone.lag.best_teacher_loss
    # A batch without one of the corpora leaves what is known of it alone.
    before = program.lag
    train(program, net, pick(b, [0, 2]))
    assert (
        program.lag.student_loss[1] == before.student_loss[1] and program.lag.student_loss[0] != before.student_loss[0]
    )
    other = StudentStep(Meters("cpu"), 64, weighting, V, 10, corpora=2)
    other.load_state(json.loads(json.dumps(program.state())))
    assert all(torch.equal(x, y) for x, y in zip(other.lag, program.lag))


def own(losses: list[float]) -> LagState:
    return LagState(torch.tensor(losses).double(), torch.full((len(losses),), math.inf).double())


def train(program: StudentStep, net: Transformer, b: Batch) -> None:
    program.begin(b, 0, ALONE)
    program.loss(net, b)
    program.end(ALONE)


def pick(b: Batch, samples: list[int]) -> Batch:
    """Some samples of a batch, as a batch."""
    parts = [b.rows(i, i + 1) for i in samples]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Batch)}
    targets = SoftTargets(*(torch.cat(column) for column in zip(*columns.pop("targets"))))
    del columns["images"], columns["tile_tokens"]
    joined = {n: torch.cat(c) if isinstance(c[0], torch.Tensor) else np.concatenate(c) for n, c in columns.items()}
    return Batch(**joined, targets=targets)
