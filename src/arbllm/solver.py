"""One weight matrix: damping, Cholesky, the loop over blocks with error compensation -> `BinaryMatrix`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arbllm.binarize.binarize import BlockFit, binarize_block
from arbllm.binarize.block import Part
from arbllm.binarize.methods import get_method
from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError, ModelError
from arbllm.format.assemble import assemble
from arbllm.format.matrix import BinaryMatrix, SolveReport

DAMPING_STEP = 4.0
DAMPING_LIMIT = 1e4
INVERSE_LEAF = 128


@dataclass(frozen=True)
class Factor:
    """The factorised Hessian, shared by all linears that read the same input.

    Attributes:
        hessian: H, float32 (m, m), as accumulated.
        upper: U, upper triangular, (H + lambda I)^-1 = U^T U, float32 (m, m).
        dead: bool (m), inputs that never fire (H_jj = 0).
        damping: lambda over the mean of diag H; larger than asked for where Cholesky needed it.
    """

    hessian: Tensor
    upper: Tensor
    dead: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float = 0.01) -> Factor:
    """Damp and factorise H, raising the damping fourfold with a warning for as long as Cholesky fails.

    Args:
        hessian: H = (2 / N) sum x x^T, (m, m).
        damping: lambda in units of the mean of diag H.

    Raises:
        ModelError: H has NaN or infinite entries, or is so far from positive definite that no damping helps.
    """
    hessian = hessian.float()
    if not torch.isfinite(hessian).all():
        raise ModelError("its Hessian has NaN or infinite entries: the activations overflowed; try --dtype float32")
    dead = hessian.diagonal() <= 0
    damped = hessian.clone()
    damped.diagonal()[dead] = 1.0
    unit = damped.diagonal().mean()
    while damping < DAMPING_LIMIT:
        # With J the reversal of order, chol(J A J) gives A = R R^T, R upper triangular, so A^-1 = U^T U with U = R^-1.
        shifted = damped + damping * unit * torch.eye(damped.shape[0], device=damped.device)
        lower, failed = torch.linalg.cholesky_ex(shifted.flip(0, 1))
        if not failed:
            return Factor(hessian, _inverse(lower.flip(0, 1)), dead, damping)
        raised = DAMPING_STEP * damping
        warnings.warn(f"the Hessian is not positive definite at damping {damping:g}; trying {raised:g}", stacklevel=2)
        damping = raised
    raise ModelError("its Hessian is not positive definite at any damping: calibrate on more or other text")


def quantize_matrix(
    weight: Tensor, hessian: Tensor, config: BinarizationConfig | None = None, *, factor: Factor | None = None
) -> BinaryMatrix:
    """Binarize one weight matrix so that the layer's output changes as little as possible.

    >>> matrix = quantize_matrix(weight, hessian, BinarizationConfig(method="arb-rc"))
    >>> matrix.true_bits, matrix.report.output_error

    Args:
        weight: W, (n, m), outputs by inputs, any floating dtype.
        hessian: H = (2 / N) sum x x^T over the layer's inputs, (m, m), undamped.
        config: method and options; the default is arb-rc with the column-group bitmap.
        factor: `factorize(hessian, config.damping)`, where the caller has it already.

    Returns:
        The packed matrix on the weight's device, with a `SolveReport`.

    Raises:
        ConfigError: shapes do not fit.
        ModelError: NaN or infinite entries, or scales that do not fit float16.
    """
    config = config or BinarizationConfig()
    if weight.ndim != 2 or hessian.shape != (weight.shape[-1],) * 2:
        raise ConfigError(
            f"a weight of shape (n, m) needs a Hessian (m, m), not {list(weight.shape)} and {list(hessian.shape)}"
        )
    original = weight.detach().float()
    if not torch.isfinite(original).all():
        raise ModelError("its weight has NaN or infinite entries: the model file is damaged, or was saved that way")
    factor = factor or factorize(hessian, config.damping)
    fits, reconstruction = _solve(original, factor, config)
    difference = original - reconstruction
    report = SolveReport(
        output_error=_ratio(_energy(difference, factor.hessian), _energy(original, factor.hessian)),
        weight_error=_ratio(float(difference.square().sum()), float(original.square().sum())),
        damping=factor.damping,
        error_history=tuple(fit.errors for fit in fits),
    )
    return assemble(_parts(fits), report, block_size=config.block_size)


def _parts(fits: list[BlockFit]) -> list[Part]:
    """The parts of all blocks, left to right, their columns numbered through the whole matrix."""
    parts, start = [], 0
    for fit in fits:
        parts += [replace(part, columns=part.columns + start) for part in fit.block.parts]
        start += fit.block.width
    return parts


def _solve(original: Tensor, factor: Factor, config: BinarizationConfig) -> tuple[list[BlockFit], Tensor]:
    """Binarize block by block, each block's error spread over the columns still to come."""
    remaining = original.clone()
    remaining[:, factor.dead] = 0
    reconstruction = torch.empty_like(remaining)
    method = get_method(config.method)
    fits = []
    for start in range(0, remaining.shape[1], config.block_size):
        end = min(start + config.block_size, remaining.shape[1])
        weight, triangle = remaining[:, start:end], factor.upper[start:end, start:end]
        fit = binarize_block(
            weight,
            (weight / triangle.diagonal()).square(),
            factor.hessian[start:end, start:end],
            method,
            metric=torch.cholesky_inverse(triangle, upper=True) if method.refine else None,
            partition=config.partition,
            groups=config.groups,
            iterations=config.iterations,
            split_on=config.split_on,
        )
        fit = fit._replace(block=fit.block.rounded())
        reconstruction[:, start:end] = fit.block.reconstruct()
        error = weight - reconstruction[:, start:end]
        remaining[:, end:] -= _compensation(error, triangle, config.compensation) @ factor.upper[start:end, end:]
        fits.append(fit)
    return fits, reconstruction


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


def _compensation(error: Tensor, triangle: Tensor, form: str) -> Tensor:
    """E U_bb^-1, the least-squares optimum (`exact`), or E / diag(U_bb), as BiLLM and the paper (`reference`)."""
    if form == "reference":
        return error / triangle.diagonal()
    return torch.linalg.solve_triangular(triangle, error, upper=True, left=False)


def _energy(matrix: Tensor, hessian: Tensor) -> float:
    """tr(A H A^T)."""
    return float(((matrix @ hessian) * matrix).sum())


def _ratio(part: float, whole: float) -> float:
    return max(part, 0.0) / whole if whole > 0 else 0.0
