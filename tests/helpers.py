"""Random packed matrices and models for tests that need no solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arbllm.binarize.code import COEFFICIENTS, PRODUCTS
from arbllm.binarize.trellis import TrellisPart
from arbllm.config import BinarizationConfig
from arbllm.format.bitplanes import pack
from arbllm.format.layout import Layout, Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.integrations.transformers import mark_packed
from arbllm.nn import BinaryLinear


def random_matrix(
    rows: int,
    columns: int,
    *,
    groups: int = 2,
    salient_groups: int = 2,
    salient: int = 0,
    block_size: int = 128,
    row_means: bool = False,
    column_scaled: bool = True,
    scale_bits: int = 16,
    ordering: str = "bitmap",
    seed: int = 0,
) -> BinaryMatrix:
    """A `BinaryMatrix` of random packed tensors that agree with one another; padding bits are zero, scales positive.

    Args:
        rows: n.
        columns: m.
        groups: groups of regular weights: 1, 2 or 4.
        salient_groups: groups of salient weights: 1, 2 or 4.
        salient: c, salient columns; they fall on random columns, so blocks with none, and with nothing else, occur.
        block_size: K; a block has a segment of regular columns, then one of salient columns.
        row_means: whether the matrix stores row means (as plain, ARB and ARB-X do).
        column_scaled: whether it stores column scales (as ARB-RC does).
        scale_bits: 8 or 16.
        ordering: see `Layout`; `bitmap` becomes `natural` where no column is salient, and the column order is random
            with `explicit`.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    column_bitmap = torch.zeros(columns, dtype=torch.bool)
    column_bitmap[torch.randperm(columns, generator=generator)[:salient]] = True
    segments = []
    for block in column_bitmap.split(block_size):
        widths = (int((~block).sum()), groups, 1), (int(block.sum()), salient_groups, 2)
        segments += [Segment(*segment) for segment in widths if segment[0]]
    if ordering == "bitmap" and not salient:
        ordering = "natural"
    layout = Layout(
        rows=rows,
        columns=columns,
        segments=tuple(segments),
        ordering=ordering,
        block_size=block_size if ordering == "bitmap" else 0,
        scale_bits=scale_bits,
        row_means=row_means,
        column_scaled=column_scaled,
    )
    return random_packed(layout, seed, column_bitmap)


def random_packed(layout: Layout, seed: int = 0, column_bitmap: Tensor | None = None) -> BinaryMatrix:
    """A `BinaryMatrix` of this layout with random contents; `column_bitmap`, bool (m), where its ordering needs one."""
    generator = torch.Generator().manual_seed(seed)

    def bits(width: int) -> Tensor:
        return pack(torch.randint(2, (layout.rows, width), generator=generator).bool())

    def scales(name: str, shape: tuple[int, ...]) -> Tensor:
        size = 1.0 if name == "column_scales" else layout.columns**-0.5
        return (size * (0.5 + torch.rand(shape, generator=generator))).half()

    tensors = {"signs": bits(layout.columns)}
    for name, (dtype, shape) in layout.tensors().items():
        if dtype == torch.float16:
            tensors[name] = scales(name, shape)
    if layout.scale_bits == 8:
        for name in ("row_scales", "column_scales") if layout.column_scaled else ("row_scales",):
            shape = layout.tensors()[name][1]
            tensors[name] = torch.randint(160, 256, shape, generator=generator, dtype=torch.uint8)
    for name, width in (
        ("group_bitmap", layout.grouped_columns),
        ("group_bitmap_high", layout.quartered_columns),
        ("second_signs", layout.salient),
        ("third_signs", layout.columns_of_terms(3)),
        ("fourth_signs", layout.columns_of_terms(4)),
    ):
        if width:
            tensors[name] = bits(width)
    if layout.ordering == "bitmap":
        assert column_bitmap is not None
        tensors["column_bitmap"] = pack(column_bitmap)
    if layout.ordering == "segments":
        number = torch.arange(len(layout.segments)).repeat_interleave(torch.tensor([s.width for s in layout.segments]))
        number = number[torch.randperm(layout.columns, generator=generator)]
        tensors["column_segments"] = pack(torch.stack([(number >> p & 1).bool() for p in range(layout.segment_planes)]))
    if layout.ordering == "explicit":
        tensors["column_order"] = torch.randperm(layout.columns, generator=generator).to(torch.int16)
    return BinaryMatrix.from_tensors(layout, tensors)


def in_segments(rows: int, *segments: Segment, seed: int = 0, **options: Any) -> BinaryMatrix:
    """A random matrix of these segments, stored in natural order with scales of 16 bits and no row means.

    Args:
        rows: n.
        segments: first to last.
        seed: of the random numbers.
        options: fields of the `Layout` that are to be others.
    """
    layout = Layout(
        rows=rows,
        columns=sum(segment.width for segment in segments),
        segments=segments,
        ordering="natural",
        block_size=0,
        scale_bits=16,
        row_means=False,
        column_scaled=True,
    )
    layout = replace(layout, **options)
    layout.check()
    return random_packed(layout, seed)


def levels_by_hand(stored: Sequence[Tensor]) -> Tensor:
    """What weights of a trellis are without their scales, row after row as docs/format.md has it: float32 (n, k).

    Args:
        stored: the stored signs of each weight, bool (n, k), true for +.
    """
    first, terms = stored[0].long(), len(stored)
    rows = []
    for i in range(len(first)):
        now, two, three, five = (first[i - lag] if lag <= i else 0 * first[0] for lag in (0, 16, 24, 40))
        bits = [sign[i].long() for sign in stored[1:]] + [now ^ two ^ five, three]
        signs = [2.0 * bit - 1 for bit in bits]
        level = sum(c * sign for c, sign in zip(COEFFICIENTS[terms], signs, strict=True))
        for (a, b, c), coefficient in PRODUCTS[terms].items():
            level = level + coefficient * signs[a] * signs[b] * signs[c]
        rows.append(level)
    return torch.stack(rows)


def trellis_values(part: TrellisPart) -> Tensor:
    """The weights of a part with a trellis, float32 (n, k)."""
    return levels_by_hand(part.stored) * part.row_scales[:, None] * part.column_scales


def pack_randomly(model: PreTrainedModel, salient: int = 3, block_size: int = 16) -> PreTrainedModel:
    """Put a random `BinaryLinear` in place of every linear but the head, and mark the model as packed; in place."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for seed, (name, module) in enumerate(linears):
        if module is model.get_output_embeddings():
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.T.shape if transposed else module.weight.shape
        matrix = random_matrix(rows, columns, salient=salient, block_size=block_size, seed=seed)
        model.set_submodule(name, BinaryLinear.from_matrix(matrix, module.bias, transposed))
    mark_packed(
        model,
        {
            "binarization": BinarizationConfig(block_size=block_size).to_dict(),
            "statistics": {name: {"output_error": 0.1, "weight_error": 0.2} for name, _ in linears},
            "calibration": {"text": "random", "windows": 0, "window_length": 0, "seed": 0},
        },
    )
    return model
