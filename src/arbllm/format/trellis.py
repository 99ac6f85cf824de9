"""Weights of a trellis code, from stored signs to the numbers of their levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from arbllm.binarize.code import derived_planes, first_level
from arbllm.format.bitplanes import unpack_values
from arbllm.format.layout import Layout, Place

FURTHER_SIGNS = ("second_signs", "third_signs", "fourth_signs")
"""The tensors that hold signs after the first."""


def level_numbers(layout: Layout, tensors: Mapping[str, Tensor], rows: slice) -> Iterator[tuple[Place, Tensor]]:
    """Each segment with a trellis, and the numbers of its weights' levels in `all_levels`.

    Args:
        layout: of a matrix.
        tensors: its stored tensors by name.
        rows: which rows.

    Yields:
        The segment's place, and uint8 (rows, width).
    """
    last_bits = [unpack_values(plane, layout.columns, 0, 1) for plane in derived_planes(tensors["signs"], rows)]
    further = [
        unpack_values(tensors[name][rows], layout.columns_of_terms(terms), 0, 1)
        for terms, name in enumerate(FURTHER_SIGNS, start=2)
        if name in tensors
    ]
    for place in layout.places:
        if place.segment.trellis:
            starts = (place.second, place.third, place.fourth)[: place.segment.terms - 1]
            planes = [plane[:, start:] for plane, start in zip(further, starts, strict=False)]
            planes += [plane[:, place.column :] for plane in last_bits]
            number = torch.zeros_like(planes[0][:, : place.segment.width])
            for plane in planes:
                number = 2 * number + plane[:, : place.segment.width]
            yield place, number.view(torch.uint8) + first_level(place.segment.terms)
