"""Positive scales in 8 bits: a code is the logarithm of a scale's share of the largest one, in steps of 1/24 octave.

    share(code) = 2^((code - 255) / 24) for codes 1 to 255, and 0 for code 0

The codes span 10.6 octaves, and a scale is off by at most 1.5 %. Uniform codes would spend most of their accuracy on
the few largest scales, and none on small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS_PER_OCTAVE = 24
LARGEST_CODE = 255
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ScaleCodes:
    """Scales as stored: `largest * share(codes)`.

    Attributes:
        codes: uint8 (slots, k).
        largest: float32 (slots).
    """

    codes: Tensor
    largest: Tensor


def positive_codes(scales: Tensor) -> ScaleCodes:
    """The nearest codes of positive scales, float32 (slots, k), each slot against its own largest scale."""
    largest = scales.amax(1)
    share = scales / largest.clamp(min=TINY)[:, None]
    codes = (LARGEST_CODE + STEPS_PER_OCTAVE * share.clamp(min=TINY).log2()).round().clamp(min=0)
    return ScaleCodes(codes.to(torch.uint8), largest)


def shares(codes: Tensor) -> Tensor:
    """What codes stand for: float32 of the same shape, between 0 and 1."""
    return _all_shares(codes.device)[codes.long()]


def _all_shares(device: torch.device) -> Tensor:
    exponents = (torch.arange(LARGEST_CODE + 1, device=device, dtype=torch.float32) - LARGEST_CODE) / STEPS_PER_OCTAVE
    shares = exponents.exp2()
    shares[0] = 0
    return shares
