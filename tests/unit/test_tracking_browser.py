"""Pages in a real browser: every chart is drawn, nothing is fetched, nothing is wider than the window."""

import json

import pytest

from distill.tools.commands import main
from distill.tracking import report
from tests import browser
from tests.browser import Browser
from tests.unit.test_run_tools_way_in import write
from tests.unit.test_tracking_length import LOSS, NEEDLE
from tests.unit.test_tracking_report import full_run

pytestmark = pytest.mark.skipif(
    not browser.INSTALLED, reason="needs a browser: apt-get install chromium chromium-driver"
)

DRAWN = """return [...document.querySelectorAll('figure')].map(figure => ({
  title: figure.querySelector('h3').textContent,
  svgs: figure.querySelectorAll('svg.main-svg').length,
  marks: figure.querySelectorAll('.scatterlayer path.js-line, .heatmaplayer image, .barlayer path').length,
  overlaps: (() => {
    const boxes = [...figure.querySelectorAll('.xtick text')].map(text => text.getBoundingClientRect());
    return boxes.some((box, i) => i && box.left < boxes[i - 1].right);
  })(),
  commas: [...figure.querySelectorAll('.ytick text')].some(text => {
    const box = text.getBoundingClientRect();
    return [...figure.querySelectorAll('path.xtick')].map(tick => tick.getBoundingClientRect())
      .some(tick => tick.top < box.bottom && tick.bottom > box.top && tick.left - box.right < 4);
  }),
  covered: (() => {
    const legend = figure.querySelector('.infolayer .legend');
    const layer = figure.querySelector('.cartesianlayer .gridlayer, .cartesianlayer .plot');
    return legend && legend.getBoundingClientRect().bottom > layer.getBoundingClientRect().top + 1;
  })(),
}))"""
SIZES = """return {page: document.documentElement.scrollWidth, window: window.innerWidth,
  fetched: performance.getEntriesByType('resource').length, plots: document.querySelectorAll('.plot').length}"""


def report_page(folder):
    full_run(folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"loss_by_position": LOSS, "needle": NEEDLE}))
    return report.write(folder)


def cache_page(folder):
    parts = [([sample], sample) for sample in range(12)]
    assert main(["stats", write(folder / "cache", parts), "--deep", "4", "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize(("make", "charts"), [(report_page, 10), (cache_page, 5)])
def test_a_page_in_a_browser(make, charts, width, tmp_path):
    page = make(tmp_path / "run")
    assert page.stat().st_size <= 6_000_000
    with Browser() as window:
        window.load(page, width)
        drawn, sizes, errors = window.run(DRAWN), window.run(SIZES), window.errors()
    assert errors == []
    assert sizes["fetched"] == 0 and sizes["page"] == sizes["window"] == width
    assert sizes["plots"] == len(drawn) == charts
    for chart in drawn:
        assert chart["svgs"] and chart["marks"], f"{chart['title']} is empty"
        assert not chart["overlaps"], f"{chart['title']}: ticks overlap"
        assert not chart["commas"], f"{chart['title']}: a tick of the axis of x touches a number"
        assert not chart["covered"], f"{chart['title']}: the legend covers the curves"


def test_an_error_of_the_page_would_be_found(tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><html><body><script>nowhere()</script><img src='https://example.org/a.png'>")
    with Browser() as window:
        window.load(broken, 400)
        errors = "\n".join(window.errors())
    assert "nowhere is not defined" in errors and "example.org" in errors
