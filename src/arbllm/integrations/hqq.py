"""HQQ by its own library, one matrix: half-quadratic quantization, which needs no calibration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arbllm.baselines import SCALE_BITS, Rounded
from arbllm.errors import ConfigError

BITS = (1, 2, 3, 4, 8)
GROUP_SIZE = 64


def hqq_round(weight: Tensor, bits: int, *, group_size: int = GROUP_SIZE) -> Rounded:
    """Quantize a matrix with the library's defaults, groups along a row; its scales and zeros are both float16.

    Args:
        weight: W, (n, m), outputs by inputs, any floating dtype.
        bits: of a code, one of `BITS`.
        group_size: weights that share a scale and a zero.

    Raises:
        ConfigError: the library is not installed, or groups do not divide the matrix.
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise ConfigError("method hqq needs the library hqq: pip install hqq") from error
    if weight.shape[1] % group_size:
        group_size = math.gcd(weight.shape[1], group_size)
    codes, meta = Quantizer.quantize(
        weight.float(), nbits=bits, group_size=group_size, axis=1, bitpack=False, device=str(weight.device)
    )
    scale, zero = (meta[name].to(torch.float16).float() for name in ("scale", "zero"))
    values = ((codes.float() - zero) * scale).reshape(weight.shape)
    return Rounded(values, bits + 2 * SCALE_BITS / group_size)
