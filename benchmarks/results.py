"""Perplexity, size and cost of every method on SmolLM2-135M: writes docs/results.md.

    python benchmarks/results.py                         the paper's methods, as far as not there yet, then the page
    python benchmarks/results.py --row arb-rc            one row
    python benchmarks/results.py --max-windows 50        the first 50 windows of the text alone
    python benchmarks/results.py --table                 only the page, from the rows that are there

Each row is `arbllm quantize`, then `arbllm eval` for every 50 windows of the text. They leave their JSON in
docs/results, so that an interrupted run goes on where it stopped; the checkpoints go to out/results. The text is
WikiText-2 (raw), `wiki.valid.raw` to calibrate on and `wiki.test.raw` to evaluate on, looked for under $ARBLLM_DATA or
../shared/data. The rows of arb-rcx and of its peers are those that benchmarks/compare.py left in docs/comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arbllm.evaluation.compare import PIECE, perplexity_of
from arbllm.evaluation.frontier import shown
from arbllm.evaluation.methods import DISTILLATION_STEPS
from arbllm.evaluation.methods import FULL as FP16
from arbllm.evaluation.protocol import ROWS
from arbllm.evaluation.steps import read_row
from arbllm.evaluation.write_report import markdown
from arbllm.evaluation.written import markdown_table
from budgets import JOINT, budget_table
from commands import arbllm, demonstration_model
from questions import question_table

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("ARBLLM_DATA", ROOT.parent / "shared" / "data")) / "wikitext2"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "results"
CHECKPOINTS = ROOT / "out" / "results"
FULL = "full precision"
METHODS = ("billm", "arb", "arb-x", "arb-rc")
PAPER = (FULL, *METHODS)
WINDOWS, JOINT_WINDOWS, DISTILL_WINDOWS, CONTEXT = 16, 32, 128, 2048
COMPARED = ROOT / "docs" / "comparison" / "results.json"
COMPARISONS = {"comparison": "", "comparison-c4": " on C4"}  # folder of docs -> what it adds to the name of a row
TEXT_WINDOWS = 148
PATHS = ("model", "path", "text", "texts")

_PAGE = """\
# Results

SmolLM2-135M-Instruct (float16 weights from its Q4_1 GGUF file), WikiText-2 test, {windows} of {context} tokens: the
text joined, tokenised once, cut into windows that do not overlap. Calibrated on {calibration} windows of {context}
tokens of the validation text, seed 0. Every method with the column-group bitmap (`--partition cgb`), two groups,
blocks of 128 columns, 15 iterations, and otherwise the defaults: `billm` has the paper's bitmap here, too, which as
published it has not.

{table}

![Perplexity against true bits per weight](results.svg)

{joint}Bits are those of the linear layers: *nominal* counts signs alone, as papers do; *true* counts everything stored
(signs, bitmaps, second signs, scales). Megabytes are those of the whole checkpoint: embeddings, which are also the
head, stay in 16 bits and make most of the {rest:.0f} MB that are not linear layers. Output error is the mean over
linears of tr(D H Dᵀ) / tr(W H Wᵀ). Peak memory is that of `arbllm quantize` on {machine}, the model's loading included.

`python benchmarks/results.py{option}` writes this page ([figures](results)); `make results` runs what is missing of
all tables but that of budgets, in two days on two cores if nothing is there. `$ARBLLM_DATA` must hold
`wikitext2/wiki.valid.raw`, `wikitext2/wiki.test.raw`, and the questions under `qa/`, named as in
[commands](commands.md). Made with arbllm {arbllm}, PyTorch {torch}, transformers {transformers}.
"""


_JOINT = """\
`arb-rcx` with its budget of true bits over the linears, and its peers, calibrated on {windows} windows: of the
validation text of WikiText-2, or of C4 where that is said. Rows named by a budget alone had each block's scales
and norms tuned after it was solved, *distilled* ones {steps} steps of distillation on {lessons} windows of the same
text as well, *untuned* ones neither.
`rtn` and `gptq` round to uniform grids, one a row and 128 columns, clipped by search; `gptq-act-order` takes
columns by falling energy of their inputs; `hqq` is the library of that name, with groups of 64; all in the same loop
on the same windows. Their true bits count scales and zeros, and an order of columns where there is one; their megabytes
are those that packed weights would take. *QA* is the mean accuracy; by task, with standard errors and samples of text:
[the comparison](comparison/report.html), which `python benchmarks/compare.py{option}` writes.
The text that methods are calibrated on is of the kind that they are tested on, and distillation makes the most of it;
what *QA* can tell, and which checkpoints were asked, is in the [notes](notes.md).

{table}
"""

_QUESTIONS = (
    "Accuracy by task; the last column leaves out BoolQ, where always yes is right 62 % of the time, 64 % of these 200:"
)

_BUDGETS = """\
`arb-rcx` by its budget, perplexity on the first {windows} windows and how many times full precision's that is; GPTQ
on the same calibration (`python benchmarks/compare.py --budgets --max-windows {windows}`):"""


def main() -> None:
    """Run the missing rows, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=PAPER, help="a row to run; by default all")
    parser.add_argument("--table", action="store_true", help="only write the page from the rows that are there")
    parser.add_argument(
        "--max-windows", type=int, default=TEXT_WINDOWS, help="only so many windows of the text; the page says so"
    )
    options = parser.parse_args()
    if not options.table:
        check_data()
        for row in options.row or PAPER:
            run_row(row, options.max_windows)
    write_page(options.max_windows)


def check_data() -> None:
    """End with a readable message if the text is not there."""
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        if not (DATA / name).exists():
            sys.exit(f"{DATA / name} is missing: set ARBLLM_DATA to the directory that holds wikitext2/{name}")


def run_row(row: str, max_windows: int) -> None:
    """Quantize and evaluate one row, as far as that has not been done."""
    if evaluation(row, max_windows):
        return
    FIGURES.mkdir(parents=True, exist_ok=True)
    model = demonstration_model()
    if row != FULL:
        model = CHECKPOINTS / row.replace(" ", "-")
        if not model.exists():
            quantization_file(row).unlink(missing_ok=True)
        once(quantization_file(row), lambda: quantize(row, model))
    words = ("eval", model, "--text", DATA / "wiki.test.raw", "--context", str(CONTEXT))
    for start, count in pieces(max_windows):
        command = (*words, "--skip-windows", str(start), "--max-windows", str(count))
        once(piece_file(row, start, count), partial(arbllm, *command))
    print(f"{row}: perplexity {evaluation(row, max_windows)['perplexity']:.2f}")


def quantization_file(row: str) -> Path:
    """Where the figures of `arbllm quantize` are kept."""
    return FIGURES / f"{row.replace(' ', '-')}.quantize.json"


def pieces(max_windows: int) -> list[tuple[int, int]]:
    """(first window, windows) of each piece of the text."""
    return [(start, min(PIECE, max_windows - start)) for start in range(0, max_windows, PIECE)]


def piece_file(row: str, start: int, count: int) -> Path:
    """Where the figures of `arbllm eval` on one piece of the text are kept."""
    return FIGURES / f"{row.replace(' ', '-')}.eval-{start}-{start + count}.json"


def evaluation(row: str, max_windows: int) -> dict[str, Any]:
    """The figures of `arbllm eval` over all pieces, as if it were one; empty while one is missing."""
    files = [piece_file(row, start, count) for start, count in pieces(max_windows)]
    if not all(file.exists() for file in files):
        return {}
    parts = [json.loads(file.read_text()) for file in files]
    return parts[0] | {"perplexity": perplexity_of(parts), "windows": sum(part["windows"] for part in parts)}


def quantize(row: str, out: Path) -> dict[str, Any]:
    """Quantize the demonstration model as a row says."""
    calibration = ("--calibration", DATA / "wiki.valid.raw", "--windows", str(WINDOWS), "--window-length", str(CONTEXT))
    method = ("--method", row, "--partition", "cgb")
    return arbllm("quantize", demonstration_model(), out, *method, *calibration, "--overwrite")


def once(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result kept at `path`, or that of `work`, which is then kept there together with what it was made on."""
    if path.exists():
        return json.loads(path.read_text())
    versions = {package: version(package) for package in ("arbllm", "torch", "transformers")}
    figures = {name: value for name, value in work().items() if name not in PATHS}
    result = figures | {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "versions": versions}
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def load_rows(max_windows: int = TEXT_WINDOWS) -> dict[str, dict[str, Any]]:
    """Row name -> its figures: those of `eval`, with those of `quantize` under that key. Missing rows are left out."""
    rows = {}
    for row in PAPER:
        if measured := evaluation(row, max_windows):
            rows[row] = measured
            quantized = quantization_file(row)
            rows[row]["quantize"] = json.loads(quantized.read_text()) if quantized.exists() else {}
    return rows


def compared_rows(max_windows: int) -> dict[str, dict[str, Any]]:
    """The same of benchmarks/compare.py, full precision left out, by family and true bits."""
    rows: dict[str, dict[str, Any]] = {}
    for folder, suffix in COMPARISONS.items():
        for file in (ROOT / "docs" / folder / ROWS).glob("*.json"):
            done = read_row(file)
            texts = done.get("texts", {}).get("wiki.test.raw", {})
            parts = [texts.get(f"{start}-{start + count}") for start, count in pieces(max_windows)]
            if file.stem != FP16 and all(parts):
                rows[file.stem + suffix] = {"perplexity": perplexity_of(parts), "quantize": as_quantized(done)}
    return dict(sorted(rows.items(), key=_family_and_bits))


def _family_and_bits(item: tuple[str, dict[str, Any]]) -> tuple[str, float, str]:
    name, figures = item
    words = [word for word in name.split("-") if word.isalpha()]
    return "-".join(words[:2]), figures["quantize"]["true_bits_per_weight"], name


def as_quantized(done: dict[str, Any]) -> dict[str, Any]:
    """What a row of a comparison knows of quantization, under the names that `arbllm quantize` has for it."""
    found = done["quantize"]
    names = {"nominal_bits": "nominal_bits_per_weight", "true_bits": "true_bits_per_weight", "bytes": "bytes_on_disk"}
    return found | {name: found[short] for short, name in names.items()}


def write_page(max_windows: int = TEXT_WINDOWS) -> None:
    """Write docs/results.md from the rows that are there."""
    rows = load_rows(max_windows)
    full = rows.pop(FULL, None)
    if full is None or not rows:
        sys.exit("the page needs the row 'full precision' and one more")
    job = next(iter(rows.values()))["quantize"]
    whole = max_windows == TEXT_WINDOWS
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(
        _PAGE.format(
            windows=f"{'' if whole else 'the first '}{full['windows']} windows",
            context=CONTEXT,
            calibration=WINDOWS,
            table=table(rows, max_windows, job["dense_bytes"]),
            joint=joint_section(max_windows, job["dense_bytes"]),
            rest=(job["bytes_on_disk"] - job["linear_bytes"]) / 1e6,
            machine=job["machine"],
            option="" if whole else f" --max-windows {max_windows}",
            **full["versions"],
        )
    )
    print(f"wrote {PAGE.relative_to(ROOT)}")


def joint_section(max_windows: int, dense: int) -> str:
    """The tables of arb-rcx and its peers, with what they are; empty without a row of them."""
    tables, shown_already, option = [], set(), ""
    if COMPARED.exists():
        results = json.loads(COMPARED.read_text())
        windows = results["settings"]["max_windows"]
        option = f" --max-windows {windows}" if windows else ""
        tables = [f"On {f'the first {windows}' if windows else 'all'} windows, and {results['settings']['limit']} "
                  "questions of each of seven tasks:", markdown(results).rstrip()]  # fmt: skip
        if asked := question_table(results["rows"]):
            tables += [_QUESTIONS, asked]
        shown_already = {row["method"] for row in results["rows"]}
    budgets = compared_rows(PIECE)
    if tables and budgets:
        full = evaluation(FULL, PIECE)["perplexity"]
        tables += [_BUDGETS.format(windows=PIECE), budget_table(budgets, full)]
        shown_already |= {method for method in budgets if method.startswith(JOINT)}
    for windows in (TEXT_WINDOWS, PIECE):
        rows = {row: figures for row, figures in compared_rows(windows).items() if row not in shown_already}
        shown_already |= rows.keys()
        if rows:
            tables += [f"Perplexity alone, on {windows} windows:", table(rows, windows, dense)]
    return (
        _JOINT.format(
            windows=JOINT_WINDOWS,
            steps=DISTILLATION_STEPS,
            lessons=DISTILL_WINDOWS,
            option=option,
            table="\n\n".join(tables),
        )
        + "\n"
        if tables
        else ""
    )


def table(rows: dict[str, dict[str, Any]], max_windows: int, dense: int) -> str:
    """Rows over so many windows as a table in Markdown, below the dense model with its bytes."""
    head = ("", "nominal bits", "true bits", "MB", "perplexity", "ratio", "output error", "peak GB")
    full = evaluation(FULL, max_windows)["perplexity"]
    lines = [(FULL, "16", "16", f"{dense / 1e6:.1f}", f"{full:.2f}", "1.00", "", "")]
    for row, figures in rows.items():
        perplexity, job = figures["perplexity"], figures["quantize"]
        bits = (f"{job['nominal_bits_per_weight']:.2f}", f"{job['true_bits_per_weight']:.2f}")
        ratio = (f"{job['bytes_on_disk'] / 1e6:.1f}", shown(perplexity), shown(perplexity / full))
        peak = f"{job['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in job else ""  # of a job in one piece
        lines.append((row, *bits, *ratio, f"{job['output_error']:.4f}", peak))
    return markdown_table(head, lines)


if __name__ == "__main__":
    main()
