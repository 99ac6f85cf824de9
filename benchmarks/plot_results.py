"""The picture docs/results.svg: perplexity of the paper's methods against true bits, from the rows of results.py.

python benchmarks/plot_results.py [--max-windows N]
"""

from __future__ import annotations

import argparse

import matplotlib as mpl

from results import FULL, ROOT, TEXT_WINDOWS, load_rows

mpl.use("svg")
from matplotlib import pyplot

COLOURS = {"billm": "#8d99ae", "arb": "#e0a458", "arb-x": "#4f8a8b", "arb-rc": "#c8553d", "arb-rcx": "#6a4c93"}


def main() -> None:
    """Read the rows, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-windows", type=int, default=TEXT_WINDOWS, help="rows over so many windows of the text")
    windows = parser.parse_args().max_windows
    rows = load_rows(windows)
    mpl.rcParams.update({"svg.hashsalt": "arbllm", "font.family": "sans-serif", "font.size": 11})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for row, figures in rows.items():
        family = row.partition(" ")[0]
        if row == FULL:
            axes.axhline(figures["perplexity"], color="black", linestyle=":", linewidth=1)
            axes.annotate(f"full precision, {figures['perplexity']:.1f}", (0.99, figures["perplexity"]), (0, 4),
                          xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")  # fmt: skip
            continue
        size, bits = figures["quantize"]["bytes_on_disk"] / 1e6, figures["quantize"]["true_bits_per_weight"]
        axes.scatter(bits, figures["perplexity"], s=size, color=COLOURS[family], zorder=2)
        axes.annotate(f"{row}, {figures['perplexity']:.1f} ({size:.0f} MB)",
                      (bits, figures["perplexity"]), (9, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.set_yscale("log")
    axes.set_yticks((20, 50, 100, 200, 500), labels=("20", "50", "100", "200", "500"))
    axes.minorticks_off()
    axes.margins(x=0.4, y=0.25)
    axes.set_xlabel("true bits per weight of the linear layers, everything stored included")
    axes.set_ylabel("perplexity, WikiText-2 test")
    axes.spines[["top", "right"]].set_visible(False)
    picture = ROOT / "docs" / "results.svg"
    figure.savefig(picture, metadata={"Date": None})
    print(f"wrote {picture.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
