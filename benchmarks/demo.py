"""The demonstration: SmolLM2-135M binarized with arb-rc in a few minutes, and compared with the original.

Everything it needs is installed by `make install`; nothing is downloaded. It calibrates on the built-in text, the
language reference that every Python carries, and measures perplexity on the part of that text which calibration never
sees.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from commands import arbllm, demonstration_model

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The Python programming language is"
CALIBRATION_WINDOWS, CONTEXT = 16, 1024
EVALUATION_WINDOWS = 16


def main() -> None:
    """Quantize, evaluate both models, let both write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="where the packed checkpoint goes")
    packed = parser.parse_args().out
    start = time.perf_counter()
    dense = demonstration_model()
    job = arbllm(
        "quantize", dense, packed, "--method", "arb-rc", "--calibration", "builtin",
        "--windows", str(CALIBRATION_WINDOWS), "--window-length", str(CONTEXT), "--overwrite",
    )  # fmt: skip
    scores = {name: evaluate(model) for name, model in (("original", dense), ("binarized", packed))}
    console = Console()
    console.print(comparison(job, scores))
    for name, model in (("original", dense), ("binarized", packed)):
        text = arbllm("generate", model, PROMPT, "--max-new-tokens", "60")["text"]
        console.print(Panel(f"[bold]{PROMPT}[/]{text}", title=f"{name} writes", title_align="left", width=100))
    console.print(
        f"Done in {(time.perf_counter() - start) / 60:.1f} minutes. The packed checkpoint: {packed}", highlight=False
    )


def evaluate(model: Path) -> dict[str, Any]:
    """Perplexity on the held-out part of the built-in text."""
    return arbllm(
        "eval", model, "--text", "builtin", "--context", str(CONTEXT), "--max-windows", str(EVALUATION_WINDOWS)
    )


def comparison(job: dict[str, Any], scores: dict[str, dict[str, Any]]) -> Table:
    """The table of both models."""
    original, binarized = scores["original"], scores["binarized"]
    table = Table(title="SmolLM2-135M-Instruct, before and after", title_justify="left")
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("binarized", justify="right")
    for name, before, after in (
        ("perplexity, held-out text", f"{original['perplexity']:.2f}", f"{binarized['perplexity']:.2f}"),
        ("bytes", f"{job['dense_bytes']:,}", f"{job['bytes_on_disk']:,}"),
        ("bytes of the linear layers", f"{job['dense_linear_bytes']:,}", f"{job['linear_bytes']:,}"),
        ("true bits a weight", "16", f"{job['true_bits_per_weight']:.2f}"),
        ("nominal bits a weight", "16", f"{job['nominal_bits_per_weight']:.2f}"),
        ("seconds to quantize", "", f"{job['seconds']:.0f}"),
        ("seconds to evaluate", f"{original['seconds']:.0f}", f"{binarized['seconds']:.0f}"),
        ("peak memory to quantize, GB", "", f"{job['peak_memory_bytes'] / 1e9:.2f}"),
    ):
        table.add_row(name, before, after)
    return table


if __name__ == "__main__":
    main()
