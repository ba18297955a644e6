"""What `stats` returns as text for a terminal. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.config.units import file_size, grouped

BLOCKS = " ▏▎▍▌▋▊▉█"
WIDTH = 40
"""Of a whole bar, in characters."""
LINES = 16
"""Of lag over time."""


def bar(share: float) -> str:
    """`share` in [0, 1] as a bar of up to WIDTH characters."""
    eighths = round(max(0.0, min(1.0, share)) * WIDTH * 8)
    return BLOCKS[8] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def stats_lines(found: dict[str, Any]) -> list[str]:
    """All that `stats` found, for a terminal."""
    header, tokens = found["header"], found["tokens"]
    codec = ", ".join(f"{name} {value}" for name, value in header["codec"].items() if name != "name")
    most = "" if found["exact"] else "at most "
    lines = [
        found["folder"],
        f"  format {header['format']}, codec {header['codec']['name']} ({codec}), "
        f"vocabulary {grouped(header['vocab_size'])}, samples of {grouped(header['sample_tokens'])} tokens",
        f"  coverage: {most}{grouped(found['samples'])} of {grouped(header['samples'])} samples, "
        f"{found['coverage']:.2%}",
        f"  {grouped(found['records'])} records in {grouped(found['shards'])} shards, {grouped(tokens)} tokens with "
        f"a target, {found['atoms_per_token']:.2f} atoms a token",
        "",
        f"Bytes: {found['bytes_per_token']:.2f} a token in shards",
        *_bytes(found["bytes"], tokens),
    ]
    if found["origins"]:
        lines += ["", "Where the records come from", *_origins(found["origins"])]
    if found["lag"]["step"]:
        lines += ["", "Lag: how much worse than at its best the teacher was, nats", *_lag(found["lag"])]
    lines += ["", "What the targets cost", *_flops(found["flops"])]
    notes = [
        f"  {each['name']}: {each['rows']} rows"
        + (", finished" if each["finished"] else "")
        + (", alive" if each["alive"] else "")
        + (f", a torn row of {each['torn']} bytes at its end" if each["torn"] else "")
        for each in found["writers"]
    ]
    if notes:
        shown = notes if len(notes) <= LINES else [*notes[:LINES], f"  and {len(notes) - LINES} more"]
        lines += ["", "Ledgers", *shown]
    return lines


def _bytes(sizes: dict[str, dict[str, int]], tokens: int) -> list[str]:
    rows = []
    for group, parts in sizes.items():
        for name, count in parts.items():
            if group == "of no use" and not count:
                continue
            share = f"{count / max(tokens, 1):.3f}" if group == "shards" else ""
            rows.append([name if group != "of no use" else f"{name} (of no use)", file_size(count), share])
    return table(rows)


def _origins(origins: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["teacher", "by", "samples", "tokens", "steps", "best loss", "last loss"]]
    for each in origins[:LINES]:
        losses = [f"{each[name]:.4f}" if each[name] is not None else "" for name in ("best_loss", "last_loss")]
        by = each["source"] + (", seen before" if each["seen_before"] else "")
        steps = f"{each['first_step']} to {each['last_step']}"
        rows.append([each["teacher"], by, grouped(each["samples"]), grouped(each["tokens"]), steps, *losses])
    return table(rows) + ([f"  and {len(origins) - LINES} more"] if len(origins) > LINES else [])


def _flops(flops: dict[str, float]) -> list[str]:
    rows = [
        [
            "forward passes taken from training",
            f"{flops['saved_tflops']:,.3g} TFLOP",
            f"{grouped(flops['captured_tokens'])} tokens",
        ],
        [
            "forward passes made for targets",
            f"{flops['backfill_tflops']:,.3g} TFLOP",
            f"{grouped(flops['backfilled_tokens'])} tokens",
        ],
        ["imported", "", f"{grouped(flops['imported_tokens'])} tokens"],
        ["of teachers whose cost is not recorded", "", f"{grouped(flops['unpriced_tokens'])} tokens"],
    ]
    return table([row for row in rows if row[2] != "0 tokens"] or [["nothing", "", ""]])


def _lag(lag: dict[str, list[float]]) -> list[str]:
    """Means over equal stretches of tokens."""
    total, seen = sum(lag["tokens"]), 0.0
    groups: list[list[float]] = []
    for step, value, tokens in zip(lag["step"], lag["lag"], lag["tokens"], strict=True):
        place = min(int(LINES * seen / max(total, 1)), LINES - 1)
        if not groups or groups[-1][0] != place:
            groups.append([place, step, step, 0.0, 0.0])
        groups[-1][2] = step
        groups[-1][3] += value * tokens
        groups[-1][4] += tokens
        seen += tokens
    means = [each[3] / max(each[4], 1) for each in groups]
    most = max(means)
    rows = [
        ["steps", "lag"],
        *([f"{int(g[1])} to {int(g[2])}", f"{m:.3f}"] for g, m in zip(groups, means, strict=True)),
    ]
    bars = ["", *(bar(mean / most if most else 0) for mean in means)]
    return [f"{line}  {each}".rstrip() for line, each in zip(table(rows), bars, strict=True)]


HISTOGRAMS = {
    "entropy": "Entropy of the teacher's prediction, nats",
    "label": "Negative log-probability of the label, nats",
    "mass": "Stored mass of a token (sum of its probabilities)",
    "atoms": "Atoms of a token",
}


def histogram_lines(found: dict[str, Any]) -> list[str]:
    """What `sampled` found, for a terminal."""
    lines = ["", f"From {grouped(found['samples'])} samples, {grouped(found['tokens'])} tokens with a target"]
    for name, title in HISTOGRAMS.items():
        each = found[name]
        counts, edges = each["counts"], each["edges"]
        filled = [i for i, count in enumerate(counts) if count]
        if not filled:
            continue
        total, most = sum(counts), max(counts)
        whole = name == "atoms"
        span = range(filled[0], filled[-1] + 1)
        rows = [[_interval(edges[i], edges[i + 1], whole), f"{counts[i] / total:.1%}"] for i in span]
        lines += ["", f"{title}: mean {each['mean']:.3f}"]
        lines += [f"{t}  {bar(counts[i] / most)}".rstrip() for t, i in zip(table(rows), span, strict=True)]
    return lines


def _interval(low: float, high: float, whole: bool) -> str:
    if whole:
        return f"{int(low)}" if high - low <= 1 else f"{int(low)} to {int(high) - 1}"
    return f"{low:.2f} to {high:.2f}"
