"""One job by several processes, each on a GPU or on a share of the CPU: `torchrun ... -m arbllm quantize`.

Every process (a rank) opens the model and takes the same steps, on its share of the calibration windows. They meet at:

- what is on the disk or follows from the whole model (text, how bits are divided, finished blocks): rank 0 tells it;
- the Hessians of a block: summed at the ranks that own its linears, which solve them side by side and tell the result;
- tuning: each step takes a window of every rank and the mean of their gradients.

Rank 0 alone writes and shows progress. What is told is told exactly, and sums are taken in a fixed order, so that all
ranks go on with the same weights, and the same number of ranks makes the same checkpoint again.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from arbllm.errors import ConfigError, ModelError, RankError
from arbllm.model.capture import InputGroup
from arbllm.model.walk import Linear

PATIENCE = timedelta(hours=6)
"""How long a rank waits for another, which may solve, distil or evaluate alone meanwhile.

A process that ends is noticed at once; this is for one that hangs.
"""

MEETING = timedelta(minutes=10)
"""How long ranks look for each other in the beginning."""

Made = TypeVar("Made")


class Ranks:
    """A process that has the job to itself: it keeps every window, owns every linear, and need not be told anything.

    Attributes:
        rank: its number, from 0.
        count: how many processes there are.
    """

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, windows: Tensor) -> Tensor:
        """The windows of this rank, of all the windows (N, L).

        Raises:
            ConfigError: there are fewer windows than ranks.
        """
        if len(windows) < self.count:
            raise ConfigError(f"{len(windows)} windows are too few for {self.count} processes; use more (--windows)")
        return windows.tensor_split(self.count)[self.rank]

    def told(self, make: Callable[[], Made], owner: int = 0) -> Made:
        """What `make` returns at rank `owner`, on every rank; it is called there alone. Tensors arrive on the CPU."""
        return make()

    def check_same(self, value: Any, name: str) -> None:
        """Compare a value with that of rank 0.

        Raises:
            ModelError: it is another; names it.
        """
        if self.told(lambda: value) != value:
            raise ModelError(f"rank {self.rank}: its {name} differ from those of rank 0; give all ranks the same")

    def sum_hessians(self, groups: Sequence[InputGroup], owners: Mapping[Linear, int]) -> list[InputGroup]:
        """The linears that this rank owns, with Hessians over the windows of all ranks.

        Args:
            groups: all linears of a block, with Hessians over the windows of this rank, which are used up.
            owners: the rank of each linear (see `assign_owners`).
        """
        return list(groups)

    def mean(self, value: float) -> float:
        """The mean over all ranks of a number."""
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all ranks, in place."""


class ManyRanks(Ranks):
    """One process of several, which `torch.distributed` connects.

    A collective operation fails with `RankError` when another process has ended, or hangs for longer than `PATIENCE`.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def told(self, make: Callable[[], Made], owner: int = 0) -> Made:
        """See `Ranks`."""
        if self.rank == owner:
            value = make()
            octets = _to_octets(value)
            self._broadcast(torch.tensor([octets.numel()]), owner)
            self._broadcast(octets, owner)
            return value
        size = self._broadcast(torch.zeros(1, dtype=torch.int64), owner)
        return _from_octets(self._broadcast(torch.empty(int(size), dtype=torch.uint8), owner))

    def sum_hessians(self, groups: Sequence[InputGroup], owners: Mapping[Linear, int]) -> list[InputGroup]:
        """See `Ranks`."""
        self.check_same([[linear.name for linear in group.linears] for group in groups], "inputs of linears")
        tokens = torch.tensor([group.tokens for group in groups])
        self._sum(tokens)
        mine = []
        for group, total in zip(groups, tokens.tolist(), strict=True):
            group.hessian.mul_(group.tokens / max(total, 1))
            self._sum(group.hessian, {owners[linear] for linear in group.linears})
            linears = tuple(linear for linear in group.linears if owners[linear] == self.rank)
            if linears:
                mine.append(InputGroup(linears, group.hessian, total))
        return mine

    def mean(self, value: float) -> float:
        """See `Ranks`."""
        total = torch.tensor([value], dtype=torch.float64)
        self._sum(total)
        return float(total) / self.count

    def average(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks`."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._sum(flat)
        for tensor, mean in zip(tensors, (flat / self.count).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def _sum(self, tensor: Tensor, ranks: set[int] | None = None) -> None:
        """Sum a tensor over all ranks, in place; only some `ranks` may need it, and elsewhere it is then undefined."""
        with self._together():
            if ranks is not None and len(ranks) == 1:
                dist.reduce(tensor, min(ranks))
            else:
                dist.all_reduce(tensor)

    def _broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        with self._together():
            dist.broadcast(tensor, owner)
        return tensor

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Name what has happened where a collective operation fails: none does but for want of another process."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _alone(self.rank) from error


def solve_cost(linear: Linear) -> int:
    """What a linear (n, m) takes to solve, n m^2, in units of its own."""
    rows, columns = linear.weight.shape
    return int(rows * columns**2)


def assign_owners(groups: Sequence[InputGroup], count: int) -> dict[Linear, int]:
    """Divide the linears of a block among ranks: the dearest first, each to the rank that has least to do.

    Linears that share an input may have several owners, all of which are then given its Hessian: to factorise it costs
    little beside the solving.

    Args:
        groups: all linears of the block.
        count: ranks.

    Returns:
        The rank of each linear.
    """
    loads = [0] * count
    owners: dict[Linear, int] = {}
    for linear in sorted((linear for group in groups for linear in group.linears), key=solve_cost, reverse=True):
        owners[linear] = loads.index(min(loads))
        loads[owners[linear]] += solve_cost(linear)
    return owners


def is_first_process() -> bool:
    """Whether this process is rank 0 of those that torchrun has started, or there are no others."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of the GPUs of a machine, each of its processes takes one.

    Raises:
        ConfigError: the machine has more processes than GPUs.
    """
    if device != torch.device("cuda") or _launched() == 1:
        return device
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"--nproc-per-node: there are more processes than the {torch.cuda.device_count()} GPUs of this machine; "
            "start as many as there are, or pass --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that do this job: those that torchrun has started, or this one.

    Where `torch.distributed` is in use already, it is used as it is; it must then take tensors of the CPU, too.

    Args:
        device: where this process computes; Hessians on GPUs are summed by NCCL, all else by gloo.

    Raises:
        RankError: another process has ended, or torchrun stops this one since another has.
    """
    if dist.is_available() and dist.is_initialized():
        yield ManyRanks() if dist.get_world_size() > 1 else Ranks()
        return
    if _launched() == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, count = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"the processes of this job cannot find each other ({error}); start them by torchrun"
        ) from error
    try:
        with _heeding_torchrun():
            ranks = ManyRanks()
            yield ranks
            ranks.mean(0.0)  # nobody leaves before all have come to the end
    finally:
        dist.destroy_process_group()


def _launched() -> int:
    """Processes that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _alone(rank: int) -> RankError:
    return RankError(
        f"rank {rank}: another process of this job has ended, or does not answer; its own message says why. The same "
        "command goes on from the last finished block"
    )


@contextmanager
def _heeding_torchrun() -> Iterator[None]:
    """Turn the signal by which torchrun stops a process when another has failed into an error that says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def ignore_once(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)

    def stop(*_: object) -> None:
        # Who has noticed a broken connection before is not to be disturbed in what it tells and clears away.
        if not isinstance(sys.exc_info()[1], RankError):
            raise _alone(dist.get_rank())

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except RankError:
        # A broken connection is noticed before torchrun's signal comes, and is to be told all the same.
        signal.signal(signal.SIGTERM, ignore_once)
        raise
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    signal.signal(signal.SIGTERM, before)


def _to_octets(value: Any) -> Tensor:
    """Any value as bytes, uint8."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _from_octets(octets: Tensor) -> Any:
    """What `_to_octets` was given, its tensors on the CPU. It comes from a process of the same job."""
    return torch.load(io.BytesIO(octets.numpy().tobytes()), map_location="cpu", weights_only=False)
