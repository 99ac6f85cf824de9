"""A LLaMA with random weights in plain PyTorch, for measurements of speed: one token at a time, a static cache.

Its linears are dense or packed; everything else is the same code, so that the two compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from arbllm.format.published import ModelShape

HEAD_WIDTH = 128
ROTARY_BASE = 10_000.0

MakeLinear = Callable[[int, int], nn.Module]
"""(rows, columns) -> a linear layer of that many outputs and inputs."""


class Decoder(nn.Module):
    """Embedding, blocks, norm and head.

    Attributes:
        position: int64 (1), tokens in the cache.
    """

    position: Tensor
    cosines: Tensor
    sines: Tensor

    def __init__(self, shape: ModelShape, length: int, linear: MakeLinear, dtype: torch.dtype, device: str) -> None:
        """Random weights.

        Args:
            shape: sizes.
            length: tokens that the cache holds.
            linear: makes the linears of the blocks.
            dtype: of the embedding, the head, the norms and the cache.
            device: where they go.
        """
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.embedding = nn.Embedding(shape.vocabulary, shape.width, **options)
        self.blocks = nn.ModuleList(_Block(shape, length, linear, options) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.width, **options)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False, **options)
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64, device=device))
        angles = torch.arange(length)[:, None] * ROTARY_BASE ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
        angles = torch.cat([angles, angles], 1).to(device)
        self.register_buffer("cosines", angles.cos().to(dtype))
        self.register_buffer("sines", angles.sin().to(dtype))

    def forward(self, token: Tensor) -> Tensor:
        """The next token, int64 (1), after this one, int64 (1): the likeliest."""
        rotary = self.cosines[self.position], self.sines[self.position]
        hidden = self.embedding(token)
        for block in self.blocks:
            hidden = block(hidden, self.position, rotary)
        self.position.add_(1)
        return self.head(self.norm(hidden)).argmax(-1)


class _Block(nn.Module):
    cache: Tensor
    places: Tensor

    def __init__(self, shape: ModelShape, length: int, linear: MakeLinear, options: dict[str, Any]) -> None:
        super().__init__()
        self.heads = shape.width // HEAD_WIDTH
        names = ("query", "key", "value", "output", "gate", "up", "down")
        self.linears = nn.ModuleDict({name: linear(*size) for name, size in zip(names, shape.linears, strict=True)})
        self.before_attention = nn.RMSNorm(shape.width, **options)
        self.before_feed_forward = nn.RMSNorm(shape.width, **options)
        cache = torch.zeros(2, self.heads, length, HEAD_WIDTH, **options)
        self.register_buffer("cache", cache)
        self.register_buffer("places", torch.arange(length, device=cache.device))

    def forward(self, hidden: Tensor, position: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        linears = self.linears
        x = self.before_attention(hidden)
        query, key, value = (linears[name](x).view(self.heads, 1, HEAD_WIDTH) for name in ("query", "key", "value"))
        self.cache.index_copy_(2, position, torch.stack([_rotated(key, rotary), value]))
        attended = functional.scaled_dot_product_attention(
            _rotated(query, rotary)[None], self.cache[:1], self.cache[1:], attn_mask=(self.places <= position)[None]
        )
        hidden = hidden + linears["output"](attended.reshape(1, -1))
        x = self.before_feed_forward(hidden)
        return hidden + linears["down"](functional.silu(linears["gate"](x)) * linears["up"](x))


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotary[0] + torch.cat([-second, first], -1) * rotary[1]
