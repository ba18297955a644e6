"""The page around charts: style and scripts are inline, so that one file is all there is."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --sheet: #f6f5f2; --ink: #1d1d1f; --soft: #6b6b70; --rule: #e2e0db; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --sheet: #1f2024; --ink: #e9e8e4; --soft: #9c9ba0;
  --rule: #33343a; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 32px 96px; }
header p { color: var(--soft); }
h1 { font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
.verdict { font-size: clamp(22px, 3.4vw, 34px); line-height: 1.25; font-weight: 600; letter-spacing: -0.015em;
  max-width: 26em; margin: 20px 0 28px; text-wrap: balance; }
h2 { font-size: 20px; margin: 56px 0 4px; padding-top: 16px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
h3 small { font-size: 13px; font-weight: 400; color: var(--soft); margin-left: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-size: 13px; font-weight: 400; color: var(--soft); }
th, td { text-align: right; padding: 7px 28px 7px 0; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; min-width: 130px; }
tr.lead td { font-weight: 600; }
.share { display: inline-block; width: 140px; height: 6px; border-radius: 3px; background: var(--rule);
  margin-left: 12px; vertical-align: 2px; overflow: hidden; }
.share i { display: block; height: 100%; border-radius: 3px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
dl { display: flex; flex-wrap: wrap; gap: 14px 40px; margin-top: 28px; }
dt { font-size: 13px; color: var(--soft); }
dd { overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 36px 44px; margin-top: 20px; }
.wide { grid-column: 1 / -1; }
.chart { display: flex; flex-direction: column; justify-content: end; break-inside: avoid; min-width: 0; }
figcaption { flex: 1; }
figcaption p, .x-unit { font-size: 13px; color: var(--soft); }
.x-unit { text-align: right; }
details { margin-top: 14px; }
summary { cursor: pointer; }
pre { background: var(--sheet); border-radius: 8px; padding: 18px 20px; margin-top: 10px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
/* plotly writes colors into its elements; these follow the theme instead. */
.plot text { fill: var(--soft) !important; }
.plot .legendtext, .plot .hoverlayer text, .plot .heatmap-label text { fill: var(--ink) !important; }
.plot .gridlayer path { stroke: var(--rule) !important; }
.plot .ticks { stroke: var(--soft) !important; }
.plot .legend .bg { fill: transparent !important; }
.plot .hoverlayer .bg, .plot .hoverlayer .hovertext path { fill: var(--sheet) !important;
  stroke: var(--rule) !important; }
@media (max-width: 720px) {
  main { padding: 28px 18px 64px; }
  .grid { grid-template-columns: minmax(0, 1fr); gap: 30px; }
  .share { display: none; }
  table { width: 100%; }
  th { white-space: normal; vertical-align: bottom; }
  th, td { padding-right: 14px; }
  th:last-child, td:last-child { padding-right: 0; }
  th:first-child, td:first-child { min-width: 0; }
}
@media print { :root { color-scheme: light; --paper: #fff; --sheet: #fff; --ink: #000; --soft: #555; --rule: #ddd; }
  main { padding: 0; max-width: none; } body { font-size: 12px; print-color-adjust: exact; } h2 { break-after: avoid; }
  }
"""

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
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}</main>\n{scripts}</body></html>\n"
    )
