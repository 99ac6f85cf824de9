"""Products that gradients go back through: the weight is unpacked a second time, not kept dense in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arbllm.kernels.modes import is_followed

Product = Callable[[Tensor], Tensor]


def is_wanted(x: Tensor) -> bool:
    """Whether the backward pass of a product is ours to write.

    Where PyTorch follows the product, or compiles it, it derives the plain one.
    """
    recorded = x.requires_grad and torch.is_grad_enabled()
    return recorded and not torch.compiler.is_compiling() and not is_followed()


def differentiable(x: Tensor, product: Product, transposed: Product, followed: Product) -> Tensor:
    """A product of which the weight is a constant, y = x W^T.

    Args:
        x: (..., m).
        product: x -> y, (tokens, m) -> (tokens, n).
        transposed: the gradient of y, (tokens, n), -> that of x, (tokens, m).
        followed: the same by PyTorch's own operators, for gradients of gradients and where PyTorch follows.

    Returns:
        y, (..., n); its gradient reaches x.
    """
    # As rows: of what the function returns as a view, PyTorch lets nobody change anything in place.
    y = _Product.apply(x.reshape(-1, x.shape[-1]), product, transposed, followed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, transposed: Product, followed: Product) -> Tensor:
        ctx.transposed, ctx.followed = transposed, followed
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ours = ctx.followed if gradient.requires_grad or is_followed() else ctx.transposed
        return ours(gradient), None, None, None
