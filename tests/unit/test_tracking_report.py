import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from distill.config.schema import ConsoleMode, TrackingConfig
from distill.tracking import charts, report, thinning
from distill.tracking.tracker import Tracker

CONFIG = TrackingConfig(console=ConsoleMode.off)
HOSTILE = "</script><script>alert(1)</script> & \"quotes\" 'too' <b>"


class Page(HTMLParser):
    """Every element with its attributes and the text below it; fails on tags that do not close in order."""

    VOID = ("meta", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.links = [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], [element["tag"] for element in self.open]

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data", "poster", "srcset")]
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, (tag, self.getpos())
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, kind=""):
        return [
            e for e in self.elements if e["tag"] == tag and set(kind.split()) <= set((e.get("class") or "").split())
        ]

    @property
    def charts(self):
        """All charts, by title."""
        titles, figures = self.all("h3"), [e for e in self.all("script") if e.get("type") == "application/json"]
        assert len(titles) == len(figures) == len(self.all("div", "plot"))
        return {t["text"]: Chart(json.loads(f["text"])) for t, f in zip(titles, figures, strict=True)}

    def chart(self, title):
        """The only chart whose title begins so."""
        (found,) = [chart for text, chart in self.charts.items() if text.startswith(title)]
        return found


class Chart:
    """What plotly is given."""

    def __init__(self, figure):
        self.layout, self.traces = figure["layout"], figure["data"]

    @property
    def curves(self):
        """x and y of the traces in the legend, by label."""
        shown = [trace for trace in reversed(self.traces) if trace.get("showlegend")]
        return {trace["legendgroup"]: (values(trace["x"]), values(trace["y"])) for trace in shown}

    @property
    def legend(self):
        return [trace["name"] for trace in reversed(self.traces) if trace.get("showlegend")]

    @property
    def ends(self):
        """The point of each arm that is drawn apart, by label."""
        apart = [trace for trace in reversed(self.traces) if trace.get("line", {}).get("dash") == "dot"]
        return {
            trace["legendgroup"]: (values(trace["x"])[1], values(trace["y"])[1])
            for trace in apart
            if not trace.get("showlegend")
        }

    def trace(self, kind):
        (found,) = [trace for trace in self.traces if trace["type"] == kind]
        return found


def values(array):
    """Numbers as plotly has them: a list, or the bytes of an array."""
    if isinstance(array, list):
        return np.array(array)
    flat = np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])
    return flat.reshape([int(size) for size in array["shape"].split(",")]) if "shape" in array else flat


def train(folder, job="student", steps=50, alpha=True, tokens=True):
    with Tracker(folder, CONFIG, {}, resume_steps=None if not folder.exists() else {"teacher": 10**9}) as tracker:
        for step in range(1, steps + 1):
            row = {"loss": 3 + 1 / step, "hard_loss": 3 + 2 / step, "lr": 1e-3, "grad_norm": 1.0}
            row |= {"tokens": 512 * step} if tokens else {}
            row |= {"heldout_loss": 3 + 1 / step} if step % 10 == 0 else {}
            row |= {"alpha": 0.25, "coverage": 1.0} if alpha else {}
            tracker.log(job, step, row, {"alpha": [0.0] * 5 + [30.0, 10.0] + [0.0] * 13} if alpha else None)


def full_run(folder):
    train(folder, "teacher", alpha=False)
    train(folder, "student")
    train(folder / "arms" / "hard", alpha=False)
    train(folder / "arms" / "constant")
    (folder / "config.yaml").write_text(f"job: codistill\nname: {HOSTILE}\n")
    summary = {"job": "codistill", "teacher_loss": 3.168, "distilled_loss": 3.218, "hard_loss": 3.299}
    (folder / "summary.json").write_text(json.dumps(summary | {"constant_loss": 3.448, "bytes_per_token": 9.83}))


def written(folder):
    path = report.write(folder)
    assert path == folder / "report.html" and not path.with_name("report.html.new").exists()
    return Page(path.read_text(encoding="utf-8"))


def test_a_full_run(tmp_path):
    full_run(tmp_path)
    page = written(tmp_path)
    (verdict,) = page.all("p", "verdict")
    assert verdict["text"] == "Distillation closed 62 % of the gap between hard labels and the teacher."
    assert [cell["text"] for cell in page.all("td")] == [
        "teacher", "3.168", "−0.131", "",
        "distilled", "3.218", "−0.081", "62 %",
        "hard", "3.299", "", "",
        "constant", "3.448", "+0.149", "−114 %",
    ]  # fmt: skip
    assert "9.8 bytes per token" in [cell["text"] for cell in page.all("dd")]

    held_out = page.chart("Loss on held-out text")
    assert sorted(held_out.curves) == ["constant", "distilled", "hard", "teacher"]
    assert held_out.legend == [
        "teacher <b>3.168</b>", "distilled <b>3.218</b>", "hard <b>3.299</b>", "constant <b>3.448</b>"
    ]  # fmt: skip
    assert all(len(x) == 4 for x, _ in held_out.curves.values())
    assert list(page.chart("Mean alpha").curves) == ["distilled", "constant"]
    # One color for an arm wherever it appears.
    colors = {(t["legendgroup"], t["line"]["color"]) for c in page.charts.values() for t in c.traces if "line" in t}
    assert len({pair for pair in colors if pair[0] != "mean"}) == 4


def test_held_out_curves_end_at_the_last_step_with_the_loss_of_the_table(tmp_path):
    full_run(tmp_path)
    settings = "".join(f"{role}:\n  train:\n    eval_samples: 64\n" for role in ("teacher", "student"))
    (tmp_path / "config.yaml").write_text(f"{settings}evaluate:\n  samples: 512\n")
    page = written(tmp_path)
    ends = page.chart("Loss on held-out text").ends
    assert {label: x for label, (x, _) in ends.items()} == dict.fromkeys(ends, 512 * 50)
    losses = {"teacher": 3.168, "distilled": 3.218, "hard": 3.299, "constant": 3.448}
    assert {label: y for label, (_, y) in ends.items()} == pytest.approx(losses)
    note = page.all("figcaption")[0]["text"]
    assert "Dots: 64 held-out samples. The diamond at the end, as the table: 512 samples." in note


def test_each_corpus_of_a_mixture_has_its_held_out_charts(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in (1, 2, 3):
            tracker.log("teacher", step, {"heldout_loss": 3.0, "heldout_loss/a": 2.0, "heldout_accuracy/a": 0.5})
    corpora = {"a": {"loss": 1.5, "accuracy": 0.6}}
    (tmp_path / "summary.json").write_text(json.dumps({"teacher_loss": 2.9, "teacher_corpora": corpora}))
    page = written(tmp_path)
    assert [section["text"] for section in page.all("h2")] == ["Held-out loss"]
    assert page.chart("Loss on held-out text: a").ends == {"teacher": pytest.approx((3, 1.5))}
    assert page.chart("Accuracy on held-out text: a").ends == {"teacher": pytest.approx((3, 0.6))}


def test_what_a_weighting_is_made_of_stands_beside_alpha(tmp_path):
    logged = {
        "alpha": 0.5,
        "alpha/a": 0.4,
        "variance_factor": 0.6,
        "student_place": 3.0,
        "hard_loss/a": 2.0,
        "own": 1.0,
    }
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in (1, 2, 3):
            tracker.log("student", step, {name: value / step for name, value in logged.items()})
    page = written(tmp_path)
    assert [section["text"] for section in page.all("h2")] == [
        "Training loss",
        "Weighting and targets",
        "Further metrics",
    ]
    assert list(page.charts) == [
        "Hard loss: a nats per token", "Mean alpha share of the soft term", "Student's place nats",
        "Mean alpha: a share of the soft term", "Variance factor mean of a token's", "own ",
    ]  # fmt: skip


def test_what_is_switched_off_has_no_curve_and_no_chart(tmp_path):
    off = {"coverage": 1.0, "mass": 1.0 + 1e-7, "dead_experts": 0.0, "balance_loss": 0.0, "skipped_samples": 0.0}
    for arm, factor in (("plain", 1.0), ("lagging", 0.5)):
        with Tracker(tmp_path / "arms" / arm, CONFIG, {}) as tracker:
            for step in (1, 2, 3):
                tracker.log("student", step, off | {"loss": 3.0, "lag_factor": factor})
    assert {text: list(chart.curves) for text, chart in written(tmp_path).charts.items()} == {
        "Training loss nats per token": ["lagging", "plain"],
        "Lag factor 1 for the best targets": ["lagging"],
    }


def test_nothing_is_fetched(tmp_path):
    full_run(tmp_path)
    page, html = written(tmp_path), (tmp_path / "report.html").read_text()
    assert page.links == [] and not page.all("link") and not page.all("img")
    # What plotly's script does is tested in a browser.
    own = html.replace(get_plotlyjs(), "")
    assert len(own) < len(html) and not re.search(r"https?://|@import|url\(|//[a-z]|fetch\(|import\(", own)


def test_hostile_words_stay_words(tmp_path):
    full_run(tmp_path)
    (tmp_path / "arms" / "hard").rename(tmp_path / "arms" / "<img onerror=x>")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            file.write(json.dumps({"job": "teacher", "step": step, "<i>odd</i>": step}) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"<u>": "<s>", "job": "<q>", "<em>_loss": 3.0}))
    page = written(tmp_path)
    assert len([script for script in page.all("script") if "type" not in script]) == 2
    assert not {"img", "u", "s", "q", "em"} & {element["tag"] for element in page.elements}
    assert HOSTILE in page.all("pre")[0]["text"]
    assert list(page.chart("<i>odd</i>").curves) == ["teacher"]
    labels = [trace["legendgroup"] for trace in page.chart("Training loss").traces]
    assert "&lt;img onerror=x&gt;" in labels and "<img onerror=x>" not in labels


def test_points_are_the_numbers(tmp_path):
    train(tmp_path, "teacher", alpha=False)
    x, y = written(tmp_path).chart("Loss on held-out text").curves["teacher"]
    steps = np.arange(10, 51, 10)
    np.testing.assert_allclose(x, 512 * steps)
    np.testing.assert_allclose(y, 3 + 1 / steps, atol=1e-6)


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
def test_points_that_a_logarithmic_axis_has_no_place_for_are_left_out(log):
    x = np.array([0.0, 3, 20, 1e3, 5e6])
    y = np.array([4.0, 700, 20, 2.5, 0.03])
    curve = charts.Curve("arm", 1, x, y)
    frame = charts.Frame("A law", "nats", "parameters")
    chart = Page(
        charts.line_chart(frame, [curve], smoothed=False, zero=False, log_x="x" in log, log_y="y" in log)
    ).chart("A law")
    kept = x > 0 if "x" in log else np.ones(5, bool)
    np.testing.assert_allclose(chart.curves["arm"], (x[kept], y[kept]), rtol=1e-6)
    for axis, numbers in (("x", x[kept]), ("y", y[kept])):
        low, high = chart.layout[f"{axis}axis"]["range"]
        assert (chart.layout[f"{axis}axis"].get("type") == "log") == (axis in log)
        if axis in log:
            low, high = 10**low, 10**high
            assert len(chart.layout[f"{axis}axis"]["tickvals"]) >= 3
        assert low <= numbers.min() and high >= numbers.max()


def test_a_curve_without_a_positive_point_has_no_place_on_a_logarithmic_axis():
    curves = [
        charts.Curve(name, 0, np.array([1.0, 2.0]), np.array(y)) for name, y in (("a", [0.0, 0]), ("b", [1.0, 2]))
    ]
    frame = charts.Frame("A law", "nats", "parameters")
    page = Page(charts.line_chart(frame, curves, smoothed=False, zero=False, log_y=True))
    assert list(page.chart("A law").curves) == ["b"]
    assert charts.line_chart(frame, curves[:1], smoothed=False, zero=False, log_y=True) == ""


def test_heat_map_cells(tmp_path):
    train(tmp_path)
    chart = written(tmp_path).chart("Alpha over time: student")
    cells = chart.trace("heatmap")
    shares = values(cells["customdata"]) / 100
    # Each of 50 rows has a histogram, with two bins that are not empty.
    assert shares.shape == (20, 50) and np.count_nonzero(shares) == 50 * 2
    np.testing.assert_allclose(shares[5:7], [[0.75] * 50, [0.25] * 50])
    np.testing.assert_allclose(values(cells["z"]) ** 2, shares, atol=1e-6)
    np.testing.assert_allclose(values(cells["x"]), 512 * np.arange(51))
    np.testing.assert_allclose(values(cells["y"])[5:8], [0.25, 0.3, 0.35])
    assert "± 0.025<br>" in cells["hovertemplate"] and list(chart.curves) == ["mean"]


def test_a_heat_map_has_its_name_in_words(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in range(1, 4):
            tracker.log("student", step, {"loss": 4.0}, {"lag_factor": [1.0, step, 0.0]})
    assert written(tmp_path).chart("Lag factor over time")


def test_a_heat_map_of_one_value_is_not_drawn(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in range(1, 50):
            tracker.log("student", step, {"alpha": 0.4}, {"alpha": [0.0, 40.0, 0.0]})
    assert list(written(tmp_path).charts) == ["Mean alpha share of the soft term"]


def test_long_runs_are_thinned(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(
                json.dumps({"job": "teacher", "step": step, "loss": 3.0, "lr": 1e-3 if step != 777 else 5e-3}) + "\n"
            )
    with (tmp_path / "histograms.jsonl").open("w") as file:
        for step in range(1, 2_001):
            file.write(json.dumps({"job": "teacher", "step": 10 * step, "name": "alpha", "counts": [1, 1]}) + "\n")
    page = written(tmp_path)
    points = [len(values(t["x"])) for chart in page.charts.values() for t in chart.traces if t["type"] == "scatter"]
    assert max(points) == 600 and len(page.chart("Training loss").curves["teacher"][0]) == 600
    assert values(page.chart("Alpha over time").trace("heatmap")["z"]).shape == (2, 100)
    assert (tmp_path / "report.html").stat().st_size < len(get_plotlyjs()) + 100_000
    assert page.chart("Learning rate").curves["teacher"][1].max() == pytest.approx(5e-3)


def test_steps_are_the_axis_where_an_arm_does_not_know_its_tokens(tmp_path):
    train(tmp_path, "teacher", tokens=False)
    page = written(tmp_path)
    assert page.all("p", "x-unit")[0]["text"] == "steps"
    assert page.chart("Loss on held-out text").layout["xaxis"]["range"] == pytest.approx([0, 50], rel=0.02)


def test_rows_without_tokens_find_their_place_between_others(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in (10, 20):
            tracker.log("teacher", step, {"tokens": 100 * step})
            tracker.log("teacher", step + 5, {"heldout_loss": 3.0 - step / 100})
        tracker.log("teacher", 30, {"tokens": 3000})
    x, _ = written(tmp_path).chart("Loss on held-out text").curves["teacher"]
    assert x == pytest.approx([1500, 2500])


@pytest.mark.parametrize("words", ["", '{"job": "teacher", "st', '[1]\n{"step": "x"}\n{"job": 3, "step": 1}\n'])
def test_an_empty_folder_and_torn_files(tmp_path, words):
    for name in ("metrics.jsonl", "histograms.jsonl", "summary.json"):
        (tmp_path / name).write_text(words)
    page = written(tmp_path)
    assert page.all("p", "verdict")[0]["text"] == "This run has not measured anything."
    assert not page.all("figure") and not page.all("table")


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
    full_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    for name in ("metrics.jsonl", "histograms.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"job": "student", "step": 51, "lo')
    page = written(tmp_path)
    assert page.all("p", "verdict")[0]["text"] == "This run has not finished."
    chart = page.chart("Loss on held-out text")
    assert len(chart.curves) == 4 and not chart.ends


def test_one_arm_alone_and_names_without_data_have_no_chart(tmp_path):
    train(tmp_path / "arms" / "hard", alpha=False)
    page = written(tmp_path)
    assert {label for chart in page.charts.values() for label in chart.curves} == {"hard"}
    titles = [title["text"] for title in page.all("h3")]
    assert "Loss on held-out text nats per token" in titles
    assert not [title for title in titles if title.startswith(("Soft", "Mean alpha", "Alpha", "Lag", "Coverage"))]


def test_evaluate_has_a_table_and_no_charts(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        tracker.log("evaluate", 0, {"heldout_loss": 2.5, "ece": 0.0123})
    (tmp_path / "summary.json").write_text('{"job": "evaluate", "heldout_loss": 2.5, "ece": 0.0123, "seconds": 4.2}')
    page = written(tmp_path)
    assert [e["text"] for e in page.all("dd")] == ["2.500 nats per token", "1.2 %", "4 s"] and not page.all("figure")


def test_the_same_run_gives_the_same_page(tmp_path):
    full_run(tmp_path)
    first = report.write(tmp_path).read_bytes()
    assert report.write(tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.9, 1100, ["1", "10", "100", "1k"]),
        (15, 5000, ["20", "50", "100", "200", "500", "1k", "2k", "5k"]),
        (2.1, 3.4, ["2.5", "3"]),
        (1e-6, 1e-2, ["1e-6", "1e-5", "0.0001", "0.001", "0.01"]),
        (1, 1e12, ["1", "100", "10k", "1M", "100M", "10G", "1T"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_or_round(low, high, texts):
    ticks = thinning.log_ticks(low, high)
    assert list(ticks.values()) == texts and all(low <= value <= high for value in ticks)
