"""Peak resident memory: of the first blocks of a streamed job, and of loading a packed checkpoint.

python benchmarks/memory.py stream MODEL --blocks 2 --windows 8 --window-length 2048
python benchmarks/memory.py load CHECKPOINT
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import suppress
from pathlib import Path

import arbllm
import arbllm.integrations.transformers  # what is imported once is no matter of a checkpoint
from arbllm.device import peak_memory_bytes, reset_peak_memory
from arbllm.format.checkpoint import bytes_on_disk
from arbllm.model.events import BlockFinished, Event
from arbllm.pipeline import quantize
from arbllm.plan import plan


class EnoughError(Exception):
    """The blocks that were to be measured are done."""


def peak_of_blocks(model: Path, blocks: int, windows: int, window_length: int) -> list[BlockFinished]:
    """Quantize a model's first blocks, streamed, by the default method on the built-in text."""
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


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stream", "load"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=2048)
    options = parser.parse_args()
    if options.what == "load":
        growth, size = peak_of_loading(options.path)
        print(
            f"{options.path}: files of {size / 1e9:.3f} GB; loading them took {growth / 1e9:.3f} GB of memory at most"
        )
        return
    uniform = arbllm.BinarizationConfig(allocation="uniform")
    shape = {"windows": options.windows, "window_length": options.window_length}
    foretold = plan(options.path, options.path.with_name("none"), config=uniform, stream=True, **shape)
    done = peak_of_blocks(options.path, options.blocks, options.windows, options.window_length)
    print(
        f"{options.path}: {bytes_on_disk(options.path) / 1e9:.2f} GB on disk; the first {len(done)} blocks took "
        f"{max(event.peak_memory_bytes for event in done) / 1e9:.2f} GB of memory at most (--dry-run says "
        f"{foretold.peak_memory_bytes / 1e9:.2f} GB) and {sum(event.seconds for event in done):.0f} s"
    )


if __name__ == "__main__":
    main()
