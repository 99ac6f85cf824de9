"""How many rounds the alternating loops need, over sizes and kinds of matrices: docs/convergence.md and its picture.

    python benchmarks/convergence.py [--data ../shared/data]

Single-threaded, some minutes. The real matrices and their Hessians are read from DATA/reference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from arbllm import segments
from arbllm.binarize import steps
from arbllm.binarize.alternating import fit_arb
from arbllm.binarize.row_column import fit_arb_rc
from arbllm.binarize.steps import Fit
from arbllm.config import BinarizationConfig
from arbllm.solver import quantize_matrix
from plot_results import COLOURS
from solver import DATA, ROOT, Rows, as_markdown, as_table

PAGE = ROOT / "docs" / "convergence.md"
PICTURE = ROOT / "docs" / "convergence.svg"

# Early stops of the package, switched off so that the loops run on until a round no longer lowers the error.
EARLY_STOPS = ((steps, "TOLERANCE"), (segments, "ENOUGH"))
NEAR = 0.01
FIT_ROUNDS, JOINT_ROUNDS = 200, 30
SIZES = tuple(2**power for power in range(6, 13))
WIDTHS = tuple(2**power for power in range(6, 10))
WIDTH, WIDTH_ROWS, WIDTH_DRAWS = 128, 512, 3
COLUMNS = 512
# Rows solved for one random point of the picture, about: small matrices are drawn more often.
ROWS_SOLVED, MOST_DRAWS = 2048, 3
DEGREES = 4
CLIPS = (None, 8, 5, 3)

GAUSSIAN, STUDENT, REAL = "Gaussian", "Student t", "real"
KINDS = (GAUSSIAN, STUDENT, REAL)
METHODS = ("arb, first order", "arb, second", "arb-rc, first", "arb-rc, second", "arb-rcx")
STYLES = ((COLOURS["arb"], ":"), (COLOURS["arb"], "-"), (COLOURS["arb-rc"], ":"), (COLOURS["arb-rc"], "-"),
          (COLOURS["arb-rcx"], "-"))  # fmt: skip
AFTER = (0, 3, 15)

_PAGE = """\
# Convergence

The paper asks how the convergence of its alternating loop depends on the size of the matrix. **It hardly does; the
largest weights decide.** From 64 to 4096 rows, the rounds until the error is within 1 % of its limit stay the same on
Gaussian matrices and on layers of a language model: {arb_first} for ARB with one sign a weight and {arb_second} with
two, {rc_first} and {rc_second} for ARB-RC, {joint} for `arb-rcx`. ARB and ARB-RC need a little less in wider blocks;
`arb-rcx` takes {joint_wide} in real blocks of {narrowest} to {widest} columns.

On heavy-tailed matrices (Student t, {degrees} degrees of freedom) of the same sizes, ARB and ARB-RC with two signs take
{student} rounds: a row with one huge weight creeps to its limit, and the sum over all rows waits for it. Size comes in
where more weights have more extreme ones among them. With the huge weights clipped, the rounds fall to nearly those of
a Gaussian matrix (third table). So the paper's 15 rounds are plenty for the layers measured here and, as far as they
are like Gaussian ones, for larger layers; they are too few where single weights stick out by eight standard deviations.

![Rounds to within 1 % of the limit](convergence.svg)

*Rounds to within 1 % of the limit: above by rows, below by columns of a block; lines are medians, bands the range.*

ARB treats every row by itself: the rows cannot matter but for the average over them. The first order of ARB-RC keeps
its signs and fits one product r c^T to |W|, which nearly is one: its start is within 1 % of the limit. The second order
moves signs as well, round by round, and that is what takes time.

## How it was measured

Random matrices have n rows and min(n, {columns}) columns, 1 to {most_draws} draws each; real ones are the first n rows
and {columns} columns of three linear layers of SmolLM2-135M (q_proj, k_proj as far as its 192 rows go, down_proj). The
loops of the paper know one block only, so more columns would tell nothing new: ARB and ARB-RC run on the first
{width} columns as one zone, without groups, on the plain squared error. `arb-rcx` solves the whole matrix at 2.25 true
bits; its rounds are those of the refinement under the Hessian that follows its first pass. The Hessians are real for
the real matrices, and those of correlated inputs of unequal energy for the random ones.

The limit is the error where the loop comes to rest, or after {fit_rounds} rounds ({joint_rounds} for `arb-rcx`), with
no early stop; `quantize` itself stops once the error hardly falls. Cells are the median of the rounds to within 1 % of
the limit, and the range where there is one.

## By rows

{by_rows}

## By columns of a block

{width_rows} rows (k_proj: 192) and {columns} columns, {width_draws} draws. For `arb-rcx` a block is the columns that
share row scales.

{by_width}

## By the largest weights

Student t, {width_rows} x {columns}, clipped at so many standard deviations, {width_draws} draws.

{by_clip}

## What the rounds buy

Error above the limit at the start, after 3 and after 15 rounds, in per cent; medians over the sizes of the first table.

{gains}

`python benchmarks/convergence.py` writes this page.
"""

Curve = tuple[float, ...]


class Matrix(NamedTuple):
    """A weight (n, m), its Hessian (m, m), and the columns of a block, of the paper's methods and of `arb-rcx`."""

    weight: Tensor
    hessian: Tensor
    block_size: int = WIDTH
    scale_block: int = COLUMNS


class Point(NamedTuple):
    """The error curves of one kind and size, one a matrix, for each of `METHODS`."""

    kind: str
    size: int
    curves: tuple[tuple[Curve, ...], ...]

    def rounds(self, method: int) -> list[int]:
        """Rounds to within `NEAR` of the limit, of every matrix."""
        return [next(t for t, e in enumerate(curve) if e <= (1 + NEAR) * min(curve)) for curve in self.curves[method]]

    def excess(self, method: int, rounds: int) -> float:
        """Median of the error above the limit after so many rounds."""
        return median(curve[min(rounds, len(curve) - 1)] / min(curve) - 1 for curve in self.curves[method])

    def cells(self) -> tuple[str, ...]:
        """One table cell a method."""
        every = [self.rounds(method) for method in range(len(METHODS))]
        return tuple(
            f"{median(rounds):g}" + (f" ({min(rounds)}-{max(rounds)})" if min(rounds) < max(rounds) else "")
            for rounds in every
        )


def main() -> None:
    """Measure, print, write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds reference/")
    folder = parser.parse_args().data / "reference"
    torch.set_num_threads(1)
    for module, constant in EARLY_STOPS:
        assert hasattr(module, constant), f"{module.__name__} has no {constant} any more: see EARLY_STOPS"
        setattr(module, constant, 0.0)
    console = Console(width=140)
    with console.status("measuring") as status:
        by_rows = [measured(kind, n, matrices, status.update) for kind, n, matrices in rows_wanted(folder)]
        by_width = [measured(kind, k, matrices, status.update) for kind, k, matrices in widths_wanted(folder)]
        by_clip = [measured(STUDENT, clip or 0, clipped(clip), status.update) for clip in CLIPS]
    tables = {
        "by_rows": (("matrix", "rows", *METHODS), sized(by_rows)),
        "by_width": (("matrix", "columns", *METHODS), sized(by_width)),
        "by_clip": (("clipped at", *METHODS), [(str(point.size or "never"), *point.cells()) for point in by_clip]),
        "gains": (("matrix", *METHODS), gains(by_rows)),
    }
    console.print(*(as_table(*table) for table in tables.values()))
    write_page({name: as_markdown(*table) for name, table in tables.items()}, by_rows, by_width)
    draw(by_rows, by_width)
    console.print(f"wrote {PAGE} and {PICTURE}")


def measured(kind: str, size: int, matrices: Iterable[Matrix], progress: Callable[[str], None]) -> Point:
    """All methods on all matrices of one kind and size."""
    progress(f"{kind}, {size}")
    solved = [
        (*(fit_curve(fit, order, matrix) for fit in (fit_arb, fit_arb_rc) for order in (1, 2)), joint_curve(matrix))
        for matrix in matrices
    ]
    return Point(kind, size, tuple(zip(*solved, strict=True)))


def fit_curve(fit: Callable[[Tensor, Tensor, int, int, None], Fit], order: int, matrix: Matrix) -> Curve:
    """Error of the first block, as one zone, after each round."""
    block = matrix.weight[:, : matrix.block_size]
    return fit(block, torch.ones_like(block, dtype=torch.bool), order, FIT_ROUNDS, None).errors


def joint_curve(matrix: Matrix) -> Curve:
    """Calibrated error of `arb-rcx` after its first pass and each round of refinement."""
    config = BinarizationConfig(method="arb-rcx", scale_block=matrix.scale_block, iterations=JOINT_ROUNDS)
    report = quantize_matrix(matrix.weight, matrix.hessian, config).report
    assert report
    (history,) = report.error_history
    return history


def rows_wanted(folder: Path) -> Iterator[tuple[str, int, list[Matrix]]]:
    """Kind, number of rows and matrices of the first table."""
    for kind in (GAUSSIAN, STUDENT):
        for n in SIZES:
            draws = max(1, min(ROWS_SOLVED // n, MOST_DRAWS))
            yield kind, n, [random_matrix(kind, n, min(n, COLUMNS), seed) for seed in range(draws)]
    reals = real_matrices(folder)
    for n in SIZES:
        chosen = [matrix._replace(weight=matrix.weight[:n]) for matrix in reals if len(matrix.weight) >= n]
        if chosen:
            yield REAL, n, chosen


def widths_wanted(folder: Path) -> Iterator[tuple[str, int, list[Matrix]]]:
    """Kind, columns of a block and matrices of the second table."""
    for kind in KINDS:
        matrices = real_matrices(folder) if kind == REAL else drawn(kind)
        for width in WIDTHS:
            yield kind, width, [Matrix(matrix.weight[:WIDTH_ROWS], matrix.hessian, width, width) for matrix in matrices]


def clipped(clip: int | None) -> list[Matrix]:
    """Student t matrices, what exceeds so many standard deviations cut off."""
    matrices = drawn(STUDENT)
    if clip is None:
        return matrices
    limits = [clip * float(matrix.weight.std()) for matrix in matrices]
    return [m._replace(weight=m.weight.clamp(-limit, limit)) for m, limit in zip(matrices, limits, strict=True)]


def drawn(kind: str) -> list[Matrix]:
    """The random matrices of the second and third table."""
    return [random_matrix(kind, WIDTH_ROWS, COLUMNS, seed) for seed in range(WIDTH_DRAWS)]


def random_matrix(kind: str, rows: int, columns: int, seed: int) -> Matrix:
    """Independent weights; inputs are mixtures of twice as many sources, their energies log-normal."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    weight = normal(rows, columns)
    if kind == STUDENT:
        weight = weight / normal(DEGREES, rows, columns).square().mean(0).sqrt()
    mixing = normal(columns, 2 * columns) / columns**0.5 * normal(columns, 1).exp()
    return Matrix(weight, mixing @ mixing.T)


def real_matrices(folder: Path) -> list[Matrix]:
    """The first columns of the reference matrices, and their Hessians."""
    tensors = load_file(folder / "reference.safetensors")
    return [
        Matrix(tensors[f"{name}.weight"][:, :COLUMNS].float(), tensors[f"{name}.hessian"][:COLUMNS, :COLUMNS].float())
        for name in json.loads((folder / "reference.json").read_text())
    ]


def sized(points: list[Point]) -> Rows:
    """Table rows of points."""
    return [(point.kind, str(point.size), *point.cells()) for point in points]


def gains(points: list[Point]) -> Rows:
    """Per kind: the error above the limit after `AFTER` rounds, medians over sizes."""
    rows: Rows = []
    for kind in KINDS:
        own = [point for point in points if point.kind == kind]
        cells = (
            ", ".join(f"{100 * median(point.excess(method, rounds) for point in own):.1f}" for rounds in AFTER)
            for method in range(len(METHODS))
        )
        rows.append((kind, *cells))
    return rows


def write_page(tables: dict[str, str], by_rows: list[Point], by_width: list[Point]) -> None:
    """docs/convergence.md, its figures filled in."""
    tame = [point for point in by_rows if point.kind != STUDENT]
    heavy = [point for point in by_rows if point.kind == STUDENT]
    names = ("arb_first", "arb_second", "rc_first", "rc_second", "joint")
    PAGE.write_text(
        _PAGE.format(
            **tables,
            **{name: span(tame, (method,)) for method, name in enumerate(names)},
            joint_wide=span([point for point in by_width if point.kind == REAL], (len(METHODS) - 1,)),
            narrowest=WIDTHS[0],
            widest=WIDTHS[-1],
            student=span(heavy, (1, 3)),
            degrees=DEGREES,
            width=WIDTH,
            width_rows=WIDTH_ROWS,
            width_draws=WIDTH_DRAWS,
            columns=COLUMNS,
            most_draws=MOST_DRAWS,
            fit_rounds=FIT_ROUNDS,
            joint_rounds=JOINT_ROUNDS,
        )
    )


def span(points: list[Point], methods: tuple[int, ...]) -> str:
    """The least and the largest median of rounds."""
    medians = [median(point.rounds(method)) for point in points for method in methods]
    return f"{min(medians):g} to {max(medians):g}" if min(medians) < max(medians) else f"{medians[0]:g}"


def draw(by_rows: list[Point], by_width: list[Point]) -> None:
    """docs/convergence.svg: one column of panels a kind, rows above, columns of a block below."""
    pyplot.rcParams.update({"svg.hashsalt": "arbllm", "font.family": "sans-serif", "font.size": 11})
    figure, panels = pyplot.subplots(2, len(KINDS), figsize=(9, 5.6), sharex="row", sharey="col", layout="constrained")
    for line, points, label in zip(panels, (by_rows, by_width), ("rows", "columns of a block"), strict=True):
        for axes, kind in zip(line, KINDS, strict=True):
            draw_panel(axes, [point for point in points if point.kind == kind])
            axes.set_xlabel(label)
    for axes in panels[0]:
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    for axes, kind in zip(panels[0], KINDS, strict=True):
        axes.set_title({STUDENT: f"Student t, {DEGREES} degrees", REAL: "SmolLM2-135M"}.get(kind, kind))
    figure.supylabel("rounds to within 1 % of the limit")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False, fontsize=10)
    figure.savefig(PICTURE, metadata={"Date": None})


def draw_panel(axes: Axes, points: list[Point]) -> None:
    """Medians as lines, the range as a band, of every method."""
    sizes = [point.size for point in points]
    for method, (colour, style) in enumerate(STYLES):
        every = [point.rounds(method) for point in points]
        axes.plot(sizes, [median(rounds) for rounds in every], style, color=colour, label=METHODS[method], linewidth=2)
        axes.fill_between(sizes, list(map(min, every)), list(map(max, every)), color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
