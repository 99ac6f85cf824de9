"""Search how the Triton kernels are best launched on this GPU, with a trellis, and write it as data.

    python benchmarks/tune_triton.py [--bits 2.25] [--repeats 5] [--workers 12] [--parts few,many]

Writes src/arbllm/kernels/configurations/<name of the GPU>.json: for every shape and number of tokens the best of all
candidates, and as the default of all other shapes what is best for the largest. Candidates are compiled by several
processes at a time before any is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from arbllm.kernels.triton_products import LEAST_SPAN, LEAST_TOKENS
from gpu_kernels import SHAPES, graph_times
from random_matrices import random_matrix

_TILES = [(128, 4, 4), (256, 4, 8), (256, 2, 4), (512, 1, 4), (512, 2, 8), (512, 4, 16), (1024, 1, 8), (1024, 2, 16)]
"""Rows, words side by side and warps of a program."""
_FEW = [
    {"rows": rows, "words": words, "most_rows": rows, "warps": warps, "most_words": most, "programs": programs}
    for rows, words, warps in _TILES
    for most, programs in product((8, 16, 32), (264, 396, 792))
]
_MANY_TILES = [(64, 4), (128, 4), (128, 8), (256, 8)]
"""Rows and warps of a program."""


def _many(tokens: int) -> list[dict[str, Any]]:
    tiles = product(_MANY_TILES, (min(tokens, 32), tokens))
    fitting = {(rows, warps, size) for (rows, warps), size in tiles if rows * size <= 1024 * warps}
    return [
        {"rows": rows, "warps": warps, "tokens": size, "stages": stages, "programs": programs}
        for rows, warps, size in sorted(fitting)
        for stages, programs in product((2, 3, 4) if size < 64 else (2, 3), (132, 264, 396, 528))
    ]


CHOICES: dict[str, dict[int, list[dict[str, Any]]]] = {
    "few": {
        1: _FEW,
        4: _FEW,
        8: [launch for launch in _FEW if launch["warps"] == 4],
    },
    "many": {tokens: _many(tokens) for tokens in (8, 16, 64)},
    "dense": {2048: [{"rows": rows, "scratch_megabytes": 512, "warps": 4} for rows in (32, 64, 128)]},
}
"""Candidates for each kernel by the number of tokens."""
EARLY = (("few", 1), ("many", LEAST_TOKENS), ("many", 16))
"""Kernels and numbers of tokens of which programs are tried that begin before the kernel before them ends."""
SHARES = 4
"""Parts that the candidates of a kernel are compiled in."""
BYTES = 120 * 10**6
"""Memory that products go through before they come back to the first."""
COMPILED = (4096, 4096)
"""Kernels are the same for all shapes, so that they are compiled for the smallest."""


def main() -> None:
    """Tune every shape, one after the other, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, default=2.25, help="true bits a weight")
    parser.add_argument("--repeats", type=int, default=5, help="candidates are compared by the median of so many runs")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile first; 0 for none")
    parser.add_argument("--parts", default=",".join(CHOICES), help="kernels, with commas")
    parser.add_argument("--compile-only", action="store_true", help="only fill Triton's cache of compiled kernels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here, so there is nothing to tune.")
    console = Console(width=150)
    parts = options.parts.split(",")
    if options.workers:
        compile_all(parts, options.bits, options.workers)
    if not options.compile_only:
        tune(parts, options.bits, options.repeats, console)


def compile_all(parts: list[str], bits: float, workers: int) -> None:
    """Compile all candidates once."""
    jobs = [(part, tokens) for part in parts for tokens in CHOICES[part]]
    work = [(*job, share, bits) for job in jobs for share in range(SHARES)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_compile, work))


def _compile(job: tuple[str, int, int, float]) -> None:
    part, tokens, share, bits = job
    device = torch.device("cuda")
    matrix = cuda.prepare(random_matrix(*COMPILED, bits, device))
    base = list(candidates(load("any"), part, tokens))
    kinds = {_same_kernel(asdict(getattr(candidate, part))): candidate for candidate in base}
    for candidate in list(kinds.values())[share::SHARES]:
        whole = replace(candidate, few=replace(candidate.few, programs=1))  # of as many words as it may
        attempt(_inputs(tokens, COMPILED[1]), COMPILED[0], [matrix], whole)


def _same_kernel(launch: dict[str, Any]) -> tuple[Any, ...]:
    """Launches of which this is the same have the same kernel."""
    span = max(LEAST_SPAN, launch.get("most_words", 0))
    return tuple(launch[name] for name in launch if name not in ("programs", "most_words")), span


def tune(parts: list[str], bits: float, repeats: int, console: Console) -> None:
    """Time all candidates and write the best."""
    device = torch.device("cuda")
    chosen = replace(load("any"), device=torch.cuda.get_device_name())
    for shape in SHAPES:
        first = random_matrix(*shape, bits, device)
        matrices = [cuda.prepare(random_matrix(*shape, bits, device)) for _ in range(1 + BYTES // first.nbytes)]
        entries: list[dict[str, Any]] = []
        least: dict[tuple[str, int], float] = {}
        for part, tokens in [(each, tokens) for each in parts for tokens in CHOICES[each]]:
            x = _inputs(tokens, shape[1])
            timed = [
                (attempt(x, shape[0], matrices, candidate, repeats), number, getattr(candidate, part))
                for number, candidate in enumerate(candidates(load("any"), part, tokens))
            ]
            for seconds, _, launch in sorted(timed)[:3]:
                console.print(f"{shape[0]} x {shape[1]}, {tokens} tokens: {1e6 * seconds:.1f} us with {launch}")
            best = asdict(min(timed)[2])
            found = {name: best[name] for name in CHOICES[part][tokens][0]}
            least[part, tokens] = min(timed)[0]
            entries.append({"rows": shape[0], "columns": shape[1], "tokens": tokens, part: found})
            chosen = replace(chosen, **{part: replace(getattr(chosen, part), **found)})
        for entry in entries:
            if "many" in entry and entry["tokens"] == LEAST_TOKENS:
                entry["many"]["least_tokens"] = least_tokens(least)
        chosen = replace(chosen, shapes=[*chosen.shapes, *entries])
        write(chosen, console)
    write(begin_early(chosen, bits, repeats, console), console)


def least_tokens(seconds: dict[tuple[str, int], float]) -> int:
    """From how many tokens on tensor cores are the faster, which take LEAST_TOKENS for any fewer."""
    found = LEAST_TOKENS + 1
    for tokens in sorted(CHOICES["few"], reverse=True):
        if seconds["many", LEAST_TOKENS] >= seconds.get(("few", tokens), 0.0):
            break
        found = tokens
    return found


def begin_early(chosen: Configuration, bits: float, repeats: int, console: Console) -> Configuration:
    """The configuration with programs for few tokens that begin early, for the shapes that gain from it."""
    shapes = []
    for entry in chosen.shapes:
        part, tokens = next(name for name in CHOICES if name in entry), entry["tokens"]
        if (part, tokens) in EARLY:
            shape = entry["rows"], entry["columns"]
            matrices = [cuda.prepare(random_matrix(*shape, bits, torch.device("cuda"))) for _ in range(24)]
            base = replace(next(candidates(load("any"), part, tokens)), shapes=[])
            launch = {**entry[part], "least_tokens": 0} if part == "many" else entry[part]
            launches = {early: replace(getattr(base, part), **launch, early=early) for early in (False, True)}
            seconds = {
                early: attempt(_inputs(tokens, shape[1]), shape[0], matrices, replace(base, **{part: launch}), repeats)
                for early, launch in launches.items()
            }
            console.print(
                f"{shape[0]} x {shape[1]}, {tokens} tokens, early: {1e6 * seconds[True]:.1f} us, "
                f"not: {1e6 * seconds[False]:.1f}"
            )
            entry = {**entry, part: {**entry[part], "early": seconds[True] < seconds[False]}}
        shapes.append(entry)
    return replace(chosen, shapes=shapes)


def _inputs(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")


def candidates(default: Configuration, part: str, tokens: int) -> Iterator[Configuration]:
    """All configurations to try for a kernel and number of tokens; that kernel takes them all."""
    few = replace(default.few, most_tokens=tokens if part == "few" else 0)
    many = replace(default.many, least_tokens=0, most_tokens=tokens if part == "many" else 0)
    base = replace(default, few=few, many=many)
    for values in CHOICES[part][tokens]:
        yield replace(base, **{part: replace(getattr(base, part), **values)})


def attempt(x: Tensor, rows: int, matrices: list[cuda.Ready], candidate: Configuration, repeats: int = 0) -> float:
    """Median seconds of a product; infinite where the candidate asks for more than the GPU has, or computes wrongly."""
    calls = [partial(cuda.multiply, x, matrix, rows) for matrix in matrices]
    expected = [cuda.multiply(x, matrix, rows, exact=True) for matrix in matrices[-2:]] if repeats else []
    kernel.configuration_of = lambda device: candidate  # type: ignore[assignment]
    try:
        calls[0]()  # divides the work, which no graph may record
        if not repeats:
            return 0.0
        found: list[Tensor] = []
        times = graph_times([*calls[:-2], *(partial(_kept, found, call) for call in calls[-2:])], repeats)
    except (triton.errors.TritonError, RuntimeError) as error:
        print(f"{str(error)[:400]}: {candidate}")
        return float("inf")
    near = all((y - e).norm() <= 0.02 * e.norm() for y, e in zip(found[-len(expected) :], expected, strict=True))
    return times.middle if near else float("inf")


def _kept(found: list[Tensor], call: Callable[[], Tensor]) -> Tensor:
    found.append(call())
    return found[-1]


def write(configuration: Configuration, console: Console) -> None:
    """Write the file of this GPU."""
    file = file_of(configuration.device)
    file.write_text(json.dumps(asdict(configuration), indent=2) + "\n")
    console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
