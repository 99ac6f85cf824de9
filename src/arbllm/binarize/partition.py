"""Which weights share parameters: the salient columns, and the groups of large and small weights (paper section 3.4).

Both searches price a candidate with the plain quantizer. A row's error is a function of the count, sum and sum of
squares of the weights in each zone, so cumulative sums over sorted rows price every threshold in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SALIENT_COLUMNS = 49
PERCENTILES = range(10, 91)
SWEEPS = 3
SAMPLE = 16384
SPLIT_ENTRIES = 2**26
"""Entries of a block that a GPU prices splits of at a time, over all splits."""

# Entries [start, stop) of each sorted row, int64 (n, T) each.
Span = tuple[Tensor, Tensor]


def salient_columns(saliency: Tensor) -> Tensor:
    """The column bitmap of a block, found as in the paper: the top k columns by summed saliency, k = 1 .. 49.

    The k is kept whose error on the saliency matrix itself is least, with both the top columns and the rest quantized
    to second order by the plain quantizer, as the reference implementation does.

    Args:
        saliency: s_ij = W_ij^2 / U_jj^2, float32 (n, K).

    Returns:
        bool (K). A block of one column has none.
    """
    width = saliency.shape[1]
    bitmap = torch.zeros(width, dtype=torch.bool, device=saliency.device)
    most = min(MOST_SALIENT_COLUMNS, width - 1)
    if most < 1:
        return bitmap
    order = saliency.sum(0).argsort(descending=True, stable=True)
    ranked = saliency.T[order].contiguous()
    bitmap[order[: int(_errors_of_splits(ranked, most).argmin()) + 1]] = True
    return bitmap


def _errors_of_splits(ranked: Tensor, most: int) -> Tensor:
    """Errors where the first 1 to `most` of the columns (K, n) are apart from the rest, float32 (most)."""
    if ranked.is_cpu:
        errors = [_second_order_error(ranked[:k]) + _second_order_error(ranked[k:]) for k in range(1, most + 1)]
        return torch.stack(errors)
    # A GPU waits for each of so many small steps, so that it takes them for many splits at a time.
    batch = max(1, SPLIT_ENTRIES // ranked.numel())
    counts = torch.arange(1, most + 1, device=ranked.device)
    return torch.cat([_second_order_errors(ranked, some) for some in counts.split(batch)])


def _second_order_errors(ranked: Tensor, counts: Tensor) -> Tensor:
    """`_second_order_error` of both sides of each split, float32 (splits)."""
    first = torch.arange(len(ranked), device=ranked.device)[:, None] < counts[:, None, None]
    sizes = counts[:, None, None], len(ranked) - counts[:, None, None]

    def means(values: Tensor) -> Tensor:
        ours = (values * first).sum(1, keepdim=True)
        return torch.where(first, ours / sizes[0], (values.sum(1, keepdim=True) - ours) / sizes[1])

    residual = ranked - means(ranked.expand(len(counts), -1, -1))
    residual = residual - torch.copysign(means(residual.abs()), residual)
    residual = residual - means(residual)
    return (residual.square() - means(residual.abs()).square()).sum((1, 2))


def _second_order_error(columns: Tensor) -> Tensor:
    """Squared error of the plain quantizer of second order, a row being a column of `columns` (k, n)."""
    residual = columns - columns.mean(0)
    residual = residual - torch.copysign(residual.abs().mean(0), residual)
    residual = residual - residual.mean(0)
    scales = residual.abs().mean(0)
    return residual.square().sum() - columns.shape[0] * scales.square().sum()


def split_by_weight(values: Tensor, groups: int, centered: bool) -> Tensor:
    """Group numbers by |values|, thresholds chosen for the least error of the values themselves.

    With 4 groups the three thresholds are improved in turn, which a nested split cannot do.

    Args:
        values: float32 (n, k).
        groups: 2 or 4.
        centered: whether the method's zones have row means.

    Returns:
        uint8 (n, k), 0 for the smallest magnitudes.
    """
    prefix = _Prefix.of(values, centered)
    candidates = _percentiles(_sample(values.abs().flatten()))
    chosen = _nested(prefix, candidates, groups)
    for _ in range(SWEEPS if groups > 2 else 0):
        for index in range(groups - 1):
            below = chosen[index - 1] if index else None
            above = chosen[index + 1] if index + 2 < groups else None
            chosen[index] = _best(prefix, candidates, below, above)
    return _codes(values, chosen)


def split_by_saliency(saliency: Tensor, groups: int, zeros: int) -> Tensor:
    """Group numbers by saliency, found as the reference implementation does; four groups split the small part again.

    Args:
        saliency: float32 (n, k).
        groups: 2 or 4.
        zeros: entries of value zero that the percentiles count beside these (the reference takes them over the whole
            block with its salient columns blanked).

    Returns:
        uint8 (n, k), 0 for the smallest saliency.
    """
    prefix = _Prefix.of(saliency, centered=True)
    flat = torch.cat([saliency.flatten(), saliency.new_zeros(zeros)])
    chosen = [_best(prefix, _percentiles(flat), None, None)]
    while len(chosen) < groups - 1:
        small = flat[flat <= chosen[0]]
        chosen.insert(0, _best(prefix, _percentiles(small), None, chosen[0]))
    return _codes(saliency, chosen)


def _codes(values: Tensor, thresholds: list[Tensor]) -> Tensor:
    return torch.bucketize(values.abs(), torch.stack(thresholds)).to(torch.uint8)


def _nested(prefix: _Prefix, candidates: Tensor, groups: int) -> list[Tensor]:
    """A start for the thresholds: split everything, then the small part again, ascending."""
    chosen = [_best(prefix, candidates, None, None)]
    while len(chosen) < groups - 1:
        chosen.insert(0, _best(prefix, candidates, None, chosen[0]))
    return chosen


def _best(prefix: _Prefix, candidates: Tensor, below: Tensor | None, above: Tensor | None) -> Tensor:
    """The candidate between `below` and `above` that splits that range of magnitudes with the least error."""
    inside = candidates
    if below is not None or above is not None:  # how many there are a GPU has to be waited for
        low = candidates.new_zeros(()) if below is None else below
        high = candidates.new_full((), torch.inf) if above is None else above
        inside = candidates[(candidates >= low) & (candidates <= high)]
        if inside.numel() == 0:
            return low
    middle = prefix.within(inside)
    bounds = prefix.within(below), prefix.within(above, everything=True)
    return inside[(prefix.errors(bounds[0], middle) + prefix.errors(middle, bounds[1])).argmin()]


def _sample(values: Tensor) -> Tensor:
    """At most about `SAMPLE` entries, evenly spaced: enough to place candidates, whose errors are then exact."""
    return values[:: max(1, values.numel() // SAMPLE)]


def _percentiles(values: Tensor) -> Tensor:
    """The 10th to 90th percentiles, linearly interpolated (81 values)."""
    ordered = values.sort().values
    # Made where it is needed: a copy from the CPU would wait for the GPU.
    position = (
        torch.arange(PERCENTILES.start, PERCENTILES.stop, device=values.device, dtype=torch.float64)
        / 100
        * (values.numel() - 1)
    )
    index = position.long()
    above = ordered[(index + 1).clamp(max=values.numel() - 1)]
    return torch.lerp(ordered[index], above, (position - index).float())


@dataclass(frozen=True)
class _Prefix:
    """Rows in ascending order with cumulative sums, from which any range of magnitudes is priced in O(log k) a row.

    Attributes:
        ordered: float32 (n, k), sorted rows.
        sums: float32 (n, k + 1), sums of the first i entries.
        squares: float32 (n, k + 1), sums of their squares.
        zero: int64 (n, 1), how many entries are negative.
        centered: whether the quantizer has a row mean.
    """

    ordered: Tensor
    sums: Tensor
    squares: Tensor
    zero: Tensor
    centered: bool

    @classmethod
    def of(cls, values: Tensor, centered: bool) -> _Prefix:
        ordered = values.sort(1).values
        sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
        squares = torch.nn.functional.pad(ordered.square().cumsum(1), (1, 0))
        return cls(ordered, sums, squares, (ordered < 0).sum(1, keepdim=True), centered)

    def within(self, threshold: Tensor | None, everything: bool = False) -> Span:
        """The entries of each row with |w| <= threshold, for T thresholds; None means no entry, or every one."""
        if threshold is None:
            every = torch.zeros_like(self.zero), torch.full_like(self.zero, self.ordered.shape[1])
            return every if everything else (self.zero, self.zero)
        wanted = threshold.expand(self.ordered.shape[0], threshold.numel()).contiguous()
        return torch.searchsorted(self.ordered, -wanted), torch.searchsorted(self.ordered, wanted, right=True)

    def errors(self, inner: Span, outer: Span) -> Tensor:
        """Summed plain error of the weights inside `outer` but not `inner`, for each of T thresholds. Float32 (T)."""
        lower, upper = (outer[0], inner[0]), (inner[1], outer[1])
        count = lower[1] - lower[0] + upper[1] - upper[0]
        squares = _between(self.squares, lower) + _between(self.squares, upper)
        left, right = _between(self.sums, lower), _between(self.sums, upper)
        safe = count.clamp(min=1)
        if not self.centered:
            return (squares - (right - left).square() / safe).sum(0)
        means = (left + right) / safe
        middle = torch.searchsorted(self.ordered, means)
        deviation = self._deviation(lower, middle, means) + self._deviation(upper, middle, means)
        return (squares - count * means.square() - deviation.square() / safe).sum(0)

    def _deviation(self, span: Span, middle: Tensor, means: Tensor) -> Tensor:
        """Sum of |w - mean| over a span, float32 (n, T)."""
        start, stop = span
        cut = torch.minimum(torch.maximum(middle, start), stop)
        above = _between(self.sums, (cut, stop)) - means * (stop - cut)
        below = means * (cut - start) - _between(self.sums, (start, cut))
        return above + below


def _between(cumulative: Tensor, span: Span) -> Tensor:
    start, stop = torch.broadcast_tensors(*span)
    return cumulative.gather(1, stop) - cumulative.gather(1, start)
