"""The loop over decoder blocks: capture, solve, propagate, pack."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from arbllm.binarize.methods import get_method
from arbllm.config import BinarizationConfig
from arbllm.device import peak_memory_bytes, release_memory
from arbllm.errors import ConfigError, ModelError, naming
from arbllm.factor import Factor, factorize
from arbllm.format.matrix import BinaryMatrix
from arbllm.model.capture import (
    BlockCall,
    InputGroup,
    capture_inputs,
    compute_dtype,
    gather_hessians,
    propagate,
    resident,
)
from arbllm.model.events import BlockFinished, BlockStarted, BlockTuned, Event, JobStarted, LinearQuantized, OnEvent
from arbllm.model.ranks import Ranks, assign_owners
from arbllm.model.resume import FinishedBlock, Progress
from arbllm.model.sensitivity import linear_configs
from arbllm.model.spill import spill
from arbllm.model.training import Tuning
from arbllm.model.tune import Goal, tune_block
from arbllm.model.walk import DecoderBlock, Linear, check_weights, find_blocks, replace_module
from arbllm.model.workers import Solvers, solver_memory, solvers
from arbllm.nn import BinaryLinear
from arbllm.solver import quantize_matrix

PROBED_TOKENS = 8
"""Of each of two windows, to see how the model calls its blocks."""

Solved = tuple[Linear, BinaryMatrix, LinearQuantized]


def quantize_model(
    model: PreTrainedModel,
    windows: Tensor,
    config: BinarizationConfig | None = None,
    *,
    tuning: Tuning | None = None,
    device: torch.device | str | None = None,
    on_event: OnEvent | None = None,
    progress: Progress | None = None,
    load_block: Callable[[DecoderBlock], None] | None = None,
    offload: Path | None = None,
    ranks: Ranks | None = None,
) -> list[LinearQuantized]:
    """Binarize every linear of every decoder block, in place; embeddings, norms and head stay as they are.

    >>> quantize_model(model, calibration_windows("builtin", tokenizer, windows=16))

    Blocks are taken in order. Each is calibrated on what the quantized blocks before it produce, so later blocks can
    make up for the errors of earlier ones; one block's activations and Hessians are in memory at a time. Tuning draws
    each block's output to what the dense model has there, so a second stream of activations is kept for it: of the
    first tokens of each window, where a causal model's do not depend on later ones. On a CPU, a block stored in half
    precision is computed in float32. Embeddings are to be rounded before, if at all (see
    `quantize_embeddings`), so that blocks make up for that, too.

    Args:
        model: a causal language model; it is put in evaluation mode. After an error it is left partly quantized.
        windows: calibration tokens, int64 (N, L).
        config: method and options.
        tuning: tune each block's scales and norms after it is solved; None leaves them.
        device: where to compute, one block at a time; None for where the model is.
        on_event: told of every step as it happens (see `arbllm.model.events`).
        progress: where finished blocks are kept; those that it has already are only run forward, and what was emitted
            then is emitted again. None keeps nothing.
        load_block: reads a block's weights when its turn comes, where they are not in memory (see
            `arbllm.model.stream`); bits can then not be divided as measured.
        offload: a directory for the activations, which are memory-mapped from there; None for memory.
        ranks: the processes that do this together, each calling this function with the same model and windows (see
            `arbllm.model.ranks`), and rank 0 alone with `progress`; None for this one alone.

    Returns:
        One record per linear, in the model's order.

    Raises:
        ModelError: the model does not fit this procedure, the windows do not fit the model, or a weight or an
            activation is not finite; the message names the layer.
    """
    config = config or BinarizationConfig()
    emit, ranks = on_event or _ignore, ranks or Ranks()
    blocks = find_blocks(model)
    if load_block is None:
        check_weights(blocks)
    elif config.bits is not None and config.allocation == "measured":
        raise ConfigError("allocation 'measured' needs the whole model in memory; choose uniform for a streamed model")
    else:
        load_block(blocks[0])
    check_windows(model, windows)
    device = torch.device(device) if device is not None else blocks[0].linears[0].weight.device
    emit(_job_started(blocks))
    model.eval()
    capture_inputs(model, blocks, windows[:2, :PROBED_TOKENS], device)  # refuses a model before much is done for it
    configs = ranks.told(partial(linear_configs, model, blocks, windows, config, device, progress))
    last = ranks.told(partial(_last_unfinished, blocks, progress))  # activations are needed as far as there
    windows = ranks.share(windows)
    hidden, calls = capture_inputs(model, blocks, windows, device)
    goals: list[Goal | None] = [None] * len(calls)
    if tuning:
        dense = spill(hidden[:, : tuning.length], offload) if offload else hidden[:, : tuning.length].clone()
        shorter = capture_inputs(model, blocks, windows[:1, : tuning.length], device)[1]
        goals = [Goal(dense, call) for call in shorter]
    hidden = spill(hidden, offload) if offload else hidden
    results: list[LinearQuantized] = []
    total = len(blocks)
    with solvers(blocks, frugal=load_block is not None, device=device) as pool:
        for call, goal in zip(calls, goals, strict=True):
            # Popped, so that nothing but the job holds the dense weights: they are free when it ends.
            if load_block is not None:
                load_block(blocks[0])
            job = _BlockJob(model, blocks.pop(0), total, last, device, configs, tuning, emit, pool, ranks, progress)
            results += job.run(call, hidden, goal)
    return results


@dataclass(frozen=True)
class _BlockJob:
    """One decoder block's share of the work."""

    model: PreTrainedModel
    block: DecoderBlock
    blocks: int
    last: int
    device: torch.device
    configs: Mapping[str, BinarizationConfig]
    tuning: Tuning | None
    on_event: OnEvent
    pool: Solvers
    ranks: Ranks
    progress: Progress | None = None
    events: list[Event] = field(default_factory=list)

    def run(self, call: BlockCall, hidden: Tensor, goal: Goal | None) -> list[LinearQuantized]:
        """Quantize the block, or take what was made of it before, and turn its inputs into its outputs in place.

        The inputs are `hidden` (N, L, d); they stay as they are where no later block needs them. Tuned by the `goal`,
        which moves on to the next block as well.
        """
        home = self.block.linears[0].weight.device
        stored = {linear: linear.weight.dtype for linear in self.block.linears}
        call = call.to(self.device)
        done = self.ranks.told(lambda: self.progress.block(self.block.index) if self.progress else None)
        if done is not None:
            return self._repeat(done, home, call, hidden, goal)
        self.emit(BlockStarted(self.block.index, self.blocks))
        laps = [self._now()]
        with resident(self.block.module, self.device):
            others = self._other_parameters()
            if goal:
                goal.propagate(self.block, self.device)
            groups = gather_hessians(self.block, call, hidden)
            for linear, dtype in stored.items():  # the solver takes one after the other to float32
                linear.set_weight(linear.weight.to(dtype))
            laps.append(self._lap())
            solved = self._solve(groups)
            self._drop_weights()
            laps.append(self._lap())
            if goal:
                solved = self._tune(solved, hidden, goal)
            laps.append(self._lap())
            matrices = {linear: matrix for linear, matrix, _ in solved}
            self._advance(matrices, call, hidden)
            laps.append(self._lap())
            self._pack(matrices, home)
            # As it computed, before it goes back to the dtype that it is stored in: a repetition must do the same.
            kept = {name: parameter.detach().clone() for name, parameter in others.items()}
        start, captured, finished, tuned, propagated = laps
        event = BlockFinished(
            self.block.index,
            self.blocks,
            seconds=self._now() - start,
            capture_seconds=captured - start,
            solve_seconds=finished - captured,
            tune_seconds=tuned - finished,
            propagate_seconds=propagated - tuned,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )
        if self.progress:
            named = {linear.name: matrix for linear, matrix in matrices.items()}
            self.progress.keep_block(self.block.index, FinishedBlock(named, kept, (*self.events, event)))
        self.emit(event)
        return [record for _, _, record in solved]

    def emit(self, event: Event) -> None:
        """Tell of an event, and remember it."""
        self.events.append(event)
        self.on_event(event)

    def _repeat(
        self, done: FinishedBlock, home: torch.device, call: BlockCall, hidden: Tensor, goal: Goal | None
    ) -> list[LinearQuantized]:
        """`run` for a block that is finished: forward alone, by the same steps."""
        for event in done.events:
            self.emit(event)
        with resident(self.block.module, self.device), torch.no_grad():
            if goal and self.block.index < self.last:
                goal.propagate(self.block, self.device)
            for name, parameter in self._other_parameters().items():
                parameter.copy_(done.others[name])
            matrices = {
                linear: done.matrices[linear.name].map(lambda tensor: tensor.to(self.device))
                for linear in self.block.linears
            }
            self._advance(matrices, call, hidden)
            self._pack(matrices, home)
        return [event for event in done.events if isinstance(event, LinearQuantized)]

    def _other_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters but the weights of the linears, by their names in the block; tuning changes them in place."""
        weights = {linear.module.weight for linear in self.block.linears}
        return {name: each for name, each in self.block.module.named_parameters() if each not in weights}

    def _drop_weights(self) -> None:
        """Let go of the dense weights, which nothing asks for once they are solved."""
        for linear in self.block.linears:
            linear.set_weight(linear.weight.new_empty(0, 0))

    def _advance(self, matrices: Mapping[Linear, BinaryMatrix], call: BlockCall, hidden: Tensor) -> None:
        """Run the block with its new weights, where a later block needs what it puts out."""
        if self.block.index >= self.last:
            return
        for linear, matrix in matrices.items():
            linear.set_weight(matrix.dequantize(compute_dtype(linear.weight.dtype, self.device)))
            replace_module(self.model, linear.name, linear.module)
        propagate(self.block, call, hidden)

    def _pack(self, matrices: Mapping[Linear, BinaryMatrix], home: torch.device) -> None:
        """Put packed linears in the place of the dense ones."""
        for linear, matrix in matrices.items():
            here = matrix.map(lambda tensor: tensor.to(home))
            packed = BinaryLinear.from_matrix(here, linear.module.bias, linear.transposed)
            replace_module(self.model, linear.name, packed)

    def _solve(self, groups: list[InputGroup]) -> list[Solved]:
        """Binarize all linears, those with the same input by one factorisation; emits them in the block's order.

        The groups are used up: of a Hessian, nothing is left when the last linear that reads it is solved.
        """
        owners = assign_owners(groups, self.ranks.count)
        factors: dict[Linear, Factor] = {}
        mine = self.ranks.sum_hessians(groups, owners)
        self._tell_unseen(groups)
        groups.clear()
        while mine:
            group = mine.pop(0)
            with _named(group.linears[0].name):
                config = self.configs[group.linears[0].name]
                joint = get_method(config.method).joint
                factor = factorize(group.trusted(), config.damping, group.sampling_error if joint else 0.0)
                factors |= dict.fromkeys(group.linears, factor.without_upper() if joint else factor)
                del factor, group
        futures: dict[Linear, Future[tuple[BinaryMatrix, float]]] = {}
        for linear in sorted(factors, key=solver_memory, reverse=True):
            futures[linear] = self.pool.submit(linear, partial(self._solve_linear, linear, factors.pop(linear)))

        def result(linear: Linear) -> tuple[BinaryMatrix, float]:
            return futures[linear].result()

        solved = []
        for linear in self.block.linears:
            matrix, seconds = self.ranks.told(partial(result, linear), owners[linear])
            matrix = matrix.map(lambda tensor: tensor.to(self.device))
            record = self._record(linear, matrix, seconds)
            self.emit(record)
            solved.append((linear, matrix, record))
        return solved

    def _tell_unseen(self, groups: list[InputGroup]) -> None:
        """Warn of experts that no token came to, whose weights are all that the solver has to go by."""
        tokens = torch.tensor([group.tokens for group in groups], dtype=torch.float32)
        self.ranks.average([tokens])
        names = [group.linears[0].name.rpartition(".")[0] for group in groups]
        unseen = list(dict.fromkeys(name for name, count in zip(names, tokens, strict=True) if not count))
        if unseen and self.ranks.rank == 0:
            warnings.warn(
                f"{self.block.name}: no token of the calibration text came to {len(unseen)} of its experts (the first "
                f"is {unseen[0]}), which are quantized by their weights alone; calibrate on more windows or other text",
                stacklevel=2,
            )

    def _tune(self, solved: list[Solved], hidden: Tensor, goal: Goal) -> list[Solved]:
        assert self.tuning
        start = self._now()
        matrices = {linear: matrix for linear, matrix, _ in solved}
        call, begin = goal.call.to(self.device), hidden[:, : self.tuning.length]
        tuned = tune_block(self.block, call, begin, goal.states, matrices, self.tuning, self.ranks)
        seconds = self._now() - start
        self.emit(BlockTuned(self.block.index, self.blocks, tuned.before, tuned.after, tuned.steps, seconds))
        return [(linear, tuned.matrices[linear], record) for linear, _, record in solved]

    def _solve_linear(self, linear: Linear, factor: Factor) -> tuple[BinaryMatrix, float]:
        start = self._now()
        try:
            matrix = quantize_matrix(linear.weight, factor.hessian, self.configs[linear.name], factor=factor)
        except ModelError as error:
            raise ModelError(f"{linear.name}: {error}") from error
        release_memory()
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

    def _lap(self) -> float:
        """`_now`, at the end of a stage, whose memory goes back to the system."""
        release_memory()
        return self._now()


def _ignore(_: object) -> None:
    pass


def _last_unfinished(blocks: list[DecoderBlock], progress: Progress | None) -> int:
    """The number of the last block that is still to be quantized; -1 for none."""
    unfinished = [block.index for block in blocks if progress is None or progress.block(block.index) is None]
    return max(unfinished, default=-1)


def _job_started(blocks: list[DecoderBlock]) -> JobStarted:
    linears = [linear for block in blocks for linear in block.linears]
    return JobStarted(len(blocks), len(linears), sum(linear.weight.numel() for linear in linears))


def check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    """Refuse windows that would fail deep inside the model.

    Raises:
        ModelError: no windows, windows longer than the model's positions, or token numbers that it does not have.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ModelError(f"calibration windows must be a matrix of tokens (windows, length), not {list(windows.shape)}")
    check_length(model.config, windows.shape[1])
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary or int(windows.min()) < 0:
        raise ModelError(
            f"the text has token number {int(windows.max())}, but the model knows {vocabulary} tokens; "
            "use the model's own tokenizer"
        )


def check_length(config: PretrainedConfig, length: int) -> None:
    """Refuse windows of more tokens than the model has positions.

    Raises:
        ModelError: they are longer.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ModelError(
            f"windows of {length} tokens are longer than the model's {positions} positions; "
            f"choose --window-length {positions} or less"
        )


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Put the layer's name before the solver's errors and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with naming(layer):
            yield
    for warning in caught:
        warnings.warn(f"{layer}: {warning.message}", warning.category, stacklevel=3)
