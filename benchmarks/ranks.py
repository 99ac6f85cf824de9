"""Quantizes a model by one, two and four processes: the same quality, and the same bits each time.

python benchmarks/ranks.py                                      # a small one of random weights
python benchmarks/ranks.py --model MODEL --counts 1,2 --windows 8 --window-length 256
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import arbllm
from arbllm.pipeline import quantize
from kill import WRITTEN, make_model

TOLERANCE = 0.005


def run_ranks(count: int, work: Callable[[], Any]) -> list[Any]:
    """Do some work in each of `count` processes that gloo connects, with one thread each; what it returned in each.

    They are children of this process, which must not have computed before.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    with tempfile.TemporaryDirectory() as directory:
        meeting = f"file://{directory}/meeting"
        for rank, (_, sender) in enumerate(pipes):
            context.Process(target=_be_rank, args=(rank, count, meeting, work, sender)).start()
            sender.close()
        return [receiver.recv() for receiver, _ in pipes]


def _be_rank(rank: int, count: int, meeting: str, work: Callable[[], Any], sender: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    sender.send(work())
    dist.barrier()
    dist.destroy_process_group()


def quality_of_job(model: Path, windows: int, length: int, out: Path) -> tuple[float, float]:
    """Perplexity and mean output error of a job by all processes that there are, bits measured and blocks tuned."""
    summary = quantize(
        model,
        out,
        config=arbllm.BinarizationConfig(iterations=2),
        calibration="builtin",
        windows=windows,
        window_length=length,
        device="cpu",
        tune=8,
        evaluate="builtin",
    )
    assert summary.perplexity
    return summary.perplexity, summary.output_error


def compare(job: Callable[[Path], tuple[float, float]], directory: Path, counts: Sequence[int]) -> bool:
    """Print what jobs by so many processes come to; whether perplexity stays, and equal numbers make equal bits."""
    found: dict[int, tuple[float, list[bytes]]] = {}
    sound = True
    for number, count in enumerate(counts):
        out = directory / str(number)
        perplexity, error = run_ranks(count, partial(job, out))[0]
        written = [(out / name).read_bytes() for name in WRITTEN]
        again = count in found
        same = not again or found[count][1] == written
        found[count] = perplexity, written
        change = perplexity / found[counts[0]][0] - 1
        print(
            f"{count} ranks: perplexity {perplexity:.4f} ({100 * change:+.3f} %), output error {error:.5f}"
            + (f", {'the same' if same else 'OTHER'} bits as before" if again else ""),
            flush=True,
        )
        sound &= same and abs(change) < TOLERANCE
    return sound


def main() -> None:
    """Compare; the exit code is 0 where all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--counts", default="1,2,2,4,4")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-length", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = options.model or run_ranks(1, partial(make_model, directory / "dense"))[0]
        job = partial(quality_of_job, model, options.windows, options.window_length)
        sound = compare(job, directory, [int(count) for count in options.counts.split(",")])
    raise SystemExit(0 if sound else 1)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    main()
