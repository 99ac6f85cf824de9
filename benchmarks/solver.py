"""Output error and time of every method on three real matrices, beside the paper's reference implementation; Theorem 2.

    python benchmarks/solver.py [--data ../shared/data] [--repeats 3]

Single-threaded. The matrices, their Hessians and the reference's figures are read from DATA/reference.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from arbllm.config import BinarizationConfig
from arbllm.solver import quantize_matrix

Result = TypeVar("Result")

CASES = {
    "braq": ("billm", "column+group"),
    "arb": ("arb", "column+group"),
    "arb+cgb": ("arb", "cgb"),
    "arb-x+cgb": ("arb-x", "cgb"),
    "arb-rc": ("arb-rc", "column+group"),
    "arb-rc+cgb": ("arb-rc", "cgb"),
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--repeats", type=int, default=3, help="the median time of so many runs is printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=150)
    console.print(matrices_table(options.data / "reference", options.repeats))
    console.print(theorem_2_table(options.repeats))


def matrices_table(folder: Path, repeats: int) -> Table:
    """Faithful mode against the reference, and the defaults, for each matrix and method."""
    figures = json.loads((folder / "reference.json").read_text())
    tensors = load_file(folder / "reference.safetensors")
    table = Table(title="tr(D H D^T) / tr(W H W^T); ratios are to the reference implementation")
    for heading in ("matrix", "method", "reference", "faithful", "ratio", "default", "ratio"):
        table.add_column(heading, justify="left" if heading in ("matrix", "method") else "right")
    for heading in ("true bits", "reference s", "faithful s", "default s"):
        table.add_column(heading, justify="right")
    for name, known in figures.items():
        weight, hessian = tensors[f"{name}.weight"], tensors[f"{name}.hessian"]
        for case, (method, partition) in CASES.items():
            config = BinarizationConfig(method, partition)
            faithful = BinarizationConfig(method, partition, split_on="saliency", compensation="reference")
            first, first_seconds = timed(partial(quantize_matrix, weight, hessian, faithful), repeats)
            second, second_seconds = timed(partial(quantize_matrix, weight, hessian, config), repeats)
            errors = [matrix.report.output_error for matrix in (first, second) if matrix.report]
            reference = known[case]["output_error"]
            table.add_row(
                f"{name} {'x'.join(map(str, weight.shape))}",
                case,
                f"{reference:.4f}",
                f"{errors[0]:.4f}",
                f"{errors[0] / reference:.3f}",
                f"{errors[1]:.4f}",
                f"{errors[1] / reference:.3f}",
                f"{second.true_bits:.3f}",
                f"{known[case]['seconds']:.1f}",
                f"{first_seconds:.2f}",
                f"{second_seconds:.2f}",
            )
        table.add_section()
    return table


def theorem_2_table(repeats: int) -> Table:
    """The calibrated error L2 of T successive approximations, from the inputs and from S = X^T X, computed once."""
    table = Table(title="Theorem 2: L2 of T approximations, from the inputs X and from S = X^T X")
    for heading in ("n", "K", "tokens N L", "T", "from X, s", "from S, s", "speed-up", "1 / (K (1/(n T) + 1/(N L)))"):
        table.add_column(heading, justify="right")
    for rows, tokens in ((192, 8192), (576, 8192), (1536, 32768)):
        width, rounds = 128, 15
        inputs, residual = torch.randn(tokens, width), torch.randn(rows, width)
        slow, slow_seconds = timed(partial(losses_from_inputs, inputs, residual, rounds), repeats)
        fast, fast_seconds = timed(partial(losses_from_gram, inputs, residual, rounds), repeats)
        assert abs(slow - fast) < 1e-3 * slow
        predicted = 1 / (width * (1 / (rows * rounds) + 1 / tokens))
        ratio = slow_seconds / fast_seconds
        cells = (rows, width, tokens, rounds, f"{slow_seconds:.3f}", f"{fast_seconds:.4f}", f"{ratio:.0f}x")
        table.add_row(*map(str, cells), f"{predicted:.0f}x")
    return table


def losses_from_inputs(inputs: torch.Tensor, residual: torch.Tensor, rounds: int) -> float:
    """Sum of ||R X^T||^2 over the rounds."""
    return sum(float((residual @ inputs.T).square_().sum()) for _ in range(rounds))


def losses_from_gram(inputs: torch.Tensor, residual: torch.Tensor, rounds: int) -> float:
    """Sum of tr(R S R^T) over the rounds, the accumulation of S included."""
    gram = inputs.T @ inputs
    return sum(float(((residual @ gram) * residual).sum()) for _ in range(rounds))


def timed(call: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """The call's last result and the median of its wall-clock seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)


if __name__ == "__main__":
    main()
