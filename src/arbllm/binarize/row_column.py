"""ARB-RC: row and column scales in place of row means (paper section 3.3). Arguments as in `alternating`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arbllm.binarize.alternating import squared_error
from arbllm.binarize.block import Term, Zone, nearest_signs, signs_of
from arbllm.binarize.steps import Fit, refine

TINY = torch.finfo(torch.float32).tiny


def fit_arb_rc(values: Tensor, mask: Tensor, order: int, iterations: int, gram: Tensor | None) -> Fit:
    """ARB-RC: rounds of r = sum_j W c B / sum_j c^2 and c = sum_i W r B / sum_i r^2, sums over the mask.

    To first order the signs are those of W and stay; to second order each round ends with the nearest of four points.
    """
    weights = mask.float()
    first = _start(values, weights)
    if order == 1:
        signed = values.abs() * weights
        start, step = Zone(mask, (first,)), lambda zone: Zone(mask, (_refit(signed, weights, zone.terms[0]),))
    else:
        second = _start(values - first.reconstruct(), weights)
        start, step = Zone(mask, (first, second)), lambda zone: _second_order_step(values, weights, zone)
    fit = refine(start, step, lambda zone: squared_error(values, zone), iterations)
    return Fit(_normalised(fit.zone), fit.errors)


def _start(values: Tensor, weights: Tensor) -> Term:
    """R = mean|W| per row, c = mean|W / r| per column, B = sign(W)."""
    magnitudes = values.abs() * weights
    rows = magnitudes.sum(1) / weights.sum(1).clamp(min=1)
    columns = (magnitudes / rows.clamp(min=TINY)[:, None]).sum(0) / weights.sum(0).clamp(min=1)
    return Term(signs_of(values), rows, columns)


def _second_order_step(values: Tensor, weights: Tensor, zone: Zone) -> Zone:
    first, second = zone.terms
    first = _refit((values - second.reconstruct()) * first.signs * weights, weights, first)
    second = _refit((values - first.reconstruct()) * second.signs * weights, weights, second)
    first_signs, second_signs = nearest_signs(values, _magnitudes(first), _magnitudes(second))
    return Zone(zone.mask, (replace(first, signs=first_signs), replace(second, signs=second_signs)))


def _refit(signed: Tensor, weights: Tensor, term: Term) -> Term:
    """Least-squares row scales for fixed column scales, then column scales for the new row scales; signs stay.

    Args:
        signed: what the term has to match, times its signs, zero outside the mask, float32 (n, k).
        weights: the mask as 0 and 1, float32 (n, k).
        term: the scales to start from.
    """
    columns = _columns(term)
    rows = (signed @ columns) / (weights @ columns.square()).clamp(min=TINY)
    columns = (signed.T @ rows) / (weights.T @ rows.square()).clamp(min=TINY)
    return Term(term.signs, rows, columns)


def _columns(term: Term) -> Tensor:
    assert term.column_scales is not None
    return term.column_scales


def _magnitudes(term: Term) -> Tensor:
    return term.row_scales[:, None] * _columns(term)


def _normalised(zone: Zone) -> Zone:
    """Only the product r c matters: scale each term so that mean|c| = 1, which keeps both within float16."""
    terms = []
    for term in zone.terms:
        size = _columns(term).abs().mean().clamp(min=TINY)
        terms.append(Term(term.signs, term.row_scales * size, _columns(term) / size))
    return Zone(zone.mask, tuple(terms))
