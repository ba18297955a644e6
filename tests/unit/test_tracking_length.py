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


def lines(chart):
    """x of the vertical lines, thin ones and strong ones."""
    assert all(shape["x0"] == shape["x1"] for shape in chart.layout.get("shapes", []))
    return [
        [shape["x0"] for shape in chart.layout.get("shapes", []) if shape["line"]["width"] == width] for width in (1, 2)
    ]


def test_loss_by_position_is_drawn_over_the_logarithm_of_the_position(tmp_path):
    chart = report_of(tmp_path, loss_by_position=LOSS).chart("Loss by position")
    positions, loss = chart.curves["held-out loss"]
    assert chart.layout["xaxis"]["type"] == "log"
    first, last = np.array(LOSS["first"]) + 1, np.array(LOSS["last"]) + 1
    assert (positions >= first).all() and (positions <= last).all()
    np.testing.assert_allclose(loss, LOSS["loss"], atol=1e-6)
    borders, trained = lines(chart)
    end = LOSS["last"][-1]
    assert borders == [*range(65, end, 64)][:8] and trained == ([257] if end > 256 else [])


def test_the_trained_length_is_marked_only_where_the_chart_goes_beyond(tmp_path):
    page = report_of(tmp_path, loss_by_position=LOSS | {"trained_tokens": 10**6, "chunk_size": None})
    assert lines(page.chart("Loss by position")) == [[], []]


def test_every_cell_of_the_grid_shows_its_share(tmp_path):
    page = report_of(tmp_path, needle=NEEDLE, loss_by_position=LOSS)
    chart = page.chart("Needle in a haystack")
    cells = chart.trace("heatmap")
    # By depth, then by length, shortest first.
    assert cells["text"] == [["100 %", "95 %", "5.0 %"], ["75 %", "0 %", "50 %"]]
    assert cells["z"] == [[1.0, 0.95, 0.05], [0.75, 0.0, 0.5]] and (cells["zmin"], cells["zmax"]) == (0, 1)
    assert cells["x"] == ["64", "256", "512"] and cells["y"] == ["0 %", "50 %"]
    assert lines(chart) == [[], [1.5]]  # 64 and 256 were trained
    assert "4 facts" in page.all("figcaption")[1]["text"]
    # Charts are no entries to be listed.
    assert [entry["text"] for entry in page.all("dd")] == ["2.500 nats per token", "99 % within the trained length"]


@pytest.mark.parametrize("trained, borders", [(10**6, 0), (1, 0), (64, 1)])
def test_no_border_is_drawn_at_an_edge(tmp_path, trained, borders):
    chart = report_of(tmp_path, needle=NEEDLE | {"trained_tokens": trained}).chart("Needle in a haystack")
    assert len(lines(chart)[1]) == borders


@pytest.mark.parametrize(
    "broken", [{}, [], None, {"first": [1]}, LOSS | {"loss": ["x"] * 30}, NEEDLE | {"accuracy": []}]
)
def test_what_is_not_sound_is_left_out(tmp_path, broken):
    page = report_of(tmp_path, loss_by_position=broken, needle=broken)
    assert not page.all("figure") and page.all("p", "verdict")


def test_the_legend_has_no_number_beside_the_headline(tmp_path):
    """The last bucket's loss is another one than that of the held-out text."""
    chart = report_of(tmp_path, loss_by_position=LOSS).chart("Loss by position")
    assert [trace["name"] for trace in chart.traces if trace.get("showlegend")] == ["held-out loss"]
