"""ARB-RCX: row scales, column scales, signs and groups of a whole block, refined together under the calibrated error.

The paper leaves open how to refine row and column scales under L2, since they couple. Two observations decouple them:

- The right metric for block b is not S but P = (U_bb^T U_bb)^-1: tr(E P E^T) is the loss that remains once the later
  columns have compensated exactly.
- A block is a sum of terms M_t * B_t * (r_t c_t^T), so the row scales of *all* terms together, or their column scales,
  solve a linear least-squares problem; then every weight moves to the best of its reachable levels, column by column.

Each step lowers the loss or leaves it. The start is ARB-RC.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arbllm.binarize.block import Block, Part, Term, Zone

ENOUGH = 0.01
RIDGE = 1e-5
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Levels:
    """A block as a sum over terms across all of its columns: first the regular groups, then two terms a salient group.

    Attributes:
        block: the parts and columns; its signs, masks and scales are those of the start.
        groups: int64 (n, K), group of each weight inside its part.
        signs: float32 (2, n, K), first and second signs, +1 or -1; the second of a regular column is not used.
        rows: float32 (T, n), row scales.
        columns: float32 (T, K), column scales, zero where a column lacks the term.
    """

    block: Block
    groups: Tensor
    signs: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, block: Block) -> Levels:
        """The levels of a block whose zones have column scales and no row means."""
        rows, columns = [], []
        sample = block.parts[0].zones[0].mask
        groups = torch.zeros(sample.shape[0], block.width, dtype=torch.int64, device=sample.device)
        signs = torch.ones(2, sample.shape[0], block.width, device=sample.device)
        for part in block.parts:
            for group, zone in enumerate(part.zones):
                groups[:, part.columns] += group * zone.mask
                for index, term in enumerate(zone.terms):
                    rows.append(term.row_scales)
                    columns.append(_spread(term, part.columns, block.width))
                    current = signs[index][:, part.columns]
                    signs[index][:, part.columns] = torch.where(zone.mask, term.signs, current)
        return cls(block, groups, signs, torch.stack(rows), torch.stack(columns))

    def basis(self) -> Tensor:
        """Signed masks M_t * B_t of all terms, float32 (T, n, K)."""
        terms = []
        for part in self.block.parts:
            inside = torch.zeros(self.block.width, dtype=torch.bool, device=self.rows.device)
            inside[part.columns] = True
            for group, zone in enumerate(part.zones):
                mask = (self.groups == group) & inside
                terms += [self.signs[index] * mask for index in range(len(zone.terms))]
        return torch.stack(terms)

    def reconstruct(self) -> Tensor:
        """W_hat, float32 (n, K)."""
        return self.to_block().reconstruct()

    def to_block(self) -> Block:
        """Back to zones and terms, each term scaled so that mean|c| = 1, which keeps both scales within float16."""
        parts, offset = [], 0
        for part in self.block.parts:
            zones = []
            for group, zone in enumerate(part.zones):
                terms = []
                for index in range(len(zone.terms)):
                    columns = self.columns[offset][part.columns]
                    size = columns.abs().mean().clamp(min=TINY)
                    terms.append(Term(self.signs[index][:, part.columns], self.rows[offset] * size, columns / size))
                    offset += 1
                zones.append(Zone(self.groups[:, part.columns] == group, tuple(terms)))
            parts.append(Part(part.columns, tuple(zones)))
        regular = parts[0] if self.block.regular is not None else None
        return Block(self.block.width, regular, parts[-1] if self.block.salient is not None else None)


def refine_jointly(weight: Tensor, block: Block, metric: Tensor, rounds: int) -> tuple[Block, tuple[float, ...]]:
    """Refine a block of ARB-RC under tr(E P E^T), until a round gains less than a hundredth.

    Args:
        weight: W_b, float32 (n, K).
        block: the start; zones with column scales and without row means.
        metric: P, float32 (K, K), positive definite.
        rounds: at most so many rounds of row scales, column scales, signs and groups.

    Returns:
        The refined block, and its loss at the start and after each round.
    """
    levels = Levels.of(block)
    losses = [loss(weight, levels, metric)]
    for _ in range(rounds):
        basis = levels.basis()
        candidate = solve_columns(weight, solve_rows(weight, levels, basis, metric), basis, metric)
        candidate = choose_levels(weight, candidate, metric)
        reached = loss(weight, candidate, metric)
        if not reached < losses[-1]:
            break
        levels = candidate
        losses.append(reached)
        if losses[-2] - reached < ENOUGH * losses[-2]:
            break
    return levels.to_block(), tuple(losses)


def loss(weight: Tensor, levels: Levels, metric: Tensor) -> float:
    """tr(E P E^T) with E = W - W_hat."""
    error = weight - levels.reconstruct()
    return float(((error @ metric) * error).sum())


def solve_rows(weight: Tensor, levels: Levels, basis: Tensor, metric: Tensor) -> Levels:
    """Row scales of all terms: for each row the T x T normal equations (u P u^T) r = u P w with u_t = M_t B_t c_t.

    A ridge toward the present scales keeps terms that no weight uses where they are, and the step monotone.

    Args:
        weight: W_b, float32 (n, K).
        levels: the block so far.
        basis: `levels.basis()`.
        metric: P, float32 (K, K).
    """
    terms = (basis * levels.columns[:, None, :]).transpose(0, 1)
    images = terms @ metric
    gram = images @ terms.transpose(1, 2)
    target = (images @ weight[:, :, None]).squeeze(2)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    rows, failed = torch.linalg.solve_ex(gram, target + ridge[:, None] * levels.rows.T)
    usable = (failed == 0) & torch.isfinite(rows).all(1)
    return replace(levels, rows=torch.where(usable, rows.T, levels.rows))


def solve_columns(weight: Tensor, levels: Levels, basis: Tensor, metric: Tensor) -> Levels:
    """Column scales of all terms and columns: A c = b with A = (V^T V) * P[j, j'], v_tj = M_t B_t r_t in column j.

    A is positive semidefinite by the Schur product theorem; the ridge toward the present scales makes it definite.
    Arguments as in `solve_rows`.
    """
    term, column = levels.columns.nonzero(as_tuple=True)
    vectors = basis[term, :, column] * levels.rows[term]
    system = (vectors @ vectors.T) * metric[column][:, column]
    target = (vectors * (weight @ metric).T[column]).sum(1)
    ridge = RIDGE * system.diagonal().mean().clamp(min=TINY)
    system.diagonal().add_(ridge)
    present = levels.columns[term, column]
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        return levels
    columns = levels.columns.clone()
    columns[term, column] = torch.cholesky_solve((target + ridge * present)[:, None], factor).squeeze(1)
    return replace(levels, columns=columns)


def choose_levels(weight: Tensor, levels: Levels, metric: Tensor) -> Levels:
    """One sweep of coordinate descent over the columns, all rows at once, choosing group and signs of each weight.

    With the other columns fixed, the best value of column j is t = W_hat_j + (E P)_j / P_jj: take the nearest level.
    """
    values = levels.reconstruct().T.contiguous()
    pull = metric @ (weight.T - values)
    choices = torch.empty_like(values, dtype=torch.int64)
    points = {index: table[:, place] for table, columns in _tables(levels) for place, index in enumerate(columns)}
    for column in range(values.shape[0]):
        levels_here = points[column]
        wanted = values[column] + pull[column] / metric[column, column]
        choice = (levels_here - wanted).abs_().min(0).indices
        chosen = levels_here.gather(0, choice[None])[0]
        pull[column + 1 :].addr_(metric[column + 1 :, column], chosen - values[column], alpha=-1)
        choices[column] = choice
    return _chosen(levels, choices.T)


def _tables(levels: Levels) -> list[tuple[Tensor, list[int]]]:
    """Per part, every level that its weights can take, (levels, k, n), and its columns.

    Level numbers count group-major, then first sign, then second sign, + before -.
    """
    products = levels.rows[:, None, :] * levels.columns[:, :, None]
    tables, offset = [], 0
    for part in levels.block.parts:
        steps = []
        for zone in part.zones:
            first = products[offset][part.columns]
            if len(zone.terms) == 1:
                steps += [first, -first]
            else:
                second = products[offset + 1][part.columns]
                steps += [first + second, first - second, second - first, -first - second]
            offset += len(zone.terms)
        tables.append((torch.stack(steps), part.columns.tolist()))
    return tables


def _chosen(levels: Levels, choices: Tensor) -> Levels:
    """Groups and signs from level numbers (n, K)."""
    groups, signs = levels.groups.clone(), levels.signs.clone()
    for part in levels.block.parts:
        number, width = choices[:, part.columns], 2 ** len(part.zones[0].terms)
        groups[:, part.columns] = number // width
        signs[0][:, part.columns] = 1.0 - 2.0 * (number % width // (width // 2))
        signs[1][:, part.columns] = 1.0 - 2.0 * (number % 2)
    return replace(levels, groups=groups, signs=signs)


def _spread(term: Term, columns: Tensor, width: int) -> Tensor:
    """A term's column scales over the whole block, zero outside its part."""
    assert term.column_scales is not None
    spread = term.column_scales.new_zeros(width)
    spread[columns] = term.column_scales
    return spread
