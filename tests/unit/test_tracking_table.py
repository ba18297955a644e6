import json

import pytest

from distill.tracking import table

SUMMARY = {
    "job": "codistill",
    "teacher_loss": 3.168,
    "distilled_loss": 3.182,
    "hard_loss": 3.299,
    "constant_loss": 3.448,
    "bytes_per_token": 9.83,
    "capture_overhead": 0.031,
    "coverage": 1.0,
    "gap_closed": 0.893,
    "seconds": 623.2,
}

# Worked out by hand: the gap is 3.299 - 3.168 = 0.131; 0.117 / 0.131 = 89 %, -0.149 / 0.131 = -114 %.
TEXT = """\
Distillation closed 89 % of the gap between hard labels and the teacher.

arm         held-out loss    against hard  gap closed
           nats per token  nats per token
─────────────────────────────────────────────────────
teacher             3.168          −0.131
distilled           3.182          −0.117        89 %
hard                3.299
constant            3.448          +0.149      −114 %

job               codistill
cache             9.8 bytes per token
capture overhead  3.1 % of the teacher's step
coverage          100 % of the student's tokens
wall time         10:23 min"""


def test_the_whole_table():
    assert table.render(SUMMARY) == TEXT


def test_an_accuracy_has_a_column_and_the_parts_of_a_mixture_have_none():
    parts = {"main": {"loss": 3.2, "accuracy": 0.3}, "digits": {"loss": 0.2, "accuracy": 0.91}}
    text = table.render(SUMMARY | {"teacher_accuracy": 0.9123, "hard_accuracy": 0.0, "teacher_corpora": parts})
    head, units, rule, teacher, distilled, hard, constant = text.splitlines()[2:9]
    assert head.endswith("gap closed  accuracy") and units.endswith("nats per token") and set(rule) == {"─"}
    assert teacher.endswith("−0.131                  91 %") and hard.endswith("0 %") and len(rule) == len(teacher)
    assert distilled.endswith("89 %") and constant.endswith("−114 %")
    assert "main" not in text and "accuracy" not in text.splitlines()[9:]


def test_a_name_of_ones_own_is_an_arm():
    lines = table.render({"hard_loss": 3.3, "mine_loss": 3.2, "teacher_loss": 3.3 - 0.1 / 0.054}).splitlines()
    rows = [["hard", "3.300"], ["mine", "3.200", "−0.100", "5.4", "%"], ["teacher", "1.448", "−1.852"]]
    assert [line.split() for line in lines[3:6]] == rows


def test_nothing_is_wider_than_80_columns():
    name = "a_very_long_name_of_an_arm_that_nobody_would_give"
    losses = {"teacher_loss": -8.0, "hard_loss": 1.0, f"{name}_loss": 123.456, f"{name}_accuracy": 1.0}
    text = table.render(SUMMARY | losses)
    assert max(map(len, text.splitlines())) <= 80 and "−1361 %" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distilled_loss": 3.310}, "Distillation did harm: 0.011 nats worse than hard labels."),
        ({"distilled_loss": 3.155}, "The student overtook its teacher: distillation closed 110 % of the gap."),
        ({"teacher_loss": 3.400}, "The teacher is no better than hard labels (+0.101 nats): there is no gap to close."),
    ],
)
def test_the_sentence_says_how_it_came_out(changes, words):
    assert table.verdict(SUMMARY | changes) == words


def test_other_jobs():
    assert table.verdict({"job": "teacher", "teacher_loss": 3.1684}) == (
        "The teacher ended at 3.168 nats per token on held-out text."
    )
    text = table.render(
        {"job": "evaluate", "heldout_loss": 2.5, "tokens": 20_480, "accuracy": 0.4449, "extra": {"a": 7}}
    )
    assert text.splitlines() == [
        "2.500 nats per token on held-out text.",
        "",
        "job            evaluate",
        "held-out loss  2.500 nats per token",
        "tokens         20.5k",
        "accuracy       44 % of the tokens",
        "extra.a        7",
    ]


def test_values_that_are_missing_or_not_finite_do_no_harm():
    summary = json.loads(
        '{"teacher_loss": 3.0, "hard_loss": null, "distilled_loss": NaN, "ece": NaN, "agreement": null}'
    )
    assert table.render(summary).splitlines()[0] == "The teacher ended at 3.000 nats per token on held-out text."
    assert table.render({}) == ""


@pytest.mark.parametrize(
    ("teacher", "distilled", "share"), [(2.0, 2.25, 0.75), (2.0, 3.5, -0.5), (3.0, 2.5, None), (3.5, 2.5, None)]
)
def test_the_share_of_a_gap(teacher, distilled, share):
    """None where the teacher is no better than hard labels."""
    *_, row = table.outcomes({"teacher_loss": teacher, "hard_loss": 3.0, "distilled_loss": distilled})
    assert row.gap_closed == share


def test_an_overhead_below_0_is_called_noise():
    assert table.entries({"capture_overhead": -0.055})["capture overhead"] == (
        "−5.5 % of the teacher's step; below 0 is noise of the timing"
    )
    assert table.entries({"capture_overhead": 0.055})["capture overhead"] == "5.5 % of the teacher's step"
