"""ARB-RCX with a trellis code: levels of fixed ratios, one scale a row and one a column, refined under the same metric.

The counterpart of `joint`, with the same functions, for weights whose bits depend on the rows above them (see `code`).
Since levels share their scales, a segment costs little more than its signs. Tensors are column-major, (K, n).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arbllm.binarize import code
from arbllm.binarize.joint import RIDGE, TINY, descent, forward, lower_gram
from arbllm.binarize.scales import positive_codes, shares
from arbllm.binarize.viterbi import SIGN, viterbi_sweep


@dataclass(frozen=True)
class TrellisPart:
    """The columns of a segment with a trellis, as they are stored.

    Attributes:
        columns: int64 (k), numbers of the columns in the matrix.
        stored: bool (n, k) for each stored sign of a weight, True for +.
        row_scales: float32 (n).
        column_scales: float32 (k).
    """

    columns: Tensor
    stored: tuple[Tensor, ...]
    row_scales: Tensor
    column_scales: Tensor

    @property
    def kind(self) -> tuple[int, int, bool]:
        """One group, signs a weight, and True: they are those of a trellis."""
        return 1, len(self.stored), True

    @property
    def scales(self) -> list[tuple[Tensor, Tensor]]:
        """The row scales and the column scales."""
        return [(self.row_scales, self.column_scales)]

    @property
    def row_means(self) -> list[Tensor]:
        """None."""
        return []

    @property
    def group_numbers(self) -> Tensor:
        """All 0, uint8 (n, k)."""
        return torch.zeros_like(self.stored[0], dtype=torch.uint8)

    def signs(self, term: int) -> Tensor:
        """Each weight's sign of this term, bool (n, k), True for +."""
        return self.stored[term]


@dataclass(frozen=True)
class TrellisLevels:
    """Columns of one kind: every weight is a level, times the scale of its row and of its column.

    Attributes:
        terms: signs a weight, 1 to 4.
        choices: uint8 (K, n), as `viterbi_sweep` returns them.
        rows: float32 (n), row scales.
        columns: float32 (K), column scales.
    """

    terms: int
    choices: Tensor
    rows: Tensor
    columns: Tensor

    def shapes(self) -> Tensor:
        """The level of each weight, float32 (K, n)."""
        return code.levels(self.terms, self.choices.device)[(self.choices & (SIGN - 1)).int()]

    def values(self) -> Tensor:
        """W_hat, float32 (K, n)."""
        return self.shapes().mul_(self.rows).mul_(self.columns[:, None])

    def to_part(self, columns: Tensor) -> TrellisPart:
        """The same as it is stored.

        Args:
            columns: int64 (K), numbers of the columns in the matrix, in the order of these.
        """
        choices = self.choices.T
        further = [(choices >> place & 1).bool() for place in range(self.terms, 1, -1)]
        return TrellisPart(columns, (choices >= SIGN, *further), self.rows, self.columns)

    def reordered(self, order: Tensor) -> TrellisLevels:
        """The same columns in another order, int64 (K)."""
        return replace(self, choices=self.choices[order], columns=self.columns[order])

    def rounded(self) -> TrellisLevels:
        """The same with scales as they are stored, in 8 bits (see `scales`)."""
        rows, columns = positive_codes(self.rows[None]), positive_codes(self.columns[None])
        step = (rows.largest * columns.largest).half().float()
        return replace(self, rows=step * shares(rows.codes)[0], columns=shares(columns.codes)[0])


def start(weight: Tensor, terms: int) -> TrellisLevels:
    """Levels scaled by the root mean square of each row and column; choices are left for `feed_forward` to make.

    Args:
        weight: W_b^T, float32 (K, n).
        terms: signs a weight, 1 to 4.
    """
    rows = weight.square().mean(0).sqrt().clamp(min=TINY)
    columns = (weight / rows).square().mean(1).sqrt()
    return TrellisLevels(terms, torch.zeros_like(weight, dtype=torch.uint8), rows, columns)


def refit_scales(goal: Tensor, levels: TrellisLevels, metric: Tensor) -> TrellisLevels:
    """Row scales, rounded as they are stored, then the column scales that suit them, rounded too.

    With u = level * column scale, the best scale of a row is (u P w) / (u P u^T); the best column scales solve A c = b
    with A = (V^T V) * P, v = level * row scale. A scale that would not be positive stays as it is, the others are those
    that suit it.

    Args:
        goal: G = P W_b^T, float32 (K, n).
        levels: the segment so far.
        metric: P, float32 (K, K).
    """
    shapes = levels.shapes()
    scaled = shapes * levels.columns[:, None]
    rows = (goal * scaled).sum(0) / ((metric @ scaled).mul_(scaled).sum(0)).clamp(min=TINY)
    usable = (rows > 0) & torch.isfinite(rows)
    levels = replace(levels, rows=torch.where(usable, rows, levels.rows)).rounded()
    vectors = shapes.mul_(levels.rows)
    gram = lower_gram(vectors).mul_(metric)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=TINY)
    gram.diagonal().add_(ridge)
    target = (vectors * goal).sum(1) + ridge * levels.columns
    return replace(levels, columns=_positive_solution(gram, target, levels.columns)).rounded()


def _positive_solution(gram: Tensor, target: Tensor, before: Tensor) -> Tensor:
    """The solution c of A c = b, of which what is not positive stays as it was; all of it if that is not enough.

    Args:
        gram: A, float32 (K, K), symmetric; looked at on and below its diagonal.
        target: b, float32 (K).
        before: positive or 0, float32 (K).
    """
    found = _solution(gram, target)
    free = found > 0
    if free.all():
        return found
    whole = gram.tril() + gram.tril(-1).T
    target = target - whole[:, ~free] @ before[~free]
    found = before.clone()
    found[free] = _solution(whole[free][:, free], target[free])
    return found if (found[free] > 0).all() else before


def _solution(gram: Tensor, target: Tensor) -> Tensor:
    """The solution, or NaN if the matrix is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.full_like(target, torch.nan) if failed else torch.cholesky_solve(target[:, None], factor)[:, 0]


def choose_levels(goal: Tensor, levels: TrellisLevels, metric: Tensor) -> TrellisLevels:
    """One sweep of coordinate descent over the columns; see `joint.choose_levels`. Arguments as in `refit_scales`."""
    choices, _ = viterbi_sweep(levels.rows, levels.columns, levels.terms, descent(goal, levels.values(), metric))
    return replace(levels, choices=choices)


def feed_forward(weight: Tensor, levels: TrellisLevels, upper: Tensor) -> TrellisLevels:
    """Choose the levels of one column after the other; see `joint.feed_forward`.

    Args:
        weight: W_b^T, float32 (K, n).
        levels: scales; their choices are not looked at.
        upper: U_bb, float32 (K, K), upper triangular.
    """
    choices, _ = viterbi_sweep(levels.rows, levels.columns, levels.terms, forward(weight, upper))
    return replace(levels, choices=choices)
