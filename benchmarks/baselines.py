"""Round-to-nearest and GPTQ at 2, 3 and 4 bits on three real matrices: what binarization has to beat.

    python benchmarks/baselines.py [--data ../shared/data] [--repeats 3]

Single-threaded. Grids per row and 128 columns, clipped by search; bits count scales and zeros. `by energy`: columns in
the order of diag H. Matrices and Hessians are read from DATA/reference; the seconds of GPTQ hold the factorization.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from arbllm.baselines import gptq, round_to_nearest
from arbllm.difference import output_error
from solver import DATA, Rows, as_table, timed

HEADINGS = ("matrix", "method", "true bits", "output error", "weight error", "seconds")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds reference/")
    parser.add_argument("--repeats", type=int, default=3, help="the median time of so many runs is shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.data / "reference"
    tensors = load_file(folder / "reference.safetensors")
    rows: Rows = []
    for name in json.loads((folder / "reference.json").read_text()):
        rows += one_matrix(name, tensors[f"{name}.weight"], tensors[f"{name}.hessian"], options.repeats)
    Console(width=120).print(as_table(HEADINGS, rows))


def one_matrix(name: str, weight: torch.Tensor, hessian: torch.Tensor, repeats: int) -> Rows:
    """One row a method and number of bits."""
    rows: Rows = []
    label, weight = f"{name.removeprefix('layers.4.')} {'x'.join(map(str, weight.shape))}", weight.float()
    for bits in (2, 3, 4):
        for method, call in (
            ("nearest", partial(round_to_nearest, weight, bits)),
            ("GPTQ", partial(gptq, weight, hessian, bits)),
            ("GPTQ, act-order", partial(gptq, weight, hessian, bits, by_energy=True)),
        ):
            rounded, seconds = timed(call, repeats)
            weight_error = float((weight - rounded.weight).square().sum() / weight.square().sum())
            errors = (f"{output_error(weight, rounded.weight, hessian):.4f}", f"{weight_error:.4f}")
            rows.append((label, f"{method}, {bits} bits", f"{rounded.true_bits:.2f}", *errors, f"{seconds:.2f}"))
    return rows


if __name__ == "__main__":
    main()
