"""Figures and tables as text."""

import math
from collections.abc import Sequence


def printable(text: str) -> str:
    """Return text whose characters a terminal shows and does not obey, lines kept.

    Names in a file may have anything in them: what clears a screen, or writes from right to left.
    """
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
        for one in text
    )


def joined(names: Sequence[str]) -> str:
    """Return names as words: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def format_db(decibels: float) -> str:
    """Return decibels with one decimal; "exact" for an infinite ratio."""
    return "exact" if decibels == math.inf else f"{decibels:.1f} dB"


def format_bytes(count: float) -> str:
    """Return a size in decimal units: 1 kB is 1000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def format_ms(seconds: float) -> str:
    """Return a time in milliseconds, with four digits."""
    return f"{1e3 * seconds:.4g} ms"


def format_seconds(seconds: float) -> str:
    """Return a time that is known roughly: in seconds, or in minutes where it is long."""
    if seconds < 1:
        return "under a second"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: frozenset[str] = frozenset()
) -> list[str]:
    """Return lines of text in aligned columns, those in `numeric` to the right."""
    widths = [max(len(line[place]) for line in [columns, *rows]) for place in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in [columns, *rows]
    ]
