"""Numbers with their units as text: counts, bytes and durations, everywhere in the project."""

import math


def short(value: float) -> str:
    """A number in three digits or so with k, M, G, T: `950`, `38.2k`, `1.5M`, `20M`."""
    size = abs(value)
    for limit, unit, suffix in (
        (1e3, 1.0, ""),
        (1e6, 1e3, "k"),
        (1e9, 1e6, "M"),
        (1e12, 1e9, "G"),
        (math.inf, 1e12, "T"),
    ):
        # 999.6k would be rounded to 1000k
        if size < limit * 0.9995:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:g}"


def grouped(count: float) -> str:
    """A whole number with separators: `202,048`."""
    return f"{count:,.0f}"


def file_size(count: float) -> str:
    """Bytes in the largest unit of which there is at least one: `512 B`, `1.50 MB`; kB is 1,000 B."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """`42 s`, `3:07 min`, `5:12 h` or `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def counted(count: int, noun: str) -> str:
    """`1 unit`, `1,200 units`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def tokens(count: float) -> str:
    """`950 tokens`, `38.2k tokens`."""
    return f"{short(count)} tokens"


def percent(share: float) -> str:
    """A share in [0, 1] as `62 %`, with one decimal below ten; the minus is the typographic one."""
    value = 100 * share
    digits = 1 if 0 < abs(value) < 9.95 else 0
    return f"{value:.{digits}f} %".replace("-", "−")
