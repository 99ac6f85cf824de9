"""One weight matrix by ARB-RCX: columns in segments of one kind, the cheaper first, then all refined under H itself.

Two observations decide the order. Each column's error is paid at what later columns cannot make up for; and a column
costs the whole of its own variance only if it comes last. So columns with fewer bits come first, those with the most
bits last, where little is left to be made up for; inside a segment the order is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from arbllm.binarize import joint, trellis
from arbllm.binarize.block import Part
from arbllm.binarize.joint import Levels
from arbllm.binarize.trellis import TrellisLevels, TrellisPart
from arbllm.factor import Factor
from arbllm.format.layout import Segment

FIRST_ROUNDS = 4
OUTLIER_ENERGY, MOST_OUTLIERS = 20.0, 0.01  # times the mean energy, share of the columns
ENOUGH = 0.003

AnyLevels = Levels | TrellisLevels


@dataclass(frozen=True)
class SegmentsFit:
    """A matrix in segments.

    Attributes:
        parts: one a segment, in stored order.
        reconstruction: W_hat, float32 (n, m).
        errors: tr(D H D^T), H damped, once all segments are solved and after each round of refinement that lowered it.
    """

    parts: list[Part | TrellisPart]
    reconstruction: Tensor
    errors: tuple[float, ...]


def fit_segments(weight: Tensor, factor: Factor, segments: Sequence[Segment], rounds: int) -> SegmentsFit:
    """Solve a matrix segment by segment, each one's error spread over the later ones, then refine all in turn.

    Args:
        weight: W, float32 (n, m), zero in columns that never fire.
        factor: of H.
        segments: kinds and widths; the cheaper kinds first.
        rounds: refinement under H stops after so many rounds, or once a round gains less than ENOUGH of the error. A
            round that raises it, since scales are rounded, is undone.
    """
    order = processing_order(weight, factor, segments)
    problem = _Problem(weight.T[order].contiguous())
    bounds = _bounds(segments)
    # Both H and U can be larger than the weight: U is gone when H in this order is made.
    levels = problem.solve(segments, bounds, factor.reordered_upper(order))
    problem.look_at(factor.reordered(order))
    errors = [problem.error()]
    for _ in range(rounds):
        refined = problem.refine(levels, bounds)
        error = problem.error()
        if not error < errors[-1]:  # rounding of scales is all that is left
            break
        levels = refined
        errors.append(error)
        if errors[-2] - errors[-1] < ENOUGH * errors[-2]:
            break
    del problem
    reconstruction = torch.empty_like(weight)
    parts: list[Part | TrellisPart] = []
    for level, place in zip(levels, bounds, strict=True):
        reconstruction[:, order[place]] = level.values().T
        columns, ascending = order[place].sort()
        parts.append(level.reordered(ascending).to_part(columns))
    return SegmentsFit(parts, reconstruction, tuple(errors))


def outliers(hessian: Tensor) -> int:
    """How many columns carry so much of the activations' energy that each deserves a segment of its own.

    A few inputs of a language model are hundreds of times as large as the rest, on a few tokens. What such a column is
    off by hides the error that all other tokens see, and later columns give their precision to make up for it.
    """
    energy = hessian.diagonal()
    count = int((energy > OUTLIER_ENERGY * energy.mean()).sum())
    return min(count, int(MOST_OUTLIERS * len(energy)))


def processing_order(weight: Tensor, factor: Factor, segments: Sequence[Segment]) -> Tensor:
    """The order in which columns are solved, int64 (m).

    Segments of a single column get the greatest H_jj. Of the others, the more bits, the greater
    ||w_j||^2 / (H^-1)_jj, a column's energy that no other column can make up for; inside a kind by falling H_jj.
    """
    diagonal = factor.damped_diagonal
    single = sum(segment.width == 1 for segment in segments)
    energy = weight.square().sum(0) / factor.inverse_diagonal
    energy[factor.hessian.diagonal().argsort(descending=True, stable=True)[:single]] = torch.inf
    ranked = energy.argsort(descending=True, stable=True)
    places, start = [], 0
    for _, run in groupby(segments, key=lambda segment: (segment[1:], segment.width == 1)):
        stop = start + sum(segment.width for segment in run)
        members = ranked[len(ranked) - stop : len(ranked) - start]
        places.append(members[diagonal[members].argsort(descending=True, stable=True)])
        start = stop
    return torch.cat(places)


class _Problem:
    """The matrix being solved, column-major in processing order.

    Attributes:
        weight: W^T, float32 (m, n).
        values: W_hat^T so far.
        hessian: H, damped, float32 (m, m), once it was looked at.
        pull: H (W - W_hat)^T, float32 (m, n), from then on.
    """

    hessian: Tensor
    pull: Tensor

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.values = weight, torch.zeros_like(weight)

    def error(self) -> float:
        """tr(D H D^T)."""
        return float((self.weight - self.values).mul_(self.pull).sum())

    def solve(self, segments: Sequence[Segment], bounds: Sequence[slice], upper: Tensor) -> list[AnyLevels]:
        """The first pass, by U of H: later segments make up for the errors of earlier ones."""
        remaining = self.weight.clone()
        solved: list[AnyLevels] = []
        for segment, place in zip(segments, bounds, strict=True):
            target, triangle = remaining[place], upper[place, place]
            metric = torch.cholesky_inverse(triangle, upper=True)
            levels = _feed_forward(target, segment, triangle)
            goal = metric @ target
            for _ in range(FIRST_ROUNDS):
                levels = _choose_levels(goal, _refit_scales(goal, levels, metric), metric)
            self.values[place] = levels.values()
            error = torch.linalg.solve_triangular(triangle.T, target - self.values[place], upper=False)
            remaining[place.stop :] -= upper[place, place.stop :].T @ error
            solved.append(levels)
        return solved

    def look_at(self, hessian: Tensor) -> None:
        """Go on from the first pass under H itself."""
        self.hessian = hessian
        self.pull = hessian @ (self.weight - self.values)

    def refine(self, levels: Sequence[AnyLevels], bounds: Sequence[slice]) -> list[AnyLevels]:
        """One round over all segments under H, each with all the others fixed."""
        refined = []
        for level, place in zip(levels, bounds, strict=True):
            metric, before = self.hessian[place, place], self.values[place].clone()
            goal = torch.addmm(self.pull[place], metric, before)
            level = _refit_scales(goal, _choose_levels(goal, level, metric), metric)
            self.values[place] = level.values()
            self.pull.addmm_(self.hessian[:, place], self.values[place] - before, alpha=-1)
            refined.append(level)
        return refined


def _feed_forward(target: Tensor, segment: Segment, triangle: Tensor) -> AnyLevels:
    if segment.trellis:
        return trellis.feed_forward(target, trellis.start(target, segment.terms), triangle)
    return joint.feed_forward(target, joint.start(target, segment.groups, segment.terms), triangle)


def _choose_levels(goal: Tensor, levels: AnyLevels, metric: Tensor) -> AnyLevels:
    if isinstance(levels, TrellisLevels):
        return trellis.choose_levels(goal, levels, metric)
    return joint.choose_levels(goal, levels, metric)


def _refit_scales(goal: Tensor, levels: AnyLevels, metric: Tensor) -> AnyLevels:
    if isinstance(levels, TrellisLevels):
        return trellis.refit_scales(goal, levels, metric)
    return joint.refit_scales(goal, levels, metric)


def _bounds(segments: Sequence[Segment]) -> list[slice]:
    stops = torch.tensor([segment.width for segment in segments]).cumsum(0).tolist()
    return [slice(stop - segment.width, stop) for segment, stop in zip(segments, stops, strict=True)]
