"""Products that gradients go back through: the weight is unpacked a second time, not kept dense in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arbllm.kernels.modes import is_followed

Product = Callable[[Tensor], Tensor]


def is_wanted(x: Tensor) -> bool:
    """Whether the backward pass of a product is ours to write.

    Where PyTorch follows the product, or compiles it, it derives the plain one.
    """
    recorded = x.requires_grad and torch.is_grad_enabled()
    return recorded and not torch.compiler.is_compiling() and not is_followed()


def differentiable(x: Tensor, product: Product, transposed: Product) -> Tensor:
    """A product of which the weight is a constant, y = x W^T.

    Args:
        x: (..., m).
        product: x -> y, (..., n).
        transposed: the gradient of y, (..., n), -> that of x, (..., m).

    Returns:
        y; its gradient reaches x, once.
    """
    return _Product.apply(x, product, transposed)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, transposed: Product) -> Tensor:
        ctx.transposed = transposed
        return product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed(gradient), None, None
