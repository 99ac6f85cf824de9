"""One pass over the columns of a segment that takes every weight to a level, all rows at once.

Native where the extension was built and tensors are in the CPU's memory, else with PyTorch, a few calls a column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.native import extension

TILE = 32


class Pass(NamedTuple):
    """What a pass reads, column-major.

    The value that is wanted of column j is values_j + steps_j * state_j, with 0 for values that are absent. It gets the
    nearest level; the change d, from values_j or, where they are absent, from the value that was wanted, then reaches
    the columns k > j: state_k -= influence_kj * d.

    Attributes:
        state: float32 (K, n).
        values: float32 (K, n), or None.
        steps: float32 (K).
        influence: float32 (K, K), looked at below its diagonal.
    """

    state: Tensor
    values: Tensor | None
    steps: Tensor
    influence: Tensor


def sweep(rows: Tensor, columns: Tensor, terms: int, task: Pass) -> tuple[Tensor, Tensor]:
    """Take every weight to one of its levels, column after column.

    Args:
        rows: row scales of the slots, float32 (slots, n), slots as in `joint.Levels`.
        columns: column scales, float32 (slots, K).
        terms: signs a weight.
        task: what is wanted.

    Returns:
        Numbers of the levels, uint8 (K, n), and their values, float32 (K, n).
    """
    if native := extension(rows.device):
        choices = torch.empty(task.state.shape, dtype=torch.uint8)
        values = torch.empty_like(task.state, memory_format=torch.contiguous_format)
        inputs = (rows, columns, task.influence, task.steps, task.state, task.values)
        native.sweep(
            terms,
            *(None if part is None else part.contiguous().numpy() for part in inputs),
            choices.numpy(),
            values.numpy(),
        )
        return choices, values
    return _sweep(rows, columns, terms, task)


def _sweep(rows: Tensor, columns: Tensor, terms: int, task: Pass) -> tuple[Tensor, Tensor]:
    """The same with PyTorch: inside a tile a change reaches the next columns at once, later tiles get all of a tile."""
    chooser = _Chooser(rows, columns, terms)
    state = task.state.clone()
    steps = task.steps.tolist()
    for start in range(0, len(state), TILE):
        tile = slice(start, min(start + TILE, len(state)))
        changes = torch.empty_like(state[tile])
        influence = task.influence[tile, tile, None].unbind(1)
        for place, change in enumerate(changes.unbind()):
            column = start + place
            before = None if task.values is None else task.values[column]
            wanted = state[column] * steps[column]
            if before is not None:
                wanted += before
            torch.sub(chooser.choose_next(wanted), wanted if before is None else before, out=change)
            state[column + 1 : tile.stop].addcmul_(influence[place][place + 1 :], change, value=-1)
        state[tile.stop :].addmm_(task.influence[tile.stop :, tile], changes, alpha=-1)
    return chooser.numbers(), chooser.values


class _Chooser:
    """Chooses the levels of one column after the other, from the first on.

    Levels come in pairs of opposite signs, so the search is among magnitudes, for the magnitude that is wanted.

    Attributes:
        values: what was chosen, float32 (K, n).
    """

    def __init__(self, rows: Tensor, columns: Tensor, terms: int) -> None:
        products = (rows[:, None, :] * columns[:, :, None]).unflatten(0, (len(rows) // terms, terms))
        # The levels with a positive first sign, group-major, then the second sign, + before -.
        half = products if terms == 1 else torch.stack([products.sum(1), products[:, 0] - products[:, 1]], 1)
        half = half.flatten(0, 1)
        self._terms = terms
        self._negative = half < 0
        self._magnitudes = half.abs_().transpose(0, 1).contiguous()
        self._places = torch.zeros_like(half[0], dtype=torch.int64)
        self._distances = torch.empty_like(self._magnitudes[0])
        self._least = torch.empty_like(half[0, 0])
        self.values = torch.empty_like(half[0])
        self._columns = zip(self._magnitudes.unbind(), self._places.unbind(), self.values.unbind(), strict=True)

    def choose_next(self, wanted: Tensor) -> Tensor:
        """Take the levels nearest to `wanted` (n) in the next column; returns their values."""
        magnitudes, places, values = next(self._columns)
        if len(magnitudes) > 1:
            torch.sub(magnitudes, wanted.abs(), out=self._distances)
            torch.min(self._distances.abs_(), 0, out=(self._least, places))
            magnitudes = magnitudes.gather(0, places[None])
        return torch.copysign(magnitudes[0], wanted, out=values)

    def numbers(self) -> Tensor:
        """Numbers of the levels chosen, uint8 (K, n)."""
        negative = self.values.signbit() ^ self._negative.gather(0, self._places[None])[0]
        sign, second = negative.long() << (self._terms - 1), self._places & (self._terms - 1)
        if self._terms == 2:  # a negative first sign turns the second one round too
            second = second ^ negative
        return (self._places >> (self._terms - 1) << self._terms | sign | second).byte()
