"""Threads that solve the linears of a block side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from arbllm.model.walk import DecoderBlock, Linear

WEIGHTS, HESSIANS = 7, 1  # float32 copies of either that the solver of a linear makes

Made = TypeVar("Made")


class Solvers:
    """Threads, each with its share of PyTorch's threads; see `solvers`."""

    def __init__(self, pool: Executor, room: Room | None) -> None:
        self._pool, self._room = pool, room

    def submit(self, linear: Linear, solve: Callable[[], Made]) -> Future[Made]:
        """Call `solve` when a thread is free, and, where memory is short, room for this linear."""
        return self._pool.submit(self._run, linear, solve)

    def _run(self, linear: Linear, solve: Callable[[], Made]) -> Made:
        with self._room.taken(solver_memory(linear)) if self._room else nullcontext():
            return solve()


class Room:
    """A number of bytes that threads share."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def solver_memory(linear: Linear) -> int:
    """Bytes that the solver of a linear (n, m) takes beside the weight and its Hessian, about."""
    rows, columns = linear.weight.shape
    return int(torch.float32.itemsize * (WEIGHTS * rows * columns + HESSIANS * columns**2))


@contextmanager
def solvers(blocks: Sequence[DecoderBlock], frugal: bool, device: torch.device) -> Iterator[Solvers]:
    """Threads that solve linears side by side and divide PyTorch's threads among them.

    The solver's many small steps gain little from several threads, and on a busy machine lose far more in waiting for
    one another. A GPU is kept busy by one thread best: several wait for the interpreter's lock at every step.

    Args:
        blocks: all that there will be to solve.
        frugal: side by side only what takes no more memory together than the largest linear alone.
        device: where they are solved.
    """
    threads = torch.get_num_threads()
    workers = min(threads, max(len(block.linears) for block in blocks)) if device.type == "cpu" else 1
    largest = max(solver_memory(linear) for block in blocks for linear in block.linears)
    try:
        with ThreadPoolExecutor(workers, "arbllm-solver", torch.set_num_threads, (threads // workers,)) as pool:
            try:
                yield Solvers(pool, Room(largest) if frugal else None)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error, what has not begun need not be done
    finally:
        torch.set_num_threads(threads)
