"""The Hessian of a layer's inputs, damped and factorised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from arbllm.errors import ModelError

DAMPING_STEP = 4.0
DAMPING_LIMIT = 1e4
NO_DAMPING = 1e-6  # for what is damped already
INVERSE_LEAF = 128
ROWS, PART = 512, 2**20  # of a large matrix, and of its numbers, that are dealt with at a time


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
        """H + rho diag(H) + lambda I, dead inputs as the mean of the others: positive definite, float32 (m, m)."""
        damped = self.hessian.clone()
        damped.diagonal().copy_(self.damped_diagonal)
        return damped

    @property
    def damped_diagonal(self) -> Tensor:
        """The diagonal of `damped`, which is all that it does not share with H, float32 (m)."""
        diagonal, unit = _shrunk(self.hessian, self.dead, self.shrinkage)
        return diagonal + self.damping * unit

    def reordered(self, order: Tensor) -> Tensor:
        """`damped` with its columns, and rows, in another order, int64 (m): float32 (m, m)."""
        damped = _reorder(self.hessian, order)
        damped.diagonal().copy_(self.damped_diagonal[order])
        return damped

    def reordered_upper(self, order: Tensor) -> Tensor:
        """U of `reordered`, float32 (m, m)."""
        diagonal = self.damped_diagonal[order]
        return _inverse_root(partial(_reorder, self.hessian, order.flip(0)), diagonal, diagonal.mean(), NO_DAMPING)[0]


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
    hessian = hessian.float().contiguous()
    if not all(torch.isfinite(rows).all() for rows in hessian.split(ROWS)):
        raise ModelError("its Hessian has NaN or infinite entries: the activations overflowed; try --dtype float32")
    dead = hessian.diagonal() <= 0
    diagonal, unit = _shrunk(hessian, dead, shrinkage)
    upper, damping = _inverse_root(partial(hessian.flip, 0, 1), diagonal, unit, damping)
    inverse_diagonal = torch.cat([columns.square().sum(0) for columns in upper.split(ROWS, 1)])
    return Factor(hessian, upper, inverse_diagonal, dead, damping, shrinkage)


def _shrunk(hessian: Tensor, dead: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """(1 + rho) diag(H), (m), and the mean of diag H; inputs that never fire count as the mean of the others."""
    diagonal = hessian.diagonal().clone()
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    return diagonal * (1 + shrinkage), diagonal.mean()


def _inverse_root(
    reversed_copy: Callable[[], Tensor], diagonal: Tensor, unit: Tensor, damping: float
) -> tuple[Tensor, float]:
    """U with A^-1 = U^T U, for A with `diagonal` + damping * `unit`, and the damping that it took.

    A can be large: but for blocks of a quarter of it, all happens in one copy.

    Args:
        reversed_copy: makes J A J, C-contiguous, J being the reversal of order; called again where Cholesky failed.
        diagonal: of A, (m).
        unit: of damping, a number.
        damping: to begin with.

    Raises:
        ModelError: no damping makes A positive definite.
    """
    while damping < DAMPING_LIMIT:
        matrix = reversed_copy()
        matrix.diagonal().copy_((diagonal + damping * unit).flip(0))
        # J A J = L L^T, and with R = J L J, upper triangular, A = R R^T, so A^-1 = U^T U with U = R^-1.
        failed = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, failed))
        if not failed:
            _reverse(matrix.view(-1))
            _invert(matrix.mT)
            return matrix.mT, damping
        raised = DAMPING_STEP * damping
        warnings.warn(f"the Hessian is not positive definite at damping {damping:g}; trying {raised:g}", stacklevel=3)
        damping = raised
    raise ModelError("its Hessian is not positive definite at any damping: calibrate on more or other text")


def _reverse(vector: Tensor) -> None:
    """Reverse the order of a vector's entries in place."""
    size = len(vector)
    for start in range(0, size // 2, PART):
        stop = min(start + PART, size // 2)
        head, tail = vector[start:stop], vector[size - stop : size - start]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place by halves, a third of the work of solving against the identity."""
    size = len(upper)
    if size <= INVERSE_LEAF:
        upper.copy_(
            torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True)
        )
        return
    half = size // 2
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert(first)
    _invert(last)
    corner.copy_((first @ corner).neg_() @ last)


def _reorder(matrix: Tensor, order: Tensor) -> Tensor:
    """A square matrix with rows and columns in another order; some rows at a time, so that two copies do not meet."""
    reordered = torch.empty_like(matrix)
    for target, rows in zip(reordered.split(ROWS), order.split(ROWS), strict=True):
        torch.index_select(matrix[rows], 1, order, out=target)
    return reordered
