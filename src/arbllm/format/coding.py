"""Lossless codings of the group bitmap on disk: `raw`, `csr` and `entropy`. In memory it is always raw.

`docs/format.md` describes the coded bytes; `docs/storage.md` tells what each coding saves.
"""

from __future__ import annotations

from functools import cache

import constriction
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from arbllm.errors import CheckpointError, ConfigError
from arbllm.format.layout import Layout, packed_bytes

RAW, CSR, ENTROPY = CODINGS = ("raw", "csr", "entropy")

LEVELS = 32
"""Shares of ones that `entropy` tells apart: 1/64, 3/64, ..., 63/64."""
_LEVEL_BITS = 5
_CHECKSUM_BYTES = 8
_ENTROPY_HEADER = _CHECKSUM_BYTES + 1
_WORD = np.dtype("<u4")

Octets = NDArray[np.uint8]


def check_coding(coding: str) -> None:
    """Refuse a coding that there is not.

    Raises:
        ConfigError: listing those that there are.
    """
    if coding not in CODINGS:
        raise ConfigError(f"bitmap {coding!r} is unknown; choose one of {', '.join(CODINGS)}")


def coded_planes(layout: Layout, coding: str) -> dict[str, int]:
    """Columns of each plane of a matrix that is coded, by the name of its tensor; none with `raw`."""
    planes = {"group_bitmap": layout.grouped_columns, "group_bitmap_high": layout.quartered_columns}
    return {name: width for name, width in planes.items() if width and coding != RAW}


def encode(plane: Tensor, width: int, coding: str) -> Tensor:
    """Code a plane of bits.

    Args:
        plane: uint8 (n, ceil(width / 8)), bits packed as in `bitplanes`, the padding zero.
        width: bits of a row.
        coding: `csr` or `entropy`.

    Returns:
        uint8 (bytes), on the CPU.
    """
    octets = plane.cpu().numpy()
    coded = _encode_csr(octets, width) if coding == CSR else _encode_entropy(octets, width)
    return torch.frombuffer(bytearray(coded), dtype=torch.uint8)


def decode(coded: Tensor, rows: int, width: int, coding: str, name: str = "bitmap") -> Tensor:
    """The plane that was coded, uint8 (rows, ceil(width / 8)), on the device of `coded`.

    Raises:
        CheckpointError: the bytes stand for no such plane; `name` is in the message.
    """
    data = coded.cpu().numpy().tobytes()
    try:
        octets = (_decode_csr if coding == CSR else _decode_entropy)(data, rows, width)
    except (ValueError, AssertionError) as error:  # constriction asserts
        raise CheckpointError(f"{name}: no bitmap as {coding} codes it ({error}); quantize the model again") from error
    return torch.from_numpy(octets).to(coded.device)


def is_possible_size(nbytes: int, rows: int, width: int, coding: str) -> bool:
    """Whether a coded plane of so many rows and columns can take `nbytes` bytes."""
    if coding == ENTROPY:
        return nbytes >= _ENTROPY_HEADER and (nbytes - _ENTROPY_HEADER) % _WORD.itemsize == 0
    pointer, index = _csr_types(rows, width)
    listed, rest = divmod(nbytes - 1 - (rows + 1) * pointer.itemsize, index.itemsize)
    return rest == 0 and 0 <= listed <= rows * width // 2


def _csr_types(rows: int, width: int) -> tuple[np.dtype, np.dtype]:
    """Of row pointers and of column indices: the shortest that hold the greatest that may occur."""
    kinds = [np.dtype(kind) for kind in ("<u2", "<u4", "<u8")]
    pointer, index = (
        next(kind for kind in kinds if most <= np.iinfo(kind).max) for most in (rows * width // 2, width - 1)
    )
    return pointer, index


def _encode_csr(octets: Octets, width: int) -> bytes:
    """The listed symbol, the rarer of 0 and 1; where each row begins in the list; the columns that have the symbol."""
    pointer, index = _csr_types(len(octets), width)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little").view(bool)
    symbol = int(2 * np.count_nonzero(bits) <= bits.size)
    listed = bits if symbol else ~bits
    ends = np.concatenate([[0], np.count_nonzero(listed, axis=1).cumsum()])
    columns = np.nonzero(listed)[1]
    return bytes([symbol]) + ends.astype(pointer).tobytes() + columns.astype(index).tobytes()


def _decode_csr(data: bytes, rows: int, width: int) -> Octets:
    """Raises ValueError: the bytes are no such list."""
    pointer, index = _csr_types(rows, width)
    if not is_possible_size(len(data), rows, width, CSR) or data[0] > 1:
        raise ValueError("its length or first byte is impossible")
    first = 1 + (rows + 1) * pointer.itemsize
    ends = np.frombuffer(data[1:first], pointer).astype(np.int64)
    columns = np.frombuffer(data[first:], index).astype(np.int64)
    counts = np.diff(ends)
    if ends[0] != 0 or ends[-1] != len(columns) or (counts < 0).any():
        raise ValueError("its rows are out of order")
    places = np.repeat(np.arange(rows), counts) * width + columns
    if (columns >= width).any() or (np.diff(places) <= 0).any():
        raise ValueError("its columns are out of order")
    bits = np.full(rows * width, 1 - data[0], np.uint8)
    bits[places] = data[0]
    return np.packbits(bits.reshape(rows, width), axis=1, bitorder="little")


def _encode_entropy(octets: Octets, width: int) -> bytes:
    """Checksum of the plane; whether rows have levels of their own; levels, then bytes level by level, range-coded."""
    ones = np.bitwise_count(octets).sum(1, dtype=np.int64)
    of_rows, of_all = _levels(ones, width), _levels(ones.sum(keepdims=True), width * len(ones))
    apart = _cost(ones, width, of_rows) + _LEVEL_BITS * len(ones) < _cost(ones, width, of_all) + _LEVEL_BITS
    levels = of_rows if apart else of_all
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(levels.astype(np.int32), constriction.stream.model.Uniform(LEVELS))
    for level, members in _members(levels, len(octets)):
        encoder.encode(octets[members].ravel().astype(np.int32), _byte_model(level))
    words = encoder.get_compressed().astype(_WORD)
    return xxhash.xxh3_64_digest(np.ascontiguousarray(octets).data) + bytes([apart]) + words.tobytes()


def _decode_entropy(data: bytes, rows: int, width: int) -> Octets:
    """Raises ValueError, or AssertionError: the bytes are not what was written."""
    if not is_possible_size(len(data), rows, width, ENTROPY) or data[_CHECKSUM_BYTES] > 1:
        raise ValueError("its length or first bytes are impossible")
    words = np.frombuffer(data[_ENTROPY_HEADER:], _WORD).astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    levels = decoder.decode(constriction.stream.model.Uniform(LEVELS), rows if data[_CHECKSUM_BYTES] else 1)
    octets = np.empty((rows, packed_bytes(width)), np.uint8)
    for level, members in _members(levels, rows):
        octets[members] = decoder.decode(_byte_model(level), octets[members].size).reshape(-1, octets.shape[1])
    if xxhash.xxh3_64_digest(octets.data) != data[:_CHECKSUM_BYTES]:
        raise ValueError("its checksum differs")
    return octets


def _levels(ones: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The level of each row with so many ones of `length` bits: level k is a share of (2 k + 1) / 64."""
    return np.minimum(ones * LEVELS // length, LEVELS - 1)


def _cost(ones: NDArray[np.int64], width: int, levels: NDArray[np.int64]) -> float:
    """Bits that rows of `width` with so many ones take at these levels."""
    share = (2 * levels + 1) / (2 * LEVELS)
    return -float((ones * np.log2(share) + (width - ones) * np.log2(1 - share)).sum())


def _members(levels: NDArray, rows: int) -> list[tuple[int, NDArray[np.bool_]]]:
    """Each level that occurs, ascending, and which rows have it."""
    return [(int(level), np.broadcast_to(levels == level, rows)) for level in np.unique(levels)]


@cache
def _byte_model(level: int) -> constriction.stream.model.Categorical:
    """Eight independent bits at once, which is eight times as quick. The weights are whole numbers: exact anywhere."""
    ones = np.bitwise_count(np.arange(256, dtype=np.uint8)).tolist()
    weights = [float((2 * level + 1) ** one * (2 * LEVELS - 2 * level - 1) ** (8 - one)) for one in ones]
    return constriction.stream.model.Categorical(np.array(weights), perfect=False)
