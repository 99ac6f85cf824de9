"""Bytes and bits of packed matrices, counted from their layouts alone.

*Nominal* bits count the stored signs, one a weight, more in salient columns: what papers quote. *True* bits count all
that is stored, bitmaps and scales included, down to the bits that pad each packed row to whole bytes. Both are per
weight of the linears that were packed; embeddings and other dense tensors are counted apart, in bytes. A file may hold
the group bitmap coded (see `arbllm.format.coding`): then it takes other bits on disk than in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import prod

from arbllm.format.layout import Layout
from arbllm.format.rows import RowLayout


@dataclass(frozen=True)
class StorageSize:
    """What one packed matrix, or several together, store.

    Attributes:
        weights: number of weights.
        further: number of stored signs after each weight's first, which weights of salient columns have.
        signs: bytes of first signs.
        group_bitmap: bytes of the group bitmap, low and high bits together.
        column_bitmap: bytes of the column bitmap.
        column_order: bytes of the column order, or of the columns' segment numbers.
        second_signs: bytes of second signs, and of third and fourth ones.
        row_scales: bytes of row scales, and of the steps that 8-bit ones go with.
        row_means: bytes of row means.
        column_scales: bytes of column scales.
    """

    weights: int = 0
    further: int = 0
    signs: int = 0
    group_bitmap: int = 0
    column_bitmap: int = 0
    column_order: int = 0
    second_signs: int = 0
    row_scales: int = 0
    row_means: int = 0
    column_scales: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, in the order of the attributes."""
        return {field.name: getattr(self, field.name) for field in fields(self)[2:]}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> dict[str, float]:
        """True bits per weight by part."""
        return {name: 8 * size / self.weights for name, size in self.parts.items()}

    @property
    def true_bits(self) -> float:
        """Stored bits per weight, everything included; 0 without weights."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    @property
    def nominal_bits(self) -> float:
        """Signs per weight; 0 without weights."""
        return 1 + self.further / self.weights if self.weights else 0.0

    def __add__(self, other: StorageSize) -> StorageSize:
        return StorageSize(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def matrix_size(layout: Layout, coded: Mapping[str, int] | None = None) -> StorageSize:
    """What one matrix of this layout stores; agrees with `BinaryMatrix.nbytes` to the byte.

    Args:
        layout: of the matrix.
        coded: bytes of those tensors that are stored in another form than in memory, by name.
    """
    stored = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in layout.tensors().items()}
    stored |= coded or {}
    for name, whole in (
        ("group_bitmap_high", "group_bitmap"),
        ("third_signs", "second_signs"),
        ("fourth_signs", "second_signs"),
        ("scale_steps", "row_scales"),
        ("column_segments", "column_order"),
    ):
        stored[whole] = stored.get(whole, 0) + stored.pop(name, 0)
    further = layout.rows * (layout.signs - layout.columns)
    return StorageSize(weights=layout.weights, further=further, **stored)


def total_size(layouts: Iterable[Layout]) -> StorageSize:
    """What matrices of these layouts store together. Bits per weight are thereby weighted by the matrices' weights."""
    return sum((matrix_size(layout) for layout in layouts), StorageSize())


@dataclass(frozen=True)
class ModelSize:
    """What a packed model stores, in bytes.

    Attributes:
        linears: the packed matrices in the files, without their biases.
        linears_in_memory: the same once loaded, bitmaps decoded.
        embeddings: embeddings and a head of its own, in 8 bits or dense, and linears that were left as they were.
        rest: norms and biases.
    """

    linears: StorageSize
    linears_in_memory: StorageSize
    embeddings: int
    rest: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. The files hold their headers on top: names, shapes and checksums."""
        return self.linears.nbytes + self.embeddings + self.rest


def model_size(
    layouts: Mapping[str, Layout],
    shapes: Mapping[str, tuple[tuple[int, ...], int]],
    embeddings: Mapping[str, RowLayout] | None = None,
) -> ModelSize:
    """What a model stores.

    Args:
        layouts: layout of every packed linear by module name.
        shapes: shape and bytes of every stored tensor by name, packed ones too.
        embeddings: layout of every embedding and head in 8 bits by module name.
    """
    packed = {f"{module}.{name}" for module, layout in layouts.items() for name in layout.tensors()}
    in_files = (
        matrix_size(
            layout, {name: shapes[key][1] for name in layout.tensors() if (key := f"{module}.{name}") in shapes}
        )
        for module, layout in layouts.items()
    )
    rows = {f"{module}.{name}" for module, layout in (embeddings or {}).items() for name in layout.tensors()}
    others = {name: nbytes for name, (_, nbytes) in shapes.items() if name not in packed}
    matrices = sum(nbytes for name, nbytes in others.items() if name in rows or len(shapes[name][0]) > 1)
    return ModelSize(
        linears=sum(in_files, StorageSize()),
        linears_in_memory=total_size(layouts.values()),
        embeddings=matrices,
        rest=sum(others.values()) - matrices,
    )
