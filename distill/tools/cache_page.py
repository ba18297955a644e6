"""What `stats` returns as one page with charts, those of a run's report."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from distill.config.errors import CacheError
from distill.config.files import write_text
from distill.config.units import file_size, grouped
from distill.tools.stats_text import HISTOGRAMS, stats_lines
from distill.tracking import charts
from distill.tracking.page import entry_list, page, share_bar


def write(path: str, caches: Sequence[dict[str, Any]]) -> None:
    """Writes the page of one or several caches to `path`; CacheError if that cannot be."""
    body = "".join(map(_cache, caches))
    try:
        write_text(Path(path), page("cache · codistill", body))
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror or error}") from error


def _cache(found: dict[str, Any]) -> str:
    header = found["header"]
    facts = {
        "coverage": f"{found['coverage']:.1%} of {grouped(header['samples'])} samples",
        "bytes per token": f"{found['bytes_per_token']:.2f}",
        "atoms per token": f"{found['atoms_per_token']:.2f}",
        "tokens": grouped(found["tokens"]),
        "shards": f"{grouped(found['shards'])}, {file_size(sum(found['bytes']['shards'].values()))}",
        "codec": ", ".join(str(value) for value in header["codec"].values()),
    }
    text = escape("\n".join(stats_lines(found)))
    return (
        f"<header><h1>{escape(found['folder'])}</h1>{entry_list(facts)}</header>\n"
        f'<div class="grid">\n{_losses(found)}{_histograms(found)}</div>\n{_columns(found)}'
        f"<details><summary>All numbers</summary><pre>{text}</pre></details>\n"
    )


def _losses(found: dict[str, Any]) -> str:
    if not found["losses"]:
        return ""
    frame = charts.Frame("Teacher's loss by its step", "nats per token", "step", "Mean loss of labels when captured.")
    curves = [
        charts.Curve(f"{each['teacher']}, {each['source']}", i, np.array(each["step"]), np.array(each["loss"]))
        for i, each in enumerate(found["losses"])
    ]
    return charts.line_chart(frame, curves, smoothed=False, zero=False)


def _columns(found: dict[str, Any]) -> str:
    sizes, tokens = found["bytes"]["shards"], max(found["tokens"], 1)
    total = max(sum(sizes.values()), 1)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{file_size(count)}</td><td>{count / tokens:.3f}"
        f"{share_bar(count / total, charts.COLORS[2])}</td></tr>"
        for name, count in sizes.items()
    )
    head = "<tr><th>column</th><th>size</th><th>bytes per token</th></tr>"
    return f'<h2>Bytes by column</h2>\n<div class="scroll"><table>{head}{rows}</table></div>\n'


def _histograms(found: dict[str, Any]) -> str:
    if "sampled" not in found:
        return ""
    drawn = []
    for name, title in HISTOGRAMS.items():
        each = found["sampled"][name]
        what, _, unit = title.partition(", ")
        edges, counts = each["edges"], each["counts"]
        frame = charts.Frame(
            what, "share of tokens", unit, f"Mean {each['mean']:.3f}." if each["mean"] is not None else ""
        )
        drawn.append(charts.histogram(frame, edges, counts))
    return "".join(drawn)
