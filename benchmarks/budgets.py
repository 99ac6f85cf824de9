"""The table of docs/results.md that sets the perplexity of arb-rcx against its budget of bits, beside GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arbllm.evaluation.frontier import shown
from arbllm.evaluation.written import markdown_table

BUDGETS = (1.1, 1.3, 1.6, 2.0, 2.25, 2.5, 2.85, 3.25)
JOINT = "arb-rcx"
WAYS = {"untuned": "-untuned", "tuned": "", "distilled": "-distilled"}
"""Column of the table -> what it adds to the name of a method."""
PEERS = ("gptq-2", "gptq-3", "gptq-4")


def budget_methods(ways: tuple[str, ...] = ("tuned", "untuned")) -> list[str]:
    """Names of the methods that the table wants."""
    return [_method(budget, WAYS[way]) for way in ways for budget in BUDGETS]


def budget_table(found: Mapping[str, Mapping[str, Any]], full: float) -> str:
    """The table in Markdown: perplexity, and how many times full precision's that is; columns without a figure go.

    Args:
        found: row -> its `perplexity` and, under `quantize`, its `true_bits_per_weight` and `bytes_on_disk`. A row is
            named after its method, with " on C4" where that was what calibrated it.
        full: perplexity of full precision.
    """
    columns = {f"{way}{text}": ending + text for text in ("", " on C4") for way, ending in WAYS.items()}
    rows = [
        (f"{budget:g}", {column: found.get(_method(budget, ending)) for column, ending in columns.items()})
        for budget in BUDGETS
    ]
    rows += [(peer, {"untuned" + text: found.get(peer + text) for text in ("", " on C4")}) for peer in PEERS]
    kept = [column for column in columns if any(cells.get(column) for _, cells in rows)]
    head = ["budget", "true bits", "MB", *kept]
    lines = []
    for name, cells in rows:
        measured = [figures for column in kept if (figures := cells.get(column))]
        if measured:
            job = measured[0]["quantize"]
            sizes = [f"{job['true_bits_per_weight']:.2f}", f"{job['bytes_on_disk'] / 1e6:.1f}"]
            lines.append([name, *sizes, *(_cell(cells.get(column), full) for column in kept)])
    return markdown_table(head, lines, left=0)


def _method(budget: float, ending: str) -> str:
    return f"{JOINT}-{budget:g}{ending}"


def _cell(figures: Mapping[str, Any] | None, full: float) -> str:
    return f"{shown(figures['perplexity'])} ({figures['perplexity'] / full:.2f} x)" if figures else ""
