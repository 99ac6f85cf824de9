"""Small jobs by several processes on the CPU, which meet in a file instead of by torchrun.

Processes come from a server that has imported everything and computed nothing, so that they start at once.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import arbllm
from arbllm.errors import ArbllmError
from arbllm.model import quantize

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["arbllm.pipeline", "transformers.models.llama.modeling_llama"])
JOB = {"calibration": "builtin", "windows": 9, "window_length": 64, "device": "cpu", "evaluate": "builtin"}


def run_ranks(count: int, work: Callable[[int], object], directory: Path) -> list[Any]:
    """Call `work` with its rank in each of `count` processes.

    Returns:
        For each rank what it returned, the error that it raised, or None where it was killed.
    """
    meeting = directory / "meeting"
    meeting.unlink(missing_ok=True)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
    processes = [
        CONTEXT.Process(target=_be_rank, args=(rank, count, meeting, work, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    return [_received(receiver) for receiver, _ in pipes]


def _received(receiver) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        return None


def _be_rank(rank: int, count: int, meeting: Path, work: Callable[[int], object], sender) -> None:
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": count, "timeout": timedelta(minutes=10)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", **options)
    try:
        sender.send(work(rank))
    except ArbllmError as error:
        sender.send(error)
    dist.destroy_process_group()


def quantize_tiny(dense: Path, out: Path, options: dict, rank: int = 0) -> dict:
    """Quantize a tiny model; what the summary says."""
    config = arbllm.BinarizationConfig(iterations=2)
    summary = arbllm.quantize(dense, out, **{"config": config, "tune": 4, **JOB, **options})
    return asdict(summary)


def quantize_tiny_until(block: int, victim: int, dense: Path, out: Path, options: dict, rank: int) -> dict:
    """The same, but rank `victim` is killed when block `block` is to be solved."""
    solve = quantize._BlockJob._solve

    def solve_or_die(job, groups):
        if job.block.index == block and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(job, groups)

    quantize._BlockJob._solve = solve_or_die  # type: ignore[method-assign]
    return quantize_tiny(dense, out, options)


def quantize_one_of(models: tuple[Path, ...], out: Path, rank: int) -> dict:
    """Each rank another model."""
    return quantize_tiny(models[rank], out, {})


def job(dense: Path, out: Path, **options) -> Callable[[int], object]:
    """`quantize_tiny` for `run_ranks`."""
    return partial(quantize_tiny, dense, out, options)
