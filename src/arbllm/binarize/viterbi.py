"""One pass over the columns of a segment with a trellis: a column's signs are chosen together, by Viterbi's algorithm.

What a weight can be depends on the signs of rows above it, but rows do not depend on each other under H. So with the
other columns fixed, the best signs of a column are those whose levels come nearest to what is wanted, summed over all
rows, which is a shortest path. Native where the extension was built, on the CPU even if tensors are elsewhere; else
with PyTorch, a few calls a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.code import MEMORY, ROWS_APART, WINDOWS, levels, window_bits
from arbllm.binarize.sweep import TILE, Pass
from arbllm.native import load

STATES = 1 << MEMORY
FAR = 1e30
SIGN = 128
"""Of a choice: the first sign is +; the other bits are the number of the level."""


def viterbi_sweep(rows: Tensor, columns: Tensor, terms: int, task: Pass) -> tuple[Tensor, Tensor]:
    """Choose the signs of one column after the other.

    Args:
        rows: row scales, float32 (n), positive.
        columns: column scales, float32 (K), positive.
        terms: signs of a weight, 1 to 4.
        task: what is wanted.

    Returns:
        Choices, uint8 (K, n): the number of the level, plus SIGN where the first sign is +; and their values, float32
        (K, n).
    """
    state, table = task.state.clone(), levels(terms, task.state.device)
    choices = torch.empty(state.shape, dtype=torch.uint8, device=state.device)
    values = torch.empty_like(state)
    solve = _native_tile if load() else _tile
    for start in range(0, len(state), TILE):
        tile = slice(start, min(start + TILE, len(state)))
        before = None if task.values is None else task.values[tile]
        columns_of_tile = Columns(state[tile], before, task.influence[tile, tile], task.steps[tile], columns[tile])
        choices[tile], changes = solve(columns_of_tile, rows, table)
        values[tile] = table[(choices[tile] & (SIGN - 1)).int()] * columns[tile, None] * rows
        state[tile.stop :].addmm_(task.influence[tile.stop :, tile], changes, alpha=-1)
    return choices, values


class Columns(NamedTuple):
    """A tile of T columns: the parts of a `Pass`, and column scales, float32 (T)."""

    state: Tensor
    values: Tensor | None
    influence: Tensor
    steps: Tensor
    scales: Tensor


def _native_tile(tile: Columns, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """As `_tile`, by the extension."""
    native, device = load(), rows.device
    assert native
    choices = torch.empty(tile.state.shape, dtype=torch.uint8, device="cpu")
    changes = torch.empty(tile.state.shape, dtype=torch.float32, device="cpu")
    native.viterbi(
        *(None if part is None else part.cpu().contiguous().numpy() for part in (*tile, rows, table)),
        choices.numpy(),
        changes.numpy(),
    )
    return choices.to(device), changes.to(device)


def _tile(tile: Columns, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Choices and changes of the columns of a tile.

    Args:
        tile: the columns.
        rows: row scales, float32 (n).
        table: levels, float32.

    Returns:
        Choices, uint8 (T, n), and changes as `Pass` has them, float32 (T, n).
    """
    state = tile.state.clone()
    choices, changes = torch.empty_like(state, dtype=torch.uint8), torch.empty_like(state)
    for place in range(len(state)):
        wanted = state[place] * tile.steps[place]
        if tile.values is not None:
            wanted += tile.values[place]
        scales = rows * tile.scales[place]
        choices[place] = choice = best_path(wanted, scales, table)
        chosen = table[(choice & (SIGN - 1)).int()] * scales
        changes[place] = chosen - (wanted if tile.values is None else tile.values[place])
        state[place + 1 :].addr_(tile.influence[place + 1 :, place], changes[place], alpha=-1)
    return choices, changes


def best_path(wanted: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The choices of one column that come nearest to what is wanted: uint8 (n), as `viterbi_sweep` returns them.

    Args:
        wanted: float32 (n).
        scales: of the weights, float32 (n).
        table: levels, float32.
    """
    steps = -(-len(wanted) // ROWS_APART)
    padding = steps * ROWS_APART - len(wanted)
    wanted, scales = (torch.nn.functional.pad(part, (0, padding)).view(steps, ROWS_APART) for part in (wanted, scales))
    # By number of the level: first the bits that are free, then the two that the code gives.
    distances = (wanted - table.view(-1, 4, 1, 1) * scales).square_()
    least, nearest = distances.min(0)
    windows = torch.arange(WINDOWS, device=wanted.device)
    labels = torch.tensor([window_bits(window) for window in range(WINDOWS)], device=wanted.device)
    costs = least[labels].transpose(0, 1).reshape(steps, 2, STATES, ROWS_APART)  # by step, oldest sign, new state
    total = wanted.new_full((STATES, ROWS_APART), FAR)
    total[0] = 0
    origins = (windows >> 1).view(2, STATES)
    oldest = []
    for cost in costs:
        total, taken = (total[origins] + cost).min(0)
        oldest.append(taken)
    return _traced(total.argmin(0), oldest, labels, nearest).flatten()[: steps * ROWS_APART - padding]


def _traced(state: Tensor, oldest: list[Tensor], labels: Tensor, nearest: Tensor) -> Tensor:
    """Choices along the paths that end in these states, uint8 (steps, ROWS_APART)."""
    lanes = torch.arange(ROWS_APART, device=state.device)
    found = []
    for step in range(len(oldest) - 1, -1, -1):
        window = state | oldest[step][state, lanes] << MEMORY
        bits = labels[window]
        found.append(4 * nearest[bits, step, lanes] + bits + SIGN * (window & 1))
        state = window >> 1
    return torch.stack(found[::-1]).byte()
