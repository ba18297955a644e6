"""The page around charts: style and scripts are inline, so that one file is all there is."""

from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")

DRAW = """
for (const plot of document.querySelectorAll('.plot')) {
  const {data, layout} = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, data, layout, {responsive: true, displayModeBar: false});
}
"""


def entry_list(texts: dict[str, str]) -> str:
    """Labels with their values side by side; "" where there are none."""
    pairs = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in texts.items())
    return f"<dl>{pairs}</dl>\n" if pairs else ""


def share_bar(share: float, color: str) -> str:
    """A bar as long as a share of 1; nothing on narrow windows."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<span class="share"><i style="width:{width:.1f}%;background:{color}"></i></span>'


def page(title: str, body: str) -> str:
    """A whole HTML document; `body` is HTML, with or without charts, `title` is text."""
    scripts = ""
    if '<div class="plot"' in body:
        from plotly.offline import get_plotlyjs

        scripts = f"<script>{get_plotlyjs()}</script>\n<script>{DRAW}</script>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE.read_text()}</style></head>\n"
        f"<body><main>\n{body}</main>\n{scripts}</body></html>\n"
    )
