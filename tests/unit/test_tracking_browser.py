"""The report in a real browser: every chart is drawn, nothing is fetched, nothing is wider than the window."""

import json

import pytest

from distill.tracking import report
from tests import browser
from tests.browser import Browser
from tests.unit.test_tracking_length import LOSS, NEEDLE
from tests.unit.test_tracking_report import full_run

pytestmark = pytest.mark.skipif(
    not browser.INSTALLED, reason="needs a browser: apt-get install chromium chromium-driver"
)

DRAWN = """return [...document.querySelectorAll('figure')].map(figure => ({
  title: figure.querySelector('h3').textContent,
  svgs: figure.querySelectorAll('svg.main-svg').length,
  marks: figure.querySelectorAll('.scatterlayer path.js-line, .heatmaplayer image').length,
  legend: figure.querySelectorAll('.infolayer .legendtext').length,
  overlaps: (() => {
    const boxes = [...figure.querySelectorAll('.xtick text')].map(text => text.getBoundingClientRect());
    return boxes.some((box, i) => i && box.left < boxes[i - 1].right);
  })(),
  covered: (() => {
    const legend = figure.querySelector('.infolayer .legend'), plot = figure.querySelector('.plotclip rect');
    const layer = figure.querySelector('.cartesianlayer .gridlayer, .cartesianlayer .plot');
    return legend && legend.getBoundingClientRect().bottom > layer.getBoundingClientRect().top + 1;
  })(),
}))"""
SIZES = """return {page: document.documentElement.scrollWidth, window: window.innerWidth,
  fetched: performance.getEntriesByType('resource').length, plots: document.querySelectorAll('.plot').length}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    full_run(folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"loss_by_position": LOSS, "needle": NEEDLE}))
    return report.write(folder)


@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_in_a_browser(page, width):
    assert page.stat().st_size <= 6_000_000
    with Browser() as window:
        window.load(page, width)
        drawn, sizes, errors = window.run(DRAWN), window.run(SIZES), window.errors()
    assert errors == []
    assert sizes["fetched"] == 0 and sizes["page"] == sizes["window"] == width
    assert sizes["plots"] == len(drawn) >= 8
    for chart in drawn:
        assert chart["svgs"] and chart["marks"], f"{chart['title']} is empty"
        assert chart["legend"] or "haystack" in chart["title"], chart["title"]
        assert not chart["overlaps"], f"{chart['title']}: ticks overlap"
        assert not chart["covered"], f"{chart['title']}: the legend covers the curves"


def test_an_error_of_the_page_would_be_found(tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><html><body><script>nowhere()</script><img src='https://example.org/a.png'>")
    with Browser() as window:
        window.load(broken, 400)
        errors = "\n".join(window.errors())
    assert "nowhere is not defined" in errors and "example.org" in errors
