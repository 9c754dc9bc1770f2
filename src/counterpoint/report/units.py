"""Numbers as a reader wants them: seconds and bytes with a unit, three digits, decimal prefixes.

Nothing here rounds twice: the tables keep the exact value beside the formatted one.
"""

from __future__ import annotations

NOTHING = "–"


def format_seconds(seconds: float) -> str:
    """Seconds with a unit that leaves one to three digits before the point: `812 µs`, `4.07 ms`, `1.30 s`."""
    magnitude = abs(seconds)
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if magnitude >= 0.9995 * scale:
            return f"{_three(seconds / scale)} {unit}"
    # Below a tenth of a nanosecond there are only rounding errors of sums.
    return "0 s" if magnitude < 1e-10 else f"{_three(seconds / 1e-9)} ns"


def format_bytes(nbytes: float) -> str:
    """Bytes with a decimal prefix: `512 B`, `16.4 kB`, `2.10 MB`."""
    magnitude = abs(nbytes)
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if magnitude >= 0.9995 * scale:
            return f"{_three(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} B"


def format_share(part: float, whole: float) -> str:
    """A share of a whole in percent, or a dash when there is no whole to take it of."""
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


def format_change(before: float, after: float) -> str:
    """The relative difference of `after` from `before` in percent, with its sign."""
    if before == after:
        return "0.0 %"
    return f"{100 * (after - before) / before:+.1f} %" if before else NOTHING


def signed(text: str, value: float) -> str:
    """Puts a plus sign before a formatted value that is above zero."""
    return f"+{text}" if value > 0 and not text.startswith("0 ") else text


def _three(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.0f}" if magnitude >= 99.95 else f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"
