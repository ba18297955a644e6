import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from distill.config.schema import ConsoleMode, TrackingConfig
from distill.tracking import charts, report, scale
from distill.tracking.tracker import Tracker

CONFIG = TrackingConfig(console=ConsoleMode.off)
HOSTILE = "</script><script>alert(1)</script> & \"quotes\" 'too' <b>"


class Page(HTMLParser):
    """Every element with its attributes and the text below it; fails on tags that do not close in order."""

    VOID = ("meta", "line", "rect", "polyline", "path", "br")

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

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

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

    def figure(self, title):
        """The elements of the chart with this title."""
        starts = [i for i, e in enumerate(self.elements) if e["tag"] == "figure"] + [len(self.elements)]
        for start, end in pairwise(starts):
            if any(e["tag"] == "h3" and e["text"].startswith(title) for e in self.elements[start:end]):
                part = Page.__new__(Page)
                part.elements = self.elements[start:end]
                return part
        raise AssertionError(f"no chart {title}")


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

    held_out = page.figure("Loss on held-out text")
    assert sorted(line["data-label"] for line in held_out.all("polyline", "main")) == [
        "constant", "distilled", "hard", "teacher"
    ]  # fmt: skip
    assert [line["text"] for line in held_out.all("li")] == [
        "teacher 3.0200", "distilled 3.0200", "hard 3.0200", "constant 3.0200"
    ]  # fmt: skip
    assert all(len(line["points"].split()) == 5 for line in held_out.all("polyline"))
    assert [line["data-label"] for line in page.figure("Mean alpha").all("polyline", "main")] == [
        "constant",
        "distilled",
    ]
    # One colour for an arm wherever it appears.
    styles = {(e["data-label"], e["class"].split()[-1]) for e in page.all("polyline") if "mean" not in e["class"]}
    assert len(styles) == 4


def test_nothing_is_fetched(tmp_path):
    full_run(tmp_path)
    page, html = written(tmp_path), (tmp_path / "report.html").read_text()
    assert page.links == [] and not page.all("link") and not page.all("img")
    assert not re.search(r"https?://|@import|url\(|//[a-z]|fetch\(|import\(", html)


def test_hostile_words_stay_words(tmp_path):
    full_run(tmp_path)
    (tmp_path / "arms" / "hard").rename(tmp_path / "arms" / "<img onerror=x>")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            file.write(json.dumps({"job": "teacher", "step": step, "<i>odd</i>": step}) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps({"<u>": "<s>", "job": "<q>", "<em>_loss": 3.0}))
    page = written(tmp_path)
    assert len(page.all("script")) == 1
    assert not {"img", "u", "s", "q", "em"} & {element["tag"] for element in page.elements}
    assert HOSTILE in page.all("pre")[0]["text"]
    assert page.figure("<i>odd</i>").all("polyline")


def test_points_lie_where_the_numbers_are(tmp_path):
    train(tmp_path, "teacher", alpha=False)
    figure = written(tmp_path).figure("Loss on held-out text")
    (plot,), (line,) = figure.all("div", "plot"), figure.all("polyline")
    right, low, high = (float(plot[name]) for name in ("data-right", "data-low", "data-high"))
    points = np.array([[float(v) for v in pair.split(",")] for pair in line["points"].split()]) / 1000
    steps = np.arange(10, 51, 10)
    np.testing.assert_allclose(points[:, 0] * right, 512 * steps, rtol=1e-3)
    np.testing.assert_allclose(high - points[:, 1] * (high - low), 3 + 1 / steps, atol=1e-4)
    # And so do the ticks that they are read against.
    ticks = {text["text"]: float(text["y"].rstrip("%")) / 100 for text in figure.all("text", "y")}
    assert len(ticks) >= 3
    for text, y in ticks.items():
        assert high - y * (high - low) == pytest.approx(float(text), abs=1e-4)


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
def test_points_and_ticks_lie_alike_on_logarithmic_axes(log):
    x = np.array([0.0, 3, 20, 1e3, 5e6])
    y = np.array([4.0, 700, 20, 2.5, 0.03])
    curve = charts.Curve("arm", 1, x, y)
    frame = charts.Frame("A law", "nats", "parameters")
    figure = Page(charts.line_chart(frame, [curve], smoothed=False, zero=False, log_x="x" in log, log_y="y" in log))
    (plot,), (line,) = figure.all("div", "plot"), figure.all("polyline")
    points = np.array([[float(v) for v in pair.split(",")] for pair in line["points"].split()]) / 1000
    kept = x > 0 if "x" in log else np.ones(5, bool)

    def value(share, axis, low, high):
        low, high = float(plot[low]), float(plot[high])
        return low * (high / low) ** share if axis in log else low + (high - low) * share

    np.testing.assert_allclose(value(points[:, 0], "x", "data-left", "data-right"), x[kept], rtol=2e-3, atol=2500)
    np.testing.assert_allclose(value(1 - points[:, 1], "y", "data-low", "data-high"), y[kept], rtol=1e-2, atol=0.1)
    sizes = {"": 1, "k": 1e3, "M": 1e6}
    for axis, low, high in (("x", "data-left", "data-right"), ("y", "data-low", "data-high")):
        ticks = figure.all("text", axis)
        assert len(ticks) >= 3
        for tick in ticks:
            share = float(tick[axis].rstrip("%")) / 100
            number = tick["text"].rstrip("kM")
            expected = float(number) * sizes[tick["text"].removeprefix(number)]
            assert value(share if axis == "x" else 1 - share, axis, low, high) == pytest.approx(
                expected, rel=2e-3, abs=0.1
            )


def test_a_curve_without_a_positive_point_has_no_place_on_a_logarithmic_axis():
    curves = [
        charts.Curve(name, 0, np.array([1.0, 2.0]), np.array(y)) for name, y in (("a", [0.0, 0]), ("b", [1.0, 2]))
    ]
    frame = charts.Frame("A law", "nats", "parameters")
    page = Page(charts.line_chart(frame, curves, smoothed=False, zero=False, log_y=True))
    assert [line["data-label"] for line in page.all("polyline")] == ["b"]
    assert charts.line_chart(frame, curves[:1], smoothed=False, zero=False, log_y=True) == ""


def test_heat_map_cells(tmp_path):
    train(tmp_path)
    figure = written(tmp_path).figure("Alpha over time: student")
    cells = figure.all("rect")
    # Rows 1, 11, 21, 31, 41 of 50 have a histogram, with two bins that are not empty.
    assert len(cells) == 5 * 2
    assert [cell["data-share"] for cell in cells[:2]] == ["75 %", "25 %"]
    assert cells[0]["data-bin"] == "0.25 to 0.30" and float(cells[0]["y"]) == pytest.approx(700)
    assert [float(cell["fill-opacity"]) for cell in cells[:2]] == pytest.approx([1.0, (1 / 3) ** 0.5], abs=0.01)
    assert float(cells[-1]["x"]) + float(cells[-1]["width"]) == pytest.approx(1000)
    assert [line["class"].split()[0] for line in figure.all("polyline")] == ["mean"]


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
    assert all(len(line["points"].split()) <= 600 for line in page.all("polyline"))
    assert len(page.figure("Training loss").all("polyline", "main")[0]["points"].split()) == 600
    assert len(page.figure("Alpha over time").all("rect")) == 200
    assert (tmp_path / "report.html").stat().st_size < 100_000
    x, y = scale.extremes(np.arange(20_000.0), np.where(np.arange(20_000) == 776, 5e-3, 1e-3))
    assert len(x) <= 600 and y.max() == 5e-3


def test_steps_are_the_axis_where_an_arm_does_not_know_its_tokens(tmp_path):
    train(tmp_path, "teacher", tokens=False)
    plot = written(tmp_path).all("div", "plot")[0]
    assert plot["data-unit"] == "steps" and float(plot["data-right"]) == pytest.approx(50, rel=0.02)


def test_rows_without_tokens_find_their_place_between_others(tmp_path):
    with Tracker(tmp_path, CONFIG, {}) as tracker:
        for step in (10, 20):
            tracker.log("teacher", step, {"tokens": 100 * step})
            tracker.log("teacher", step + 5, {"heldout_loss": 3.0 - step / 100})
        tracker.log("teacher", 30, {"tokens": 3000})
    figure = written(tmp_path).figure("Loss on held-out text")
    (plot,), (line,) = figure.all("div", "plot"), figure.all("polyline")
    x = [float(pair.split(",")[0]) / 1000 * float(plot["data-right"]) for pair in line["points"].split()]
    assert x == pytest.approx([1500, 2500], rel=1e-3)


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
    assert len(page.figure("Loss on held-out text").all("polyline")) == 4


def test_one_arm_alone_and_names_without_data_have_no_chart(tmp_path):
    train(tmp_path / "arms" / "hard", alpha=False)
    page = written(tmp_path)
    assert {line["data-label"] for line in page.all("polyline")} == {"hard"}
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
        (3.13, 3.82, ["3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8"]),
        (0, 1_024_000, ["0", "200k", "400k", "600k", "800k", "1M"]),
        (0, 0.0032, ["0.0000", "0.0005", "0.0010", "0.0015", "0.0020", "0.0025", "0.0030"]),
        (-0.5, 0.6, ["−0.4", "−0.2", "0.0", "0.2", "0.4", "0.6"]),
        (0, 2.1e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
    ],
)
def test_ticks_are_round(low, high, texts):
    assert scale.labels(scale.ticks(low, high)) == texts


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.9, 1100, ["1", "10", "100", "1k"]),
        (15, 5000, ["20", "50", "100", "200", "500", "1k", "2k", "5k"]),
        (2.1, 3.4, ["2.2", "2.4", "2.6", "2.8", "3.0", "3.2", "3.4"]),
        (1e-6, 1e-2, ["1e-6", "1e-5", "0.0001", "0.001", "0.01"]),
        (1, 1e12, ["1", "100", "10k", "1M", "100M", "10G", "1T"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_powers_of_ten_or_round(low, high, texts):
    assert [text for _, text in scale.Axis(low, high, log=True).marks()] == texts
