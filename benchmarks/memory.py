"""Resident memory: of the first blocks of a streamed job, of loading a packed checkpoint, and of a model that runs.

python benchmarks/memory.py stream MODEL --blocks 2 --windows 8 --window-length 2048
python benchmarks/memory.py stream smollm2 --windows 32 --window-length 2048
python benchmarks/memory.py load CHECKPOINT
python benchmarks/memory.py run CHECKPOINT

`smollm2` is the demonstration model. Without --blocks the job runs to its end. --page writes what is printed to
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import gc
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
from arbllm.nn import BinaryLinear
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


def resident(checkpoint: Path) -> tuple[int, int]:
    """Bytes of this process's own memory that are in use now, and of the checkpoint's files that it has in memory."""
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    mapped, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split(maxsplit=5)
        if not name.endswith(":"):
            ours = bool(values) and Path(values[-1]).parent == checkpoint.resolve()
        elif ours and name == "Rss:":
            mapped += 1024 * int(values[0])
    return 1024 * int(own.split()[1]), mapped


@torch.inference_mode()
def while_it_runs(checkpoint: Path) -> str:
    """What a model takes before and after it has read a few tokens, in one sentence."""
    before, _ = resident(checkpoint)
    model = arbllm.load(checkpoint)
    packed = sum(module.matrix.nbytes for module in model.modules() if isinstance(module, BinaryLinear))
    loaded = resident(checkpoint)
    model(torch.arange(8)[None])
    gc.collect()
    ran = resident(checkpoint)
    after = [
        f"{(own - before) / 1e6:.1f} MB of its own, {mapped / 1e6:.1f} MB of files" for own, mapped in (loaded, ran)
    ]
    return (
        f"files of {bytes_on_disk(checkpoint) / 1e6:.1f} MB, packed linears {packed / 1e6:.1f} MB of it; in memory "
        f"after loading: {after[0]}; after 8 tokens: {after[1]}"
    )


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
    parser.add_argument("what", choices=("stream", "load", "run"))
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
    elif options.what == "run":
        text = while_it_runs(options.path)
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
