"""Output error and time of every method on three real matrices, beside the paper's reference implementation; Theorem 2.

    python benchmarks/solver.py [--data ../shared/data] [--repeats 3] [--page]

Single-threaded. The matrices, their Hessians and the reference's figures are read from DATA/reference.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from arbllm.config import BinarizationConfig
from arbllm.evaluation.written import markdown_table
from arbllm.solver import quantize_matrix

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("ARBLLM_DATA", ROOT.parent / "shared" / "data"))
PAGE = ROOT / "docs" / "fidelity.md"

MATRIX_HEADINGS = (
    *("matrix", "method", "reference", "faithful", "ratio", "default", "ratio", "true bits"),
    *("reference, s", "faithful, s", "default, s"),
)
LABELS = ("matrix", "method")
THEOREM_HEADINGS = ("n", "K", "tokens N L", "T", "from X, s", "from S, s", "speed-up", "1 / (K (1/(n T) + 1/(N L)))")

_PAGE = """\
# Fidelity

How near the methods come to the paper's own reference implementation, on three linear layers of SmolLM2-135M with
their Hessians. `braq` is BiLLM, `+cgb` has the column-group bitmap; blocks of 128 columns, 15 iterations, processor
seconds of one thread.

Errors are output errors, tr(D H Dᵀ) / tr(W H Wᵀ). *Faithful* is `split_on="saliency"`, `compensation="reference"`: what
the reference does. *Default* chooses the group threshold by the error of the weight itself and compensates exactly, at
the same bits. [What goes beyond the paper](joint.md) has a page of its own.
The reference's seconds were measured once, on one thread of a like machine.

{matrices}

Theorem 2 of the paper: the calibrated error of T successive approximations, from the inputs and from S = XᵀX, which is
accumulated once (the accumulation is counted). The last column is what the theorem predicts.

{theorem}

`python benchmarks/solver.py --page` writes this page. It needs the matrices, their Hessians and the reference's figures
in `$ARBLLM_DATA/reference`, which are not part of this repository.
"""

CASES = {
    "braq": ("billm", "column+group"),
    "arb": ("arb", "column+group"),
    "arb+cgb": ("arb", "cgb"),
    "arb-x+cgb": ("arb-x", "cgb"),
    "arb-rc": ("arb-rc", "column+group"),
    "arb-rc+cgb": ("arb-rc", "cgb"),
}

Result = TypeVar("Result")
Rows = list[tuple[str, ...]]


def main() -> None:
    """Print both tables, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds reference/")
    parser.add_argument("--repeats", type=int, default=3, help="the median time of so many runs is shown")
    parser.add_argument("--page", action="store_true", help="also write docs/fidelity.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, second = matrices(options.data / "reference", options.repeats), theorem_2(options.repeats)
    console = Console(width=150)
    console.print(as_table(MATRIX_HEADINGS, first), as_table(THEOREM_HEADINGS, second))
    if options.page:
        text = _PAGE.format(matrices=as_markdown(MATRIX_HEADINGS, first), theorem=as_markdown(THEOREM_HEADINGS, second))
        PAGE.write_text(text)
        console.print(f"wrote {PAGE}")


def matrices(folder: Path, repeats: int) -> Rows:
    """Faithful mode against the reference, and the defaults, for each matrix and method."""
    known = json.loads((folder / "reference.json").read_text())
    tensors = load_file(folder / "reference.safetensors")
    return [
        one_matrix(name, case, tensors[f"{name}.weight"], tensors[f"{name}.hessian"], known[name][case], repeats)
        for name in known
        for case in CASES
    ]


def one_matrix(
    name: str, case: str, weight: torch.Tensor, hessian: torch.Tensor, known: dict[str, float], repeats: int
) -> tuple[str, ...]:
    """One row: `known` holds the reference's figures."""
    method, partition = CASES[case]
    config = BinarizationConfig(method, partition)
    matrix, seconds = timed(partial(quantize_matrix, weight, hessian, config), repeats)
    assert matrix.report
    error = matrix.report.output_error
    label = (f"{name.removeprefix('layers.4.')} {'x'.join(map(str, weight.shape))}", case)
    as_reference = replace(config, split_on="saliency", compensation="reference")
    faithful, faithful_seconds = timed(partial(quantize_matrix, weight, hessian, as_reference), repeats)
    assert faithful.report
    theirs, ours = known["output_error"], faithful.report.output_error
    errors = (f"{theirs:.4f}", f"{ours:.4f}", f"{ours / theirs:.3f}", f"{error:.4f}", f"{error / theirs:.3f}")
    times = (f"{known['seconds']:.1f}", f"{faithful_seconds:.2f}", f"{seconds:.2f}")
    return (*label, *errors, f"{matrix.true_bits:.2f}", *times)


def theorem_2(repeats: int) -> Rows:
    """The calibrated error L2 of T successive approximations, from the inputs and from S = X^T X, computed once."""
    rows: Rows = []
    width, rounds = 128, 15
    for outputs, tokens in ((192, 8192), (576, 8192), (1536, 32768)):
        inputs, residual = torch.randn(tokens, width), torch.randn(outputs, width)
        slow, slow_seconds = timed(partial(losses_from_inputs, inputs, residual, rounds), repeats)
        fast, fast_seconds = timed(partial(losses_from_gram, inputs, residual, rounds), repeats)
        assert abs(slow - fast) < 1e-3 * slow
        predicted = 1 / (width * (1 / (outputs * rounds) + 1 / tokens))
        sizes = (str(outputs), str(width), str(tokens), str(rounds))
        times = (f"{slow_seconds:.3f}", f"{fast_seconds:.4f}")
        rows.append((*sizes, *times, f"{slow_seconds / fast_seconds:.0f}x", f"{predicted:.0f}x"))
    return rows


def losses_from_inputs(inputs: torch.Tensor, residual: torch.Tensor, rounds: int) -> float:
    """Sum of ||R X^T||^2 over the rounds."""
    return sum(float((residual @ inputs.T).square_().sum()) for _ in range(rounds))


def losses_from_gram(inputs: torch.Tensor, residual: torch.Tensor, rounds: int) -> float:
    """Sum of tr(R S R^T) over the rounds, the accumulation of S included."""
    gram = inputs.T @ inputs
    return sum(float(((residual @ gram) * residual).sum()) for _ in range(rounds))


def as_table(headings: tuple[str, ...], rows: Rows) -> Table:
    """For the terminal."""
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LABELS else "right")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(headings: tuple[str, ...], rows: Rows) -> str:
    """For the page."""
    return markdown_table(headings, rows, left=sum(heading in LABELS for heading in headings))


def timed(call: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """The call's last result and the median of its processor seconds, which other jobs on the machine hardly change."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, median(seconds)


if __name__ == "__main__":
    main()
