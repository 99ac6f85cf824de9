"""Peak resident memory: of the first blocks of a streamed job, and of loading a packed checkpoint.

python benchmarks/memory.py stream MODEL --blocks 2 --windows 8 --window-length 2048
python benchmarks/memory.py stream smollm2 --windows 32 --window-length 2048
python benchmarks/memory.py load CHECKPOINT

`smollm2` is the demonstration model. Without --blocks the job runs to its end. --page writes what is printed to
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import arbllm
import arbllm.integrations.transformers  # what is imported once is no matter of a checkpoint
from arbllm.device import peak_memory_bytes, reset_peak_memory
from arbllm.format.checkpoint import bytes_on_disk
from arbllm.model.events import BlockFinished, Event
from arbllm.pipeline import quantize
from arbllm.plan import plan
from commands import demonstration_model
from sections import ROOT, write_section

RELIABILITY = ROOT / "docs" / "reliability.md"
DEMONSTRATION = "smollm2"


class EnoughError(Exception):
    """The blocks that were to be measured are done."""


def save_dense(directory: Path) -> None:
    """The demonstration model as a directory of safetensors, which can be streamed."""
    from arbllm.model.source import open_model

    model, tokenizer = open_model(str(demonstration_model()))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def in_child(work: Callable[[Path], None], directory: Path) -> None:
    """Do some work in a process of its own, whose memory is not this one's."""
    child = multiprocessing.get_context("spawn").Process(target=work, args=(directory,))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)


def peak_of_blocks(model: Path, blocks: int | None, windows: int, window_length: int) -> list[BlockFinished]:
    """Quantize a model's first blocks, or all, streamed, by the default method on the built-in text."""
    done: list[BlockFinished] = []

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished):
            done.append(event)
            print(
                f"block {event.block}: {event.seconds:.0f} s, peak {event.peak_memory_bytes / 1e9:.2f} GB", flush=True
            )
            if len(done) == blocks:
                raise EnoughError

    with tempfile.TemporaryDirectory(dir=model.parent) as directory, suppress(EnoughError):
        quantize(
            model,
            Path(directory) / "packed",
            config=arbllm.BinarizationConfig(allocation="uniform"),
            calibration="builtin",
            windows=windows,
            window_length=window_length,
            device="cpu",
            stream=True,
            on_event=stop,
        )
    return done


def peak_of_loading(checkpoint: Path) -> tuple[int, int]:
    """Bytes by which the peak of resident memory grows while a checkpoint is loaded, and bytes of its files."""
    reset_peak_memory()
    before = peak_memory_bytes()
    model = arbllm.load(checkpoint)
    after = peak_memory_bytes()
    del model
    return after - before, bytes_on_disk(checkpoint)


def streamed(model: Path, blocks: int | None, windows: int, window_length: int) -> str:
    """What the first blocks of a streamed job took, and what `--dry-run` says, in one sentence."""
    foretold = plan(
        model,
        model.with_name("none"),
        config=arbllm.BinarizationConfig(allocation="uniform"),
        windows=windows,
        window_length=window_length,
        stream=True,
    )
    done = peak_of_blocks(model, blocks, windows, window_length)
    which = "all its blocks" if len(done) == foretold.blocks else f"the first {len(done)} of {foretold.blocks} blocks"
    return (
        f"{model.name}: {bytes_on_disk(model) / 1e9:.2f} GB on disk; with {windows} windows of {window_length} tokens "
        f"{which} took {max(event.peak_memory_bytes for event in done) / 1e9:.2f} GB of memory at most and "
        f"{sum(event.seconds for event in done):.0f} s, on {torch.get_num_threads()} of the processor's cores. "
        f"--dry-run says {foretold.peak_memory_bytes / 1e9:.2f} GB, {foretold.memory['packed'] / 1e9:.2f} GB of it for "
        f"all {foretold.blocks} blocks when they are packed."
    )


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "load"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=2048)
    parser.add_argument("--page", action="store_true", help="also write docs/reliability.md")
    options = parser.parse_args()
    shape = options.blocks, options.windows, options.window_length
    if options.what == "load":
        growth, size = peak_of_loading(options.path)
        text = f"files of {size / 1e9:.3f} GB; loading them took {growth / 1e9:.3f} GB of memory at most"
    elif str(options.path) == DEMONSTRATION:
        with tempfile.TemporaryDirectory() as directory:
            dense = Path(directory) / DEMONSTRATION
            in_child(save_dense, dense)
            text = streamed(dense, *shape)
    else:
        text = streamed(options.path, *shape)
    print(text)
    if options.page:
        write_section(
            RELIABILITY,
            f"memory: {options.what} {options.path.name}",
            textwrap.indent(textwrap.fill(text, 110), "    "),
        )


if __name__ == "__main__":
    main()
