"""What a quantization would take and make, told from shapes alone: `arbllm quantize --dry-run`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from arbllm.config import BinarizationConfig
from arbllm.device import peak_memory_bytes
from arbllm.errors import ModelError
from arbllm.experts import SplitExperts
from arbllm.format.accounting import matrix_size
from arbllm.format.coding import RAW
from arbllm.format.rows import ROW_BITS, RowLayout
from arbllm.job import check_choices, choose_tuning, streamed_config
from arbllm.model import disturbance
from arbllm.model.distill import LENGTH
from arbllm.model.quantize import check_length
from arbllm.model.resume import unfinished_directory
from arbllm.model.sensitivity import uniform_shares
from arbllm.model.stream import empty_model
from arbllm.model.training import Tuning
from arbllm.model.walk import DecoderBlock, Linear, check_shares, find_blocks
from arbllm.model.workers import solver_memory
from arbllm.sizes import header_bytes, largest_layout, most_listed
from arbllm.text import check_amount

FLOAT_BYTES = 4
PROGRAM_BYTES = 100_000_000  # tokenizer and text, and what the allocator keeps, beside the libraries
CODE_BYTES = 1  # of a weight whose scales are trained
REBUILT = 3  # float32 copies of the largest of such weights, gradients included
KEPT = 1.3  # float32 numbers that a pass forward keeps for the way back, for each that a linear reads or writes
PASSING = 3  # likewise without a way back, but of the largest linear
LOGITS = 8  # float32 copies
DISTURBED_LOGITS = 3  # likewise, beside what the model as it is predicts


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
        stage: which takes the most: `measuring` how the bits are to be divided, or `disturbing` linears for that,
            `blocks`, `reading` what is distilled, or `distilling`.
        memory: bytes by part at that stage.
        seconds: for all blocks, if they take as long as those that an unfinished job has measured; None without one.
    """

    blocks: int
    linears: int
    weights: int
    true_bits_per_weight: float
    result_bytes: int
    peak_memory_bytes: int
    stage: str
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
    bitmap: str = RAW,
    tune: int | None = None,
    distill: int = 0,
    distill_windows: int | None = None,
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
        bitmap: how files hold group bitmaps.
        tune: steps of tuning; None for the method's own.
        distill: steps of distillation.
        distill_windows: windows to distil on; None for as many as for calibration.
        windows: calibration windows.
        window_length: tokens of a window.
        dtype: to open the model in.
        stream: whether weights are read block by block.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ModelError: config.json cannot be read, or describes no model that can be binarized.
        ConfigError: options that the job would refuse, too.
        TextError: likewise, windows.
    """
    config = config or BinarizationConfig()
    check_choices(config, embedding_bits, bitmap, None, distill, distill_windows)
    tuning = choose_tuning(config, tune, distill)
    for count in (windows, windows if distill_windows is None else distill_windows):
        check_amount(count, window_length)
    if stream:
        config = streamed_config(config, distill)
    if Path(model).suffix == ".gguf":
        raise ModelError(f"{model}: a GGUF file has no config.json to plan by; leave out --dry-run")
    empty = empty_model(model, dtype, trust_remote_code)
    empty.tie_weights()
    blocks = find_blocks(empty)
    check_shares(blocks)
    weights = sum(linear.weight.numel() for block in blocks for linear in block.linears)
    check_length(empty.config, window_length)
    packed = _packed_bytes(blocks, config)
    rest = _rest_bytes(empty, blocks, embedding_bits)
    text = windows, window_length
    stages = {"blocks": _at_blocks(empty, blocks, text, tuning is not None) | _model(empty, rest, packed, stream)}
    if config.bits is not None and config.allocation == "measured":
        stages["measuring"] = _measuring(empty, blocks, window_length)
        stages["disturbing"] = _disturbing(empty, blocks, window_length)
    if distill:
        stages |= _distilling(empty, blocks, (distill_windows or windows, window_length), rest + packed)
    stage = max(stages, key=lambda name: sum(stages[name].values()))
    memory = {"program": peak_memory_bytes() + PROGRAM_BYTES} | stages[stage]
    linears = [linear for block in blocks for linear in block.linears]
    return Plan(
        blocks=len(blocks),
        linears=len(linears),
        weights=weights,
        true_bits_per_weight=8 * packed / weights,
        result_bytes=packed + most_listed(empty, config, bitmap) + rest + header_bytes(empty, linears),
        peak_memory_bytes=sum(memory.values()),
        stage=stage,
        memory=memory,
        seconds=_seconds(unfinished_directory(Path(out).expanduser()), len(blocks)),
    )


def _packed_bytes(blocks: list[DecoderBlock], config: BinarizationConfig) -> int:
    linears = [linear.weight for block in blocks for linear in block.linears]
    if config.bits is not None:
        uniform_shares(blocks, config)  # refuses too few
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


def _model(model: PreTrainedModel, rest: int, packed: int, stream: bool) -> dict[str, int]:
    """Bytes of the model while its blocks are quantized, by part; the packed ones in the end."""
    return {"outside_blocks": rest, "packed": packed} if stream else {"model": _bytes(model)}


def _at_blocks(
    model: PreTrainedModel, blocks: list[DecoderBlock], text: tuple[int, int], tuned: bool
) -> dict[str, int]:
    """Bytes by part while blocks are quantized, but for the model; `text` is so many windows of so many tokens."""
    block = max(blocks, key=_numbers)
    windows, length = text
    numbers, stored = _numbers(block), sum(linear.weight.nbytes for linear in block.linears)
    passing = PASSING * FLOAT_BYTES * length * max(sum(linear.weight.shape) for linear in block.linears)
    begin = min(length, Tuning().length) if tuned else 0  # of each window, what tuning uses
    tuning = _trainer([block]) + _kept(model, block, begin) if tuned else 0
    return {
        "activations": windows * (length + begin) * _width(model) * FLOAT_BYTES,
        "block": stored,
        "hessians": _hessian_bytes(model, block),
        # Passes take the block in float32; the tuner takes its place.
        "work": max(*map(solver_memory, block.linears), passing + FLOAT_BYTES * numbers - stored, tuning - stored),
    }


def _measuring(model: PreTrainedModel, blocks: list[DecoderBlock], length: int) -> dict[str, int]:
    """Bytes by part while it is measured what linears gain from bits: the model forward and backward on a window."""
    return {
        "model": _bytes(model, FLOAT_BYTES),
        "activations": len(blocks) * length * _width(model) * FLOAT_BYTES,
        "work": max(_kept(model, block, length) for block in blocks),
    }


def _disturbing(model: PreTrainedModel, blocks: list[DecoderBlock], length: int) -> dict[str, int]:
    """Bytes by part while linears are disturbed, an error kept for each."""
    tokens = min(length, disturbance.LENGTH) * model.get_input_embeddings().num_embeddings * FLOAT_BYTES
    errors = sum(linear.weight.nbytes for linear in _linears(blocks))
    return {
        "model": _bytes(model, FLOAT_BYTES),
        "errors": errors,
        "logits": (disturbance.PIECES + DISTURBED_LOGITS) * tokens,
    }


def _distilling(
    model: PreTrainedModel, blocks: list[DecoderBlock], text: tuple[int, int], packed: int
) -> dict[str, dict[str, int]]:
    """Bytes by part and stage while a packed model of so many bytes is distilled.

    The dense model first reads all of the text, so many windows of so many tokens. Not counted: where its logits are
    more than its head's (see `model.head.split_head`), it stays in memory.
    """
    windows, length = text
    kept = {"packed": packed, "states": windows * length * _width(model) * FLOAT_BYTES}
    length = min(length, LENGTH)
    passing = PASSING * FLOAT_BYTES * length * max(sum(linear.weight.shape) for linear in _linears(blocks))
    head = model.get_input_embeddings().weight.numel() * FLOAT_BYTES
    return {
        "reading": kept | {"teacher": _bytes(model, FLOAT_BYTES), "work": passing},
        "distilling": kept
        | {
            "head": head,
            "trainer": _trainer(blocks),
            "activations": sum(_kept(model, block, length) for block in blocks),
            "logits": LOGITS * length * model.get_input_embeddings().num_embeddings * FLOAT_BYTES,
        },
    }


def _linears(blocks: list[DecoderBlock]) -> list[Linear]:
    return [linear for block in blocks for linear in block.linears]


def _bytes(model: PreTrainedModel, each: int | None = None) -> int:
    """Bytes of a model's parameters, with `each` bytes a number, or as they are stored."""
    return sum(parameter.numel() * (each or parameter.itemsize) for parameter in model.parameters())


def _width(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _numbers(block: DecoderBlock) -> int:
    """Weights of a block's linears."""
    return sum(linear.weight.numel() for linear in block.linears)


def _trainer(blocks: list[DecoderBlock]) -> int:
    """Bytes of what trains the scales of some blocks together."""
    largest = max(linear.weight.numel() for block in blocks for linear in block.linears)
    return CODE_BYTES * sum(map(_numbers, blocks)) + REBUILT * FLOAT_BYTES * largest


def _kept(model: PreTrainedModel, block: DecoderBlock, tokens: int) -> int:
    """Bytes of what a block keeps of some tokens to go backward; experts are given as many each."""
    routed = _routed_share(model)
    numbers = sum(sum(linear.weight.shape) * (routed if linear.routed else 1) for linear in block.linears)
    return int(KEPT * FLOAT_BYTES * tokens * numbers)


def _routed_share(model: PreTrainedModel) -> float:
    """The share of all tokens that comes to an expert of a mixture, on average."""
    experts = max((module.num_experts for module in model.modules() if isinstance(module, SplitExperts)), default=1)
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or experts
    return min(1.0, (max(chosen) if isinstance(chosen, list) else chosen) / experts)


def _hessian_bytes(model: PreTrainedModel, block: DecoderBlock) -> int:
    """Bytes of the Hessians of a block's inputs; attention and MLP read inputs of one width, but not the same ones.

    An expert's linears have one each.
    """
    widths = {linear.weight.shape[1] for linear in block.linears if not linear.routed}
    repeated = 2 * _width(model) ** 2 if len(block.linears) > 1 and _width(model) in widths else 0
    routed = sum(linear.weight.shape[1] ** 2 for linear in block.linears if linear.routed)
    return FLOAT_BYTES * (sum(width**2 for width in widths) + repeated + routed)


def _seconds(directory: Path, blocks: int) -> float | None:
    """Time of all blocks by the mean of those that an unfinished job has done."""
    from safetensors import SafetensorError, safe_open

    measured = []
    for file in sorted(directory.glob("block-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as reader:
                events = json.loads(reader.metadata()["values"])["events"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # damaged: the job will make it anew
            continue
        measured += [event["seconds"] for event in events if event["event"] == "block_finished"]
    return blocks * sum(measured) / len(measured) if measured else None
