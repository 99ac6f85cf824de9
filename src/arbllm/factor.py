"""The Hessian of a layer's inputs, damped and factorised."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arbllm.errors import ModelError

DAMPING_STEP = 4.0
DAMPING_LIMIT = 1e4
INVERSE_LEAF = 128


@dataclass(frozen=True)
class Factor:
    """The factorised Hessian, shared by all linears that read the same input.

    Attributes:
        hessian: H, float32 (m, m), as accumulated.
        upper: U, upper triangular, (H + lambda I)^-1 = U^T U, float32 (m, m); empty in `without_upper`.
        inverse_diagonal: diagonal of U^T U, float32 (m).
        dead: bool (m), inputs that never fire (H_jj = 0).
        damping: lambda over the mean of diag H; larger than asked for where Cholesky needed it.
        shrinkage: rho.
    """

    hessian: Tensor
    upper: Tensor
    inverse_diagonal: Tensor
    dead: Tensor
    damping: float
    shrinkage: float = 0.0

    def without_upper(self) -> Factor:
        """The same without U, as large as H, for those that only ask for the diagonal of its square."""
        return replace(self, upper=self.upper.new_empty(0, 0))

    @property
    def damped(self) -> Tensor:
        """H + rho diag(H) + lambda I, with H_jj = 1 for inputs that never fire: positive definite, float32 (m, m)."""
        damped = self.hessian.clone()
        damped.diagonal().copy_(self.damped_diagonal)
        return damped

    @property
    def damped_diagonal(self) -> Tensor:
        """The diagonal of `damped`, which is all that it does not share with H, float32 (m)."""
        diagonal, unit = _shrunk(self.hessian, self.dead, self.shrinkage)
        return diagonal + self.damping * unit


def factorize(hessian: Tensor, damping: float = 0.01, shrinkage: float = 0.0) -> Factor:
    """Damp and factorise H, raising the damping fourfold with a warning for as long as Cholesky fails.

    Args:
        hessian: H = (2 / N) sum x x^T, (m, m).
        damping: lambda in units of the mean of diag H.
        shrinkage: rho, in units of each H_jj: trust in correlations that few tokens have shown falls by 1 / (1 + rho),
            as in the shrinkage estimators of covariance matrices (O. Ledoit and M. Wolf, 2004).

    Raises:
        ModelError: H has NaN or infinite entries, or is so far from positive definite that no damping helps.
    """
    hessian = hessian.float()
    if not torch.isfinite(hessian).all():
        raise ModelError("its Hessian has NaN or infinite entries: the activations overflowed; try --dtype float32")
    dead = hessian.diagonal() <= 0
    diagonal, unit = _shrunk(hessian, dead, shrinkage)
    while damping < DAMPING_LIMIT:
        # With J the reversal of order, chol(J A J) gives A = R R^T, R upper triangular, so A^-1 = U^T U with U = R^-1.
        # H can be large: no more copies of it live at a time than must.
        matrix = hessian.flip(0, 1)
        matrix.diagonal().copy_((diagonal + damping * unit).flip(0))
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = matrix.flip(0, 1)
            upper = _inverse(matrix)
            del matrix
            return Factor(hessian, upper, upper.square().sum(0), dead, damping, shrinkage)
        raised = DAMPING_STEP * damping
        warnings.warn(f"the Hessian is not positive definite at damping {damping:g}; trying {raised:g}", stacklevel=2)
        damping = raised
    raise ModelError("its Hessian is not positive definite at any damping: calibrate on more or other text")


def _shrunk(hessian: Tensor, dead: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """(1 + rho) diag(H) with H_jj = 1 for inputs that never fire, (m), and the mean of diag H, by then without rho."""
    diagonal = hessian.diagonal().clone()
    diagonal[dead] = 1.0
    return diagonal * (1 + shrinkage), diagonal.mean()


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves, a third of the work of solving against the identity."""
    size = upper.shape[0]
    if size <= INVERSE_LEAF:
        return torch.linalg.solve_triangular(upper, torch.eye(size, device=upper.device), upper=True)
    half = size // 2
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = _inverse(upper[:half, :half])
    inverse[half:, half:] = _inverse(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    return inverse
