"""Who wins: the rows of a comparison that no other row beats at the same size or less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
SAME = 1.01


def score(row: Row, text: str) -> float:
    """Perplexity of a row on a text; infinite where it is not a number."""
    value = row["perplexity"].get(text)
    return math.inf if value is None else float(value)


def frontier(rows: Sequence[Row], text: str, size: str = "true_bits") -> list[Row]:
    """The rows that no other beats in perplexity at the same size or less, by size.

    Sizes are the same within `SAME`: budgets are hit no closer.

    Args:
        rows: of `results.json`.
        text: the text that perplexity was measured on.
        size: `true_bits` or `bytes`.
    """
    winners = [row for row in rows if score(row, text) < math.inf and beaten_by(row, rows, text, size) is None]
    return sorted(winners, key=lambda row: row[size])


def beaten_by(row: Row, rows: Sequence[Row], text: str, size: str = "true_bits") -> Row | None:
    """The best row of no greater size that has a lower perplexity than `row`; None on the frontier."""
    rivals = [other for other in rows if other[size] <= SAME * row[size] and other is not row]
    best = min(rivals, key=lambda other: score(other, text), default=None)
    return best if best is not None and score(best, text) < score(row, text) else None


def verdict(rows: Sequence[Row], text: str) -> list[str]:
    """What the table says, in sentences: the frontier first, then who is beaten by whom.

    Args:
        rows: of `results.json`.
        text: the text that perplexity was measured on.
    """
    winners = frontier(rows, text)
    listed = ", ".join(f"{row['method']} ({row['true_bits']:.2f} bits, {shown(score(row, text))})" for row in winners)
    lines = [f"On {text}, no method of the same true bits or fewer has a lower perplexity than: {listed}."]
    for row in rows:
        rival = beaten_by(row, rows, text)
        if rival:
            lines.append(
                f"{row['method']} ({row['true_bits']:.2f} bits, {shown(score(row, text))}) is beaten by "
                f"{rival['method']} ({rival['true_bits']:.2f} bits, {shown(score(rival, text))})."
            )
    return lines


def shown(perplexity: float) -> str:
    """A perplexity with as many digits as tell something."""
    if not math.isfinite(perplexity):
        return "not finite"
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"
