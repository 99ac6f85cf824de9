"""What a packed checkpoint holds, read from its headers alone: everything that `arbllm inspect` shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arbllm.format.accounting import ModelSize
from arbllm.format.checkpoint import bytes_on_disk, open_checkpoint
from arbllm.format.layout import Segment


@dataclass(frozen=True)
class LinearReport:
    """One packed linear.

    Attributes:
        name: its full name in the model.
        rows: output features.
        columns: input features.
        salient: columns with two signs a weight or more.
        kinds: the columns of each kind together, as a segment; the most bits a weight first.
        nominal_bits: signs a weight.
        true_bits: stored bits a weight, in the file.
        output_error: tr(D H D^T) / tr(W H W^T) when it was quantized; None where the checkpoint does not tell.
        bytes: stored bytes, in the file.
    """

    name: str
    rows: int
    columns: int
    salient: int
    kinds: tuple[Segment, ...]
    nominal_bits: float
    true_bits: float
    output_error: float | None
    bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """A packed checkpoint.

    Attributes:
        path: its directory.
        binarization: method and options, as in config.json.
        calibration: text, windows, window length and seed, as in config.json.
        bitmap: how the file holds group bitmaps: raw, csr or entropy.
        linears: the packed linears, block by block.
        rounded_embeddings: embeddings and heads that are stored in 8 bits, by name.
        size: bytes of linears, embeddings and the rest.
        bytes_on_disk: bytes of the weight files.
    """

    path: Path
    binarization: dict[str, Any]
    calibration: dict[str, Any]
    bitmap: str
    linears: list[LinearReport]
    rounded_embeddings: list[str]
    size: ModelSize
    bytes_on_disk: int

    @property
    def output_error(self) -> float | None:
        """Mean output error of the linears; None where the checkpoint does not tell."""
        errors = [linear.output_error for linear in self.linears if linear.output_error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        packed = self.size.linears
        return {
            "path": str(self.path),
            "binarization": self.binarization,
            "calibration": self.calibration,
            "bitmap": self.bitmap,
            "true_bits_per_weight": packed.true_bits,
            "true_bits_per_weight_in_memory": self.size.linears_in_memory.true_bits,
            "nominal_bits_per_weight": packed.nominal_bits,
            "output_error": self.output_error,
            "weights": packed.weights,
            "linear_bytes": packed.nbytes,
            "linear_bytes_in_memory": self.size.linears_in_memory.nbytes,
            "linear_bytes_by_part": packed.parts,
            "embedding_bytes": self.size.embeddings,
            "rounded_embeddings": self.rounded_embeddings,
            "other_bytes": self.size.rest,
            "bytes_on_disk": self.bytes_on_disk,
            "linears": [asdict(linear) for linear in self.linears],
        }


def report(path: Path, *, contents: bool = True) -> CheckpointReport:
    """Describe a packed checkpoint.

    Args:
        path: its directory.
        contents: also read every tensor and compare its checksum.

    Raises:
        CheckpointError: not a packed checkpoint, or damaged; names the file and the tensor.
    """
    checkpoint = open_checkpoint(path)
    if contents:
        checkpoint.verify_contents()
    statistics = checkpoint.quantization.get("statistics", {})
    linears = []
    for name, layout in sorted(checkpoint.layouts.items(), key=lambda item: _natural_order(item[0])):
        size = checkpoint.matrix_size(name)
        linears.append(
            LinearReport(
                name=name,
                rows=layout.rows,
                columns=layout.columns,
                salient=layout.salient,
                kinds=_kinds(layout.segments),
                nominal_bits=size.nominal_bits,
                true_bits=size.true_bits,
                output_error=statistics.get(name, {}).get("output_error"),
                bytes=size.nbytes,
            )
        )
    return CheckpointReport(
        path,
        checkpoint.quantization.get("binarization", {}),
        checkpoint.quantization.get("calibration", {}),
        checkpoint.bitmap,
        linears,
        sorted(checkpoint.embeddings),
        checkpoint.size,
        bytes_on_disk(path),
    )


def _kinds(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Segments of the same kind put together."""
    widths: dict[Segment, int] = {}
    for segment in segments:
        kind = segment._replace(width=0)
        widths[kind] = widths.get(kind, 0) + segment.width
    kinds = [kind._replace(width=width) for kind, width in widths.items()]
    return tuple(sorted(kinds, key=lambda kind: (kind.bits, kind.terms), reverse=True))


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
