"""Kernels of arbllm in C++."""

from typing import Any

def instruction_sets() -> list[str]:
    """Instruction sets that can be chosen, the best first."""

def sweep(
    terms: int,
    rows: Any,
    columns: Any,
    influence: Any,
    steps: Any,
    state: Any,
    values: Any | None,
    choices: Any,
    chosen: Any,
) -> None:
    """One pass over the columns of a segment: see `arbllm.binarize.sweep`."""
