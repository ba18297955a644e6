"""Draws docs/smoke.svg from the table of the main job in docs/results.md: `python docs/draw_smoke.py`."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
ARMS = {"teacher": "#808086", "distilled": "#1f7fc4", "step": "#2a9d6f", "constant": "#c98a00", "hard": "#d55e00"}
FIRST, LAST, TICKS = 2.44, 2.62, (2.45, 2.50, 2.55, 2.60)
"""Ends of the axis and its ticks, nats per token."""
LEFT, RIGHT, TOP, ROW = 120, 610, 78, 34
"""Pixels: ends of the axis, height of the first row, distance of rows."""
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.quiet { fill: #6e7781 }
line { stroke: #80808666 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .quiet { fill: #8d96a0 } }
"""


def runs(page: str) -> list[dict[str, str]]:
    """The rows of the page's first table, by column."""
    lines = [line for line in page[page.index("| machine |") :].split("\n\n")[0].splitlines()]
    header, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def svg(rows: list[dict[str, str]]) -> str:
    """One row a run, on an axis of held-out loss: a dot for each model, and the share of the gap that is closed."""
    bottom = TOP + ROW * len(rows)
    title = "Held-out loss of the smoke's five models (nats per token; lower is better)"
    parts = [_text(16, 22, title), *_legend()]
    parts.append(_text(RIGHT + 14, TOP - 26, "gap closed", "quiet"))
    for loss in TICKS:
        parts.append(_line(_x(loss), TOP - 18, _x(loss), bottom - 12))
        parts.append(_text(_x(loss), bottom + 6, f"{loss:.2f}", "quiet", "middle"))
    for y, row in enumerate(rows):
        parts += _run(TOP + ROW * y, row)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{bottom + 18}" viewBox="0 0 720 {bottom + 18}" '
        f'role="img" aria-label="{title}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def _run(y: int, row: dict[str, str]) -> list[str]:
    losses = {arm: float(row[arm]) for arm in ARMS}
    dots = [f'<circle cx="{_x(losses[arm]):.1f}" cy="{y}" r="6" fill="{color}"/>' for arm, color in ARMS.items()]
    return [
        _text(16, y + 4, f"{row['machine']}, seed {row['seed']}"),
        _line(_x(losses["teacher"]), y, _x(losses["hard"]), y, 3),
        *dots,
        _text(RIGHT + 14, y + 4, row["closed by distilled"]),
    ]


def _legend() -> list[str]:
    labels = {"hard": "labels"}
    parts = []
    for place, arm in enumerate(ARMS):
        x = LEFT + place * 112
        parts += [f'<circle cx="{x}" cy="42" r="6" fill="{ARMS[arm]}"/>', _text(x + 12, 46, labels.get(arm, arm))]
    return parts


def _x(loss: float) -> float:
    return LEFT + (loss - FIRST) / (LAST - FIRST) * (RIGHT - LEFT)


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{text}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, width: int = 1) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke-width="{width}"/>'


if __name__ == "__main__":
    (HERE / "smoke.svg").write_text(svg(runs((HERE / "results.md").read_text())))
