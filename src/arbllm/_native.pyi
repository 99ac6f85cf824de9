"""Kernels of arbllm in C++."""

from collections.abc import Sequence
from typing import Any

def instruction_sets() -> list[str]:
    """Instruction sets that can be chosen, the best first."""

LANES: int
"""Rows of a block: `unpack` counts in these."""
MULTIPLIES_BFLOAT16: bool
"""Whether this processor has instructions for that."""

class Packed:
    """A packed matrix in memory that its owner keeps."""

    @staticmethod
    def at(
        rows: int,
        columns: int,
        places: Sequence[Sequence[int]],
        planes: Sequence[int],
        plane_bytes: Sequence[int],
        levels: Sequence[Sequence[tuple[int, float]]],
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
    prepared: int,
    x: int,
    y: int,
    tokens: int,
    columns: int,
    rows: int,
    stride: int,
    bfloat16: bool,
    halves: bool,
    instruction_set: int,
    threads: int,
) -> None:
    """y = x W^T in 8 bits, for at most `most_tokens` tokens.

    With `halves`, in bfloat16 where that is faster, and where the kernel `takes_more` for any number of them.
    """

def most_tokens(instruction_set: int) -> int:
    """That `multiply` multiplies in 8 bits."""

def takes_more(instruction_set: int) -> bool:
    """Whether `multiply` takes more tokens than that, if these may be in bfloat16."""

def put_in_order(
    prepared: int, x: int, y: int, tokens: int, columns: int, stride: int, bfloat16: bool, threads: int
) -> None:
    """y (tokens, columns) = x with its columns in the prepared order."""

def unpack(
    prepared: int,
    columns: int,
    first: int,
    last: int,
    to: int,
    bfloat16: bool,
    instruction_set: int,
    threads: int,
) -> None:
    """Blocks of LANES rows of W, transposed, in the prepared order: (columns, LANES * (last - first))."""

def order(prepared: int, columns: int) -> int:
    """Address of the natural column, int32, of each prepared one."""

def give_back(start: int, bytes: int) -> int:
    """Give back memory that is as a mapped file has it; the bytes that were."""

def rebuild(
    places: Sequence[Sequence[int]],
    codes: Any,
    levels: Any,
    order: Any,
    rows: Any,
    columns: Any,
    weight: Any,
    threads: int,
) -> None:
    """Write the weight: see `arbllm.rebuild`."""

def contract(
    places: Sequence[Sequence[int]],
    codes: Any,
    levels: Any,
    order: Any,
    rows: Any,
    columns: Any,
    gradient: Any,
    row_gradients: Any,
    column_gradients: Any,
) -> None:
    """Write the gradients of the scales; those of the column scales as a row for each thread, to be added up."""

def multiply_rows(x: Any, codes: Any, scales: Any, y: Any, instruction_set: int, threads: int) -> None:
    """y = x (scale * code)^T: see `arbllm.kernels.rows`."""

def viterbi(
    state: Any,
    values: Any | None,
    influence: Any,
    steps: Any,
    columns: Any,
    rows: Any,
    levels: Any,
    choices: Any,
    changes: Any,
) -> None:
    """Signs of a trellis, a few columns: see `arbllm.binarize.viterbi`."""

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
