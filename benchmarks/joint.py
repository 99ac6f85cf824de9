"""Output error and time of arb-rcx on three real matrices at several budgets of bits, beside arb-rc and its reference.

    python benchmarks/joint.py [--data ../shared/data] [--repeats 3] [--page]

Single-threaded. The matrices and their Hessians are read from DATA/reference. With --page, writes docs/joint.md.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from arbllm.config import BinarizationConfig
from arbllm.solver import quantize_matrix
from solver import DATA, ROOT, Rows, as_markdown, as_table, timed

PAGE = ROOT / "docs" / "joint.md"
BITS = (1.1, 1.3, 1.6, 2.0, 2.25, 2.3, 2.5, 2.85, 3.25, 4.0)
PLAIN_BITS = (1.1, 2.25, 2.85)
HEADINGS = ("matrix", "method", "true bits", "output error", "seconds", "x arb-rc")

_PAGE = """\
# Beyond the paper: arb-rcx

`arb-rcx` refines row scales, column scales, signs and groups together under the calibrated error, which the paper
leaves open. Six things make the difference:

- **One metric.** H = XᵀX is what a layer's inputs X give, U the upper Cholesky factor of its inverse, U_bb the part
  of it at the columns of a block. What a block's error E = W - Ŵ costs, once later columns have made up for it, is
  tr(E P Eᵀ) with P = (U_bbᵀ U_bb)⁻¹. Under it the row scales of all signs and groups solve one linear system, and so
  do the column scales; then the weights, column by column, move to the best of their levels.
- **Signs that are not stored.** A weight of k stored signs has 2^(k+1) levels: one bit more follows from the first
  signs of the rows above it in its column, by a convolutional code with 32 states, as in trellis-coded quantization
  (M. Marcellin and T. Fischer, 1990). Rows do not depend on each other under H, so the best signs of a whole column,
  the others being fixed, are a shortest path, which the Viterbi algorithm finds in every sweep. The levels have fixed
  ratios, so that a segment has one row scale and one column scale instead of one for every sign and group. Without it
  (`--no-trellis`) columns have one or two signs and one, two or four groups, each with scales of its own.
- **Columns in order of their bits.** Columns come in kinds of 1, 2, 3 or 4 bits a weight, two neighbouring kinds to a
  matrix. The cheaper kind is solved first, so that the better columns make up for its errors; the better kind goes to
  the columns whose energy no other column can make up for, ||w_j||² / (H⁻¹)_jj. A segment holds columns of one kind.
- **Outlying inputs.** A few inputs are hundreds of times as large as the rest, on a few tokens. Their columns (1 % at
  most, where H_jj is over 20 times the mean) come last, each a segment of its own, whose row scales describe every
  weight to 1.5 %. The error of the other columns' outputs, which is what all other tokens see, falls by a quarter to
  four fifths.
- **Cheap scales.** A segment of about 512 columns shares its row scales. Row and column scales are codes of 8 bits,
  logarithmic, with one float16 step for each segment; the solver knows the rounded scales and fits the rest to them.
- **Refinement under H itself.** Once all segments are solved, each is refined in turn with the others fixed, so that
  earlier columns learn of what later ones could not do.

In a whole model three things are added. Bits go where they do most: gradients tell how much each linear's error
raises the loss, and since an error that stays the same on all tokens does other harm than they foretell, all linears
of one kind in a third of the depth are put in error together, as quantization will, and the divergence of the
predictions is measured. In SmolLM2-135M keys and values get the most bits, queries and outputs of attention the
fewest (`arbllm inspect` shows the division). H is measured on so many tokens only, and what it shows of correlations
is partly chance: all H_jj are raised by sqrt(inputs / tokens) of themselves before H is used, which costs error on
the text of the calibration and saves it on other text. And after a block is solved, its scales and norms are tuned
until it puts out what the dense model has there, so that it also makes up for blocks before it. With `--distill`,
scales and norms of all blocks are trained together in the end, toward the predictions of the dense model, which reads
the text first: where both fit in memory, that does more than any other step after the solver; `arbllm distill` does
it for a checkpoint that is there already.

Errors are output errors, tr(D H Dᵀ) / tr(W H Wᵀ), on three linear layers of SmolLM2-135M; bits count everything
stored; times are processor seconds of one thread, medians of {repeats}. The reference is the implementation of the
paper's authors.

{table}

`python benchmarks/joint.py --page` writes this page. It needs the matrices, their Hessians and the reference's
figures in `$ARBLLM_DATA/reference`, which are not part of this repository.
"""


def main() -> None:
    """Print the table, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds reference/")
    parser.add_argument("--repeats", type=int, default=3, help="the median time of so many runs is shown")
    parser.add_argument("--page", action="store_true", help="also write docs/joint.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.data / "reference", options.repeats)
    Console(width=120).print(as_table(HEADINGS, rows))
    if options.page:
        PAGE.write_text(_PAGE.format(table=as_markdown(HEADINGS, rows), repeats=options.repeats))
        print(f"wrote {PAGE.relative_to(ROOT)}")


def measure(folder: Path, repeats: int) -> Rows:
    """For each matrix the reference's arb-rc + CGB, ours, and arb-rcx at all budgets."""
    known = json.loads((folder / "reference.json").read_text())
    tensors = load_file(folder / "reference.safetensors")
    rows: Rows = []
    for name in known:
        weight, hessian = tensors[f"{name}.weight"], tensors[f"{name}.hessian"]
        label = f"{name.removeprefix('layers.4.')} {'x'.join(map(str, weight.shape))}"
        theirs = known[name]["arb-rc+cgb"]
        configs = {"arb-rc + CGB": BinarizationConfig("arb-rc")}
        configs |= {f"arb-rcx {bits}": BinarizationConfig(bits=bits) for bits in BITS}
        configs |= {f"arb-rcx {bits}, no trellis": BinarizationConfig(bits=bits, trellis=False) for bits in PLAIN_BITS}
        unit = None
        for method, config in configs.items():
            matrix, seconds = timed(partial(quantize_matrix, weight, hessian, config), repeats)
            assert matrix.report
            if unit is None:  # the reference stores the same tensors, had it packed them
                unit = seconds
                same = f"{matrix.true_bits:.3f}", f"{theirs['output_error']:.4f}", "", ""
                rows.append((label, "arb-rc + CGB, reference", *same))
            figures = f"{matrix.true_bits:.3f}", f"{matrix.report.output_error:.4f}", f"{seconds:.2f}"
            rows.append((label, method, *figures, f"{seconds / unit:.1f}"))
    return rows


if __name__ == "__main__":
    main()
