"""The loop over decoder blocks for methods that leave ordinary dense weights: what binarization is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arbllm.baselines import Rounded
from arbllm.device import peak_memory_bytes
from arbllm.difference import output_error, weight_error
from arbllm.errors import naming
from arbllm.factor import Factor, factorize
from arbllm.model.capture import BlockCall, capture_inputs, gather_hessians, propagate, resident
from arbllm.model.events import BlockFinished, BlockStarted, JobStarted, LinearQuantized, OnEvent
from arbllm.model.quantize import check_windows
from arbllm.model.walk import DecoderBlock, Linear, check_weights, find_blocks

# What one linear becomes: its weight (n, m) and its factorised Hessian in, the rounded weight out.
RoundLinear = Callable[[Tensor, Factor], Rounded]


def round_model(
    model: PreTrainedModel,
    windows: Tensor,
    round_linear: RoundLinear,
    *,
    nominal_bits: float,
    device: torch.device | str | None = None,
    on_event: OnEvent | None = None,
) -> list[LinearQuantized]:
    """Round every linear of every decoder block, in place, each block calibrated on what the rounded ones produce.

    The Hessians are those that `arbllm.model.quantize.quantize_model` works on: same windows, same order, same damping.
    The weights stay ordinary tensors in the dtype that they had.

    >>> round_model(model, windows, lambda weight, factor: gptq(weight, factor.hessian, 3), nominal_bits=3)

    Args:
        model: a causal language model; it is put in evaluation mode. After an error it is left partly rounded.
        windows: calibration tokens, int64 (N, L).
        round_linear: rounds one linear.
        nominal_bits: bits of a code, for the records.
        device: where to compute, one block at a time; None for where the model is.
        on_event: told of every step as it happens (see `arbllm.model.events`).

    Returns:
        One record per linear, in the model's order.

    Raises:
        ModelError: the model does not fit this procedure, the windows do not fit the model, or a weight or an
            activation is not finite; the message names the layer.
    """
    emit = on_event or (lambda _: None)
    blocks = find_blocks(model)
    check_weights(blocks)
    check_windows(model, windows)
    place = torch.device(device) if device is not None else blocks[0].linears[0].weight.device
    linears = [linear for block in blocks for linear in block.linears]
    emit(JobStarted(len(blocks), len(linears), sum(linear.weight.numel() for linear in linears)))
    model.eval()
    hidden, calls = capture_inputs(model, blocks, windows, place)
    results: list[LinearQuantized] = []
    for block, call in zip(blocks, calls, strict=True):
        results += _round_block(block, len(blocks), call.to(place), hidden, round_linear, nominal_bits, emit)
    return results


def _round_block(
    block: DecoderBlock,
    blocks: int,
    call: BlockCall,
    hidden: Tensor,
    round_linear: RoundLinear,
    nominal_bits: float,
    emit: OnEvent,
) -> list[LinearQuantized]:
    """Round one block, and turn its inputs `hidden` (N, L, d) into its outputs in place, except for the last."""
    emit(BlockStarted(block.index, blocks))
    results: dict[Linear, LinearQuantized] = {}
    laps = [time.perf_counter()]
    with resident(block.module, hidden.device):
        groups = gather_hessians(block, call, hidden)
        laps.append(time.perf_counter())
        for group in groups:
            with naming(group.linears[0].name):
                factor = factorize(group.trusted())
            for linear in group.linears:
                results[linear] = _round_one(linear, block.index, blocks, factor, round_linear, nominal_bits)
        for linear in block.linears:
            emit(results[linear])
        laps.append(time.perf_counter())
        if block.index + 1 < blocks:
            propagate(block, call, hidden)
        laps.append(time.perf_counter())
    start, captured, solved, propagated = laps
    emit(
        BlockFinished(
            block.index,
            blocks,
            seconds=propagated - start,
            capture_seconds=captured - start,
            solve_seconds=solved - captured,
            tune_seconds=0.0,
            propagate_seconds=propagated - solved,
            peak_memory_bytes=peak_memory_bytes(hidden.device),
        )
    )
    return [results[linear] for linear in block.linears]


def _round_one(
    linear: Linear, block: int, blocks: int, factor: Factor, round_linear: RoundLinear, nominal_bits: float
) -> LinearQuantized:
    start = time.perf_counter()
    weight = linear.weight.float()
    rows, columns = weight.shape
    with naming(linear.name):
        rounded = round_linear(weight, factor)
    seconds = time.perf_counter() - start
    error = output_error(weight, rounded.weight, factor.hessian)
    distance = weight_error(weight, rounded.weight)
    linear.set_weight(rounded.weight.to(linear.weight.dtype))
    return LinearQuantized(
        block,
        blocks,
        linear.name,
        rows,
        columns,
        output_error=error,
        weight_error=distance,
        nominal_bits=nominal_bits,
        true_bits=rounded.true_bits,
        bytes=round(rounded.true_bits * weight.numel() / 8),
        damping=factor.damping,
        seconds=seconds,
    )
