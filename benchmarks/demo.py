"""The demonstration: SmolLM2-135M at 2.25 true bits a weight in a few minutes, compared with the original.

    python benchmarks/demo.py [--out demo] [--readme]

Everything it needs is installed by `make install`; nothing is downloaded. It calibrates on the built-in text, the
language reference that every Python carries, and measures perplexity on the part of that text which calibration never
sees. With `--readme` the table and the samples also replace those in README.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from commands import arbllm, demonstration_model

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ORIGINAL = ROOT / "out" / "SmolLM2-135M-Instruct"
BEGIN, END = "<!-- demo -->\n", "<!-- end of demo -->\n"
PROMPT = "Python is a programming language that"
WINDOWS, CONTEXT = 5, 1024
CALIBRATION = ("--calibration", "builtin", "--windows", "20", "--window-length", "512")
SHORTER = ("--iterations", "0", "--tune", "0", "--distill", "8")
NEW_TOKENS, REPETITION_PENALTY = 40, 1.1

Row = tuple[str, str, str]


def main() -> None:
    """Quantize, evaluate both models, let both write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="where the packed checkpoint goes")
    parser.add_argument("--readme", action="store_true", help="put table and samples into README.md")
    options = parser.parse_args()
    start = time.perf_counter()
    original, binarized = ORIGINAL, options.out
    arbllm("export", demonstration_model(), original, "--overwrite")  # else every command reads the GGUF file anew
    job = quantize(original, binarized)
    rows = comparison(job, evaluate(original), evaluate(binarized))
    samples = {"original": write(original), "binarized": write(binarized)}
    show(rows, samples)
    print(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes. The packed checkpoint: {binarized}")
    if options.readme:
        update_readme(rows, samples)


def quantize(model: Path, out: Path) -> dict[str, Any]:
    """Binarize with the defaults, arb-rcx at 2.25 bits, and 8-bit embeddings, on the built-in text.

    No rounds of refinement under H keep it short; and the scales are tuned for all blocks together, by distillation,
    which for so small a model takes no longer than block by block and does more.
    """
    return arbllm("quantize", model, out, *SHORTER, "--embeddings", "8", *CALIBRATION, "--overwrite")


def evaluate(model: Path) -> dict[str, Any]:
    """Perplexity on the held-out part of the built-in text."""
    return arbllm("eval", model, "--text", "builtin", "--context", str(CONTEXT), "--max-windows", str(WINDOWS))


def write(model: Path) -> str:
    """What the model makes of the prompt: the likeliest tokens, of which a penalty keeps it from running in circles."""
    options = ("--max-new-tokens", str(NEW_TOKENS), "--repetition-penalty", str(REPETITION_PENALTY))
    return arbllm("generate", model, PROMPT, *options)["text"]


def comparison(job: dict[str, Any], original: dict[str, Any], binarized: dict[str, Any]) -> list[Row]:
    """What is compared: a name, the original's figure, the binarized model's."""
    return [
        ("perplexity, held-out text", f"{original['perplexity']:.2f}", f"{binarized['perplexity']:.2f}"),
        ("bytes", f"{job['dense_bytes']:,}", f"{job['bytes_on_disk']:,}"),
        ("bytes of the linear layers", f"{job['dense_linear_bytes']:,}", f"{job['linear_bytes']:,}"),
        ("true bits a weight", "16", f"{job['true_bits_per_weight']:.2f}"),
        ("nominal bits a weight", "16", f"{job['nominal_bits_per_weight']:.2f}"),
        ("seconds to quantize", "", f"{job['seconds']:.0f}"),
        ("seconds to evaluate", f"{original['seconds']:.0f}", f"{binarized['seconds']:.0f}"),
        ("peak memory to quantize", "", f"{job['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]


def show(rows: list[Row], samples: dict[str, str]) -> None:
    """The table and the samples on the terminal."""
    console = Console()
    table = Table("", "original", "binarized", title="SmolLM2-135M-Instruct", title_justify="left")
    for row in rows:
        table.add_row(*row)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    for name, text in samples.items():
        content = f"[bold]{escape(PROMPT)}[/]{escape(text)}"
        console.print(Panel(content, title=f"the {name} model", title_align="left", width=100))


def update_readme(rows: list[Row], samples: dict[str, str]) -> None:
    """Replace what stands between the two marks in README.md."""
    lines = ["| SmolLM2-135M-Instruct | original | binarized |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {before} | {after} |" for name, before, after in rows]
    for name, text in samples.items():
        paragraphs = [fill(line, 110) for line in f"{PROMPT}{text}".splitlines()]
        lines += ["", f"The {name} model continues *{PROMPT}*:", "", "````text", *paragraphs, "````"]
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")
    print("updated README.md")


if __name__ == "__main__":
    main()
