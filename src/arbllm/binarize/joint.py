"""ARB-RCX: scales, signs and groups of a segment of columns, refined together under the calibrated error.

The paper leaves open how to refine row and column scales under L2, since they couple. Two observations decouple them:

- The right metric for a segment is not S but P = (U_bb^T U_bb)^-1: tr(E P E^T) is the loss that remains once the later
  columns have compensated exactly.
- A segment is a sum of terms M_s * B_s * (r_s c_s^T) over its slots s, so the row scales of *all* slots together, or
  their column scales, solve a linear least-squares problem; then every weight moves to the best of its reachable
  levels, column by column.

Each step lowers the loss or leaves it. None needs W itself, only the goal G = P W^T. Tensors are column-major here,
(K, n), as columns are what is swept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arbllm.binarize.block import Part, Term, Zone
from arbllm.binarize.scales import positive_codes, shares
from arbllm.binarize.sweep import Pass, sweep

STRIPS = 4
SLOTS_AT_A_TIME = 4
RIDGE = 1e-5
TINY = torch.finfo(torch.float32).tiny

# Magnitudes that represent a normal distribution with the least squared error (J. Max, Quantizing for minimum
# distortion, 1960), by their number.
NORMAL_LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    4: (0.2451, 0.7560, 1.344, 2.152),
    8: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


@dataclass(frozen=True)
class Levels:
    """Columns of one kind: every weight takes one of groups * 2^terms levels.

    Slots are numbered group-major, then by term; levels group-major, then by first sign, then by second, + before -.

    Attributes:
        groups: 1, 2 or 4.
        terms: signs a weight, 1 or 2.
        choices: uint8 (K, n), the level of each weight.
        rows: float32 (slots, n), row scales.
        columns: float32 (slots, K), column scales.
    """

    groups: int
    terms: int
    choices: Tensor
    rows: Tensor
    columns: Tensor

    def basis(self) -> Tensor:
        """Signed masks M_s * B_s of all slots, float32 (slots, K, n)."""
        group = self.choices >> self.terms
        signs = [self._signs(term) for term in range(self.terms)]
        return torch.stack([sign * (group == g) for g in range(self.groups) for sign in signs])

    def table(self) -> Tensor:
        """What each level is worth in every place, float32 (levels, K, n)."""
        products = self.rows[:, None, :] * self.columns[:, :, None]
        levels = []
        for first, *second in products.split(self.terms):
            if second:
                levels += [first + second[0], first - second[0], second[0] - first, -first - second[0]]
            else:
                levels += [first, -first]
        return torch.stack(levels)

    def values(self) -> Tensor:
        """W_hat, float32 (K, n)."""
        return self.table().gather(0, self.choices[None].long())[0]

    def to_part(self, columns: Tensor) -> Part:
        """The same as zones and terms.

        Args:
            columns: int64 (K), numbers of the columns in the matrix, in the order of these.
        """
        group = (self.choices >> self.terms).T
        signs = [self._signs(term).T for term in range(self.terms)]
        zones = []
        for g in range(self.groups):
            slots = range(g * self.terms, (g + 1) * self.terms)
            terms = tuple(Term(sign, self.rows[s], self.columns[s]) for sign, s in zip(signs, slots, strict=True))
            zones.append(Zone(group == g, terms))
        return Part(columns, tuple(zones))

    def reordered(self, order: Tensor) -> Levels:
        """The same columns in another order, int64 (K)."""
        return replace(self, choices=self.choices[order], columns=self.columns[:, order])

    def rounded(self) -> Levels:
        """The same with scales as they are stored, in 8 bits (see `scales`): positive, signs taken by the weights."""
        flipped = torch.zeros_like(self.choices)
        for slot in range(len(self.rows)):
            group, term = divmod(slot, self.terms)
            negative = (self.rows[slot] < 0)[None, :] ^ (self.columns[slot] < 0)[:, None]
            if negative.any():
                flipped |= (negative & (self.choices >> self.terms == group)).byte() << (self.terms - 1 - term)
        rows, columns = positive_codes(self.rows.abs()), positive_codes(self.columns.abs())
        steps = (rows.largest * columns.largest).half().float()
        return replace(
            self,
            choices=self.choices ^ flipped,
            rows=steps[:, None] * shares(rows.codes),
            columns=shares(columns.codes),
        )

    def _signs(self, term: int) -> Tensor:
        return 1 - 2 * (self.choices >> (self.terms - 1 - term) & 1).float()


def start(weight: Tensor, groups: int, terms: int) -> Levels:
    """The best levels for normally distributed weights, scaled by the root mean square of each row and column.

    The choices are left at 0, for `feed_forward` to make.

    Args:
        weight: W_b^T, float32 (K, n).
        groups: 1, 2 or 4.
        terms: signs a weight, 1 or 2.
    """
    rows = weight.square().mean(0).sqrt().clamp(min=TINY)
    columns = (weight / rows).square().mean(1).sqrt()
    magnitudes = weight.new_tensor(NORMAL_LEVELS[groups * terms]).view(groups, terms)
    if terms == 2:  # levels first + second and first - second
        magnitudes = torch.stack([magnitudes.sum(1), magnitudes.diff(dim=1)[:, 0]], 1) / 2
    factors = magnitudes.flatten()[:, None]
    return Levels(
        groups, terms, torch.zeros_like(weight, dtype=torch.uint8), factors * rows, columns.expand(len(factors), -1)
    )


def refit_scales(goal: Tensor, levels: Levels, metric: Tensor) -> Levels:
    """Row scales of all slots, rounded as they are stored, then the column scales that suit them, rounded too."""
    basis = levels.basis()
    levels = solve_columns(goal, solve_rows(goal, levels, basis, metric).rounded(), None, metric)
    return levels.rounded()


def solve_rows(goal: Tensor, levels: Levels, basis: Tensor, metric: Tensor) -> Levels:
    """Row scales of all slots: for each row the normal equations (u P u^T) r = u P w with u_s = M_s B_s c_s.

    A ridge toward the present scales keeps slots that no weight uses where they are, and the step monotone.

    Args:
        goal: G = P W_b^T, float32 (K, n).
        levels: the segment so far.
        basis: `levels.basis()`.
        metric: P, float32 (K, K).
    """
    terms = basis * levels.columns[:, :, None]
    images = metric @ terms
    gram = torch.stack([(images * term).sum(1) for term in terms], 1).permute(2, 0, 1).contiguous()
    target = (goal * terms).sum(1).T
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    rows, failed = torch.linalg.solve_ex(gram, target + ridge[:, None] * levels.rows.T)
    usable = (failed == 0) & torch.isfinite(rows).all(1)
    return replace(levels, rows=torch.where(usable, rows.T, levels.rows))


def solve_columns(goal: Tensor, levels: Levels, basis: Tensor | None, metric: Tensor) -> Levels:
    """Column scales of all columns: A c = b with A = (V^T V) * P[j, j'], v_sj = M_s B_s r_s in column j.

    A is positive semidefinite by the Schur product theorem; the ridge toward the present scales makes it definite. Of
    many slots, some at a time are solved for, the others as they are. Arguments as in `solve_rows`.
    """
    vectors = (levels.basis() if basis is None else basis) * levels.rows[:, None, :]
    slots, width, _ = vectors.shape
    columns = levels.columns.clone()
    for start in range(0, slots, SLOTS_AT_A_TIME):
        some = slice(start, start + SLOTS_AT_A_TIME)
        wanted = goal
        if slots > SLOTS_AT_A_TIME:
            others = columns.clone()
            others[some] = 0
            wanted = goal - metric @ (vectors * others[:, :, None]).sum(0)
        flat = vectors[some].flatten(0, 1)
        system = lower_gram(flat)
        system.view(-1, width, len(flat) // width, width).mul_(metric[:, None, :])
        ridge = (RIDGE * system.diagonal().mean()).clamp(min=TINY)
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed:
            target = (vectors[some] * wanted).sum(2).flatten() + ridge * columns[some].flatten()
            columns[some] = torch.cholesky_solve(target[:, None], factor).view(-1, width)
    return replace(levels, columns=columns)


def lower_gram(vectors: Tensor) -> Tensor:
    """V V^T (k, k) at and below the diagonal, all that Cholesky looks at; a strip at a time saves most of the rest."""
    gram = vectors.new_zeros(len(vectors), len(vectors))
    height = -(-len(vectors) // STRIPS)
    for start in range(0, len(vectors), height):
        stop = start + height
        torch.mm(vectors[start:stop], vectors[:stop].T, out=gram[start:stop, :stop])
    return gram


def choose_levels(goal: Tensor, levels: Levels, metric: Tensor) -> Levels:
    """One sweep of coordinate descent over the columns, all rows at once, choosing group and signs of each weight.

    With the other columns fixed, the best value of column j is t = W_hat_j + (P E)_j / P_jj: take the nearest level.
    Arguments as in `solve_rows`.
    """
    choices, _ = sweep(levels.rows, levels.columns, levels.terms, descent(goal, levels.values(), metric))
    return replace(levels, choices=choices)


def descent(goal: Tensor, values: Tensor, metric: Tensor) -> Pass:
    """A sweep of coordinate descent from `values`, W_hat, float32 (K, n); see `choose_levels`."""
    return Pass(torch.addmm(goal, metric, values, alpha=-1), values, metric.diagonal().reciprocal(), metric)


def feed_forward(weight: Tensor, levels: Levels, upper: Tensor) -> Levels:
    """Choose the levels of one column after the other, each column's error spread over the later ones at once.

    As in GPTQ (arXiv 2210.17323): a better start for `choose_levels` than rounding every weight by itself.

    Args:
        weight: W_b^T, float32 (K, n).
        levels: scales; their choices are not looked at.
        upper: U_bb, float32 (K, K), upper triangular.
    """
    choices, _ = sweep(levels.rows, levels.columns, levels.terms, forward(weight, upper))
    return replace(levels, choices=choices)


def forward(weight: Tensor, upper: Tensor) -> Pass:
    """A sweep that spreads each column's error over the later ones; arguments as in `feed_forward`."""
    spread = (upper / upper.diagonal()[:, None]).T
    return Pass(weight, None, torch.ones_like(weight[:, 0]), spread.neg())
