"""What matrices that are prepared for a GPU have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class PreparedTensors:
    """A plan, which follows from a layout, and tensors, which an operator takes as a list."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the class."""
        return [value for each in fields(self) if isinstance(value := getattr(self, each.name), Tensor)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)
