"""Bits packed eight to a byte along the last dimension; bit j of a row is bit j % 8 (least significant first) of byte j // 8."""

from __future__ import annotations

import torch
from torch import Tensor

from arbllm.format.layout import packed_bytes


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack(bits: Tensor) -> Tensor:
    """Pack a boolean tensor (..., m) into bytes (..., ceil(m / 8)), uint8; the padding bits are zero."""
    length = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, 8 * packed_bytes(length) - length))
    octets = padded.unflatten(-1, (-1, 8)) * _bit_values(bits.device)
    return octets.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, length: int) -> Tensor:
    """The first `length` bits of packed bytes (..., ceil(length / 8)), as a boolean tensor (..., length)."""
    bits = (packed.unsqueeze(-1) & _bit_values(packed.device)) != 0
    return bits.flatten(-2)[..., :length]
