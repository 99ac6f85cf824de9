"""What several processes spend on a decoder block, and from it the time of LLaMA-2-70B on 1, 8 and 64 GPUs.

    python benchmarks/scaling.py          # measures blocks of a sixteenth and an eighth of its width
    python benchmarks/scaling.py --page   # also writes docs/scaling.md

Computing is measured in one process with one thread, by processor time, which others on the machine do not add to.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from arbllm.config import BinarizationConfig
from arbllm.factor import factorize
from arbllm.format.matrix import BinaryMatrix
from arbllm.model.capture import STRIPS, InputGroup, capture_inputs, gather_hessians, propagate
from arbllm.model.events import BlockFinished, Event
from arbllm.model.quantize import quantize_model
from arbllm.model.ranks import ManyRanks, assign_owners, solve_cost
from arbllm.model.training import CHECKS, Tuning
from arbllm.model.tune import HELD_OUT_SHARE, tune_block
from arbllm.model.walk import Linear, find_blocks
from arbllm.solver import quantize_matrix
from make_random_model import SHAPES
from memory import EnoughError
from ranks import run_ranks
from solver import ROOT, Rows, as_markdown, as_table

PAGE = ROOT / "docs" / "scaling.md"
LARGE = SHAPES["llama-70b"]
SMALL = {**LARGE, "num_attention_heads": 8, "num_key_value_heads": 1}
WIDTHS = (512, 1024)
BITS = BinarizationConfig().bits or 0.0
WINDOWS, LENGTH = 128, 2048
COUNTS = (2, 4)
GPUS = (1, 8, 64)
GPUS_OF_A_MACHINE = 8
PRODUCT = 1024  # rows of the square matrices whose product is the measure of a processor
STRIP_SHARE = (STRIPS + 1) / (2 * STRIPS)  # of a Hessian that is computed rather than mirrored
FORWARD, CAPTURE, SOLVE, TUNE = "a forward pass", "Hessians", "solving", "tuning"
HESSIANS, TOLD, GRADIENTS = "Hessians, summed", "packed linears, told", "gradients and losses, averaged"

_PAGE = """\
# Scaling

What several processes spend on a decoder block, and a **prediction** of what LLaMA-2-70B would take by it. Nothing
below was measured on a GPU, and the path by which GPUs sum Hessians (NCCL) has not been run.

## What a block takes to compute

A block of LLaMA-2-70B at a sixteenth and at an eighth of its width, {windows} windows of {length} tokens, by one thread
of a CPU, in its processor time. Operations are counted by formulas: 2 for each weight and token of a forward pass,
three times that forward and backward; 2 for each token and entry of a Hessian at or above its diagonal, strips
included; to solve a linear (n, m), n m^2. The last column is operations a second, in units of what a product of two
1024 x 1024 matrices reached in the same run.

{steps}

## What ranks send

The wider block, quantized by processes of one machine that gloo connects, each operation timed from when all ranks have
come to it. Bytes are those that each rank puts in or takes out; how many of them cross a wire is the affair of the
library, for a sum in a ring about one time or two times of them. The seconds are wall-clock time on a machine that
did other work as well: bounds from above.

{traffic}

Hessians are float32, one for each distinct input (q, k and v share theirs; so do gate and up): they grow with the
square of the width and not with the number of windows. Packed linears take {bits} bits a weight.

## LLaMA-2-70B, predicted

128 windows of 2048 tokens, arb-rcx at {bits} bits, tuned by 40 steps, streamed, bits divided uniformly.

{prediction}

What is assumed:

- Each step reaches the same share of the rate of a matrix product as it did above at the greater width: {half} Tflop/s
  in bfloat16 (forward passes, tuning), {single} Tflop/s in float32 (Hessians, solving), about an H100 in practice.
- Within a machine of 8 GPUs each sends {within} GB/s; with 64 GPUs, to other machines, {between} GB/s. Packed linears
  are told at {told} GB/s.
- A machine reads {disk} GB/s of weights; its ranks read the same ones, which the system keeps in memory.
- Nothing waits but for the steps above, which follow one another. Left out: the first pass through the embedding, the
  attention of tokens to each other, factorising the Hessians, dequantizing, and writing.

Solving is the least certain part. From the smaller width to the greater its share rises in the first table, since much
of it is not products of matrices; should that go on, it takes less than predicted.

Forward passes and Hessians shrink with the number of GPUs. Solving shrinks as far as linears can be divided: a block
has seven, of which three (gate, up, down) are most of the work, so more than a few owners do not help. Tuning hardly
shrinks, since steps follow one another: only the windows that check it are divided. Both are nearly the same for 8
GPUs as for 64: beyond one machine the gain is in windows, not in time.

`python benchmarks/scaling.py --page` writes this page.
"""


@dataclass(frozen=True)
class Machine:
    """What is assumed of GPUs and of what lies between them; about an H100 in a machine of eight.

    Attributes:
        half: products of matrices in bfloat16, operations a second, as they are reached.
        single: the same in float32.
        within: bytes a second that a GPU sends to others of its machine.
        between: the same to other machines.
        told: bytes a second of what is told by gloo.
        disk: bytes a second at which a machine reads weights.
    """

    half: float = 400e12
    single: float = 40e12
    within: float = 200e9
    between: float = 20e9
    told: float = 1e9
    disk: float = 2e9


@dataclass(frozen=True)
class Step:
    """One step of a block, measured.

    Attributes:
        operations: what it takes by its formula.
        seconds: processor time.
        share: operations a second, in units of what a product of matrices reaches.
    """

    operations: float
    seconds: float
    share: float


class CountingRanks(ManyRanks):
    """Counts bytes and seconds of what ranks do together, once all of them have come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def _sum(self, tensor: Tensor, ranks: set[int] | None = None) -> None:
        self._count(GRADIENTS if ranks is None else HESSIANS, tensor, partial(super()._sum, tensor, ranks))

    def _broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        self._count(TOLD, tensor, partial(super()._broadcast, tensor, owner))
        return tensor

    def _count(self, kind: str, tensor: Tensor, operation: Callable[[], object]) -> None:
        dist.barrier()
        start = time.perf_counter()
        operation()
        self.seconds[kind] += time.perf_counter() - start
        self.nbytes[kind] += tensor.nbytes


def small_model(width: int) -> LlamaForCausalLM:
    """Two blocks, random, the same each time."""
    torch.manual_seed(0)
    inner = width * LARGE["intermediate_size"] // LARGE["hidden_size"]
    shape = {**SMALL, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **shape)).eval()


def measure_steps(width: int, windows: int, length: int) -> dict[str, Step]:
    """What a block takes to compute, in this process."""
    torch.set_num_threads(1)
    model, tokens = small_model(width), torch.randint(256, (windows, length))
    block = find_blocks(model)[0]
    hidden, calls = capture_inputs(model, [block], tokens, torch.device("cpu"))
    weights = sum(linear.weight.numel() for linear in block.linears)
    targets = hidden.clone()
    forward = _processor_time(partial(propagate, block, calls[0], targets))
    groups: list[InputGroup] = []
    both = _processor_time(lambda: groups.extend(gather_hessians(block, calls[0], hidden)))
    matrices: dict[Linear, BinaryMatrix] = {}
    solve = _processor_time(lambda: matrices.update(_solve(groups)))
    # With two steps it stops early at no time: twice forward and backward, and three times forward alone to check.
    tune = partial(tune_block, block, calls[0], hidden[:2], targets[:2], matrices, Tuning(steps=2))
    operations = {
        FORWARD: 2.0 * weights * windows * length,
        CAPTURE: 2.0 * STRIP_SHARE * windows * length * sum(len(group.hessian) ** 2 for group in groups),
        SOLVE: float(sum(map(solve_cost, block.linears))),
        TUNE: 2.0 * weights * length * (2 * 3 + 3),
    }
    seconds = {FORWARD: forward, CAPTURE: both - forward, SOLVE: solve, TUNE: _processor_time(tune)}
    rate = _product_rate()
    return {name: Step(operations[name], seconds[name], operations[name] / seconds[name] / rate) for name in operations}


def _solve(groups: list[InputGroup]) -> dict[Linear, BinaryMatrix]:
    matrices = {}
    for group in groups:
        factor = factorize(group.hessian, shrinkage=group.sampling_error)
        for linear in group.linears:
            matrices[linear] = quantize_matrix(linear.weight, group.hessian, factor=factor)
    return matrices


def _product_rate() -> float:
    """Operations a second of a product of square matrices in float32."""
    left = torch.randn(PRODUCT, PRODUCT)
    return 2 * PRODUCT**3 / min(_processor_time(lambda: left @ left) for _ in range(5))


def _processor_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_traffic(width: int, windows: int, length: int) -> tuple[Mapping[str, int], Mapping[str, float]]:
    """Bytes that a rank gives to each kind of common operation in a block, and the seconds that they take.

    To be called by every rank.
    """
    ranks = CountingRanks()
    tokens = torch.randint(256, (windows, length), generator=torch.Generator().manual_seed(0))

    def listen(event: Event) -> None:
        if isinstance(event, BlockFinished):
            raise EnoughError

    config = BinarizationConfig(allocation="uniform")
    with suppress(EnoughError):
        quantize_model(small_model(width), tokens, config, tuning=Tuning(), on_event=listen, ranks=ranks)
    return dict(ranks.nbytes), dict(ranks.seconds)


def large_groups() -> list[InputGroup]:
    """The linears of a block of LLaMA-2-70B, without weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **{**LARGE, "num_hidden_layers": 1}))
        named = {linear.name.rpartition(".")[2]: linear for linear in find_blocks(model)[0].linears}
        members = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
        return [
            InputGroup(tuple(named[name] for name in names), torch.empty((named[names[0]].weight.shape[1],) * 2), 1)
            for names in members
        ]


def predict(gpus: int, steps: Mapping[str, Step], machine: Machine) -> dict[str, float]:
    """Seconds of each step of a block of LLaMA-2-70B, each reaching the same share of a product's rate as measured."""
    groups, tuning = large_groups(), Tuning()
    linears = [linear for group in groups for linear in group.linears]
    weights = sum(linear.weight.numel() for linear in linears)
    windows = ceil(WINDOWS / gpus)
    owners = assign_owners(groups, gpus)
    busiest = max(sum(solve_cost(linear) for linear in linears if owners[linear] == rank) for rank in range(gpus))
    inputs = sum(len(group.hessian) ** 2 for group in groups)
    checked = max(1, windows // HELD_OUT_SHARE) * (CHECKS + 1)
    half = {name: machine.half * step.share for name, step in steps.items()}
    single = {name: machine.single * step.share for name, step in steps.items()}
    return {
        "reading the weights": 2 * weights / machine.disk,
        "three forward passes": 3 * 2 * weights * windows * LENGTH / half[FORWARD],
        "Hessians": 2 * STRIP_SHARE * windows * LENGTH * inputs / single[CAPTURE],
        "summing them": _sum_seconds(groups, owners, gpus, machine),
        "solving": busiest / single[SOLVE],
        "telling the result": BITS / 8 * weights / machine.told if gpus > 1 else 0.0,
        "tuning": 2 * weights * tuning.length * (3 * tuning.steps + checked) / half[TUNE],
    }


def _sum_seconds(groups: list[InputGroup], owners: Mapping[Linear, int], gpus: int, machine: Machine) -> float:
    """A sum for one owner moves a Hessian once, one for several owners twice."""
    rate = machine.within if gpus <= GPUS_OF_A_MACHINE else machine.between
    times = (2 if len({owners[linear] for linear in group.linears}) > 1 else 1 for group in groups)
    nbytes = sum(4 * len(group.hessian) ** 2 * each for group, each in zip(groups, times, strict=True))
    return nbytes * (gpus - 1) / gpus / rate


def step_rows(measured: Mapping[int, Mapping[str, Step]]) -> Rows:
    """The table of what was computed."""
    return [
        (name, str(width), f"{step.operations / 1e9:.1f}", f"{step.seconds:.2f}", f"{step.share:.3f}")
        for width, steps in measured.items()
        for name, step in steps.items()
    ]


def traffic_rows(measured: Mapping[int, tuple[Mapping[str, int], Mapping[str, float]]]) -> Rows:
    """The table of what went to and fro."""
    return [
        (kind, *(f"{nbytes[kind] / 1e6:.2f} MB, {seconds[kind]:.3f} s" for nbytes, seconds in measured.values()))
        for kind in (HESSIANS, TOLD, GRADIENTS)
    ]


def prediction_rows(predicted: Mapping[int, Mapping[str, float]]) -> Rows:
    """The table of seconds a block, and the whole model's minutes."""
    blocks = LARGE["num_hidden_layers"]
    rows: Rows = [
        (name, *(f"{seconds[name]:.2f}" for seconds in predicted.values())) for name in next(iter(predicted.values()))
    ]
    rows.append(("a block, s", *(f"{sum(seconds.values()):.1f}" for seconds in predicted.values())))
    rows.append(("the model, min", *(f"{blocks * sum(seconds.values()) / 60:.0f}" for seconds in predicted.values())))
    return rows


def main() -> None:
    """Measure, print, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--page", action="store_true", help="also write docs/scaling.md")
    options = parser.parse_args()
    shape = options.windows, options.window_length
    traffic = {count: run_ranks(count, partial(measure_traffic, WIDTHS[-1], *shape))[0] for count in COUNTS}
    steps = {width: measure_steps(width, *shape) for width in WIDTHS}
    machine = Machine()
    tables = {
        "steps": (
            ("step", "width", "billion operations", "processor time, s", "share of a product's rate"),
            step_rows(steps),
        ),
        "traffic": (("a rank, a block", *(f"{count} ranks" for count in COUNTS)), traffic_rows(traffic)),
        "prediction": (
            ("LLaMA-2-70B, s a block", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)),
            prediction_rows({gpus: predict(gpus, steps[WIDTHS[-1]], machine) for gpus in GPUS}),
        ),
    }
    console = Console(width=120)
    for headings, rows in tables.values():
        console.print(as_table(headings, rows))
    if options.page:
        written = {name: as_markdown(headings, rows) for name, (headings, rows) in tables.items()}
        figures = {name: f"{getattr(machine, name) / 1e12:.0f}" for name in ("half", "single")}
        figures |= {name: f"{getattr(machine, name) / 1e9:.0f}" for name in ("within", "between", "told", "disk")}
        text = _PAGE.format(**written, **figures, windows=options.windows, length=options.window_length, bits=BITS)
        PAGE.write_text(text)
        console.print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
