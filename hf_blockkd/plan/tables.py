"""Numbers and tables as a person reads them: `si`, `table`."""

from __future__ import annotations

from collections.abc import Sequence


def si(number: float) -> str:
    """`1234567` -> `"1.23 M"`: three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or prefix == "P":
            break
        number /= 1000
    return f"{number:#.3g}".rstrip(".") + f" {prefix}"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width: the first `left` ones flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
