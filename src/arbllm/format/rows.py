"""Matrices of 8-bit codes with one scale a row: how embeddings and output heads can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from arbllm.errors import CheckpointError, ModelError

ROW_BITS = 8
LARGEST_CODE = 127
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class RowLayout:
    """Size of an embedding or output head in 8 bits.

    Attributes:
        rows: V, the vocabulary.
        columns: d, the width.
    """

    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.tensors().values())

    @property
    def weights(self) -> int:
        """Number of weights, V d."""
        return self.rows * self.columns

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of the stored tensors."""
        return {"codes": (torch.int8, (self.rows, self.columns)), "scales": (torch.float16, (self.rows,))}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return {"rows": self.rows, "columns": self.columns, "bits": ROW_BITS}


def row_layouts(quantization: Mapping[str, Any]) -> dict[str, RowLayout]:
    """Layout of every embedding and head in 8 bits by module name, from a `quantization_config`.

    Raises:
        CheckpointError: one is unreadable; names the module.
    """
    layouts = {}
    embeddings = quantization.get("embeddings") or {}
    if not isinstance(embeddings, dict):
        raise CheckpointError("config.json: the embeddings of the quantization_config are not listed by their names")
    for module, values in embeddings.items():
        try:
            layout = RowLayout(values["rows"], values["columns"])
            whole = type(layout.rows) is type(layout.columns) is int
            sound = whole and layout.to_dict() == values and min(layout.rows, layout.columns) > 0
        except (KeyError, TypeError):
            sound = False
        if not sound:
            raise CheckpointError(f"config.json: the embedding {module} is not described as arbllm does: {values}")
        layouts[module] = layout
    return layouts


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8-bit codes, symmetric about zero, with one scale a row: weight = scale * code.

    A row's scale is its largest magnitude over 127, as float16 holds it. Codes are rounded against that stored scale,
    so that no weight is off by more than half of it.

    Args:
        weight: float (V, d).

    Returns:
        codes int8 (V, d) from -127 to 127; scales float16 (V), 0 for rows of zeros (and of less than 127 * 2^-25).

    Raises:
        ModelError: an entry is NaN, infinite or beyond what float16 scales reach.
    """
    largest = torch.maximum(weight.amax(1), -weight.amin(1)).float()
    scales = (largest / LARGEST_CODE).half()
    if not torch.isfinite(scales).all():
        raise ModelError("its weight has NaN, infinite or huge entries; the model file is damaged")
    # Among the smallest float16 numbers the nearest one can be so far below that codes would have to be cut off.
    low = (scales.float() * (LARGEST_CODE + 0.5) < largest) & (scales > 0)
    scales = torch.where(low, (scales.view(torch.int16) + 1).view(torch.float16), scales)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    steps = torch.where(scales > 0, scales.float(), torch.inf)[:, None]
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        codes[part] = (weight[part].float() / steps[part]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * code, (V, d), for codes int8 (V, d) and scales float16 (V): exact in float32, then rounded to `dtype`."""
    return codes.float().mul_(scales.float()[:, None]).to(dtype)
