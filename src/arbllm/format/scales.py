"""Row and column scales as a matrix stores them: float16, or codes of 8 bits with one float16 step a slot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arbllm.binarize.scales import positive_codes, shares
from arbllm.errors import ModelError
from arbllm.format.layout import Layout


def encode_scales(row_scales: Tensor, column_scales: Tensor | None, layout: Layout) -> dict[str, Tensor]:
    """The tensors `row_scales`, `column_scales` and `scale_steps`, as far as the layout has them.

    Args:
        row_scales: float32 (n, S); positive where the layout wants codes.
        column_scales: float32, flat as `Layout.places` describes it, likewise; None without any.
        layout: of the matrix.

    Raises:
        ModelError: a scale does not fit float16.
    """
    if layout.scale_bits == 16:
        stored = {"row_scales": to_float16(row_scales)}
        return stored if column_scales is None else stored | {"column_scales": to_float16(column_scales)}
    rows = positive_codes(row_scales.T)
    steps, stored = rows.largest, {"row_scales": rows.codes.T.contiguous()}
    if column_scales is not None:
        columns = [positive_codes(slot[None]) for slot in column_scales.split(slot_widths(layout))]
        steps = steps * torch.cat([slot.largest for slot in columns])
        stored["column_scales"] = torch.cat([slot.codes[0] for slot in columns])
    return stored | {"scale_steps": to_float16(steps)}


def decode_scales(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Row scales, float32 (n, S), and column scales, float32, flat, or None without any."""
    rows, columns = tensors["row_scales"], tensors["column_scales"] if layout.column_scaled else None
    if layout.scale_bits == 16:
        return rows.float(), None if columns is None else columns.float()
    return shares(rows) * tensors["scale_steps"].float(), None if columns is None else shares(columns)


def slot_widths(layout: Layout) -> list[int]:
    """Columns of each row scale slot, in order."""
    return [segment.width for segment in layout.segments for _ in range(segment.slots)]


def to_float16(values: Tensor) -> Tensor:
    """Values as float16.

    Raises:
        ModelError: one does not fit.
    """
    stored = values.half()
    if not torch.isfinite(stored).all():
        raise ModelError(
            f"a scale of {float(values.abs().max()):.3g} does not fit float16 (at most 65504); "
            "the weights are unusually large: rescale them, or leave this layer dense"
        )
    return stored
