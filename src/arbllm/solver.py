"""One weight matrix: the paper's loop over blocks with error compensation, or ARB-RCX -> `BinaryMatrix`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.binarize import binarize_block
from arbllm.binarize.block import Part
from arbllm.binarize.methods import Method, get_method
from arbllm.binarize.trellis import TrellisPart
from arbllm.budget import joint_layout
from arbllm.config import BinarizationConfig
from arbllm.difference import output_error, weight_error
from arbllm.errors import ConfigError, ModelError
from arbllm.factor import Factor, factorize
from arbllm.format.assemble import assemble
from arbllm.format.matrix import BinaryMatrix, SolveReport
from arbllm.segments import fit_segments, outliers


def quantize_matrix(
    weight: Tensor, hessian: Tensor, config: BinarizationConfig | None = None, *, factor: Factor | None = None
) -> BinaryMatrix:
    """Binarize one weight matrix so that the layer's output changes as little as possible.

    >>> matrix = quantize_matrix(weight, hessian, BinarizationConfig(method="arb-rc"))
    >>> matrix.true_bits, matrix.report.output_error

    Args:
        weight: W, (n, m), outputs by inputs, any floating dtype.
        hessian: H = (2 / N) sum x x^T over the layer's inputs, (m, m), undamped.
        config: method and options; the default is arb-rcx at 2.25 true bits.
        factor: `factorize(hessian, config.damping)`, where the caller has it already.

    Returns:
        The packed matrix on the weight's device, with a `SolveReport`.

    Raises:
        ConfigError: shapes do not fit, or the matrix cannot be stored in `config.bits`.
        ModelError: no entries, NaN or infinite ones, or scales that do not fit float16.
    """
    config = config or BinarizationConfig()
    if weight.ndim != 2 or hessian.shape != (weight.shape[-1],) * 2:
        raise ConfigError(
            f"a weight of shape (n, m) needs a Hessian (m, m), not {list(weight.shape)} and {list(hessian.shape)}"
        )
    if not weight.numel():
        raise ModelError(f"its weight of shape {list(weight.shape)} has no entries; leave this layer dense")
    original = weight.detach().float()
    if not torch.isfinite(original).all():
        raise ModelError("its weight has NaN or infinite entries: the model file is damaged, or was saved that way")
    factor = factor or factorize(hessian, config.damping)
    method = get_method(config.method)
    solved = (_solve_segments if method.joint else _solve_blocks)(original, factor, config, method)
    report = SolveReport(
        output_error=output_error(original, solved.reconstruction, factor.hessian),
        weight_error=weight_error(original, solved.reconstruction),
        damping=factor.damping,
        error_history=solved.history,
    )
    return assemble(solved.parts, report, block_size=config.block_size, scale_bits=solved.scale_bits)


class _Solved(NamedTuple):
    """A matrix as parts with natural column numbers, its reconstruction (n, m), and errors as in `SolveReport`."""

    parts: Sequence[Part | TrellisPart]
    reconstruction: Tensor
    history: tuple[tuple[float, ...], ...]
    scale_bits: int


def _solve_segments(original: Tensor, factor: Factor, config: BinarizationConfig, method: Method) -> _Solved:
    """ARB-RCX within the budget of bits."""
    assert config.bits is not None, "the configuration fills it in"
    rows, columns = original.shape
    layout = joint_layout(rows, columns, config.bits, config.scale_block, outliers(factor.hessian), config.trellis)
    weight = original.masked_fill(factor.dead, 0) if factor.dead.any() else original
    fit = fit_segments(weight, factor, layout.segments, config.iterations)
    return _Solved(fit.parts, fit.reconstruction, (fit.errors,), layout.scale_bits)


def _solve_blocks(original: Tensor, factor: Factor, config: BinarizationConfig, method: Method) -> _Solved:
    """The paper's methods: block by block, each block's error spread over the columns still to come."""
    remaining = original.clone()
    remaining[:, factor.dead] = 0
    reconstruction = torch.empty_like(remaining)
    parts: list[Part] = []
    history = []
    for start in range(0, remaining.shape[1], config.block_size):
        end = min(start + config.block_size, remaining.shape[1])
        weight, triangle = remaining[:, start:end], factor.upper[start:end, start:end]
        fit = binarize_block(
            weight,
            (weight / triangle.diagonal()).square(),
            factor.hessian[start:end, start:end],
            method,
            partition=config.partition,
            groups=config.groups,
            iterations=config.iterations,
            split_on=config.split_on,
        )
        block = fit.block.rounded()
        reconstruction[:, start:end] = block.reconstruct()
        error = weight - reconstruction[:, start:end]
        remaining[:, end:] -= _compensation(error, triangle, config.compensation) @ factor.upper[start:end, end:]
        parts += [replace(part, columns=part.columns + start) for part in block.parts]
        history.append(fit.errors)
    return _Solved(parts, reconstruction, tuple(history), scale_bits=16)


def _compensation(error: Tensor, triangle: Tensor, form: str) -> Tensor:
    """E U_bb^-1, the least-squares optimum (`exact`), or E / diag(U_bb), as BiLLM and the paper (`reference`)."""
    if form == "reference":
        return error / triangle.diagonal()
    return torch.linalg.solve_triangular(triangle, error, upper=True, left=False)
