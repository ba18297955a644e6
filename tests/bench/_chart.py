"""The page of a bench, with its charts, beside the file with its numbers."""

from __future__ import annotations

from pathlib import Path

from distill.tracking.page import page


def draw(name: str, title: str, body: str) -> None:
    """Writes `runs/bench/<name>.html`."""
    out = Path(f"runs/bench/{name}.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(f"{title} · codistill", f"<header><h1>{title}</h1></header>\n{body}"))
