"""Search how the Triton kernels are best launched on this GPU, and write it as data.

    python benchmarks/tune_triton.py [--bits 2.25] [--repeats 5]

Writes src/arbllm/kernels/configurations/<name of the GPU>.json: for every shape and number of tokens the best of all
candidates, and as the default of all other shapes what is best for the largest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from rich.console import Console
from torch import Tensor

from arbllm.kernels import cuda
from arbllm.kernels import triton as kernel
from arbllm.kernels.triton_configuration import Configuration, file_of, load
from gpu_kernels import CACHE_BYTES, SHAPES, graph_times
from random_matrices import random_matrix

FEW, MANY = (1, 8, 16), (64, 256)
FEW_CHOICES = {
    "rows": (32, 64, 128),
    "words": (16, 32),
    "programs": (512, 1024, 2048),
    "registers": (128, 168, 255),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}
MANY_CHOICES = {
    "tokens": (16, 32, 64, 128),
    "rows": (32, 64),
    "words": (16, 32),
    "programs": (132, 264, 528),
    "warps": (4, 8),
    "stages": (2, 3),
}


def main() -> None:
    """Tune every shape, one after the other, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--repeats", type=int, default=5, help="candidates are compared by the median of so many runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here, so there is nothing to tune.")
    console = Console(width=150)
    device = torch.device("cuda")
    chosen = load("any")
    shapes: list[dict[str, Any]] = []
    for shape in SHAPES:
        first = random_matrix(*shape, options.bits, device)
        count = 1 + CACHE_BYTES // first.nbytes
        matrices = [cuda.prepare(random_matrix(*shape, options.bits, device)) for _ in range(count)]
        for part, tokens in [("few", tokens) for tokens in FEW] + [("many", tokens) for tokens in MANY]:
            x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device=device)
            best, seconds = None, float("inf")
            for candidate in candidates(load("any"), part, tokens):
                kernel.configuration_of = lambda _, candidate=candidate: candidate  # type: ignore[assignment]
                taken = attempt(x, shape[0], matrices, options.repeats)
                if taken < seconds:
                    best, seconds = getattr(candidate, part), taken
            if best is None:
                continue
            found = {name: value for name, value in asdict(best).items() if name != "most_tokens"}
            console.print(f"{shape[0]} x {shape[1]}, {tokens} tokens: {1e6 * seconds:.1f} us with {found}")
            shapes.append({"rows": shape[0], "columns": shape[1], "tokens": tokens, part: found})
            chosen = replace(chosen, **{part: replace(getattr(chosen, part), **found)})
        del matrices
    write(replace(chosen, device=torch.cuda.get_device_name(), shapes=shapes), console)


def candidates(default: Configuration, part: str, tokens: int) -> Iterator[Configuration]:
    """All configurations to try for the kernel for a `few` or `many` tokens; that kernel takes them all."""
    choices = FEW_CHOICES if part == "few" else MANY_CHOICES
    few = replace(default.few, most_tokens=tokens if part == "few" else 0)
    base = replace(default, few=few, many=replace(default.many, most_tokens=tokens))
    for values in product(*choices.values()):
        yield replace(base, **{part: replace(getattr(base, part), **dict(zip(choices, values, strict=True)))})


def attempt(x: Tensor, rows: int, matrices: list[cuda.Ready], repeats: int) -> float:
    """Median seconds of a product; infinite where the candidate asks for more than the GPU has."""
    try:
        return graph_times([partial(cuda.multiply, x, matrix, rows) for matrix in matrices], repeats).middle
    except triton.errors.TritonError:
        return float("inf")


def write(configuration: Configuration, console: Console) -> None:
    """Write the file of this GPU."""
    file = file_of(configuration.device)
    file.write_text(json.dumps(asdict(configuration), indent=2) + "\n")
    console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
