"""What a quantization would take and make, told from shapes alone: `arbllm quantize --dry-run`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from arbllm.binarize.methods import get_method
from arbllm.config import BinarizationConfig
from arbllm.device import peak_memory_bytes
from arbllm.format.accounting import matrix_size
from arbllm.format.rows import ROW_BITS, RowLayout
from arbllm.model.resume import unfinished_directory
from arbllm.model.stream import empty_model
from arbllm.model.tune import Tuning
from arbllm.model.walk import DecoderBlock, find_blocks
from arbllm.sizes import largest_layout

FLOAT_BYTES = 4
HESSIANS, SOLVER, TUNER = 3, 6, 12
"""Float32 copies that are held: of each Hessian; of the largest weight in the solver; bytes a weight of the tuner."""


@dataclass(frozen=True)
class Plan:
    """What a job would take and make.

    Attributes:
        blocks: decoder blocks.
        linears: linears to binarize.
        weights: their weights.
        true_bits_per_weight: of them, at most.
        result_bytes: of the checkpoint's tensors, at most.
        peak_memory_bytes: an estimate, the sum of `memory`.
        memory: the same by part: the program as it is, the model, activations, the block at work, its Hessians, and the
            larger of what solver and tuner need.
        seconds: for all blocks, if they take as long as those that an unfinished job has measured; None without one.
    """

    blocks: int
    linears: int
    weights: int
    true_bits_per_weight: float
    result_bytes: int
    peak_memory_bytes: int
    memory: dict[str, int]
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that are not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def plan(
    model: str | Path,
    out: str | Path,
    *,
    config: BinarizationConfig | None = None,
    embedding_bits: int = 16,
    tune: int | None = None,
    windows: int = 128,
    window_length: int = 2048,
    dtype: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Foretell a job on the CPU; nothing is read but config.json, and nothing is written.

    Args:
        model: a hub id or a local directory.
        out: where the checkpoint would go: if a job for it is unfinished, its blocks tell the time.
        config: method and options.
        embedding_bits: as in `arbllm.quantize`, like all that follows.
        tune: steps of tuning; None for the method's own.
        windows: calibration windows.
        window_length: tokens of a window.
        dtype: to open the model in.
        stream: whether weights are read block by block.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ModelError: config.json cannot be read, or describes no model that can be binarized.
    """
    config = config or BinarizationConfig()
    empty = empty_model(model, dtype, trust_remote_code)
    blocks = find_blocks(empty)
    weights = sum(linear.weight.numel() for block in blocks for linear in block.linears)
    packed = _packed_bytes(blocks, config)
    tuned = bool(tune if tune is not None else get_method(config.method).joint and Tuning().steps)
    rest = _rest_bytes(empty, blocks, embedding_bits)
    memory = _memory(empty, blocks, windows * window_length, tuned)
    memory["model"] = rest + packed if stream else sum(parameter.nbytes for parameter in empty.parameters())
    return Plan(
        blocks=len(blocks),
        linears=sum(len(block.linears) for block in blocks),
        weights=weights,
        true_bits_per_weight=8 * packed / weights,
        result_bytes=packed + rest,
        peak_memory_bytes=sum(memory.values()),
        memory=memory,
        seconds=_seconds(unfinished_directory(Path(out)), len(blocks)),
    )


def _packed_bytes(blocks: list[DecoderBlock], config: BinarizationConfig) -> int:
    linears = [linear.weight for block in blocks for linear in block.linears]
    if config.bits is not None:
        return ceil(config.bits * sum(weight.numel() for weight in linears) / 8)
    return sum(matrix_size(largest_layout(weight, config)).nbytes for weight in linears)


def _rest_bytes(model: PreTrainedModel, blocks: list[DecoderBlock], embedding_bits: int) -> int:
    """Bytes of all but the linears of the blocks, embedding and head as they will be stored."""
    linears = {linear.module.weight for block in blocks for linear in block.linears}
    rest = sum(parameter.nbytes for parameter in model.parameters() if parameter not in linears)
    if embedding_bits != ROW_BITS:
        return rest
    matrices: dict[nn.Parameter, RowLayout] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            matrices[module.weight] = RowLayout(*module.weight.shape)
    return rest + sum(layout.nbytes - weight.nbytes for weight, layout in matrices.items())


def _memory(model: PreTrainedModel, blocks: list[DecoderBlock], tokens: int, tuned: bool) -> dict[str, int]:
    """Bytes by part, but for the model itself."""
    width = model.get_input_embeddings().weight.shape[1]
    block = max(blocks, key=lambda each: sum(linear.weight.numel() for linear in each.linears))
    shapes = [tuple(linear.weight.shape) for linear in block.linears]
    inputs = sum(columns**2 for columns in {columns for _, columns in shapes})
    shared = len(shapes) > 1  # attention and MLP read inputs of one width, but not the same ones
    inputs += sum(columns**2 for columns in {columns for _, columns in shapes} if columns == width) * 2 * shared
    numbers = sum(rows * columns for rows, columns in shapes)
    largest = max(rows * columns for rows, columns in shapes)
    return {
        "program": peak_memory_bytes(),
        "activations": tokens * width * FLOAT_BYTES * (2 if tuned else 1),
        "block": numbers * FLOAT_BYTES,
        "hessians": HESSIANS * inputs * FLOAT_BYTES,
        "solver_or_tuner": max(SOLVER * largest * FLOAT_BYTES, TUNER * numbers if tuned else 0),
    }


def _seconds(directory: Path, blocks: int) -> float | None:
    """Time of all blocks by the mean of those that an unfinished job has done."""
    from safetensors import safe_open

    measured = []
    for file in sorted(directory.glob("block-*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            events = json.loads(reader.metadata()["values"])["events"]
        measured += [event["seconds"] for event in events if event["event"] == "block_finished"]
    return blocks * sum(measured) / len(measured) if measured else None
