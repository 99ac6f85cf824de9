"""Packed matrices with random contents, for measurements of speed: what the bits are makes no difference to it."""

from __future__ import annotations

import torch
from torch import Tensor

from arbllm.budget import joint_layout
from arbllm.format.bitplanes import pack
from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix

SCALE_BLOCK = 512
OUTLIERS_PER_COLUMN = 0.002


def random_matrix(rows: int, columns: int, bits: float, device: torch.device, trellis: bool = True) -> BinaryMatrix:
    """A matrix as arb-rcx would store it at so many true bits a weight, with a few outlying columns."""
    layout = joint_layout(rows, columns, bits, SCALE_BLOCK, round(OUTLIERS_PER_COLUMN * columns), trellis)
    tensors = {name: _random(name, dtype, shape, layout, device) for name, (dtype, shape) in layout.tensors().items()}
    return BinaryMatrix.from_tensors(layout, tensors)


def _random(name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: Layout, device: torch.device) -> Tensor:
    if name == "column_segments":
        widths = torch.tensor([segment.width for segment in layout.segments])
        number = torch.arange(len(widths)).repeat_interleave(widths)[torch.randperm(layout.columns)]
        return pack(torch.stack([(number >> plane & 1).bool() for plane in range(layout.segment_planes)])).to(device)
    if dtype == torch.float16:  # the steps of scales: weights of about the size that a model has
        return torch.full(shape, layout.columns**-0.5, dtype=dtype, device=device)
    least = 160 if name.endswith("scales") else 0
    return torch.randint(least, 256, shape, dtype=dtype, device=device)
