"""Every kind of step, rehearsed on a card that is not there: devices fit, and the host waits where it may and nowhere
else."""

import dataclasses

import numpy as np
import pytest
import torch

from distill.config.registry import PRECISIONS
from distill.config.schema import OptimizerName
from distill.engine import checkpoint
from distill.model import Transformer
from distill.model.decode import generate
from distill.model.precision import numerics_of
from distill.run.models import parts_of
from student.evaluate import evaluate
from teacher.labelling import Own, label
from tests.rehearsal.card import DEVICE
from tests.rehearsal.steps import (
    ALONE,
    B,
    a_batch,
    capture_of,
    configured,
    rehearsed,
    run_of,
    student_trainer,
    teacher_trainer,
    train,
)

HAND_OVER = "teacher/capture.py:_on_host"
PUBLISHING = "teacher/capture.py:Capture._release"
ROW = {"distill/tracking/meters.py:Meters.flush", "distill/engine/watch.py:Watch.problem"}
PICTURES = ("vision@teacher.model.vision=tiny", "vision@student.model.vision=tiny")
PRECISION_NAMES = [name for name in ("fp32", "bf16", "fp8") if name in PRECISIONS.names]
ALL_FACTORS = {
    f"student__weighting__{name}__enabled": True for name in ("lag", "entropy", "disagreement", "variance", "label_gap")
} | {"student__weighting__entropy__skip": 0.1, "student__weighting__entropy__scale": True}
"""Alpha is their product."""
SEVERAL = {
    "accumulation": 2,
    "balance_rate": 1e-3,
    "balance_loss": 0.01,
    "z_loss": 1e-3,
    "activation_checkpointing": True,
}


def of(role, values):
    return {f"{role}__train__{key}": value for key, value in values.items()}


def frozen(config, part):
    """A model of a configuration on the card, as it is loaded there."""
    dtype = numerics_of(config.precision, DEVICE).dtype
    return Transformer(part.model, parts_of(run_of(config))).to(dtype).to(DEVICE)


def one_corpus(batch):
    return dataclasses.replace(batch, corpus_B=np.zeros(B, np.int64))


def teach(*arguments, steps=1, **values):
    config = configured(*arguments, **{"precision__name": "bf16"} | values)
    with rehearsed() as card:
        trainer = teacher_trainer(config)
        train(card, trainer, one_corpus(a_batch(config.teacher.model.vision)), steps)
    return card.waited


def learn(*arguments, codec="systematic", live=False, **values):
    """A student's step; codec: of the cache that it reads, "": none."""
    config = configured(*arguments, **{"precision__name": "bf16"} | values)
    with rehearsed() as card:
        teacher = Own(frozen(config, config.teacher)) if live else None
        trainer = student_trainer(config, codec, teacher)
        train(card, trainer, a_batch(config.student.model.vision, covered=bool(codec)))
    return card.waited


@pytest.mark.parametrize("codec", ["systematic", "multinomial", "threshold", "topk"])
def test_a_teacher_captures(codec):
    assert teach(cache__codec__name=codec, steps=2) == {HAND_OVER, PUBLISHING, *ROW}


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_a_teacher_in_every_precision(precision):
    assert teach(precision__name=precision) == {HAND_OVER, *ROW}


def test_fp8_by_tensor_with_all_products_in_it():
    assert teach(precision__name="fp8", precision__recipe="tensor", precision__grad_weight="fp8") > ROW


def test_a_teacher_that_accumulates_balances_and_checkpoints_activations():
    assert teach(**of("teacher", SEVERAL)) == {HAND_OVER, *ROW}


def test_a_teacher_that_sees_pictures():
    assert teach(*PICTURES, teacher__train__accumulation=2) == {HAND_OVER, *ROW}


def test_a_teacher_without_capture_waits_for_its_row_of_metrics_alone():
    assert teach(teacher__capture=False, teacher__optim__optimizer=OptimizerName.sgd) == ROW


@pytest.mark.parametrize("weighting", ["constant", "hard", "lag", "wsd"])
def test_a_student_of_every_weighting(weighting):
    assert learn(f"weighting@student.weighting={weighting}") == ROW


def test_between_rows_of_metrics_a_student_waits_for_nothing():
    assert learn(student__train__log_every=5, **ALL_FACTORS) == set()
    assert teach(teacher__train__log_every=5, steps=2) == {HAND_OVER, PUBLISHING}


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_a_student_whose_weight_is_the_product_of_all_factors(precision):
    assert learn(precision__name=precision, **ALL_FACTORS) == ROW


def test_a_student_with_a_factor_of_its_user():
    plugins = {"shard_lag": {"power": 1.0, "smoothing": 0.9}}
    assert learn(student__weighting__plugins=plugins) == {*ROW, "student/checked_factor.py:CheckedFactor.problem"}


def test_a_student_on_labels_alone():
    assert learn(codec="") == ROW


def test_a_student_that_accumulates_balances_and_checkpoints_activations():
    assert learn(**of("student", SEVERAL)) == ROW


def test_a_student_that_sees_pictures():
    assert learn(*PICTURES, student__train__accumulation=2) == ROW


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jensen_shannon", "alpha_beta"])
def test_a_student_of_losses_of_the_bucket(loss):
    assert learn(codec="topk", student__loss=loss) == ROW


def test_a_student_beside_a_live_teacher():
    values = {"student__loss": "reverse_kl", "student__hidden_match": 0.1, "student__train__accumulation": 2}
    assert learn(*PICTURES, codec="", live=True, **values, **ALL_FACTORS) == ROW


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_an_evaluation_waits_at_its_end(precision):
    config = configured(precision__name=precision)
    with rehearsed() as card:
        model, teacher = frozen(config, config.student), frozen(config, config.teacher)
        batch = one_corpus(a_batch())
        with card.step():
            evaluate(model, [batch, batch], ["main"], ALONE, teacher=teacher)
    assert card.waited == {"student/evaluate.py:_on_host"}


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_a_backfill_waits_for_its_targets_alone(precision):
    config = configured(precision__name=precision)
    with rehearsed() as card:
        teacher, capture = Own(frozen(config, config.teacher)), capture_of(config, None)
        batch = one_corpus(a_batch())
        with card.step():
            label(teacher, batch.to(DEVICE), 4096, capture)
    assert card.waited == {HAND_OVER}


@pytest.mark.parametrize("precision", PRECISION_NAMES)
def test_a_generation_waits_at_its_end_and_to_see_whether_all_rows_have_ended(precision):
    config = configured(precision__name=precision)
    prompts = [torch.arange(70), torch.arange(5)]
    with rehearsed() as card:
        model = frozen(config, config.student)
        with card.step():
            generate(model, prompts, 3, temperature=0.7, top_p=0.9)
        assert card.waited == {"distill/model/decode.py:_cut"}
        with card.step():
            generate(model, prompts, 3, eos_ids=[1])
        assert card.waited == {"distill/model/decode.py:_cut", "distill/model/decode.py:_all"}


def test_a_checkpoint_of_what_is_on_the_card(tmp_path):
    with rehearsed() as card:
        trainer = teacher_trainer(configured(precision__name="bf16"))
        with card.step():
            checkpoint.save(tmp_path, 1, {"teacher": trainer.engine}, {}, ALONE, 1, trainer.hand_over())
    assert card.waited == {"distill/engine/checkpoint.py:_on_host", PUBLISHING}
    assert checkpoint.newest(tmp_path).tensors("teacher")
