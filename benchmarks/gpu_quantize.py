"""How long quantizing a LLaMA-7B takes on a GPU: whole blocks with random weights are measured, and multiplied.

    python benchmarks/gpu_quantize.py [--blocks 4] [--windows 128] [--page]
    python benchmarks/gpu_quantize.py --device cpu --width 128 --inner 192 --windows 2 --window-length 32  # a trial

The first block warms up; the last does not pass its results on; those between are what is multiplied.
Without a GPU it says so, and leaves the page as it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from statistics import median

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from arbllm.config import BinarizationConfig
from arbllm.format.published import LLAMA_7B, ModelShape
from arbllm.model.events import BlockFinished, Event
from arbllm.model.quantize import quantize_model
from gpu_kernels import machine
from sections import PERFORMANCE, write_section
from solver import Rows, as_markdown, as_table

HEADINGS = (*("step", "seconds a block, median", "spread", "minutes of the whole model"),)
STEPS = ("capture_seconds", "solve_seconds", "propagate_seconds", "seconds")
NAMES = ("inputs and Hessians", "solver", "passing results on", "all")
COMMAND = "python benchmarks/gpu_quantize.py --page"

_SECTION = """\
## Quantizing on a GPU

LLaMA-7B by arb-rc with the column-group bitmap, {iterations} iterations, {windows} windows of {length} tokens. The
weights are random. Of {blocks} blocks the first warms up and the last is not passed on; the median of the others is
multiplied by the {total} of the model. Peak memory of the GPU: {memory}.

{machine}

{table}

`{command}` writes this section.
"""


def main() -> None:
    """Print the table, and write it to the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="blocks to quantize, the first and the last included")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--window-length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--iterations", type=int, default=15, help="of the solver")
    parser.add_argument("--device", default="cuda", help="cpu only shows that the code runs")
    parser.add_argument("--page", action="store_true", help="also write the section of docs/performance.md")
    for name in ("width", "inner"):
        parser.add_argument(f"--{name}", type=int, default=getattr(LLAMA_7B, name), help="of the model")
    options = parser.parse_args()
    if options.blocks < 3:
        parser.error("--blocks must be 3 or more")
    shape = replace(LLAMA_7B, width=options.width, inner=options.inner)
    if options.page and (options.device != "cuda" or shape != LLAMA_7B):
        parser.error("--page is for the whole width on a GPU")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here, so nothing is measured.")
    console = Console(width=150)
    windows = torch.randint(LLAMA_7B.vocabulary, (options.windows, options.window_length))
    finished, entered = quantize(shape, options.blocks, windows, options.iterations, options.device)
    rows, memory = summary(finished, entered), max(event.peak_memory_bytes for event in finished)
    console.print(as_table(HEADINGS, rows))
    console.print(f"peak memory: {memory / 1e9:.2f} GB")
    if options.page:
        text = _SECTION.format(
            iterations=options.iterations,
            windows=options.windows,
            length=options.window_length,
            blocks=options.blocks,
            total=LLAMA_7B.blocks,
            memory=f"{memory / 1e9:.2f} GB",
            machine=machine(),
            table=as_markdown(HEADINGS, rows),
            command=COMMAND,
        )
        write_section(PERFORMANCE, "quantizing on a GPU", text)
        console.print(f"wrote {PERFORMANCE}")


def quantize(
    shape: ModelShape, blocks: int, windows: torch.Tensor, iterations: int, device: str
) -> tuple[list[BlockFinished], float]:
    """Quantize the first blocks of a random model.

    Returns:
        What each block took, and the seconds until the first began: inputs of all windows, and the calls of blocks.
    """
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, shape.width // 128),
        vocab_size=shape.vocabulary,
        max_position_embeddings=windows.shape[1],
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began: list[float] = []
    finished: list[BlockFinished] = []

    def listen(event: Event) -> None:
        began.append(time.perf_counter())
        if isinstance(event, BlockFinished):
            finished.append(event)
            print(f"block {len(finished)}: {event.seconds:.1f} s, {event.solve_seconds:.1f} s of them in the solver")

    method = BinarizationConfig(method="arb-rc", partition="cgb", iterations=iterations)
    quantize_model(model, windows, method, device=device, on_event=listen)
    return finished, began[1] - began[0]


def summary(finished: list[BlockFinished], entered: float) -> Rows:
    """The table, from what each block took and what came before the first."""
    rows: Rows = []
    measured = finished[1:-1]
    for field, name in zip(STEPS, NAMES, strict=True):
        seconds = [getattr(event, field) for event in measured]
        total = median(seconds) * LLAMA_7B.blocks + (entered if field == "seconds" else 0)
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        rows.append((name, f"{median(seconds):.2f}", spread, f"{total / 60:.2f}"))
    return rows


if __name__ == "__main__":
    main()
