"""A LLaMA with random weights in plain PyTorch, for measurements of speed: one token at a time, a static cache.

Its linears are dense or packed; everything else is the same code, so that the two compare.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
    places: Tensor
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
        self.register_buffer("places", torch.arange(length, device=device))
        angles = torch.arange(length)[:, None] * ROTARY_BASE ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
        angles = torch.cat([angles, angles], 1).to(device)
        self.register_buffer("cosines", angles.cos().to(dtype))
        self.register_buffer("sines", angles.sin().to(dtype))

    def forward(self, token: Tensor) -> Tensor:
        """The next token, int64 (1), after this one, int64 (1): the likeliest."""
        rotary = self.cosines[self.position], self.sines[self.position]
        written = (self.places <= self.position)[None]
        hidden = self.embedding(token)
        for block in self.blocks:
            hidden = block(hidden, self.position, rotary, written)
        self.position.add_(1)
        return self.head(self.norm(hidden)).argmax(-1)


class _Block(nn.Module):
    cache: Tensor

    def __init__(self, shape: ModelShape, length: int, linear: MakeLinear, options: dict[str, Any]) -> None:
        super().__init__()
        self.heads = shape.width // HEAD_WIDTH
        names = ("query", "key", "value", "output", "gate", "up", "down")
        self.linears = nn.ModuleDict({name: linear(*size) for name, size in zip(names, shape.linears, strict=True)})
        self.before_attention = nn.RMSNorm(shape.width, **options)
        self.before_feed_forward = nn.RMSNorm(shape.width, **options)
        self.register_buffer("cache", torch.zeros(2, self.heads, length, HEAD_WIDTH, **options))

    def forward(self, hidden: Tensor, position: Tensor, rotary: tuple[Tensor, Tensor], written: Tensor) -> Tensor:
        linears, fused = self.linears, _fused if hidden.is_cuda else _as_they_are
        x = self.before_attention(hidden)
        heads = [linears[name](x).view(self.heads, 1, HEAD_WIDTH) for name in ("query", "key", "value")]
        query = fused(_placed)(*heads, *rotary, self.cache, position)
        attended = functional.scaled_dot_product_attention(
            query[None], self.cache[:1], self.cache[1:], attn_mask=written
        )
        hidden = hidden + linears["output"](attended.reshape(1, -1))
        x = self.before_feed_forward(hidden)
        return hidden + linears["down"](fused(_gated)(linears["gate"](x), linears["up"](x)))


@cache
def _fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one kernel, or few."""
    return torch.compile(function, dynamic=False)


def _as_they_are(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _placed(
    query: Tensor, key: Tensor, value: Tensor, cosines: Tensor, sines: Tensor, cache: Tensor, position: Tensor
) -> Tensor:
    """The query, rotated; the rotated key and the value go to their place in the cache."""
    cache.index_copy_(2, position, torch.stack([_rotated(key, cosines, sines), value]))
    return _rotated(query, cosines, sines)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up
