"""What a job that made a checkpoint reports, whatever the method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class JobSummary:
    """What a finished job made, and what it cost.

    Attributes:
        path: the checkpoint.
        linears: linears that were quantized.
        weights: their weights.
        true_bits_per_weight: stored bits a weight of them, everything counted.
        nominal_bits_per_weight: bits a weight of them without scales: signs, or codes.
        output_error: mean over them of tr(D H D^T) / tr(W H W^T).
        bytes_on_disk: size of the weight files.
        linear_bytes: of it, the linears.
        dense_bytes: what the model's tensors took before, in the dtype that it was stored in.
        dense_linear_bytes: of it, the linears.
        seconds: wall-clock time, from opening the model to the finished checkpoint; an evaluation not counted. Of a job
            that was stopped and went on, that of the work that was kept, too.
        peak_memory_bytes: greatest resident memory of the process meanwhile.
        peak_device_memory_bytes: greatest memory of tensors on the GPU; None without one.
    """

    path: Path
    linears: int
    weights: int
    true_bits_per_weight: float
    nominal_bits_per_weight: float
    output_error: float
    bytes_on_disk: int
    linear_bytes: int
    dense_bytes: int
    dense_linear_bytes: int
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that do not apply."""
        return {key: value for key, value in (asdict(self) | {"path": str(self.path)}).items() if value is not None}
