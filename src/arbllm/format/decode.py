"""From bits and scales to numbers: rows of a packed matrix in float32, as fast as plain PyTorch allows on a CPU.

What counts there is the number of passes over the weights, and the number of operations where segments are many and
narrow. Hence segments are decoded together, and a weight chooses among the values of its groups bitwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from arbllm.binarize.code import all_levels
from arbllm.format.bitplanes import unpack_values
from arbllm.format.layout import Layout, Place
from arbllm.format.scales import decode_scales
from arbllm.format.trellis import level_numbers

MOST_RUNS = 4
"""With more changes between numbers of groups than this, all columns are decoded as if they had the most."""


class Decoder:
    """Decodes one matrix. Its tables take O(m) time, so it is made anew for each use rather than kept in step."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Make the tables.

        Args:
            layout: sizes of the matrix.
            tensors: the stored tensors by name.
        """
        self.layout = layout
        self.tensors = tensors
        self._row_scales, factors = decode_scales(tensors, layout)
        device = tensors["signs"].device
        runs = _runs(layout.places)
        salient = _runs([place for place in layout.places if _is_salient(place)])
        self._first = [_Columns(run, 0, factors, device) for run in runs]
        self._second = [_Columns(run, 1, factors, device) for run in salient]
        self._means = [_Columns(run, None, None, device) for run in runs if layout.row_means]

    def rows(self, rows: slice) -> Tensor:
        """Some rows of the dense weight, float32, columns in stored order."""
        layout, tensors = self.layout, self.tensors
        scales = self._row_scales[rows]
        planes = [
            unpack_values(tensors[name][rows], width, 0, -1)
            for name, width in (
                ("group_bitmap", layout.grouped_columns),
                ("group_bitmap_high", layout.quartered_columns),
            )
            if width
        ]
        weight = _joined([columns.values(scales, planes) for columns in self._first])
        weight *= self._factors(rows) if layout.has_trellis else self._signs(rows)
        for columns in self._second:
            signs = unpack_values(tensors["second_signs"][rows], layout.salient, -1, 1)
            _add(weight, columns.where, columns.values(scales, planes).mul_(_take(signs, columns.second)))
        if self._means:
            means = tensors["row_means"][rows].float()
            weight += _joined([columns.values(means, planes) for columns in self._means])
        return weight

    def _signs(self, rows: slice) -> Tensor:
        """First signs of all columns, int8."""
        return unpack_values(self.tensors["signs"][rows], self.layout.columns, -1, 1)

    def _factors(self, rows: slice) -> Tensor:
        """What scales are multiplied by, float32: first signs, and levels in the columns of a trellis."""
        factors = self._signs(rows).float()
        levels = all_levels(factors.device)
        for place, numbers in level_numbers(self.layout, self.tensors, rows):
            values = levels.index_select(0, numbers.flatten().int()).view(numbers.shape)
            factors[:, place.column : place.column + place.segment.width] = values
        return factors


class _Columns:
    """Stored columns whose values of one term, without signs, or whose row means are decoded together.

    Attributes:
        where: which columns.
        second: where they are in the second signs.
    """

    where: slice | Tensor
    second: slice | Tensor

    def __init__(self, places: Sequence[Place], term: int | None, factors: Tensor | None, device: torch.device) -> None:
        """Make the tables.

        Args:
            places: the segments.
            term: which term; None for row means.
            factors: all column scales in float32, or None without any.
            device: where the tables are needed.
        """
        widths = [place.segment.width for place in places]
        self.where = _where([place.column for place in places], widths, device)
        self.second = _where([place.second for place in places], widths, device)
        most = max(place.segment.groups for place in places)
        self._tables = [_table(places, widths, group, term, factors, device) for group in range(most)]
        self._planes = [_plane(places, widths, groups, device) for groups in (2, 4) if groups <= most]

    def values(self, parameters: Tensor, planes: Sequence[Tensor]) -> Tensor:
        """What the group of each weight has, float32 (rows, columns).

        Args:
            parameters: row scales or row means, float32 (rows, slots).
            planes: low and high bits of the group numbers, int8, all ones where set.
        """
        candidates = []
        for slots, factors in self._tables:
            value = parameters.index_select(1, slots)
            candidates.append(value if factors is None else value.mul_(factors))
        for plane, (where, present) in zip(planes, self._planes, strict=False):
            bits = _take(plane, where)
            if present is not None:
                bits = bits & present
            candidates = [_select(*pair, bits) for pair in zip(candidates[::2], candidates[1::2], strict=True)]
        return candidates[0]


def _is_salient(place: Place) -> bool:
    return place.segment.terms == 2 and not place.segment.trellis


def _runs(places: Sequence[Place]) -> list[list[Place]]:
    """Segments that follow each other and have as many groups, together; all in one where that makes many runs."""
    runs: list[list[Place]] = []
    for place in places:
        last = runs[-1][-1] if runs else None
        if last and last.column + last.segment.width == place.column and last.segment.groups == place.segment.groups:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs if len(runs) <= MOST_RUNS else [list(places)]


def _table(
    places: Sequence[Place],
    widths: Sequence[int],
    group: int,
    term: int | None,
    factors: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Where columns find the parameter of a group or, if they have no such group, another; and its column scales."""
    slots, pieces = [], []
    for place in places:
        width, groups, terms, _ = place.segment
        own = min(group, groups - 1)
        if term is None:
            slots.append(place.row_mean + own)
            continue
        slot = own * terms + term
        slots.append(place.row_scale + slot)
        if factors is not None:
            start = place.column_scale + slot * width
            pieces.append(factors[start : start + width])
    return _spread(slots, widths).to(device), torch.cat(pieces) if pieces else None


def _plane(
    places: Sequence[Place], widths: Sequence[int], groups: int, device: torch.device
) -> tuple[slice | Tensor, Tensor | None]:
    """Where columns find a bit of their group number, and a mask of those that have it, None for all of them.

    Args:
        places: the segments.
        widths: their widths.
        groups: 2 for the low bit, 4 for the high one: the fewest groups for which it exists.
        device: where the tables are needed.
    """
    present = [place.segment.groups >= groups for place in places]
    starts = [place.low if groups == 2 else place.high for place in places]
    if all(present):
        return _where(starts, widths, device), None
    mask = _spread(present, widths)
    where = _indices(starts, widths).where(mask, 0)
    return where.to(device), -mask.to(device, torch.int8)


def _where(starts: Sequence[int], widths: Sequence[int], device: torch.device) -> slice | Tensor:
    """Ranges of a tensor's columns, as a slice where they join and as indices, int64, where not."""
    ends = [start + width for start, width in zip(starts, widths, strict=True)]
    if list(starts[1:]) == ends[:-1]:
        return slice(starts[0], ends[-1])
    return _indices(starts, widths).to(device)


def _indices(starts: Sequence[int], widths: Sequence[int]) -> Tensor:
    """All indices of ranges, one range after the other, int64."""
    shifts = [start - before for start, before in zip(starts, accumulate(widths, initial=0), strict=False)]
    return _spread(shifts, widths) + torch.arange(sum(widths))


def _spread(values: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Each value as often as its width says."""
    return torch.tensor(values).repeat_interleave(torch.tensor(widths), output_size=sum(widths))


def _take(values: Tensor, where: slice | Tensor) -> Tensor:
    """Some columns of (rows, k); of int8, gather is much the faster."""
    return values[:, where] if isinstance(where, slice) else values.gather(1, where.expand(len(values), -1))


def _add(values: Tensor, where: slice | Tensor, summand: Tensor) -> None:
    """Add to some columns of (rows, k), in place."""
    if isinstance(where, slice):
        values[:, where] += summand
    else:
        values.scatter_add_(1, where.expand(len(values), -1), summand)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _select(low: Tensor, high: Tensor, plane: Tensor) -> Tensor:
    """`high` where the plane is set, else `low`; in place and bitwise, as torch.where is many times slower on a CPU."""
    bits, difference = low.view(torch.int32), high.view(torch.int32)
    difference ^= bits
    difference &= plane
    bits ^= difference
    return low
