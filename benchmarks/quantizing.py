"""How long a whole model takes to quantize on the CPU, and on what: the paper's arb-rc with its bitmap.

    python benchmarks/quantizing.py [--windows 16] [--window-length 2048] [--blocks 3] [--threads 2] [--page]

The first blocks of the demonstration model are measured. The reference implementation's seconds are those of
`../shared/data/reference/reference.json`, or of another directory named by $ARBLLM_REFERENCE: one thread, one matrix of
each of three shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

import arbllm
from arbllm.model.events import BlockFinished, Event, LinearQuantized
from arbllm.pipeline import quantize
from commands import demonstration_model
from kernels import machine
from memory import EnoughError
from sections import PERFORMANCE, ROOT, write_section
from solver import Rows, as_markdown, as_table

REFERENCE_CASE = "arb-rc+cgb"
HEADINGS = ("linears", "shape", "solver, s each", "reference, s each", "share")
COMMAND = "python benchmarks/quantizing.py --page"

_SECTION = """\
## Quantizing on a CPU

SmolLM2-135M by arb-rc with the column-group bitmap, {windows} windows of {length} tokens, {threads} threads, its first
{blocks} blocks. *Solver* is the time of a linear, of which as many are solved at once as there are threads; *reference*
that of the paper's reference implementation for a matrix of the same shape, measured once, on one thread of a like
machine. It was not measured for the other two linears.

{table}

{summary}

{machine}

`{command}` writes this section.
"""


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help="of calibration text")
    parser.add_argument("--window-length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--blocks", type=int, default=3, help="decoder blocks to measure")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch and the solver")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    linears, blocks = measured(options.windows, options.window_length, options.blocks)
    table, summary = against_reference(linears), whole_job(blocks)
    console = Console(width=120)
    console.print(as_table(HEADINGS, table), summary)
    if options.page:
        text = _SECTION.format(
            windows=options.windows, length=options.window_length, threads=options.threads, blocks=len(blocks),
            table=as_markdown(HEADINGS, table), summary=summary, machine=machine(), command=COMMAND,
        )  # fmt: skip
        write_section(PERFORMANCE, "quantizing on a CPU", text)
        console.print(f"wrote {PERFORMANCE}")


def measured(windows: int, length: int, count: int) -> tuple[list[LinearQuantized], list[BlockFinished]]:
    """What a job tells of its linears and of its blocks, of which it does so many."""
    linears: list[LinearQuantized] = []
    blocks: list[BlockFinished] = []

    def listen(event: Event) -> None:
        if isinstance(event, LinearQuantized):
            linears.append(event)
        if isinstance(event, BlockFinished):
            blocks.append(event)
            if len(blocks) == count:
                raise EnoughError

    with tempfile.TemporaryDirectory() as directory, suppress(EnoughError):
        quantize(
            demonstration_model(),
            Path(directory) / "packed",
            config=arbllm.BinarizationConfig(method="arb-rc", partition="cgb"),
            calibration="builtin",
            windows=windows,
            window_length=length,
            device="cpu",
            on_event=listen,
        )
    return linears, blocks


def against_reference(linears: list[LinearQuantized]) -> Rows:
    """Mean seconds of the solver by kind of linear, and the reference's for the same shape."""
    folder = Path(os.environ.get("ARBLLM_REFERENCE", ROOT.parent / "shared" / "data" / "reference"))
    known = json.loads((folder / "reference.json").read_text())
    kinds: dict[str, list[LinearQuantized]] = defaultdict(list)
    for event in linears:
        kinds[event.name.rpartition(".")[2]].append(event)
    same_shape = {
        "q_proj": "q_proj",
        "o_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "k_proj",
        "down_proj": "down_proj",
    }
    rows: Rows = []
    for kind, events in kinds.items():
        seconds = mean(event.seconds for event in events)
        found = [
            case[REFERENCE_CASE]["seconds"] for name, case in known.items() if name.endswith(same_shape.get(kind, "?"))
        ]
        reference = (f"{found[0]:.1f}", f"1/{found[0] / seconds:.0f}") if found else ("", "")
        rows.append((kind, f"{events[0].rows} x {events[0].columns}", f"{seconds:.2f}", *reference))
    return rows


def whole_job(blocks: list[BlockFinished]) -> str:
    """The time of a block, and how it compares with what it cannot do without."""
    total, solver, forward = (
        mean(times) for times in zip(*((e.seconds, e.solve_seconds, e.propagate_seconds) for e in blocks), strict=True)
    )
    needed = 2 * forward + solver
    return (
        f"A block takes {total:.1f} s: {solver:.1f} s in the solver, {forward:.1f} s in a forward pass of its windows. "
        f"That is {total / needed:.2f} times two forward passes and the solver, {needed:.1f} s."
    )


if __name__ == "__main__":
    main()
