"""Kernels of arbllm in C++."""

from collections.abc import Sequence
from typing import Any

def instruction_sets() -> list[str]:
    """Instruction sets that can be chosen, the best first."""

LANES: int
"""Rows of a block: `unpack` counts in these."""
MOST_TOKENS: int
"""That `multiply` takes at a time."""

class Packed:
    """A packed matrix in memory that its owner keeps."""

    @staticmethod
    def at(
        rows: int,
        columns: int,
        places: Sequence[Sequence[int]],
        planes: Sequence[int],
        plane_bytes: Sequence[int],
        row_scales: int,
        row_means: int,
        column_scales: int,
        order: int,
    ) -> Packed:
        """From addresses, 0 for what is absent."""

    def prepared_bytes(self) -> int:
        """Bytes that `prepare` writes."""

    def prepare(self, to: int, threads: int) -> None:
        """Write the matrix as the kernels want it, to an address divisible by 64."""

def multiply(
    prepared: int, x: int, y: int, tokens: int, stride: int, bfloat16: bool, instruction_set: int, threads: int
) -> None:
    """y = x W^T for at most MOST_TOKENS tokens."""

def unpack(prepared: int, first: int, last: int, to: int, instruction_set: int, threads: int) -> None:
    """Blocks of LANES rows of W, transposed, in the prepared order: float32 (columns, LANES * (last - first))."""

def order(prepared: int) -> int:
    """Address of the natural column, int32, of each prepared one."""

def give_back(start: int, bytes: int) -> int:
    """Give back memory that is as a mapped file has it; the bytes that were."""

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
