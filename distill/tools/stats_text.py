"""What `stats` returns as text for a terminal. No torch."""

import time
from collections.abc import Sequence
from typing import Any

from distill.config.terminal import text_table
from distill.config.units import file_size, grouped

BLOCKS = " ▏▎▍▌▋▊▉█"
WIDTH = 40
"""Of a whole bar, in characters."""
LINES = 16
"""Of a curve, and of the longest lists."""


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """All that `stats` returns but histograms."""
    header, tokens = stats["header"], stats["tokens"]
    codec = ", ".join(f"{name} {value}" for name, value in header["codec"].items() if name != "name")
    most = "" if stats["exact"] else "at most "
    lines = [
        stats["folder"] + _as_of(stats),
        f"  format {header['format']}, codec {header['codec']['name']} ({codec}), "
        f"vocabulary {grouped(header['vocab_size'])}, samples of {grouped(header['sample_tokens'])} tokens",
        f"  coverage: {most}{grouped(stats['samples'])} of {grouped(header['samples'])} samples, "
        f"{stats['coverage']:.2%}",
        f"  {grouped(stats['records'])} records in {grouped(stats['shards'])} shards, {grouped(tokens)} tokens with "
        f"a target, {stats['atoms_per_token']:.2f} atoms a token",
        "",
        f"Bytes: {stats['bytes_per_token']:.2f} a token in shards",
        *_bytes(stats["bytes"], tokens),
    ]
    if stats["origins"]:
        lines += ["", "Where the records come from", *_origins(stats["origins"])]
    for curve in stats["losses"]:
        lines += ["", f"Loss of teacher {curve['teacher']} by its step ({curve['source']}), nats", *_curve(curve)]
    lines += ["", "What the targets cost", *_flops(stats["flops"])]
    return lines + (["", "Streams", *_streams(stats["writers"])] if stats["writers"] else [])


def _as_of(stats: dict[str, Any]) -> str:
    """Of --quick: the snapshot that everything is of."""
    number, made = stats["snapshot"]["number"], stats["snapshot"]["made"]
    if not stats["quick"] or number < 0:
        return ""
    return f", snapshot {number} of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(made))}"


def _streams(writers: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for each in writers:
        parts = [f"{grouped(each['count'])} published"]
        if "shards" in each:
            parts = [f"{grouped(each[name])} {name}" for name in ("shards", "marks", "replaced") if each[name]]
        parts += [name for name in ("finished", "alive") if each[name]]
        lines.append(f"  {each['name']}: {', '.join(parts)}")
    return _shortened(lines)


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> list[str]:
    return [f"  {line}" for line in text_table(rows, header)]


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= LINES else [*lines[:LINES], f"  and {len(lines) - LINES} more"]


def _bar(share: float) -> str:
    """`share` in [0, 1] as a bar of up to WIDTH characters."""
    eighths = round(max(0.0, min(1.0, share)) * WIDTH * 8)
    return BLOCKS[8] * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def _with_bars(rows: Sequence[Sequence[str]], values: Sequence[float]) -> list[str]:
    """A table with a bar at the end of each row, the greatest value's a whole one."""
    most = max(values)
    bars = (_bar(value / most if most else 0) for value in values)
    return [f"{line}  {bar}".rstrip() for line, bar in zip(_table(rows), bars, strict=True)]


def _bytes(sizes: dict[str, dict[str, int]], tokens: int) -> list[str]:
    rows = []
    for group, parts in sizes.items():
        for name, count in parts.items():
            if group != "of no use":
                rows.append([name, file_size(count), f"{count / max(tokens, 1):.3f}" if group == "shards" else ""])
            elif count:
                rows.append([f"{name} (of no use)", file_size(count), ""])
    return _table(rows)


def _origins(origins: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for each in origins:
        losses = [f"{each[name]:.4f}" if each[name] is not None else "" for name in ("best_loss", "last_loss")]
        by = each["source"] + (", seen before" if each["seen_before"] else "")
        steps = f"{each['first_step']} to {each['last_step']}"
        rows.append([each["teacher"], by, grouped(each["samples"]), grouped(each["tokens"]), steps, *losses])
    header = ["teacher", "by", "samples", "tokens", "steps", "best loss", "last loss"]
    head, rule, *lines = _table(rows, header)
    return [head, rule, *_shortened(lines)]


def _flops(flops: dict[str, float]) -> list[str]:
    costs = [
        ("forward passes taken from training", f"{flops['saved_tflops']:,.3g} TFLOP", flops["captured_tokens"]),
        ("forward passes made for targets", f"{flops['backfill_tflops']:,.3g} TFLOP", flops["backfilled_tokens"]),
        ("imported", "", flops["imported_tokens"]),
        ("of teachers whose cost is not recorded", "", flops["unpriced_tokens"]),
    ]
    rows = [[what, cost, f"{grouped(tokens)} tokens"] for what, cost, tokens in costs if tokens]
    return _table(rows or [["nothing", "", ""]])


def _curve(curve: dict[str, Any]) -> list[str]:
    """Means over LINES equal stretches of tokens, with bars of what they exceed the least of them by."""
    total, tokens_before = max(sum(curve["tokens"]), 1), 0.0
    stretches: dict[int, list[tuple[int, float, int]]] = {}
    for point in zip(curve["step"], curve["loss"], curve["tokens"], strict=True):
        place = min(int(LINES * tokens_before / total), LINES - 1)
        stretches.setdefault(place, []).append(point)
        tokens_before += point[2]
    means = [
        sum(loss * tokens for _, loss, tokens in each) / sum(tokens for _, _, tokens in each)
        for each in stretches.values()
    ]
    rows = [[f"from {each[0][0]}", f"{mean:.3f}"] for each, mean in zip(stretches.values(), means, strict=True)]
    return _with_bars(rows, [mean - min(means) for mean in means])


HISTOGRAMS = {
    "entropy": "Entropy of the teacher's prediction, nats",
    "label": "Negative log-probability of the label, nats",
    "mass": "Stored mass of a token (sum of its probabilities)",
    "atoms": "Atoms of a token",
}


def histogram_lines(histograms: dict[str, Any]) -> list[str]:
    """What `histograms` returns."""
    samples, tokens = grouped(histograms["samples"]), grouped(histograms["tokens"])
    lines = ["", f"From {samples} samples, {tokens} tokens with a target"]
    for name, title in HISTOGRAMS.items():
        counts, edges, mean = (histograms[name][key] for key in ("counts", "edges", "mean"))
        filled = [i for i, count in enumerate(counts) if count]
        if filled:
            bins = range(filled[0], filled[-1] + 1)
            rows = [
                [_interval(edges[i], edges[i + 1], name == "atoms"), f"{counts[i] / sum(counts):.1%}"] for i in bins
            ]
            lines += ["", f"{title}: mean {mean:.3f}", *_with_bars(rows, [counts[i] for i in bins])]
    return lines


def _interval(low: float, high: float, is_whole: bool) -> str:
    if is_whole:
        return f"{int(low)}" if high - low <= 1 else f"{int(low)} to {int(high) - 1}"
    return f"{low:.2f} to {high:.2f}"
