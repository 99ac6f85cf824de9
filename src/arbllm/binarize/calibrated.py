"""ARB-X: means and scales refitted under the calibrated error L2 = tr(R S R^T) (paper section 3.2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arbllm.binarize.alternating import fit_arb
from arbllm.binarize.block import Term, Zone
from arbllm.binarize.steps import Fit, refine


def fit_arb_x(values: Tensor, mask: Tensor, order: int, iterations: int, gram: Tensor | None) -> Fit:
    """ARB for `iterations` rounds, then as many rounds of mu, r under L2 with the signs frozen.

    A row of the zone is mu 1 + r1 B1 (+ r2 B2), so with S restricted to the mask all that the rounds need are the
    products of these few vectors under S: n x k x k numbers are never formed, and a round costs O(n).

    Args:
        values: W, float32 (n, k).
        mask: the zone, bool (n, k).
        order: terms, 1 or 2.
        iterations: T, for either phase.
        gram: S (k, k), the block's X^T X up to a factor, on the part's columns.

    Returns:
        The zone, and L2 (summed over rows) after the start and each round.
    """
    assert gram is not None
    zone = fit_arb(values, mask, order, iterations, None).zone
    assert zone.row_means is not None
    weights = mask.float()
    basis = [weights, *(term.signs * weights for term in zone.terms)]
    images = [vector @ gram for vector in basis]
    products = torch.stack([torch.stack([(a * b).sum(1) for b in basis]) for a in images])
    target = values * weights
    linear = torch.stack([(image * target).sum(1) for image in images])
    constant = ((target @ gram) * target).sum()

    def error(zone: Zone) -> float:
        p = _parameters(zone)
        return float(constant - 2 * (linear * p).sum() + torch.einsum("an,abn,bn->", p, products, p))

    def step(zone: Zone) -> Zone:
        return _with_parameters(zone, _sweep(_parameters(zone), products, linear))

    return refine(zone, step, error, iterations)


def _sweep(parameters: Tensor, products: Tensor, linear: Tensor) -> Tensor:
    """One round of coordinate descent on p^T A p - 2 b^T p, for every row at once; p and b are (1 + terms, n)."""
    parameters = parameters.clone()
    for index in range(parameters.shape[0]):
        curvature = products[index, index]
        gradient = (products[index] * parameters).sum(0) - linear[index]
        usable = curvature > 1e-6 * products.diagonal().amax(1)
        parameters[index] -= torch.where(usable, gradient / curvature.clamp(min=1e-30), torch.zeros_like(gradient))
    return parameters


def _parameters(zone: Zone) -> Tensor:
    """mu, r1 (, r2) as rows of one tensor (1 + terms, n)."""
    assert zone.row_means is not None
    return torch.stack([zone.row_means, *(term.row_scales for term in zone.terms)])


def _with_parameters(zone: Zone, parameters: Tensor) -> Zone:
    terms: tuple[Term, ...] = tuple(
        replace(term, row_scales=scales) for term, scales in zip(zone.terms, parameters[1:], strict=True)
    )
    return replace(zone, terms=terms, row_means=parameters[0])
