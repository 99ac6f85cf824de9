"""How far an approximation is from a weight, relative to the weight; 0 where that is 0."""

from __future__ import annotations

from torch import Tensor


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - W_hat, for W and W_hat (n, m) and H (m, m)."""
    original, hessian = weight.float(), hessian.float()
    return _ratio(_energy(original - approximation, hessian), _energy(original, hessian))


def weight_error(weight: Tensor, approximation: Tensor) -> float:
    """||W - W_hat||^2 / ||W||^2, for W and W_hat (n, m)."""
    original = weight.float()
    return _ratio(float((original - approximation).square().sum()), float(original.square().sum()))


def _energy(matrix: Tensor, hessian: Tensor) -> float:
    """tr(A H A^T)."""
    return float((matrix @ hessian).mul_(matrix).sum())


def _ratio(part: float, whole: float) -> float:
    return max(part, 0.0) / whole if whole > 0 else 0.0
