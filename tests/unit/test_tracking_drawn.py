"""What a chart of the report draws is what its rows hold, or its note says what it leaves out."""

import numpy as np
import pytest

from distill.config.schema import ConsoleMode, TrackingConfig
from distill.tracking.tracker import Tracker
from tests.unit.test_tracking_report import CONFIG, values, written


@pytest.mark.parametrize("every", [1, 5])
def test_a_map_and_its_mean_are_of_the_same_rows(tmp_path, every):
    """Of ten rows; alpha falls to 0 and comes back between two histograms of every fifth row."""
    config = TrackingConfig(console=ConsoleMode.off, histogram_every=every)
    with Tracker(tmp_path, config, {}) as tracker:
        for step in range(1, 11):
            alpha, counts = (0.0, [9.0, 0, 0, 0, 1]) if 2 <= step <= 5 else (0.8, [1.0, 0, 0, 0, 9])
            tracker.log("student", step, {"alpha": alpha}, {"alpha": counts})
    chart = written(tmp_path).chart("Alpha over time: student")
    steps, means = chart.curves["mean"]
    assert list(steps) == list(range(1, 11, every))
    cells = chart.trace("heatmap")
    np.testing.assert_allclose(values(cells["x"]), [0, *steps])
    np.testing.assert_allclose(values(cells["customdata"])[4], [90 if mean > 0 else 10 for mean in means])


@pytest.mark.parametrize("rows", [49, 200])
def test_first_points_are_on_the_chart_or_named_beside_it(tmp_path, rows):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in range(1, rows + 1):
            tracker.log("teacher", step, {"loss": 2.0 + 3.5 / step})
    page = written(tmp_path)
    chart = page.chart("Training loss")
    (note,) = [p["text"] for p in page.all("p") if "What is minimized" in p["text"]]
    assert (chart.layout["yaxis"]["range"][1] < 5.5) == (rows == 200)
    assert note.endswith("The axis leaves out first steps and spikes, up to 5.5.") == (rows == 200)


def test_a_small_share_has_no_exponent_in_the_legend(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in (1, 2):
            tracker.log("student", step, {"stall": 6.95e-5, "lr": 6.95e-5})
    page = written(tmp_path)
    legends = {title: [t["name"] for t in chart.traces if t.get("showlegend")] for title, chart in page.charts.items()}
    assert legends["Waiting for data share of the time"] == ["student <b>0.0001</b>"]
    assert legends["Learning rate "] == ["student <b>6.95e-05</b>"]
