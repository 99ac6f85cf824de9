"""The page and the picture of `arbllm analyze`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from arbllm.errors import ConfigError
from arbllm.evaluation.analyze import (
    LinearShares,
    Remainder,
    Shares,
    by_kind_and_depth,
    mean_shares,
    most_columnar,
)
from arbllm.evaluation.figures import require_matplotlib
from arbllm.evaluation.written import markdown_table, write_json

PAGE, PICTURE, FIGURES = "column-deviation.md", "column-deviation.png", "column-deviation.json"
CELLS = 96


def write_analysis(
    model: str,
    linears: Sequence[LinearShares],
    name: str,
    calibration: str,
    weight: Tensor,
    remainders: Sequence[Remainder],
    out: Path,
) -> str:
    """Write `column-deviation.md`, its picture and its figures into `out`, and return the page.

    Args:
        model: the model's name.
        linears: of `analyze_model`.
        name: the linear that methods were tried on.
        calibration: the text that they were calibrated on, in words.
        weight: its W, (n, m).
        remainders: of `compare_methods`.
        out: a directory; made where it is not there.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    prepare_output(out)
    _heat_maps(name, weight, remainders).savefig(out / PICTURE, dpi=120, metadata={"Software": None})
    write_json(out / FIGURES, to_dict(model, linears, name, calibration, remainders))
    text = page(model, linears, name, calibration, remainders)
    (out / PAGE).write_text(text, encoding="utf-8")
    return text


def prepare_output(out: Path) -> None:
    """Make the directory that an analysis is written to, before work is done for it.

    Raises:
        ConfigError: it cannot be made, or matplotlib is not installed.
    """
    require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error


def to_dict(
    model: str, linears: Sequence[LinearShares], name: str, calibration: str, remainders: Sequence[Remainder]
) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "model": model,
        "mean": asdict(mean_shares(linears)),
        "linears": [asdict(linear) for linear in linears],
        "linear": name,
        "calibration": calibration,
        "methods": [remainder.to_dict() for remainder in remainders],
    }


def page(
    model: str, linears: Sequence[LinearShares], name: str, calibration: str, remainders: Sequence[Remainder]
) -> str:
    """The page in Markdown: the short answer, the table by kind and depth, and what methods leave."""
    return f"""\
# Column deviation: {Path(model).name}

{_answer(linears)}

Shares of the variance of |W|: between the means of columns, between the means of rows, and explained by the best
product of a row factor and a column factor, as row and column scales are. Means over linears, in per cent; in brackets
what equally distributed weights of the same shape would show.

{_by_kind(linears)}

## What the methods leave

`{name}`, each method with its defaults, calibrated on {calibration}. *Columns left* is the share of the variance of
|W - Ŵ| between columns.

{_methods(remainders)}

![|W| before and after each method]({PICTURE})

The picture shows |W|, then |Ŵ| of each method, averaged over cells of neighbouring rows and columns.
"""


def _answer(linears: Sequence[LinearShares]) -> str:
    shares, most = mean_shares(linears), most_columnar(linears)
    ratio = shares.columns / max(shares.columns_by_chance, 1e-12)
    more = "more" if shares.columns > shares.rows else "less"
    reach = "Most" if shares.jointly < 0.5 else "Less than half"
    return (
        f"**Columns differ {ratio:.0f} times as much as chance would have it**, and {more} than rows do: they explain "
        f"{_per_cent(shares.columns)} of the variance of |W|, rows {_per_cent(shares.rows)}, both together as a "
        f"product {_per_cent(shares.jointly)}. {reach} of the spread lies within rows and columns, out of reach of "
        f"either kind of scale. Columns differ most in `{most.name}`, {_per_cent(most.shares.columns)}."
    )


def _by_kind(linears: Sequence[LinearShares]) -> str:
    lines = []
    for kind, depths in by_kind_and_depth(linears).items():
        lines += [[kind, depth, *_cells(shares)] for depth, shares in depths.items()]
    return markdown_table(["", "depth", "columns", "rows", "jointly"], lines, left=2)


def _cells(shares: Shares) -> list[str]:
    columns = f"{100 * shares.columns:.1f} ({100 * shares.columns_by_chance:.2f})"
    rows = f"{100 * shares.rows:.1f} ({100 * shares.rows_by_chance:.2f})"
    return [columns, rows, f"{100 * shares.jointly:.1f}"]


def _methods(remainders: Sequence[Remainder]) -> str:
    lines = []
    for row in remainders:
        errors = [f"{row.weight_error:.4f}", f"{row.output_error:.4f}", _per_cent(row.columns)]
        lines.append([row.method, f"{row.true_bits:.2f}", *errors])
    return markdown_table(["", "true bits", "weight error", "output error", "columns left"], lines)


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _heat_maps(name: str, weight: Tensor, remainders: Sequence[Remainder]) -> Any:
    """|W| and each |W_hat| in the same colours, as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = {"full precision": _cell_means(weight)}
    pictures |= {row.method: _cell_means(row.weight) for row in remainders}
    high = float(pictures["full precision"].quantile(0.98))
    figure = Figure(figsize=(8.4, 2.9 * -(-len(pictures) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(pictures) // 3), 3, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, values) in zip(grid, pictures.items(), strict=False):
        image: Any = axes.imshow(
            values.numpy(), cmap="magma", vmin=0.0, vmax=high, aspect="auto", interpolation="nearest"
        )
        axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=list(grid), shrink=0.7, label="mean of |W|")
    figure.suptitle(f"{name}: rows down, columns across", fontsize=11)
    return figure


def _cell_means(weight: Tensor) -> Tensor:
    """|W| averaged over cells, at most `CELLS` by `CELLS`."""
    rows, columns = (min(CELLS, size) for size in weight.shape)
    return adaptive_avg_pool2d(weight.abs().float()[None], (rows, columns))[0]
