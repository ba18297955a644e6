"""Draws docs/smoke.svg from the table of the main job in docs/results.md: `python docs/draw_smoke.py`."""

from __future__ import annotations

from pathlib import Path

from distill.tracking import drawing

HERE = Path(__file__).parent
ARMS = {"teacher": "#808086", "distilled": "#1f7fc4", "step": "#2a9d6f", "constant": "#c98a00", "hard": "#d55e00"}
FIRST, LAST, TICKS = 2.44, 2.62, (2.45, 2.50, 2.55, 2.60)
"""Ends of the axis and its ticks, nats per token."""
LEFT, RIGHT, TOP, ROW = 120, 610, 78, 34
"""Pixels: ends of the axis, height of the first row, distance of rows."""


def runs(page: str) -> list[dict[str, str]]:
    """The rows of the page's first table, by column."""
    lines = [line for line in page[page.index("| machine |") :].split("\n\n")[0].splitlines()]
    header, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def svg(rows: list[dict[str, str]]) -> str:
    """One row a run, on an axis of held-out loss: a dot for each model, and the share of the gap that is closed."""
    bottom = TOP + ROW * len(rows)
    title = "Held-out loss of the smoke's five models (nats per token; lower is better)"
    parts = [drawing.text(16, 22, title), *_legend()]
    parts.append(drawing.text(RIGHT + 14, TOP - 26, "gap closed", "quiet"))
    for loss in TICKS:
        parts.append(drawing.line(_x(loss), TOP - 18, _x(loss), bottom - 12))
        parts.append(drawing.text(_x(loss), bottom + 6, f"{loss:.2f}", "quiet", "middle"))
    for y, row in enumerate(rows):
        parts += _run(TOP + ROW * y, row)
    return drawing.page(720, bottom + 18, title, parts)


def _run(y: int, row: dict[str, str]) -> list[str]:
    losses = {arm: float(row[arm]) for arm in ARMS}
    dots = [f'<circle cx="{_x(losses[arm]):.1f}" cy="{y}" r="6" fill="{color}"/>' for arm, color in ARMS.items()]
    return [
        drawing.text(16, y + 4, f"{row['machine']}, seed {row['seed']}"),
        drawing.line(_x(losses["teacher"]), y, _x(losses["hard"]), y, 3),
        *dots,
        drawing.text(RIGHT + 14, y + 4, row["closed by distilled"]),
    ]


def _legend() -> list[str]:
    labels = {"hard": "labels"}
    parts = []
    for place, arm in enumerate(ARMS):
        x = LEFT + place * 112
        parts += [
            f'<circle cx="{x}" cy="42" r="6" fill="{ARMS[arm]}"/>',
            drawing.text(x + 12, 46, labels.get(arm, arm)),
        ]
    return parts


def _x(loss: float) -> float:
    return LEFT + (loss - FIRST) / (LAST - FIRST) * (RIGHT - LEFT)


if __name__ == "__main__":
    (HERE / "smoke.svg").write_text(svg(runs((HERE / "results.md").read_text())))
