"""The headers of safetensors files, read with suspicion: nothing is believed before it was compared with the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from arbllm.errors import CheckpointError

DAMAGED = "the file is damaged: download or copy the checkpoint again"
LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000
"""Bytes that safetensors itself allows."""

BYTES_OF_DTYPE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, as the file's header describes it.

    Attributes:
        file: where it lies.
        dtype: as safetensors names it: `U8`, `F16`, `BF16`, ...
        shape: its shape.
        start: offset of its first byte in the file.
        end: offset after its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.start


def read_header(file: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Metadata and tensors of a safetensors file: 8 bytes of length, a header in JSON, then the tensors.

    Raises:
        CheckpointError: the file is missing, unreadable or cut off, or a tensor cannot be what its header says: of an
            unknown dtype, of another size than its shape, or not one after the other; names file and tensor.
    """
    if not file.exists():
        raise CheckpointError(f"{file}: missing; download or copy the checkpoint again")
    try:
        size, text = _read_text(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    header = parse_object(text, f"{file}: its header is not readable; {DAMAGED}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: its header is not readable; {DAMAGED}")
    first = LENGTH_BYTES + len(text)
    tensors = {name: _read_entry(file, name, entry, first) for name, entry in header.items()}
    for name, stored in tensors.items():
        if stored.end > size:
            raise CheckpointError(f"{file}: cut off before the end of tensor {name}; {DAMAGED}")
    _check_gaps(file, tensors, first, size)
    return metadata, tensors


def parse_object(text: str | bytes, message: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is none; with this message.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(message) from error
    if not isinstance(values, dict):
        raise CheckpointError(message)
    return values


def _read_text(file: Path) -> tuple[int, bytes]:
    """The size of a file, and its header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if LENGTH_BYTES + length > size:
            raise CheckpointError(f"{file}: cut off inside its header; {DAMAGED}")
        if length > LARGEST_HEADER:
            raise CheckpointError(f"{file}: its header is not readable; {DAMAGED}")
        return size, stream.read(length)


def _read_entry(file: Path, name: str, entry: Any, first: int) -> StoredTensor:
    """One tensor; offsets in the header count from `first`, the end of the header."""
    values = entry if isinstance(entry, dict) else {}
    dtype = values.get("dtype")
    shape, offsets = _counts(values.get("shape")), _counts(values.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {name}: its entry in the header is not readable; {DAMAGED}")
    if dtype not in BYTES_OF_DTYPE:
        raise CheckpointError(f"{file}: tensor {name} is of the unknown dtype {dtype}; {DAMAGED}")
    expected = prod(shape) * BYTES_OF_DTYPE[dtype]
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{file}: tensor {name} of {dtype} {shape} takes {expected} bytes, but has {offsets[1] - offsets[0]} in "
            f"the file; {DAMAGED}"
        )
    return StoredTensor(file, dtype, tuple(shape), first + offsets[0], first + offsets[1])


def _counts(values: Any) -> list[int] | None:
    """A list of numbers that sizes and offsets can be; None where it is none."""
    sound = isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
    return values if sound else None


def _check_gaps(file: Path, tensors: dict[str, StoredTensor], first: int, size: int) -> None:
    """Tensors follow each other without gaps, from the header to the end of the file."""
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != first:
            raise CheckpointError(f"{file}: tensor {name} does not begin where the one before it ends; {DAMAGED}")
        first = stored.end
    if first != size:
        raise CheckpointError(f"{file}: has {size - first} bytes that belong to no tensor; {DAMAGED}")


def order_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: its writer leaves them in a random one.

    So the same tensors and metadata make the same file, byte for byte.
    """
    _, text = _read_text(file)
    header = parse_object(text, f"{file}: its header is not readable; {DAMAGED}")
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(text))
    if len(ordered) != len(text):  # written by something with other habits; its order is as good
        return
    with file.open("r+b") as stream:
        stream.seek(LENGTH_BYTES)
        stream.write(ordered)
