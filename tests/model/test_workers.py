import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

from arbllm.model.walk import DecoderBlock, Linear
from arbllm.model.workers import Room, solver_memory, solvers


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def block(*shapes: tuple[int, int]) -> DecoderBlock:
    linears = [Linear(f"{rows}", nn.Linear(columns, rows, device="meta"), False) for rows, columns in shapes]
    return DecoderBlock(0, "block", nn.Module(), tuple(linears))


class Crowd:
    """Counts the linears that are being solved, and the most memory that they take together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = self.memory = self.most_memory = 0

    def solve(self, linear: Linear) -> str:
        self._change(1, solver_memory(linear))
        time.sleep(0.02)
        self._change(-1, -solver_memory(linear))
        return linear.name

    def _change(self, count: int, memory: int) -> None:
        with self._lock:
            self.now, self.memory = self.now + count, self.memory + memory
            self.most, self.most_memory = max(self.most, self.now), max(self.most_memory, self.memory)


@pytest.mark.parametrize("frugal", [False, True])
def test_memory_of_the_largest_is_enough_where_it_is_short(frugal):
    blocks = [block((8, 100), (70, 8), (71, 8), (9, 8), (10, 8))]
    largest = max(map(solver_memory, blocks[0].linears))
    crowd = Crowd()
    with solvers(blocks, frugal, torch.device("cpu")) as pool:
        futures = {linear: pool.submit(linear, partial(crowd.solve, linear)) for linear in blocks[0].linears}
        assert all(future.result() == linear.name for linear, future in futures.items())
    assert crowd.most > 1
    assert (crowd.most_memory <= largest) == frugal
    assert torch.get_num_threads() == 4


def test_room_is_given_back_after_an_error():
    room = Room(10)
    with pytest.raises(ValueError, match="wrong"), room.taken(10):
        raise ValueError("wrong")
    with room.taken(4), room.taken(6):
        pass


def test_an_error_reaches_whoever_asks_for_the_result():
    blocks = [block((8, 8))]

    def fail() -> None:
        raise ValueError("wrong")

    with solvers(blocks, frugal=True, device=torch.device("cpu")) as pool, pytest.raises(ValueError, match="wrong"):
        pool.submit(blocks[0].linears[0], fail).result()
