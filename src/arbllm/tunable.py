"""`TunableLinear`: a packed linear whose scales can be trained, its signs and groups staying as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from arbllm.errors import ConfigError
from arbllm.format.matrix import BinaryMatrix
from arbllm.rebuild import Codes


class TunableLinear(nn.Module):
    """y = x W^T + bias, W rebuilt from trainable scales in every forward pass.

    Scales are trained by their logarithms: they stay positive, and one learning rate suits large and small ones.

    >>> layer = TunableLinear(matrix, bias)
    >>> ...                       # train layer.parameters()
    >>> tuned = layer.to_matrix()

    Attributes:
        row_changes: float32 (n, S), logarithm of each row scale's change.
        column_changes: float32 (flat), likewise of the column scales.
        bias: float (n), or None; not trained.
    """

    def __init__(self, matrix: BinaryMatrix, bias: Tensor | None = None, transposed: bool = False) -> None:
        """Start from the scales that the matrix has.

        Args:
            matrix: the packed weight.
            bias: float (n), or None.
            transposed: see `BinaryLinear`; kept for the layer that takes the place of this one.

        Raises:
            ConfigError: it has row means or no column scales; only arb-rc and arb-rcx can be tuned.
        """
        super().__init__()
        if not matrix.layout.column_scaled or matrix.layout.row_means:
            raise ConfigError("only scales of arb-rc and arb-rcx can be tuned; choose one of these methods")
        self.transposed = transposed
        self._matrix = matrix
        self._row_scales, factors = matrix.scales()
        assert factors is not None, "the layout has column scales"
        self._column_scales = factors
        self._codes = Codes.from_matrix(matrix)
        self.row_changes = nn.Parameter(torch.zeros_like(self._row_scales))
        self.column_changes = nn.Parameter(torch.zeros_like(self._column_scales))
        self.bias = None if bias is None else bias.detach()

    def scales(self) -> tuple[Tensor, Tensor]:
        """Row scales (n, S) and column scales (flat) as they are now, float32."""
        return self._row_scales * self.row_changes.exp(), self._column_scales * self.column_changes.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., m) to y (..., n), in the dtype of x."""
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Product.apply(x, *self.scales(), self.bias, self._codes)
        return y

    @torch.no_grad()
    def to_matrix(self) -> BinaryMatrix:
        """The packed matrix with the scales as they are now, rounded as it stores them."""
        return self._matrix.with_scales(*self.scales())


class _Product(torch.autograd.Function):
    """x W^T + bias by hand: autograd would keep every product that W is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, codes: Codes) -> Tensor:
        """Map x (..., m) to (..., n), in the dtype of x."""
        weight = codes.rebuild(rows, columns).to(x.dtype)
        ctx.codes = codes
        # Where it takes little time, or memory is dear, W is rebuilt instead of kept.
        kept = None if codes.native(rows) or rows.is_cuda else weight
        ctx.save_for_backward(x, rows, columns, kept)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """Gradients of x and of the scales."""
        x, rows, columns, weight = ctx.saved_tensors
        if weight is None:
            weight = ctx.codes.rebuild(rows, columns).to(x.dtype)
        gradient = gradients[0].reshape(-1, len(rows))
        inputs = gradient @ weight if ctx.needs_input_grad[0] else None
        products = (gradient.T @ x.reshape(-1, x.shape[-1])).to(rows.dtype)
        return (
            None if inputs is None else inputs.view_as(x),
            *ctx.codes.contract(products, rows, columns),
            None,
            None,
        )
