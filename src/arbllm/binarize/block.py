"""`Block`: a binarized block of columns as a sum over zones and terms.

    W_hat = sum over zones z of  M_z * (mu_z 1^T + sum over terms t of  B_zt * (r_zt c_zt^T))

Every method produces this shape; they differ in which parameters are free and in the error they minimise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One sign a weight and its scales.

    Attributes:
        signs: float32 (n, k), +1 or -1; meaningless outside the zone's mask.
        row_scales: float32 (n).
        column_scales: float32 (k), or None where the method has none (a factor of 1).
    """

    signs: Tensor
    row_scales: Tensor
    column_scales: Tensor | None = None

    def reconstruct(self) -> Tensor:
        """B * (r c^T), float32 (n, k), not masked."""
        value = self.signs * self.row_scales[:, None]
        return value if self.column_scales is None else value * self.column_scales


@dataclass(frozen=True)
class Zone:
    """Weights that share parameters.

    Attributes:
        mask: bool (n, k), the weights of this zone.
        terms: one term, or two for salient weights.
        row_means: float32 (n), or None where the method has none.
    """

    mask: Tensor
    terms: tuple[Term, ...]
    row_means: Tensor | None = None

    def reconstruct(self) -> Tensor:
        """Mu 1^T + sum of terms, float32 (n, k), not masked."""
        value = self.terms[0].reconstruct()
        for term in self.terms[1:]:
            value = value + term.reconstruct()
        return value if self.row_means is None else value + self.row_means[:, None]

    def map_parameters(self, change: Callable[[Tensor], Tensor]) -> Zone:
        """The same zone with row scales, column scales and row means passed through `change`."""
        terms = tuple(
            replace(
                term,
                row_scales=change(term.row_scales),
                column_scales=None if term.column_scales is None else change(term.column_scales),
            )
            for term in self.terms
        )
        return replace(self, terms=terms, row_means=None if self.row_means is None else change(self.row_means))


@dataclass(frozen=True)
class Part:
    """The regular or the salient columns of a block, divided into zones.

    Attributes:
        columns: int64 (k), positions inside the block, ascending.
        zones: zone g holds the weights of group g; their masks cover the part without overlap.
    """

    columns: Tensor
    zones: tuple[Zone, ...]

    def reconstruct(self) -> Tensor:
        """The part's weights, float32 (n, k)."""
        value = self.zones[0].reconstruct()
        for zone in self.zones[1:]:
            value = torch.where(zone.mask, zone.reconstruct(), value)
        return value

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Groups, signs a weight, and False: signs stand for themselves, see `arbllm.format.layout.Segment`."""
        return len(self.zones), len(self.zones[0].terms), False

    @property
    def scales(self) -> list[tuple[Tensor, Tensor | None]]:
        """Row scales (n) and column scales (k) of each zone's terms."""
        return [(term.row_scales, term.column_scales) for zone in self.zones for term in zone.terms]

    @property
    def row_means(self) -> list[Tensor]:
        """Row means (n) of each zone; none where the method has none."""
        return [zone.row_means for zone in self.zones if zone.row_means is not None]

    @property
    def group_numbers(self) -> Tensor:
        """Each weight's group, uint8 (n, k)."""
        number = torch.zeros_like(self.zones[0].mask, dtype=torch.uint8)
        for group, zone in enumerate(self.zones[1:], start=1):
            number += zone.mask.to(torch.uint8) * group
        return number

    def signs(self, term: int) -> Tensor:
        """Each weight's sign of this term in its own zone, bool (n, k), True for +."""
        signs = self.zones[0].terms[term].signs > 0
        for zone in self.zones[1:]:
            signs = torch.where(zone.mask, zone.terms[term].signs > 0, signs)
        return signs


@dataclass(frozen=True)
class Block:
    """A block of `width` columns: its regular part and its salient part; either may be absent, not both."""

    width: int
    regular: Part | None
    salient: Part | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that exist, regular first."""
        return tuple(part for part in (self.regular, self.salient) if part is not None)

    def reconstruct(self) -> Tensor:
        """W_hat of the block, float32 (n, width)."""
        rows, device = self.parts[0].zones[0].mask.shape[0], self.parts[0].columns.device
        weight = torch.empty(rows, self.width, dtype=torch.float32, device=device)
        for part in self.parts:
            weight[:, part.columns] = part.reconstruct()
        return weight

    def rounded(self) -> Block:
        """The block as it will be stored: row scales, column scales and row means rounded to float16."""

        def stored(part: Part | None) -> Part | None:
            if part is None:
                return None
            return replace(part, zones=tuple(zone.map_parameters(_through_float16) for zone in part.zones))

        return replace(self, regular=stored(self.regular), salient=stored(self.salient))


def _through_float16(values: Tensor) -> Tensor:
    return values.half().float()


def signs_of(values: Tensor) -> Tensor:
    """Signs in float32, an exact zero counting as +1."""
    return 2 * (values >= 0).float() - 1


def nearest_signs(values: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (B1, B2) that bring B1 * first + B2 * second nearest to `values`.

    The larger magnitude takes the sign of the value, the smaller one that of what remains.

    Args:
        values: float32 (n, k).
        first: magnitudes of the first term, broadcastable to (n, k).
        second: likewise of the second term.
    """
    leading = first.abs() >= second.abs()
    large, small = torch.where(leading, first, second), torch.where(leading, second, first)
    large_signs = signs_of(values) * signs_of(large)
    small_signs = signs_of(values - large_signs * large) * signs_of(small)
    return torch.where(leading, large_signs, small_signs), torch.where(leading, small_signs, large_signs)
