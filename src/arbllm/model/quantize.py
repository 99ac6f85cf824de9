"""The loop over decoder blocks: capture, solve, propagate, pack."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arbllm.budget import Demand, allocate
from arbllm.config import BinarizationConfig
from arbllm.device import peak_memory_bytes
from arbllm.errors import ModelError
from arbllm.factor import Factor, factorize
from arbllm.format.matrix import BinaryMatrix
from arbllm.model.capture import BlockCall, InputGroup, capture_inputs, gather_hessians, propagate, resident
from arbllm.model.events import BlockFinished, BlockStarted, BlockTuned, JobStarted, LinearQuantized, OnEvent
from arbllm.model.sensitivity import measure_demands
from arbllm.model.tune import Tuning, tune_block
from arbllm.model.walk import DecoderBlock, Linear, check_weights, find_blocks, replace_module
from arbllm.nn import BinaryLinear
from arbllm.solver import quantize_matrix

SENSITIVITY_WINDOWS = 2
Solved = tuple[Linear, BinaryMatrix, LinearQuantized]


def quantize_model(
    model: PreTrainedModel,
    windows: Tensor,
    config: BinarizationConfig | None = None,
    *,
    tuning: Tuning | None = None,
    device: torch.device | str | None = None,
    on_event: OnEvent | None = None,
) -> list[LinearQuantized]:
    """Binarize every linear of every decoder block, in place; embeddings, norms and head stay as they are.

    >>> quantize_model(model, calibration_windows("builtin", tokenizer, windows=16))

    Blocks are taken in order. Each is calibrated on what the quantized blocks before it produce, so later blocks can
    make up for the errors of earlier ones; one block's activations and Hessians are in memory at a time. On a CPU, a
    block stored in half precision is computed in float32. Embeddings are to be rounded before, if at all (see
    `quantize_embeddings`), so that blocks make up for that, too.

    Args:
        model: a causal language model; it is put in evaluation mode. After an error it is left partly quantized.
        windows: calibration tokens, int64 (N, L).
        config: method and options.
        tuning: tune each block's scales and norms after it is solved; None leaves them.
        device: where to compute, one block at a time; None for where the model is.
        on_event: told of every step as it happens (see `arbllm.model.events`).

    Returns:
        One record per linear, in the model's order.

    Raises:
        ModelError: the model does not fit this procedure, the windows do not fit the model, or a weight or an
            activation is not finite; the message names the layer.
    """
    config = config or BinarizationConfig()
    emit = on_event or _ignore
    blocks = find_blocks(model)
    check_weights(blocks)
    _check_windows(model, windows)
    device = torch.device(device) if device is not None else blocks[0].linears[0].weight.device
    emit(_job_started(blocks))
    model.eval()
    configs = _configs(model, blocks, windows, config, device)
    hidden, calls = capture_inputs(model, blocks, windows, device)
    results: list[LinearQuantized] = []
    total = len(blocks)
    with _solver_pool(max(len(block.linears) for block in blocks)) as pool:
        for call in calls:
            # Popped, so that nothing but the job holds the dense weights: they are free when it ends.
            results += _BlockJob(model, blocks.pop(0), total, device, configs, tuning, emit, pool).run(call, hidden)
    return results


@dataclass(frozen=True)
class _BlockJob:
    """One decoder block's share of the work."""

    model: PreTrainedModel
    block: DecoderBlock
    blocks: int
    device: torch.device
    configs: Mapping[str, BinarizationConfig]
    tuning: Tuning | None
    emit: OnEvent
    pool: Executor

    def run(self, call: BlockCall, hidden: Tensor) -> list[LinearQuantized]:
        """Quantize the block, and turn its inputs `hidden` (N, L, d) into its outputs in place, except for the last."""
        self.emit(BlockStarted(self.block.index, self.blocks))
        home = self.block.linears[0].weight.device
        call = call.to(self.device)
        laps = [self._now()]
        with resident(self.block.module, self.device):
            targets = torch.empty_like(hidden) if self.tuning else None
            groups = gather_hessians(self.block, call, hidden, targets)
            laps.append(self._now())
            solved = self._solve(groups)
            laps.append(self._now())
            if targets is not None:
                solved = self._tune(solved, call, hidden, targets)
            laps.append(self._now())
            if self.block.index + 1 < self.blocks:
                for linear, matrix, _ in solved:
                    linear.set_weight(matrix.dequantize(linear.weight.dtype))
                    replace_module(self.model, linear.name, linear.module)
                propagate(self.block, call, hidden)
            laps.append(self._now())
            for linear, matrix, _ in solved:
                packed = BinaryLinear.from_matrix(
                    matrix.map(lambda tensor: tensor.to(home)), linear.module.bias, linear.transposed
                )
                replace_module(self.model, linear.name, packed)
        start, captured, finished, tuned, propagated = laps
        self.emit(
            BlockFinished(
                self.block.index,
                self.blocks,
                seconds=self._now() - start,
                capture_seconds=captured - start,
                solve_seconds=finished - captured,
                tune_seconds=tuned - finished,
                propagate_seconds=propagated - tuned,
                peak_memory_bytes=self._peak_memory(),
            )
        )
        return [record for _, _, record in solved]

    def _solve(self, groups: list[InputGroup]) -> list[Solved]:
        """Binarize all linears, those with the same input by one factorisation; emits them in the block's order."""
        factors: dict[Linear, Factor] = {}
        for group in groups:
            with _named(group.linears[0].name):
                factors |= dict.fromkeys(
                    group.linears, factorize(group.hessian, self.configs[group.linears[0].name].damping)
                )
        largest_first = sorted(factors, key=lambda linear: linear.weight.numel(), reverse=True)
        futures = {linear: self.pool.submit(self._solve_linear, linear, factors[linear]) for linear in largest_first}
        solved = []
        for linear in self.block.linears:
            matrix, seconds = futures[linear].result()
            record = self._record(linear, matrix, seconds)
            self.emit(record)
            solved.append((linear, matrix, record))
        return solved

    def _tune(self, solved: list[Solved], call: BlockCall, hidden: Tensor, targets: Tensor) -> list[Solved]:
        assert self.tuning
        start = self._now()
        matrices = {linear: matrix for linear, matrix, _ in solved}
        tuned = tune_block(self.block, call, hidden, targets, matrices, self.tuning)
        seconds = self._now() - start
        self.emit(BlockTuned(self.block.index, self.blocks, tuned.before, tuned.after, tuned.steps, seconds))
        return [(linear, tuned.matrices[linear], record) for linear, _, record in solved]

    def _solve_linear(self, linear: Linear, factor: Factor) -> tuple[BinaryMatrix, float]:
        start = self._now()
        try:
            matrix = quantize_matrix(linear.weight, factor.hessian, self.configs[linear.name], factor=factor)
        except ModelError as error:
            raise ModelError(f"{linear.name}: {error}") from error
        return matrix, self._now() - start

    def _record(self, linear: Linear, matrix: BinaryMatrix, seconds: float) -> LinearQuantized:
        assert matrix.report, "the solver always reports"
        return LinearQuantized(
            self.block.index,
            self.blocks,
            linear.name,
            *matrix.shape,
            output_error=matrix.report.output_error,
            weight_error=matrix.report.weight_error,
            nominal_bits=matrix.nominal_bits,
            true_bits=matrix.true_bits,
            bytes=matrix.nbytes,
            damping=matrix.report.damping,
            seconds=seconds,
        )

    def _now(self) -> float:
        """Wall-clock seconds, once the device has done what was asked of it so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory_bytes()


def _ignore(_: object) -> None:
    pass


def _job_started(blocks: list[DecoderBlock]) -> JobStarted:
    linears = [linear for block in blocks for linear in block.linears]
    return JobStarted(len(blocks), len(linears), sum(linear.weight.numel() for linear in linears))


def _configs(
    model: PreTrainedModel,
    blocks: list[DecoderBlock],
    windows: Tensor,
    config: BinarizationConfig,
    device: torch.device,
) -> dict[str, BinarizationConfig]:
    """What each linear is quantized with: the budget, where there is one, is divided among them."""
    linears = [linear for block in blocks for linear in block.linears]
    if config.bits is None:
        return {linear.name: config for linear in linears}
    if config.allocation == "measured":
        demands = measure_demands(model, windows[:SENSITIVITY_WINDOWS], device)
    else:
        shapes = {linear.name: tuple(linear.weight.shape) for linear in linears}
        demands = {name: Demand(rows, columns, rows * columns) for name, (rows, columns) in shapes.items()}
    bits = allocate(demands, config.bits, config.scale_block)
    return {name: replace(config, bits=share) for name, share in bits.items()}


def _check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    """Refuse windows that would fail deep inside the model.

    Raises:
        ModelError: no windows, windows longer than the model's positions, or token numbers that it does not have.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ModelError(f"calibration windows must be a matrix of tokens (windows, length), not {list(windows.shape)}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise ModelError(
            f"windows of {windows.shape[1]} tokens are longer than the model's {positions} positions; "
            f"choose --window-length {positions} or less"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary or int(windows.min()) < 0:
        raise ModelError(
            f"the text has token number {int(windows.max())}, but the model knows {vocabulary} tokens; "
            "use the model's own tokenizer"
        )


@contextmanager
def _solver_pool(linears: int) -> Iterator[Executor]:
    """Threads that solve linears side by side and divide PyTorch's threads among them.

    The solver's many small steps gain little from several threads, and on a busy machine lose far more in waiting for
    one another.
    """
    threads = torch.get_num_threads()
    workers = min(threads, linears)
    share = threads // workers
    try:
        with ThreadPoolExecutor(workers, "arbllm-solver", torch.set_num_threads, (share,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Put the layer's name before the solver's errors and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{layer}: {error}") from error
    for warning in caught:
        warnings.warn(f"{layer}: {warning.message}", warning.category, stacklevel=3)
