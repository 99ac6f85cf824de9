"""The shape of one packed matrix: which tensors it stores, their dtypes and sizes.

Everything that must agree on sizes (packing, loading onto the meta device, checking a file, counting bits) asks
a `Layout`, so a stored byte is described once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from arbllm.errors import CheckpointError

GROUP_COUNTS = (1, 2, 4)


def packed_bytes(bits: int) -> int:
    """Bytes that hold `bits` bits, eight to a byte."""
    return (bits + 7) // 8


@dataclass(frozen=True)
class Layout:
    """Sizes of one packed matrix of `rows` outputs and `columns` inputs.

    The columns are cut into blocks of `block_size` (the last may be shorter). Inside a block a column is either
    *regular* (one sign a weight) or *salient* (two signs a weight). Regular weights fall into `groups` groups, salient
    weights into `salient_groups`. A block stores row scales only for the zones that it has: `groups` slots when
    it has a regular column, then 2 * `salient_groups` slots (group-major, first and second term) when it has a salient
    one. Row means, in methods that use them, follow the same order with one slot a zone.

    Attributes:
        rows: n, output features.
        columns: m, input features.
        block_size: K, columns of a block.
        groups: groups of regular weights: 1, 2 or 4.
        salient_groups: groups of salient weights: 1, 2 or 4.
        salient: c, salient columns in the whole matrix.
        row_scale_slots: S, row scales of one row over all blocks.
        row_mean_slots: row means of one row over all blocks; 0 where the method has none.
        column_scaled: whether the method stores column scales (ARB-RC).
    """

    rows: int
    columns: int
    block_size: int
    groups: int
    salient_groups: int
    salient: int
    row_scale_slots: int
    row_mean_slots: int
    column_scaled: bool

    @property
    def blocks(self) -> int:
        """Number of column blocks."""
        return -(-self.columns // self.block_size)

    @property
    def bitmap_planes(self) -> int:
        """Bits of the group bitmap per weight: 0, 1 or 2."""
        return max(self.groups, self.salient_groups if self.salient else 1).bit_length() - 1

    @property
    def weights(self) -> int:
        """Number of weights, n * m."""
        return self.rows * self.columns

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor that this matrix stores, in file order.

        Absent parts are left out: no group bitmap with one group, no second signs without salient columns.
        """
        n, m, c = self.rows, self.columns, self.salient
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"signs": (torch.uint8, (n, packed_bytes(m)))}
        if self.bitmap_planes:
            stored["group_bitmap"] = (torch.uint8, (n, self.bitmap_planes, packed_bytes(m)))
        if c:
            stored["column_bitmap"] = (torch.uint8, (packed_bytes(m),))
            stored["second_signs"] = (torch.uint8, (n, packed_bytes(c)))
        stored["row_scales"] = (torch.float16, (n, self.row_scale_slots))
        if self.row_mean_slots:
            stored["row_means"] = (torch.float16, (n, self.row_mean_slots))
        if self.column_scaled:
            if m > c:
                stored["column_scales"] = (torch.float16, (self.groups, m - c))
            if c:
                stored["salient_column_scales"] = (torch.float16, (self.salient_groups, 2, c))
        return stored

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "matrix") -> Layout:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: a field is missing, unknown or not of its type; `name` is in the message.
        """
        try:
            layout = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"{name}: its layout in config.json is not readable ({error})") from error
        layout.check(name)
        return layout

    def check(self, name: str = "matrix") -> None:
        """Refuse sizes that no matrix can have.

        Raises:
            CheckpointError: naming `name` and the field.
        """
        for field in ("rows", "columns", "block_size", "row_scale_slots"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise CheckpointError(f"{name}: {field} must be a positive whole number, not {getattr(self, field)!r}")
        for field in ("groups", "salient_groups"):
            if getattr(self, field) not in GROUP_COUNTS:
                raise CheckpointError(f"{name}: {field} must be one of {GROUP_COUNTS}, not {getattr(self, field)!r}")
        if type(self.salient) is not int or not 0 <= self.salient <= self.columns:
            raise CheckpointError(f"{name}: salient must lie between 0 and {self.columns}, not {self.salient!r}")
        most = self.blocks * (self.groups + 2 * self.salient_groups)
        if self.row_scale_slots > most or type(self.row_mean_slots) is not int or not 0 <= self.row_mean_slots <= most:
            raise CheckpointError(f"{name}: more row scales or means than its {self.blocks} blocks can have")
        if type(self.column_scaled) is not bool:
            raise CheckpointError(f"{name}: column_scaled must be true or false, not {self.column_scaled!r}")
