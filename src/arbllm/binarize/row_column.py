"""ARB-RC: row and column scales in place of row means (paper section 3.3). Arguments as in `alternating`."""

from __future__ import annotations

import torch
from torch import Tensor

from arbllm.binarize.alternating import squared_error
from arbllm.binarize.block import Term, Zone, nearest_signs, signs_of
from arbllm.binarize.steps import Fit, refine

TINY = torch.finfo(torch.float32).tiny


def fit_arb_rc(values: Tensor, mask: Tensor, order: int, iterations: int, gram: Tensor | None) -> Fit:
    """ARB-RC: up to `iterations` rounds of r = sum_j W c B / sum_j c^2 and c = sum_i W r B / sum_i r^2 over the mask."""
    weights = mask.float()
    terms = [_start(values, weights)]
    if order == 2:
        terms.append(_start(values - terms[0].reconstruct(), weights))
    fit = refine(
        Zone(mask, tuple(terms)),
        lambda zone: _step(values, weights, zone),
        lambda zone: squared_error(values, zone),
        iterations,
    )
    return Fit(_normalised(fit.zone), fit.errors)


def _start(values: Tensor, weights: Tensor) -> Term:
    """r = mean|W| per row, c = mean|W / r| per column, B = sign(W)."""
    magnitudes = values.abs() * weights
    rows = magnitudes.sum(1) / weights.sum(1).clamp(min=1)
    columns = (magnitudes / rows.clamp(min=TINY)[:, None]).sum(0) / weights.sum(0).clamp(min=1)
    return Term(signs_of(values), rows, columns)


def _step(values: Tensor, weights: Tensor, zone: Zone) -> Zone:
    if len(zone.terms) == 1:
        return Zone(zone.mask, (_refit(values, weights, zone.terms[0]),))
    first, second = zone.terms
    first = _refit(values - second.reconstruct(), weights, first)
    second = _refit(values - first.reconstruct(), weights, second)
    assert first.column_scales is not None and second.column_scales is not None
    first_signs, second_signs = nearest_signs(
        values, first.row_scales[:, None] * first.column_scales, second.row_scales[:, None] * second.column_scales
    )
    first = Term(first_signs, first.row_scales, first.column_scales)
    second = Term(second_signs, second.row_scales, second.column_scales)
    return Zone(zone.mask, (first, second))


def _refit(target: Tensor, weights: Tensor, term: Term) -> Term:
    """Least-squares row scales for fixed column scales, then column scales for the new row scales; signs stay."""
    assert term.column_scales is not None
    signed = target * term.signs * weights
    rows = (signed @ term.column_scales) / (weights @ term.column_scales.square()).clamp(min=TINY)
    columns = (signed.T @ rows) / (weights.T @ rows.square()).clamp(min=TINY)
    return Term(term.signs, rows, columns)


def _normalised(zone: Zone) -> Zone:
    """Only the product r c matters: scale each term so that mean|c| = 1, which keeps both within float16."""
    terms = []
    for term in zone.terms:
        assert term.column_scales is not None
        size = term.column_scales.abs().mean().clamp(min=TINY)
        terms.append(Term(term.signs, term.row_scales * size, term.column_scales / size))
    return Zone(zone.mask, tuple(terms))
