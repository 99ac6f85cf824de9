"""The plain quantizer (XNOR, BiLLM) and ARB: row means, row scales and signs, refined in turn (paper section 3.1).

All functions work on one zone: `values` float32 (n, k) and `mask` bool (n, k). Rows without a masked weight get zeros.
"""

from __future__ import annotations

from torch import Tensor

from arbllm.binarize.block import Term, Zone, nearest_signs, signs_of
from arbllm.binarize.steps import Fit, refine


def plain_first(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First order: mu = mean(W), r = mean|W - mu|, B = sign(W - mu), per row over the mask.

    Returns:
        row means (n), row scales (n), signs (n, k).
    """
    weights = mask.float()
    count = weights.sum(1).clamp(min=1)
    means = (values * weights).sum(1) / count
    centered = values - means[:, None]
    scales = (centered.abs() * weights).sum(1) / count
    return means, scales, signs_of(centered)


def plain(values: Tensor, mask: Tensor, order: int) -> Zone:
    """The plain quantizer; with order 2, the residual of the first fit is fitted again and the means add up."""
    means, scales, signs = plain_first(values, mask)
    terms = [Term(signs, scales)]
    if order == 2:
        residual = values - means[:, None] - terms[0].reconstruct()
        second_means, second_scales, second_signs = plain_first(residual, mask)
        means = means + second_means
        terms.append(Term(second_signs, second_scales))
    return Zone(mask, tuple(terms), means)


def fit_plain(values: Tensor, mask: Tensor, order: int, iterations: int, gram: Tensor | None) -> Fit:
    """BiLLM's quantizer as a method: no refinement, whatever `iterations` says."""
    zone = plain(values, mask, order)
    return Fit(zone, (squared_error(values, zone),))


def fit_arb(values: Tensor, mask: Tensor, order: int, iterations: int, gram: Tensor | None) -> Fit:
    """ARB: up to `iterations` rounds of means, scales and signs from the plain start (paper algorithm 1)."""
    step = _first_order_step if order == 1 else _second_order_step
    start = plain(values, mask, order)
    return refine(start, lambda zone: step(values, zone), lambda zone: squared_error(values, zone), iterations)


def squared_error(values: Tensor, zone: Zone) -> float:
    """L1 = ||M * (W - W_hat)||_F^2 of one zone."""
    return float(((values - zone.reconstruct()) * zone.mask).square().sum())


def _first_order_step(values: Tensor, zone: Zone) -> Zone:
    assert zone.row_means is not None
    term, weights = zone.terms[0], zone.mask.float()
    count = weights.sum(1).clamp(min=1)
    residual = (values - zone.reconstruct()) * weights
    means = zone.row_means + residual.sum(1) / count
    centered = values - means[:, None]
    scales = (term.signs * centered * weights).sum(1) / count
    return Zone(zone.mask, (Term(signs_of(centered), scales),), means)


def _second_order_step(values: Tensor, zone: Zone) -> Zone:
    assert zone.row_means is not None
    first, second = zone.terms
    weights = zone.mask.float()
    count = weights.sum(1).clamp(min=1)
    means = zone.row_means + ((values - zone.reconstruct()) * weights).sum(1) / count
    centered = values - means[:, None]
    first_scales = (first.signs * (centered - second.reconstruct()) * weights).sum(1) / count
    remaining = centered - first.signs * first_scales[:, None]
    second_scales = (second.signs * remaining * weights).sum(1) / count
    first_signs, second_signs = nearest_signs(centered, first_scales[:, None], second_scales[:, None])
    return Zone(zone.mask, (Term(first_signs, first_scales), Term(second_signs, second_scales)), means)
