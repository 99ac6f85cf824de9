"""What a quantization job tells its user while it runs, and the log that it leaves."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from arbllm.device import peak_memory_bytes
from arbllm.model.events import (
    BlockFinished,
    BlockStarted,
    BlockTuned,
    DistillationFinished,
    DistillationStep,
    Event,
    JobStarted,
    LinearQuantized,
    TeacherRead,
)


class JsonLinesLog:
    """Writes every event as one line of JSON, flushed at once, so that a log can be followed while it grows.

    Each line is the event's `to_dict()` with `elapsed`, seconds since the log was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = time.perf_counter()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def __call__(self, event: Event) -> None:
        """Append one event."""
        assert self._file, "enter the log before writing to it"
        line = {**event.to_dict(), "elapsed": round(time.perf_counter() - self._start, 3)}
        print(json.dumps(line), file=self._file, flush=True)


class Tally:
    """Running totals of a job.

    Attributes:
        weights: weights quantized so far.
        total: weights of the whole job.
        bits: their stored bits.
        error: sum of the relative output errors of the linears so far.
        linears: linears quantized so far.
    """

    def __init__(self) -> None:
        self.weights = self.total = self.linears = 0
        self.bits = self.error = 0.0
        self._seconds, self._timed = 0.0, 0  # of the blocks so far, and their weights

    def add(self, event: LinearQuantized) -> None:
        """Count one linear."""
        weights = event.rows * event.columns
        self.weights += weights
        self.bits += event.true_bits * weights
        self.error += event.output_error
        self.linears += 1

    def add_block(self, seconds: float) -> None:
        """Count the time of a block, all linears of which were counted."""
        self._seconds += seconds
        self._timed = self.weights

    @property
    def true_bits(self) -> float:
        """Stored bits per weight so far."""
        return self.bits / max(self.weights, 1)

    @property
    def mean_error(self) -> float:
        """Mean relative output error of the linears so far."""
        return self.error / max(self.linears, 1)

    def seconds_left(self) -> float | None:
        """Time left if the rest takes as long per weight as the blocks so far took when they were made; None before."""
        return self._seconds * (self.total - self.weights) / self._timed if self._timed else None


class ProgressDisplay:
    """Shows a job on stderr: a live display on a terminal, one line a block elsewhere.

    >>> with ProgressDisplay() as display:
    ...     arbllm.quantize(model, out, on_event=display)
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.tally = Tally()
        self._block = Tally()
        self._tuned: BlockTuned | None = None
        self._live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]block"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task("first block", total=None)

    def __enter__(self) -> Self:
        # The live display starts with the job: until then, downloads show progress of their own.
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case JobStarted():
                self.tally = Tally()
                self.tally.total = event.weights
                self._progress.update(self._task, total=event.blocks)
                self._progress.start()
                self._say(f"{event.linears} linears in {event.blocks} blocks, {event.weights:,} weights")
            case BlockStarted():
                self._block, self._tuned = Tally(), None
                self._describe("calibrating")
            case LinearQuantized():
                self.tally.add(event)
                self._block.add(event)
                name = event.name.split(f".{event.block}.", 1)[-1]
                done = event.blocks * self.tally.weights / max(self.tally.total, 1)
                self._progress.update(self._task, completed=done)
                self._describe(f"{name} error {event.output_error:.4f} {event.true_bits:.2f} bits")
            case BlockTuned():
                self._tuned = event
            case BlockFinished():
                self.tally.add_block(event.seconds)
                self._say(self._block_line(event))
                if event.block + 1 == event.blocks:
                    self._progress.stop()

            case TeacherRead():
                self._progress.start()
                self._progress.update(self._task, total=event.pieces, completed=event.piece)
                self._progress.update(self._task, description="reading with the dense model")
            case DistillationStep():
                self._progress.start()
                self._progress.update(self._task, total=event.steps, completed=event.step)
                self._progress.update(self._task, description=f"distilling · divergence {event.loss:.4f}")
            case DistillationFinished():
                self._progress.stop()
                self._say(
                    f"distilled from {event.before:.4f} to {event.after:.4f} nats a token in {event.steps} steps, "
                    f"{event.seconds:.1f} s"
                )

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, style="dim" if self._live else None)

    def _describe(self, text: str) -> None:
        left = self.tally.seconds_left()
        parts = [text, f"{_clock(left)} left" if left is not None else "", f"{peak_memory_bytes() / 1e9:.1f} GB"]
        self._progress.update(self._task, description=" · ".join(part for part in parts if part))

    def _block_line(self, event: BlockFinished) -> str:
        block, left = self._block, self.tally.seconds_left()
        tuned = f"tuned from {self._tuned.before:.4f} to {self._tuned.after:.4f}, " if self._tuned else ""
        return (
            f"block {event.block + 1}/{event.blocks}: mean output error {block.mean_error:.4f}, {tuned}"
            f"{block.true_bits:.2f} true bits, {event.seconds:.1f} s, peak {event.peak_memory_bytes / 1e9:.2f} GB"
            + (f", {_clock(left)} left" if left else "")
        )


class _CountDisplay:
    """Shows how far a count has come on stderr: a bar on a terminal, a line for each tenth elsewhere."""

    def __init__(self, unit: str, console: Console | None = None) -> None:
        self.unit = unit
        self.console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn(f"[bold]{unit}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _show(self, done: int, total: int, description: str = "") -> None:
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total, description=description)
        if not self.console.is_terminal and (done * 10 // total) > ((done - 1) * 10 // total):
            self.console.print(f"{self.unit} {done}/{total}{description and f': {description}'}", highlight=False)
        if done == total:
            self._progress.stop()


class WindowDisplay(_CountDisplay):
    """Shows an evaluation on text, by windows."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__("window", console)

    def __call__(self, done: int, total: int, perplexity: float) -> None:
        """Show that `done` of `total` windows are evaluated, and the perplexity so far."""
        self._show(done, total, f"perplexity {perplexity:.2f}")


class RequestDisplay(_CountDisplay):
    """Shows an evaluation on tasks, by answers scored."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__("answer", console)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` answers are scored."""
        self._show(done, total)


def _clock(seconds: float) -> str:
    """2:03 or 1:02:03."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text
