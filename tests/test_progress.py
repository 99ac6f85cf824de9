import io
import json

import pytest
from rich.console import Console

from arbllm.model.events import (
    BlockFinished,
    BlockStarted,
    BlockTuned,
    DistillationFinished,
    DistillationStep,
    JobStarted,
    LinearQuantized,
    TeacherRead,
)
from arbllm.progress import JsonLinesLog, ProgressDisplay, Tally, WindowDisplay, _clock


def linear(name: str, rows: int, error: float, bits: float) -> LinearQuantized:
    sizes = {"rows": rows, "columns": 10, "bytes": 1}
    figures = {"output_error": error, "weight_error": 0.1, "nominal_bits": 1.0, "true_bits": bits}
    return LinearQuantized(0, 2, f"model.layers.0.{name}", **sizes, **figures, damping=0.01, seconds=1.0)


EVENTS = [
    JobStarted(blocks=2, linears=4, weights=80),
    BlockStarted(0, 2),
    linear("self_attn.q_proj", 10, 0.02, 2.0),
    linear("mlp.up_proj", 30, 0.04, 4.0),
    BlockFinished(0, 2, 4.0, 1.0, 2.0, 0.0, 1.0, peak_memory_bytes=1_500_000_000),
]


def play(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    with ProgressDisplay(console) as display:
        for event in EVENTS:
            display(event)
        display._progress.refresh()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_a_line_a_block():
    lines = play(terminal=False).splitlines()
    assert len(lines) == 2
    assert "4 linears in 2 blocks" in lines[0]
    # Mean of the errors, mean of the bits weighted by weights.
    assert lines[1].startswith("block 1/2: mean output error 0.0300, 3.50 true bits, 4.0 s, peak 1.50 GB")
    assert lines[1].endswith("left")


def test_on_a_terminal_the_linear_its_error_bits_time_and_memory():
    shown = play(terminal=True)
    assert "mlp.up_proj" in shown
    assert "0.0400" in shown
    assert "4.00 bits" in shown
    assert "left" in shown
    assert "GB" in shown


def test_tuning_shows_in_the_line_of_its_block_alone():
    display = ProgressDisplay(Console(file=(file := io.StringIO()), width=200))
    tuned = BlockTuned(0, 2, before=0.0512, after=0.0498, steps=30, seconds=3.0)
    for event in [*EVENTS[:-1], tuned, EVENTS[-1], BlockStarted(1, 2), EVENTS[-1]]:
        display(event)
    first, second = file.getvalue().splitlines()[1:]
    assert "mean output error 0.0300, tuned from 0.0512 to 0.0498, 3.50 true bits" in first
    assert "tuned" not in second


@pytest.mark.parametrize("terminal", [True, False])
def test_distillation_ends_with_a_line(terminal):
    console = Console(file=(file := io.StringIO()), force_terminal=terminal, width=200, color_system=None)
    with ProgressDisplay(console) as display:
        display(TeacherRead(1, 4))
        display(DistillationStep(3, 8, 0.1234))
        display._progress.refresh()
        display(DistillationFinished(0.2, 0.15, 7, 12.0))
    shown = file.getvalue()
    assert "distilled from 0.2000 to 0.1500 nats a token in 7 steps, 12.0 s" in shown
    assert ("divergence 0.1234" in shown) == terminal


def test_the_time_left_is_that_of_the_blocks_whenever_they_were_made():
    tally = Tally()
    tally.total = 80
    tally.add(EVENTS[2])
    assert tally.seconds_left() is None
    tally.add_block(6.0)
    assert tally.seconds_left() == pytest.approx(6.0 * (80 - tally.weights) / tally.weights)


def test_a_second_job_starts_from_zero():
    display = ProgressDisplay(Console(file=io.StringIO()))
    for event in [*EVENTS, EVENTS[0]]:
        display(event)
    assert (display.tally.weights, display.tally.total, display.tally.true_bits) == (0, 80, 0.0)
    assert display.tally.seconds_left() is None


def test_the_log_can_be_followed_while_it_grows(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLinesLog(path) as log:
        for count, event in enumerate(EVENTS, start=1):
            log(event)
            lines = path.read_text().splitlines()
            assert len(lines) == count
            line = json.loads(lines[-1])
            assert line.pop("elapsed") >= 0
            assert line == event.to_dict()


@pytest.mark.parametrize(("windows", "expected"), [(3, [1, 2, 3]), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25])])
def test_evaluation_without_a_terminal_is_a_line_a_tenth(windows, expected):
    file = io.StringIO()
    with WindowDisplay(Console(file=file)) as display:
        for done in range(1, windows + 1):
            display(done, windows, 12.345)
    assert file.getvalue().splitlines() == [f"window {done}/{windows}: perplexity 12.35" for done in expected]


def test_evaluation_on_a_terminal_is_a_bar():
    file = io.StringIO()
    with WindowDisplay(Console(file=file, force_terminal=True, width=120, color_system=None)) as display:
        display(2, 8, 12.5)
        display._progress.refresh()
    assert "2/8" in file.getvalue()
    assert "perplexity 12.50" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0:00"), (9, "0:09"), (61, "1:01"), (754, "12:34"), (3600, "1:00:00"), (36061, "10:01:01")],
)
def test_clock(seconds, shown):
    assert _clock(seconds) == shown
