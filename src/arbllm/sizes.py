"""Sizes of a model and of its checkpoint, from shapes alone, before any work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil

from torch import Tensor
from transformers import PreTrainedModel

from arbllm.binarize.partition import MOST_SALIENT_COLUMNS
from arbllm.config import FEWEST_BITS, MOST_BITS, BinarizationConfig
from arbllm.errors import ConfigError
from arbllm.format.accounting import matrix_size
from arbllm.format.coding import CSR
from arbllm.format.layout import Layout, Segment
from arbllm.integrations.embeddings import packed_embeddings
from arbllm.model.walk import Linear, find_blocks

ENTRY_BYTES = 100
"""Of a file's header for each tensor, beside its name, which is there twice: once with its checksum."""
FURTHER_TENSORS, FURTHER_NAME = 7, 15
"""Of a packed linear, beside the one that a dense linear has, and characters of their names beyond the linear's."""


def size_in_bytes(size: int | str) -> int:
    """Bytes from a number of them, or from a text with a unit, as in 1.8GB or 95MB (powers of ten).

    Raises:
        ConfigError: it is no such text.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    try:
        return round(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))  # type: ignore[index]
    except (TypeError, ValueError):
        raise ConfigError(f"size {size!r} is not understood; write it as in 1.8GB or 95MB") from None


def dense_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of all tensors of a dense model (shared ones once), and of the linears that will be binarized."""
    everything = sum(parameter.nbytes for parameter in model.parameters())
    return everything, sum(linear.weight.nbytes for block in find_blocks(model) for linear in block.linears)


def bits_for_size(model: PreTrainedModel, size: int) -> float:
    """Bits a weight of the linears with which the weight files take `size` bytes.

    Raises:
        ConfigError: they would be fewer than there can be; names the least size. More than enough gives the most bits.
    """
    dense_bytes, dense_linear_bytes = dense_sizes(model)
    linears = [linear for block in find_blocks(model) for linear in block.linears]
    weights = sum(linear.weight.numel() for linear in linears)
    embeddings = sum(layout.nbytes for layout in packed_embeddings(model).values())
    rest = dense_bytes - dense_linear_bytes + embeddings + header_bytes(model, linears)
    bits = 8 * (size - rest) / weights
    if bits < FEWEST_BITS:
        raise ConfigError(
            f"size {size:,} bytes is too little: all but the linears takes {rest:,} and the linears at least "
            f"{ceil(FEWEST_BITS * weights / 8):,}; ask for more, or for --embeddings 8"
        )
    return min(bits, MOST_BITS)


def header_bytes(model: PreTrainedModel, linears: Sequence[Linear]) -> int:
    """Bytes that files take beside their tensors, about and at most, once these linears are packed."""
    names = [len(name) for name in model.state_dict()]
    names += [len(linear.name) + FURTHER_NAME for linear in linears] * FURTHER_TENSORS
    return sum(2 * length + ENTRY_BYTES for length in names)


def largest_size(model: PreTrainedModel, config: BinarizationConfig, bitmap: str) -> int:
    """Bytes that the checkpoint of a model with dense linears can take at most."""
    weights = [linear.weight for block in find_blocks(model) for linear in block.linears]
    if config.bits is None:
        packed = sum(matrix_size(largest_layout(weight, config)).nbytes for weight in weights)
    else:
        packed = ceil(config.bits * sum(weight.numel() for weight in weights) / 8)
    packed += most_listed(model, config, bitmap)
    dense_bytes, dense_linear_bytes = dense_sizes(model)
    embeddings = sum(layout.nbytes for layout in packed_embeddings(model).values())
    return dense_bytes - dense_linear_bytes + packed + embeddings


def most_listed(model: PreTrainedModel, config: BinarizationConfig, bitmap: str) -> int:
    """Bytes that group bitmaps may take in files beyond what they take raw."""
    if bitmap != CSR:
        return 0
    # Of each bit plane at most half the weights are listed, two bytes each.
    weights = sum(linear.weight.numel() for block in find_blocks(model) for linear in block.linears)
    return weights * (config.groups // 2)


def largest_layout(weight: Tensor, config: BinarizationConfig) -> Layout:
    """The most that a weight (n, m) takes without a budget: each block has all the columns and scales that it can."""
    rows, columns = weight.shape
    segments = []
    for start in range(0, columns, config.block_size):
        width = min(config.block_size, columns - start)
        salient = min(MOST_SALIENT_COLUMNS, width - 1)
        segments += [Segment(width - salient, config.groups, 1)]
        segments += [Segment(salient, config.groups, 2)] if salient else []
    return Layout(
        rows=rows,
        columns=columns,
        segments=tuple(segments),
        ordering="explicit",
        block_size=0,
        scale_bits=16,
        row_means=True,
        column_scaled=True,
    )
