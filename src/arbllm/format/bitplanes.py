"""Bits packed eight to a byte along the last dimension: bit j of a row is bit j % 8 of byte j // 8, least first."""

from __future__ import annotations

from functools import cache

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
    return unpack_values(packed, length, 0, 1).view(torch.bool)


def unpack_values(packed: Tensor, length: int, clear: int, set: int) -> Tensor:
    """As `unpack`, with the value `clear` for a 0 and `set` for a 1, int8 (..., length)."""
    # Where PyTorch is compiled, or in a mode, tensors may be of another kind, which must not be kept.
    plain = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
    table = (_kept_octets if plain else _octets)(clear, set, packed.device)
    octets = table.index_select(0, packed.flatten().int())
    return octets.view(torch.int8).view(*packed.shape[:-1], -1)[..., :length]


def _octets(clear: int, set: int, device: torch.device) -> Tensor:
    """What each byte unpacks to, eight int8 values seen as one int64 (256): a byte costs one look-up."""
    with torch.inference_mode(False):
        octets = (torch.arange(256, device=device).unsqueeze(1) & _bit_values(device)) != 0
        return torch.where(octets, set, clear).to(torch.int8).view(torch.int64).squeeze(1)


_kept_octets = cache(_octets)
