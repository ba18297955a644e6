"""The report's charts of length: cells and marks lie where the numbers say."""

import json

import numpy as np
import pytest

from student.positions import STARTS
from tests.unit.test_tracking_report import written

LOSS = {
    "first": STARTS[:30],
    "last": [start - 1 for start in STARTS[1:31]],
    "loss": [3 + 1 / (1 + start) for start in STARTS[:30]],
    "tokens": [5] * 30,
    "chunk_size": 64,
    "trained_tokens": 256,
}
NEEDLE = {
    "lengths": [512, 64, 256],
    "depths": [0.0, 0.5],
    "accuracy": [[0.05, 0.5], [1.0, 0.75], [0.95, 0.0]],
    "accuracy_by_length": [0.3, 0.9, 0.5],
    "trials": 20,
    "facts": 4,
    "chunk_size": 64,
    "trained_tokens": 256,
}


def report_of(folder, **entries):
    summary = {"job": "evaluate", "heldout_loss": 2.5, "needle_accuracy": 0.987, **entries}
    (folder / "summary.json").write_text(json.dumps(summary))
    return written(folder)


def test_loss_by_position_is_drawn_over_the_logarithm_of_the_position(tmp_path):
    figure = report_of(tmp_path, loss_by_position=LOSS).figure("Loss by position")
    (plot,), (line,) = figure.all("div", "plot"), figure.all("polyline")
    left, right, low, high = (float(plot[f"data-{name}"]) for name in ("left", "right", "low", "high"))
    points = np.array([[float(v) for v in pair.split(",")] for pair in line["points"].split()]) / 1000
    positions = left * (right / left) ** points[:, 0]
    first, last = np.array(LOSS["first"]) + 1, np.array(LOSS["last"]) + 1
    assert (positions >= first * 0.99).all() and (positions <= last * 1.01).all()
    np.testing.assert_allclose(high - points[:, 1] * (high - low), LOSS["loss"], atol=2e-3)

    def place(mark):
        return left * (right / left) ** (float(mark["x1"].rstrip("%")) / 100)

    borders = [place(mark) for mark in figure.all("line", "border")]
    end = LOSS["last"][-1]
    assert borders == pytest.approx([*range(65, end, 64)][:8] + ([257] if end > 256 else []), rel=1e-2)
    assert [place(mark) for mark in figure.all("line", "strong")] == pytest.approx([257] if end > 256 else [], rel=1e-2)


def test_the_trained_length_is_marked_only_where_the_chart_goes_beyond(tmp_path):
    figure = report_of(tmp_path, loss_by_position=LOSS | {"trained_tokens": 10**6, "chunk_size": None})
    assert not figure.figure("Loss by position").all("line", "border")


def test_every_cell_of_the_grid_shows_its_share(tmp_path):
    page = report_of(tmp_path, needle=NEEDLE, loss_by_position=LOSS)
    figure = page.figure("Needle in a haystack")
    # By depth, then by length, shortest first.
    assert [cell["text"] for cell in figure.all("text", "cell")] == ["100 %", "95 %", "5.0 %", "75 %", "0 %", "50 %"]
    assert [float(cell["fill-opacity"]) for cell in figure.all("rect")] == [1.0, 0.95, 0.05, 0.75, 0.0, 0.5]
    assert [text["text"] for text in figure.all("text", "x")] == ["64", "256", "512"]
    assert [text["text"] for text in figure.all("text", "y")] == ["0 %", "50 %"]
    corners = [(float(cell["x"].rstrip("%")), float(cell["y"].rstrip("%"))) for cell in figure.all("rect")]
    np.testing.assert_allclose(corners, [(x, y) for y in (0, 50) for x in (0, 33.33, 66.67)], atol=0.01)
    (border,) = figure.all("line", "border")
    assert float(border["x1"].rstrip("%")) == pytest.approx(66.67, abs=0.01)  # 64 and 256 were trained
    assert "4 facts" in page.all("figcaption")[1]["text"]
    # Charts are no facts to be listed.
    assert [fact["text"] for fact in page.all("dd")] == ["2.500 nats per token", "99 % within the trained length"]


@pytest.mark.parametrize("trained, borders", [(10**6, 0), (1, 0), (64, 1)])
def test_no_border_stands_at_an_edge(tmp_path, trained, borders):
    figure = report_of(tmp_path, needle=NEEDLE | {"trained_tokens": trained}).figure("Needle in a haystack")
    assert len(figure.all("line", "border")) == borders


@pytest.mark.parametrize(
    "broken", [{}, [], None, {"first": [1]}, LOSS | {"loss": ["x"] * 30}, NEEDLE | {"accuracy": []}]
)
def test_what_is_not_sound_is_left_out(tmp_path, broken):
    page = report_of(tmp_path, loss_by_position=broken, needle=broken)
    assert not page.all("figure") and page.all("p", "verdict")
