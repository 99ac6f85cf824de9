"""All methods on SmolLM2-135M at their true size, as `arbllm compare` does it, the report kept in docs/comparison.

    python benchmarks/compare.py                         everything that is missing: a day on two cores, resumable
    python benchmarks/compare.py --methods fp16,gptq-3   some methods; others that are there already stay in the report
    python benchmarks/compare.py --max-windows 50        the first 50 windows of the text alone
    python benchmarks/compare.py --skip tasks speed      perplexity alone; the report waits for the other steps
    python benchmarks/compare.py --budgets               perplexity of arb-rcx at all budgets, tuned and untuned
    python benchmarks/compare.py --report                only the report, from the rows that are whole

Perplexity on the whole of WikiText-2 test, accuracy on 200 items of each of seven tasks, calibrated on 32 windows of
2048 tokens of `wiki.valid.raw`, or, with `--calibration c4`, of C4; distilled rows read 128 in the end. Data are looked
for under $ARBLLM_DATA or ../shared/data. What each step gave is kept in docs/comparison/rows and not run again;
checkpoints, in out/comparison, are deleted by hand.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from arbllm.errors import ArbllmError
from arbllm.evaluation.compare import collect, run_row, text_pieces
from arbllm.evaluation.methods import Calibration, find_recipe
from arbllm.evaluation.protocol import ROWS, Protocol
from arbllm.evaluation.tasks import TASKS
from arbllm.evaluation.write_report import write_report
from arbllm.evaluation.written import write_json
from budgets import budget_methods
from commands import demonstration_model
from results import CONTEXT, DATA, DISTILL_WINDOWS, JOINT_WINDOWS, ROOT

CALIBRATIONS = {"wikitext2": DATA / "wiki.valid.raw", "c4": DATA.parent / "c4" / "c4_sample.txt"}
ITEMS = 200
METHODS = (
    "fp16,rtn-4,gptq-4,gptq-3,gptq-2,gptq-act-order-3,gptq-act-order-2,hqq-4,hqq-2,hqq-1,billm,arb,arb-x,arb-rc,"
    "arb-rcx-1.1,arb-rcx-1.1-distilled,arb-rcx-1.6,arb-rcx-2.25-untuned,arb-rcx-2.25,arb-rcx-2.25-distilled,arb-rcx-2.85"
)


def main() -> None:
    """Run the comparison, keep its rows, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS, help="with commas")
    parser.add_argument("--max-windows", type=int, help="only so many windows of the text; the report says so")
    parser.add_argument("--calibration", choices=CALIBRATIONS, default="wikitext2", help="text to calibrate on")
    parser.add_argument("--skip", nargs="*", choices=("tasks", "speed"), default=(), help="steps left for another time")
    parser.add_argument("--budgets", action="store_true", help="the methods of the table of budgets, perplexity alone")
    parser.add_argument("--report", action="store_true", help="only write the report from the rows that are whole")
    options = parser.parse_args()
    methods = budget_methods() if options.budgets else options.methods.split(",")
    skip = {"tasks", "speed"} if options.budgets else set(options.skip)
    protocol = comparison(options.calibration, options.max_windows)
    kept, out = folders(options.calibration)
    take_kept_rows(kept, out)
    try:
        run(protocol, [] if options.report else methods, out, kept, skip)
    except ArbllmError as error:
        sys.exit(str(error))


def run(protocol: Protocol, methods: Sequence[str], out: Path, kept: Path, skip: Collection[str] = ()) -> None:
    """Run the missing steps of some methods, then write the report from all rows that are whole."""
    pieces = text_pieces(protocol)
    wanted = replace(protocol, tasks=()) if "tasks" in skip else protocol
    (kept / ROWS).mkdir(parents=True, exist_ok=True)
    for method in methods:
        run_row(find_recipe(method), wanted, pieces, out, speed="speed" not in skip, on_step=say)
        shutil.copy2(out / ROWS / f"{method}.json", kept / ROWS)
    results = collect(protocol, pieces, out, METHODS.split(","))
    if not results["rows"]:
        print("no row is whole yet, so there is no report")
        return
    write_json(kept / "results.json", results)
    print(f"wrote {write_report(results, kept).relative_to(ROOT)}")


def take_kept_rows(kept: Path, out: Path) -> None:
    """Copy rows that are kept to where jobs go on from them, but for those that are there and no older."""
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    for file in (kept / ROWS).glob("*.json"):
        there = out / ROWS / file.name
        if not there.exists() or there.stat().st_mtime < file.stat().st_mtime:
            shutil.copy2(file, there)


def say(method: str, step: str) -> None:
    """Tell what begins."""
    print(f"{method}: {step}", flush=True)


def comparison(calibration: str = "wikitext2", max_windows: int | None = None) -> Protocol:
    """What every method goes through."""
    text = CALIBRATIONS[calibration]
    for file in (text, DATA / "wiki.test.raw"):
        if not file.exists():
            sys.exit(f"{file} is missing: set ARBLLM_DATA to the directory that holds {file.parent.name}/{file.name}")
    return Protocol(
        str(demonstration_model()),
        Calibration(str(text), JOINT_WINDOWS, CONTEXT, distill_windows=DISTILL_WINDOWS),
        (str(DATA / "wiki.test.raw"),),
        CONTEXT,
        max_windows,
        TASKS,
        str(DATA.parent / "qa"),
        ITEMS,
    )


def folders(calibration: str) -> tuple[Path, Path]:
    """Where the report and its rows are kept, and where checkpoints are."""
    name = "comparison" if calibration == "wikitext2" else f"comparison-{calibration}"
    return ROOT / "docs" / name, ROOT / "out" / name


if __name__ == "__main__":
    main()
