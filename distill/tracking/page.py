"""The page around a report: style and script, both inline, so that one file is all there is."""

from __future__ import annotations

from html import escape

# Okabe and Ito's palette, which colour-blind readers tell apart; adjusted for contrast on either background.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --sheet: #f6f5f2; --ink: #1d1d1f; --soft: #6b6b70; --rule: #e2e0db;
  --s0: #1d1d1f; --s1: #d55e00; --s2: #0072b2; --s3: #009e73; --s4: #b8568f; --s5: #c98a00; --s6: #3a9bd9; --s7:
  #7a6a53;
  --heat: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --sheet: #1f2024; --ink: #e9e8e4; --soft: #9c9ba0;
  --rule: #33343a; --s0: #e9e8e4; --s1: #ff8b45; --s2: #5cb1f2; --s3: #3ecfa3; --s4: #e79cc9; --s5: #f2bd4d; --s6:
  #9ad6f7;
  --s7: #c9b79a; --heat: #5cb1f2; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue",
  Arial, sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 32px 96px; }
header p { color: var(--soft); }
h1 { font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
.verdict { font-size: clamp(22px, 3.4vw, 34px); line-height: 1.25; font-weight: 600; letter-spacing: -0.015em;
  max-width: 26em;
  margin: 20px 0 28px; text-wrap: balance; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 56px 0 4px; padding-top: 16px; border-top: 1px solid
  var(--rule); }
h3 { font-size: 15px; font-weight: 600; }
h3 small { font-size: 13px; font-weight: 400; color: var(--soft); margin-left: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-size: 13px; font-weight: 400; color: var(--soft); }
th, td { text-align: right; padding: 7px 28px 7px 0; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; min-width: 130px; }
tr.lead td { font-weight: 600; }
.share { display: inline-block; position: relative; width: 140px; height: 6px; border-radius: 3px; background:
  var(--rule);
  margin-left: 12px; vertical-align: 2px; overflow: hidden; }
.share i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
dl { display: flex; flex-wrap: wrap; gap: 14px 40px; margin-top: 28px; }
dt { font-size: 13px; color: var(--soft); }
dd { overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 36px 44px; margin-top: 20px; }
.wide { grid-column: 1 / -1; }
.chart { display: flex; flex-direction: column; break-inside: avoid; min-width: 0; }
figcaption { flex: 1; }
figcaption p, .x-unit { font-size: 13px; color: var(--soft); }
.x-unit { text-align: right; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 18px; font-size: 13px; margin-top: 4px; color:
  var(--soft); }
.legend b { font-weight: 500; color: var(--ink); }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 2.5px solid; vertical-align: 4px; margin-right:
  6px; }
.legend [class^=s] i { border-color: var(--mine); }
.s0 { --mine: var(--s0); } .s1 { --mine: var(--s1); } .s2 { --mine: var(--s2); } .s3 { --mine: var(--s3); }
.s4 { --mine: var(--s4); } .s5 { --mine: var(--s5); } .s6 { --mine: var(--s6); } .s7 { --mine: var(--s7); }
.swatch, .share i { background: var(--mine); }
.ramp i { width: 70px; height: 9px; border: 0; border-radius: 2px; margin: 0 6px; vertical-align: -1px;
  background: linear-gradient(90deg, transparent, var(--heat)); outline: 1px solid var(--rule); }
.line i { border-color: var(--ink); }
.plot { position: relative; height: 210px; margin: 14px 8px 24px 52px; }
.wide .plot { height: 340px; }
.plot > svg { width: 100%; height: 100%; overflow: visible; display: block; }
.plot text { font-size: 12px; fill: var(--soft); }
.plot text.y { text-anchor: end; dominant-baseline: central; }
.plot text.x { text-anchor: middle; }
.plot line { stroke: var(--rule); shape-rendering: crispEdges; }
.plot line.border { stroke: var(--soft); stroke-dasharray: 2 4; }
.plot line.border.strong { stroke: var(--ink); stroke-width: 2; stroke-dasharray: none; }
.plot.matrix { height: calc(var(--rows) * 44px); margin-top: 30px; }
.matrix rect { fill: var(--heat); stroke: var(--rule); }
.plot text.cell { text-anchor: middle; dominant-baseline: central; fill: var(--ink); }
.plot text.cell.on { fill: var(--paper); }
.plot line.tick { transform: translateY(-4px); stroke: var(--soft); }
polyline, path { fill: none; stroke: var(--mine); stroke-linejoin: round; stroke-linecap: round; vector-effect:
  non-scaling-stroke; }
polyline, path { pointer-events: none; }
.main { stroke-width: 2; }
.raw { stroke-width: 1; opacity: 0.22; }
path.dots { stroke-width: 7; }
.s3.main, .s6.main { stroke-dasharray: 7 4; }
.s4.main, .s7.main { stroke-dasharray: 1.5 4; }
.legend .s3 i, .legend .s6 i { border-top-style: dashed; }
.legend .s4 i, .legend .s7 i { border-top-style: dotted; }
.mean { stroke: var(--ink); stroke-width: 1.5; }
.cells { fill: var(--heat); shape-rendering: crispEdges; }
.cross { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip { position: absolute; top: 6px; z-index: 1; background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 6px;
  padding: 6px 10px; font-size: 12.5px; white-space: nowrap; pointer-events: none; box-shadow: 0 2px 10px #0002; }
.tip b { float: right; margin-left: 18px; font-weight: 600; }
details { margin-top: 14px; }
summary { cursor: pointer; }
pre { background: var(--sheet); border-radius: 8px; padding: 18px 20px; margin-top: 10px; overflow-x: auto; font:
  12.5px/1.5
  ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 720px) {
  main { padding: 28px 18px 64px; }
  .grid { grid-template-columns: minmax(0, 1fr); gap: 30px; }
  .wide .plot { height: 260px; }
  .share { display: none; }
  table { width: 100%; }
  th { white-space: normal; vertical-align: bottom; }
  th, td { padding-right: 14px; }
  th:last-child, td:last-child { padding-right: 0; }
  th:first-child, td:first-child { min-width: 0; }
}
@media print { :root { color-scheme: light; --paper: #fff; --sheet: #fff; --ink: #000; --soft: #555; --rule: #ddd;
  --s0: #000;
  --s1: #d55e00; --s2: #0072b2; --s3: #009e73; --s4: #b8568f; --s5: #c98a00; --s6: #3a9bd9; --s7: #7a6a53; --heat:
  #0072b2; }
  main { padding: 0; max-width: none; } body { font-size: 12px; print-color-adjust: exact; } h2 { break-after: avoid;
  } }
"""

# Values under the pointer, read back from the coordinates that are drawn; the page is complete without it.
SCRIPT = """
const text = v => {
  const size = Math.abs(v);
  const [unit, letter] = size >= 1e9 ? [1e9, 'G'] : size >= 1e6 ? [1e6, 'M'] : size >= 1e4 ? [1e3, 'k'] : [1, ''];
  return parseFloat((v / unit).toPrecision(4)) + letter;
};
const element = (name, style, ...content) => {
  const made = document.createElement(name);
  made.className = style;
  made.append(...content);
  return made;
};
const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
for (const plot of document.querySelectorAll('.plot:not(.matrix)')) {
  const {log, unit} = plot.dataset;
  const [left, right, low, high] = ['left', 'right', 'low', 'high'].map(name => Number(plot.dataset[name]));
  const along = (from, to, share, log) => log ? from * (to / from) ** share : from + (to - from) * share;
  const curves = [...plot.querySelectorAll('.main')].reverse().map(line => ({
    label: line.dataset.label,
    style: [...line.classList].find(name => /^s[0-9]$/.test(name)),
    points: line.getAttribute('points').split(' ').map(pair => pair.split(',').map(Number)),
  }));
  const cross = element('div', 'cross'), tip = element('div', 'tip');
  const hide = () => { cross.remove(); tip.remove(); };
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect();
    const x = Math.min(Math.max(1000 * (event.clientX - box.left) / box.width, 0), 1000);
    const cell = event.target.closest('rect'), rows = [];
    let at = x;
    if (curves.length) {
      const near = curves.map(curve => nearest(curve.points, x));
      at = nearest(near, x)[0];
      curves.forEach(({label, style}, i) => {
        const value = text(along(low, high, 1 - near[i][1] / 1000, log.includes('y')));
        if (Math.abs(near[i][0] - at) < 25) rows.push([element('i', 'swatch ' + style), label, value]);
      });
    } else if (cell) {
      if (cell.dataset.bin) rows.push(['', 'alpha', cell.dataset.bin]);
      rows.push(['', 'share', cell.dataset.share]);
    } else return hide();
    rows.unshift(['', unit, text(along(left, right, at / 1000, log.includes('x')))]);
    tip.replaceChildren(...rows.map(([dot, name, value]) => element('div', '', dot, name, element('b', '', value))));
    cross.style.left = at / 10 + '%';
    tip.style.left = at > 500 ? 'auto' : `calc(${at / 10}% + 12px)`;
    tip.style.right = at > 500 ? `calc(${100 - at / 10}% + 12px)` : 'auto';
    plot.append(cross, tip);
  });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; `body` is HTML, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}</main>\n<script>{SCRIPT}</script></body></html>\n"
    )
